package reconciler_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/reconciler"
)

func TestMain(m *testing.M) {
	switch os.Getenv("RECONCILER_CHILD") {
	case "sweep":
		child()
		return
	case "verify":
		verifyChild()
		return
	}
	goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...)
}

func TestStartsIsReadyOnceTheStreamIsThereAndStops(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	health := &observe.Health{}
	_, js := broker.Connect()
	r, err := reconciler.New(reconciler.Config{}, reconciler.Deps{JetStream: js, Log: zap.NewNop(), Health: health})
	require.NoError(t, err)
	problem := func() string { return health.Problems()[reconciler.Name] }
	assert.NotEmpty(t, problem(), "not ready before it ran")

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	require.Eventually(t, func() bool { return strings.Contains(problem(), stream.ErrSetup.Error()) }, 60*time.Second, 10*time.Millisecond)
	broker.Setup()
	require.Eventually(t, func() bool { return problem() == "" }, 60*time.Second, 10*time.Millisecond)

	cancel()
	select {
	case err := <-done:
		assert.NoError(t, err)
	case <-time.After(time.Minute):
		t.Fatal("the reconciler did not stop within 15 s")
	}
}

func TestAClosedClientHasNoConnections(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	var open atomic.Int64
	server := httptest.NewUnstartedServer(w.api)
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed:
			open.Add(-1)
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	client, err := reconciler.Client(clerk.Source{Name: "clerk", APIURL: server.URL + "/v1", SecretKey: key, Quota: -1}, zap.NewNop(), reconciler.NewMetrics(nil))
	require.NoError(t, err)
	_, err = client.Count(t.Context(), "users")
	require.NoError(t, err)
	require.EqualValues(t, 1, open.Load())
	client.Close()
	require.Eventually(t, func() bool { return open.Load() == 0 }, 60*time.Second, 10*time.Millisecond)
}

func TestABrokerThatIsAwayIsNoErrorButNotReady(t *testing.T) {
	t.Parallel()
	health := &observe.Health{}
	broker := natstest.New(t)
	_, js := broker.Connect()
	broker.Stop()
	r, err := reconciler.New(reconciler.Config{}, reconciler.Deps{JetStream: js, Log: zap.NewNop(), Health: health})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	assert.NotEmpty(t, health.Problems()[reconciler.Name])
	cancel()
	assert.NoError(t, <-done)
}
