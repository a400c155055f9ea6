package worker_test

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// TestAStreamOrConsumerThatLosesEventsIsNotReady: also where it was changed while the worker runs, and no event comes.
func TestAStreamOrConsumerThatLosesEventsIsNotReady(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{}, nil)
	r.work()
	says := func(words ...string) {
		t.Helper()
		require.Eventually(t, func() bool {
			problem := r.health.Problems()["worker effects"] + r.health.Problems()["dead letters"]
			for _, w := range words {
				if !strings.Contains(problem, w) {
					return false
				}
			}
			return len(words) > 0 || problem == ""
		}, 60*time.Second, 10*time.Millisecond, "%v", words)
	}
	apply := func() {
		t.Helper()
		topology := stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{{Name: "effects"}}}
		plan, err := topology.Apply(t.Context(), r.js)
		require.NoError(t, err)
		require.Empty(t, plan.Differences)
	}
	says()

	c := (stream.Topology{}).Consumer(stream.HandlerSpec{Name: "effects"})
	c.HeadersOnly = true
	_, err := r.js.UpdateConsumer(t.Context(), stream.Events, c)
	require.NoError(t, err)
	says("consumer effects: headers_only is true, want false", "usher setup --apply")
	apply()
	says()

	for _, name := range []string{stream.Events, stream.DeadLetters} {
		s, err := r.js.Stream(t.Context(), name)
		require.NoError(t, err)
		cfg := s.CachedInfo().Config
		cfg.Discard = jetstream.DiscardOld
		_, err = r.js.UpdateStream(t.Context(), cfg)
		require.NoError(t, err)
		says("stream "+name+": discard is DiscardOld, want DiscardNew", "usher setup --apply")
		apply()
		says()
	}

	require.NoError(t, r.js.DeleteStream(t.Context(), stream.DeadLetters))
	says("stream CLERK_DLQ is missing: run `usher setup`")
	apply()
	says()
	r.send(ids("event", 10)...)
	r.ledger(time.Minute)

	// Created by hand before `usher setup` ran, as a tool suggests it.
	require.NoError(t, r.js.DeleteConsumer(t.Context(), stream.Events, "effects"))
	c.HeadersOnly, c.DeliverPolicy, c.AckPolicy = false, jetstream.DeliverNewPolicy, jetstream.AckAllPolicy
	_, err = r.js.CreateConsumer(t.Context(), stream.Events, c)
	require.NoError(t, err)
	says("deliver_policy is new, want all", "ack_policy is AckAll, want AckExplicit", "nats consumer rm CLERK_EVENTS effects")
	require.NoError(t, r.js.DeleteConsumer(t.Context(), stream.Events, "effects"))
	apply()
	says()
	r.send(ids("more", 10)...)
	r.ledger(time.Minute)
}
