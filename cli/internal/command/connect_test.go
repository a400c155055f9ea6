package command

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/fixture"
)

// TestADryRunJudgesAsTheServerDoes: the shell of the one who tries seldom has the settings of the server.
func TestADryRunJudgesAsTheServerDoes(t *testing.T) {
	t.Parallel()
	shell := newHarness(t)
	server := shell.with(
		"CLERK_WEBHOOK_SIGNING_SECRET="+fixture.Secret, "CLERK_INSTANCE_ID=ins_mine", "USHER_SOURCE_STAGING_INSTANCE_ID=ins_staging", "USHER_LOG_LEVEL=error",
		"USHER_SOURCE_STAGING_SIGNING_SECRET="+stagingSecret, "USHER_INGEST_ADDR=127.0.0.1:0", "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0",
	)
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan int, 1)
	go func() {
		served <- Run(ctx, []string{"serve"}, Env{Environ: server.env, Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard})
	}()
	defer func() { stop(); <-served }()
	var state allinone.State
	require.Eventually(t, func() bool {
		var err error
		state, err = allinone.ReadState(strings.TrimPrefix(shell.env[0], "USHER_DATA_DIR="))
		return err == nil
	}, 60*time.Second, 10*time.Millisecond)
	assert.Equal(t, map[string]string{"clerk": "ins_mine", "staging": "ins_staging"}, state.Instances)

	for _, secret := range []string{fixture.Secret, stagingSecret} {
		url := state.IngestURL
		if secret == stagingSecret {
			url += "/staging"
		}
		shell.with("CLERK_WEBHOOK_SIGNING_SECRET="+secret).Run("trigger", "user.created", "--url", url, "--count", "3").want(exitOK)
	}
	require.Eventually(t, func() bool {
		counts := into[listing[deadletter.Count]](shell.Run("dlq", "list", "--count", "-o", "json").want(exitOK)).Items
		return len(counts) == 2 && counts[0].Events == 3 && counts[1].Events == 3 && counts[0].Reason == deadletter.WrongInstance // of each source
	}, 60*time.Second, 10*time.Millisecond)

	dry := func(h *harness, code int) int {
		t.Helper()
		result := into[bulkResult](h.Run("dlq", "replay", "--all", "--dry-run", "-o", "json").want(code))
		require.NotNil(t, result.WouldPass)
		assert.Equal(t, 6, result.Failed+*result.WouldPass)
		return *result.WouldPass
	}
	assert.Zero(t, dry(shell, exitNo))
	assert.Equal(t, 6, into[bulkResult](shell.Run("dlq", "replay", "--all", "--yes", "-o", "json").want(exitNo)).Failed, "and so it is")
	theirs := "ins_34BmB94uIlt047ABzRee2dqZJKY" // of the canonical events
	assert.Equal(t, 3, dry(shell.with("CLERK_INSTANCE_ID="+theirs), exitNo), "what the shell sets comes first")
	assert.Equal(t, 6, dry(shell.with("CLERK_INSTANCE_ID="+theirs, "USHER_SOURCE_STAGING_INSTANCE_ID="+theirs), exitOK))
}
