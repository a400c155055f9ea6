package main

import (
	"bytes"
	"context"
	"net"
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
	"github.com/usherhq/usher/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// run starts the worker and returns where its exit code comes.
func run(ctx context.Context, nats, db string) <-chan int {
	code := make(chan int, 1)
	go func() {
		code <- process.Run(ctx, config.Environ{
			"USHER_NATS_URL=" + nats, "USHER_DATABASE_URL=" + db, "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=error",
		}, &bytes.Buffer{}, program)
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

func TestPendingMigrationsFail(t *testing.T) {
	t.Parallel()
	code := run(t.Context(), "nats://127.0.0.1:1", "sqlite:"+filepath.Join(t.TempDir(), "usher.db"))
	assert.Equal(t, process.Failed, wait(t, code))
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
