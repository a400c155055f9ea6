package main

import (
	"bytes"
	"context"
	"io"
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
	"github.com/usherhq/usher/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWithoutAKeyItNeedsNoDatabaseAndRunsUntilItIsStopped(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	_, js := broker.Setup(stream.HandlerSpec{Name: "mirror"})
	_, err := js.Publish(t.Context(), "clerk.evt.clerk.user.created.user_1", []byte("{}"))
	require.NoError(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ops := listener.Addr().String()
	require.NoError(t, listener.Close())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int, 1)
	go func() {
		code <- process.Run(ctx, config.Environ{
			"USHER_NATS_URL=" + broker.URL(), "USHER_DATABASE_URL=postgres://127.0.0.1:1/none", "USHER_OPS_ADDR=" + ops, "USHER_LOG_LEVEL=error",
		}, &bytes.Buffer{}, program)
	}()
	// The broker sees this test's connection and the service's.
	require.Eventually(t, func() bool { return broker.Server().NumClients() == 2 }, 60*time.Second, 5*time.Millisecond)
	// No worker lives, and that is seen here.
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ops+"/metrics", nil)
		require.NoError(c, err)
		req.Close = true
		res, err := http.DefaultClient.Do(req)
		require.NoError(c, err)
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		require.NoError(c, err)
		assert.Contains(c, string(body), `usher_consumer_pending{handler="mirror"} 1`)
	}, time.Minute, 20*time.Millisecond)
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
