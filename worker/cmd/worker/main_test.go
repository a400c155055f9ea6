package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/process"
	"github.com/usherhq/usher/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// run starts the worker and returns where its exit code comes.
func run(ctx context.Context, nats, db string, more ...string) <-chan int {
	code := make(chan int, 1)
	go func() {
		code <- process.Run(ctx, append(config.Environ{
			"USHER_NATS_URL=" + nats, "USHER_DATABASE_URL=" + db, "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=error",
		}, more...), &bytes.Buffer{}, program)
	}()
	return code
}

func wait(t *testing.T, code <-chan int) int {
	t.Helper()
	select {
	case got := <-code:
		return got
	case <-time.After(15 * time.Second):
		t.Fatal("it did not stop within 15 s")
		return -1
	}
}

func TestRunsUntilItIsStopped(t *testing.T) {
	t.Parallel()
	url := "sqlite:" + filepath.Join(t.TempDir(), "usher.db")
	db, err := database.Open(t.Context(), url, "")
	require.NoError(t, err)
	_, err = database.Migrate(t.Context(), db)
	require.NoError(t, err)
	require.NoError(t, database.Close(db))
	broker := natstest.New(t)
	broker.Setup(worker.Specs()...)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := run(ctx, broker.URL(), url)
	// The broker sees this test's connection and the service's.
	require.Eventually(t, func() bool { return broker.Server().NumClients() == 2 }, 60*time.Second, 5*time.Millisecond)
	cancel()
	assert.Equal(t, process.Stopped, wait(t, code))
}

func TestAWorkerThatIsStartedBeforeSetupWaitsForIt(t *testing.T) {
	t.Parallel()
	url := "sqlite:" + filepath.Join(t.TempDir(), "usher.db")
	broker := natstest.New(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ops := listener.Addr().String()
	require.NoError(t, listener.Close())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := run(ctx, broker.URL(), url, "USHER_OPS_ADDR="+ops)
	require.Eventually(t, func() bool {
		status, body := readyz(t, ops)
		return status == http.StatusServiceUnavailable && strings.Contains(body, "run `usher setup`")
	}, time.Minute, 20*time.Millisecond)
	db, err := database.Open(t.Context(), url, "")
	require.NoError(t, err)
	_, err = database.Migrate(t.Context(), db)
	require.NoError(t, err)
	require.NoError(t, database.Close(db))
	broker.Setup(worker.Specs()...)
	require.Eventually(t, func() bool {
		status, _ := readyz(t, ops)
		return status == http.StatusOK
	}, time.Minute, 20*time.Millisecond)
	cancel()
	assert.Equal(t, process.Stopped, wait(t, code))
}

func readyz(t *testing.T, ops string) (status int, body string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ops+"/readyz", nil)
	require.NoError(t, err)
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, ""
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res.StatusCode, string(text)
}

func TestAStopWhileItWaitsForTheDatabaseIsNoFailure(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer silent.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := run(ctx, "nats://127.0.0.1:1", "postgres://u@"+silent.Addr().String()+"/none?sslmode=disable")
	conn, err := silent.Accept() // it has asked, and gets no answer
	require.NoError(t, err)
	defer conn.Close()
	cancel()
	assert.Equal(t, process.Stopped, wait(t, code))
}
