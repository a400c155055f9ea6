package main

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/process"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWithoutAKeyItNeedsNoDatabaseAndRunsUntilItIsStopped(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int, 1)
	go func() {
		code <- process.Run(ctx, config.Environ{
			"USHER_NATS_URL=" + broker.URL(), "USHER_DATABASE_URL=postgres://127.0.0.1:1/none", "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=error",
		}, &bytes.Buffer{}, program)
	}()
	// The broker sees this test's connection and the service's.
	require.Eventually(t, func() bool { return broker.Server().NumClients() == 2 }, 15*time.Second, 5*time.Millisecond)
	cancel()
	select {
	case got := <-code:
		assert.Equal(t, process.Stopped, got)
	case <-time.After(15 * time.Second):
		t.Fatal("it did not stop within 15 s")
	}
}

func TestWithAKeyItRefusesADatabaseThatIsNotMigrated(t *testing.T) {
	t.Parallel()
	assert.Equal(t, process.Failed, process.Run(t.Context(), config.Environ{
		"USHER_NATS_URL=nats://127.0.0.1:1", "USHER_DATABASE_URL=sqlite:" + filepath.Join(t.TempDir(), "usher.db"), "USHER_OPS_ADDR=127.0.0.1:0",
		"CLERK_SECRET_KEY=sk_test_x",
	}, &bytes.Buffer{}, program))
}
