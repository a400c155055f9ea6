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
	"github.com/usherhq/usher/pkg/natstest"
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

	const theirs = "ins_theirs"
	for _, secret := range []string{fixture.Secret, stagingSecret} {
		url := state.IngestURL
		if secret == stagingSecret {
			url += "/staging"
		}
		shell.with("CLERK_WEBHOOK_SIGNING_SECRET="+secret).Run("trigger", "user.created", "--url", url, "--count", "3", "--set", "instance_id="+theirs).want(exitOK)
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
	assert.Equal(t, 3, dry(shell.with("CLERK_INSTANCE_ID="+theirs), exitNo), "what the shell sets comes first")
	assert.Equal(t, 6, dry(shell.with("CLERK_INSTANCE_ID="+theirs, "USHER_SOURCE_STAGING_INSTANCE_ID="+theirs), exitOK))
}

// TestCommandsReachTheBrokerOfServe: they find its certificates in the data folder, as its URL.
func TestCommandsReachTheBrokerOfServe(t *testing.T) {
	t.Parallel()
	files := natstest.NewCertificates(t)
	broker := natstest.New(t, natstest.WithSync, files.WithTLS(true))
	shell := newHarness(t, "USHER_NATS_MONITOR_URL=https://"+broker.Server().MonitorAddr().String())
	server := shell.with(
		"CLERK_WEBHOOK_SIGNING_SECRET="+fixture.Secret, "USHER_LOG_LEVEL=error", "USHER_INGEST_ADDR=127.0.0.1:0", "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0",
		"USHER_NATS_URL=tls://"+broker.Server().Addr().String(), "USHER_NATS_CA="+files.CA, "USHER_NATS_CERT="+files.ClientCert, "USHER_NATS_KEY="+files.ClientKey,
	)
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan int, 1)
	go func() {
		served <- Run(ctx, []string{"serve"}, Env{Environ: server.env, Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard})
	}()
	defer func() { stop(); assert.Equal(t, exitOK, <-served) }()
	require.Eventually(t, func() bool {
		_, err := allinone.ReadState(strings.TrimPrefix(shell.env[0], "USHER_DATA_DIR="))
		return err == nil
	}, 60*time.Second, 10*time.Millisecond)
	report := into[allinone.SetupReport](shell.Run("setup", "--plan", "-o", "json").want(exitOK))
	assert.Equal(t, "synced", report.Broker.State)
	assert.Empty(t, report.Streams.Missing)

	elsewhere := newHarness(t, "USHER_NATS_URL=tls://"+broker.Server().Addr().String())
	r := elsewhere.Run("setup", "--plan").want(exitUsage)
	assert.Contains(t, r.err, "name the authority's file in USHER_NATS_CA")
	r = elsewhere.with("USHER_NATS_CA="+files.CA).Run("setup", "--plan").want(exitUsage)
	assert.Contains(t, r.err, "set USHER_NATS_CERT and USHER_NATS_KEY")
	elsewhere.Run("setup", "--plan", "--nats-ca", files.CA, "--nats-cert", files.ClientCert, "--nats-key", files.ClientKey).want(exitOK)
}

func TestWhatOthersCanReadIsWarnedAboutOnce(t *testing.T) {
	t.Parallel()
	r := newHarness(t, "USHER_NATS_URL=nats://joe:hunter2@broker.example.com").Run("config").want(exitOK)
	assert.Equal(t, 1, strings.Count(r.err, "warning: USHER_NATS_URL: the login and events reach broker.example.com in clear text"))
	assert.NotContains(t, r.out+r.err, "hunter2")
}
