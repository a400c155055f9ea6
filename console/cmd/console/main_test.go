package main

import (
	"bytes"
	"context"
	"net"
	"net/http"
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

func TestWrongSettingsAreAllPrinted(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	assert.Equal(t, process.WrongSettings, process.Run(t.Context(), config.Environ{"USHER_CONSOLE_ADDR=:8081"}, &stderr, program))
	for _, want := range []string{"console: wrong settings", "USHER_CONSOLE_ADDR", "USHER_NATS_URL"} {
		assert.Contains(t, stderr.String(), want)
	}
}

func TestAnswersFromBrokerAndDatabaseUntilItIsStopped(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := listener.Addr().String()
	require.NoError(t, listener.Close())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int, 1)
	go func() {
		code <- process.Run(ctx, config.Environ{
			"USHER_NATS_URL=" + broker.URL(), "USHER_DATABASE_URL=sqlite:" + filepath.Join(t.TempDir(), "usher.db"),
			"USHER_CONSOLE_ADDR=" + addr, "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=error",
		}, &bytes.Buffer{}, program)
	}()
	require.Eventually(t, func() bool {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+"/api/consumers", nil)
		require.NoError(t, err)
		req.Close = true
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return false
		}
		_ = res.Body.Close()
		return res.StatusCode == http.StatusOK
	}, 15*time.Second, 20*time.Millisecond)
	cancel()
	select {
	case got := <-code:
		assert.Equal(t, process.Stopped, got)
	case <-time.After(15 * time.Second):
		t.Fatal("it did not stop within 15 s")
	}
}
