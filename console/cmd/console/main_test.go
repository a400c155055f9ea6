package main

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/natstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWrongSettingsAreAllPrintedAndExitWith2(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	code := run(t.Context(), config.Environ{"USHER_STREAM_REPLICAS=2", "USHER_LOG_LEVEL=loud"}, &stderr)
	assert.Equal(t, 2, code)
	for _, name := range []string{"USHER_STREAM_REPLICAS", "USHER_LOG_LEVEL"} {
		assert.Contains(t, stderr.String(), name)
	}
}

func TestAMissingBrokerExitsWith2(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	assert.Equal(t, 2, run(t.Context(), nil, &stderr))
	assert.Equal(t, 1, strings.Count(stderr.String(), "USHER_NATS_URL"), stderr.String())
}

func TestASignalStopsItWith0(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, config.Environ{
			"USHER_NATS_URL=" + broker.URL(), "USHER_DATABASE_URL=sqlite:" + filepath.Join(t.TempDir(), "usher.db"),
			"USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=error",
		}, &bytes.Buffer{})
	}()
	// The broker sees this test's connection and the service's.
	require.Eventually(t, func() bool { return broker.Server().NumClients() == 2 }, 15*time.Second, 5*time.Millisecond)
	cancel()
	select {
	case got := <-code:
		assert.Equal(t, 0, got)
	case <-time.After(15 * time.Second):
		t.Fatal("it did not stop within 15 s")
	}
}
