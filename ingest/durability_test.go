package ingest

import (
	"context"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// durable makes a service whose broker is as durable as says.
func durable(t *testing.T, allow bool, says func() stream.Durability) (*Service, <-chan error) {
	t.Helper()
	_, js := natstest.New(t, natstest.WithSync).Setup()
	publisher := stream.NewPublisher(js, 1)
	t.Cleanup(publisher.Close)
	s, err := New(Config{Addr: "127.0.0.1:0", AllowUnsynced: allow, Sources: []Source{{Name: "clerk", Secrets: []string{secret}}}},
		Deps{Publisher: publisher, JetStream: js, Health: &observe.Health{}, Durability: func(context.Context) stream.Durability { return says() }})
	require.NoError(t, err)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() { defer close(ran); ended <- s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ran })
	return s, ended
}

func (s *Service) states() map[string]float64 {
	states := map[string]float64{}
	for state, gauge := range s.metrics.durable {
		states[state] = testutil.ToFloat64(gauge)
	}
	return states
}

func TestABrokerThatDoesNotSyncIsRefused(t *testing.T) {
	t.Parallel()
	unsynced := stream.Durability{State: stream.Unsynced, Detail: "server n1 syncs every 2m0s only"}
	s, ended := durable(t, false, func() stream.Durability { return unsynced })
	err := <-ended
	require.ErrorIs(t, err, stream.ErrUnsynced)
	require.ErrorContains(t, err, "n1")
	assert.Equal(t, map[string]float64{stream.Synced: 0, stream.Unsynced: 1, stream.Unknown: 0}, s.states())

	s, _ = durable(t, true, func() stream.Durability { return unsynced })
	require.Eventually(t, func() bool { return len(s.deps.Health.Problems()) == 0 }, time.Minute, 5*time.Millisecond, "it was allowed")
	assert.Equal(t, map[string]float64{stream.Synced: 0, stream.Unsynced: 1, stream.Unknown: 0}, s.states())
}

// Nothing is answered 202 by a broker that may have to be refused.
func TestNoEventIsTakenBeforeTheBrokerWasAsked(t *testing.T) {
	t.Parallel()
	answer := make(chan stream.Durability)
	var asked atomic.Bool
	s, _ := durable(t, false, func() stream.Durability { asked.Store(true); return <-answer })
	require.Eventually(t, asked.Load, time.Minute, time.Millisecond)
	assert.Equal(t, map[string]float64{stream.Synced: 0, stream.Unsynced: 0, stream.Unknown: 1}, s.states())
	send := func() int {
		w := newRecorder()
		s.ServeHTTP(w, delivery{body: []byte(`{}`)}.request(t, "http://"+s.Addr()))
		return w.Code
	}
	assert.Equal(t, http.StatusServiceUnavailable, send())
	assert.Equal(t, errUnverified.Error(), s.deps.Health.Problems()["ingest"])
	answer <- stream.Durability{State: stream.Synced}
	require.Eventually(t, func() bool { return send() == http.StatusAccepted }, time.Minute, 5*time.Millisecond)
	assert.Equal(t, map[string]float64{stream.Synced: 1, stream.Unsynced: 0, stream.Unknown: 0}, s.states())
}
