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
	"github.com/usherhq/usher/pkg/database"
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

func TestWithAKeyItWaitsForADatabaseThatIsNotSetUp(t *testing.T) {
	t.Parallel()
	url := "sqlite:" + filepath.Join(t.TempDir(), "usher.db")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ops := listener.Addr().String()
	require.NoError(t, listener.Close())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int, 1)
	go func() {
		code <- process.Run(ctx, config.Environ{
			"USHER_NATS_URL=nats://127.0.0.1:1", "USHER_DATABASE_URL=" + url, "USHER_OPS_ADDR=" + ops, "CLERK_SECRET_KEY=sk_test_x", "USHER_LOG_LEVEL=error",
		}, &bytes.Buffer{}, program)
	}()
	readiness := func(want string, not ...string) {
		t.Helper()
		require.EventuallyWithT(t, func(c *assert.CollectT) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ops+"/readyz", nil)
			require.NoError(c, err)
			req.Close = true
			res, err := http.DefaultClient.Do(req)
			require.NoError(c, err)
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			require.NoError(c, err)
			assert.Contains(c, string(body), want)
			for _, text := range not {
				assert.NotContains(c, string(body), text)
			}
		}, time.Minute, 20*time.Millisecond)
	}
	readiness("waiting for the database: migrations are pending: run `usher setup`")
	db, err := database.Open(t.Context(), url, "")
	require.NoError(t, err)
	_, err = database.Migrate(t.Context(), db)
	require.NoError(t, err)
	require.NoError(t, database.Close(db))
	readiness("not connected to the broker", "migrations are pending")
	cancel()
	assert.Equal(t, process.Stopped, <-code)
}
