package stream_test

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

func TestConsumersTellWhatIsLeftToDo(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	_, js := broker.Setup(stream.HandlerSpec{Name: "mirror"}, stream.HandlerSpec{Name: "fraud", Filters: []string{"session.>"}})
	publish := func(subject string) {
		_, err := js.Publish(t.Context(), subject, []byte("{}"))
		require.NoError(t, err)
	}
	publish("clerk.evt.clerk.user.created.user_1")
	began := time.Now()
	_, err := js.CreateConsumer(t.Context(), stream.Events, jetstream.ConsumerConfig{InactiveThreshold: time.Minute}) // as `usher events tail` does
	require.NoError(t, err)
	publish("clerk.replay.fraud.clerk.session.created.user_1")

	consumers, err := stream.Consumers(t.Context(), js)
	require.NoError(t, err)
	require.Len(t, consumers, 2)
	fraud, mirror := consumers[0], consumers[1]
	assert.Equal(t, "fraud", fraud.Handler)
	assert.EqualValues(t, 1, fraud.Pending, "only its replay")
	assert.LessOrEqual(t, fraud.LagSeconds, time.Since(began).Seconds()+1)
	assert.Equal(t, "mirror", mirror.Handler)
	assert.EqualValues(t, 1, mirror.Pending, "not the replay of another handler")
	assert.Greater(t, mirror.LagSeconds, fraud.LagSeconds, "its event is older")

	c, err := js.Consumer(t.Context(), stream.Events, "mirror")
	require.NoError(t, err)
	msg, err := c.Next()
	require.NoError(t, err)
	require.NoError(t, msg.DoubleAck(t.Context()))
	consumers, err = stream.Consumers(t.Context(), js)
	require.NoError(t, err)
	assert.Equal(t, stream.Consumer{Handler: "mirror"}, consumers[1], "what is settled is no lag")
}

func TestConsumersSayThatSetupIsMissing(t *testing.T) {
	t.Parallel()
	_, js := natstest.New(t).Connect()
	_, err := stream.Consumers(t.Context(), js)
	assert.ErrorIs(t, err, stream.ErrSetup)
}

func TestPresenceNoticesSetupAndOutagesByItself(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	nc, js := broker.Connect()
	presence := stream.NewPresence(nc, js, zap.NewNop(), stream.Events, stream.DeadLetters)
	require.Error(t, presence.Check(), "unknown is not ready")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); presence.Run(ctx) }()
	defer func() { cancel(); <-done }()

	eventually := func(want error) {
		t.Helper()
		require.EventuallyWithT(t, func(c *assert.CollectT) { assert.ErrorIs(c, presence.Check(), want) }, 60*time.Second, 10*time.Millisecond)
	}
	eventually(stream.ErrSetup)
	broker.Setup()
	require.Eventually(t, func() bool { return presence.Check() == nil }, 60*time.Second, 10*time.Millisecond)
	letters, err := js.Stream(t.Context(), stream.DeadLetters)
	require.NoError(t, err)
	forgetful := letters.CachedInfo().Config
	forgetful.Discard = jetstream.DiscardOld
	_, err = js.UpdateStream(t.Context(), forgetful)
	require.NoError(t, err)
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		assert.ErrorContains(c, presence.Check(), "stream CLERK_DLQ: discard is DiscardOld, want DiscardNew")
	}, 15*time.Second, 10*time.Millisecond)
	require.NoError(t, js.DeleteStream(t.Context(), stream.DeadLetters))
	eventually(stream.ErrSetup)
	broker.Stop()
	require.Eventually(t, func() bool { return presence.Check() != nil && !nc.IsConnected() }, 60*time.Second, 10*time.Millisecond)
}

// TestFirstUnsettledIsExact settles events in every order, with redeliveries, deletions and restarts, and compares with its own books.
func TestFirstUnsettledIsExact(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	_, js := broker.Setup(stream.HandlerSpec{Name: "fraud", Filters: []string{"session.>", "user.created.>"}})
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	consumer, err := js.Consumer(t.Context(), stream.Events, "fraud")
	require.NoError(t, err)
	open := map[uint64]jetstream.Msg{} // what the handler has not settled; nil where it was not delivered
	times := map[uint64]time.Time{}
	subjects := []string{"clerk.evt.clerk.session.created.u", "clerk.evt.clerk.user.created.u", "clerk.replay.fraud.clerk.user.updated.u", "clerk.evt.clerk.user.updated.u", "clerk.replay.mirror.clerk.user.updated.u"}
	rnd := rand.New(rand.NewPCG(1, 2))
	check := func(step int) {
		t.Helper()
		infos, err := stream.ConsumerInfos(t.Context(), s)
		require.NoError(t, err)
		require.NotNil(t, infos["fraud"])
		seq, at, err := stream.FirstUnsettled(t.Context(), s, infos["fraud"])
		require.NoError(t, err)
		want := uint64(0)
		if len(open) > 0 {
			want = slices.Min(slices.Collect(maps.Keys(open)))
		}
		require.Equal(t, want, seq, "step %d", step)
		if want > 0 {
			require.True(t, times[want].Equal(at), "step %d", step)
		}
	}
	for step := range 400 {
		var held []uint64
		for seq, msg := range open {
			if msg != nil {
				held = append(held, seq)
			}
		}
		slices.Sort(held)
		switch n := rnd.IntN(20); {
		case n < 8:
			for range 1 + rnd.IntN(3) {
				i := rnd.IntN(len(subjects))
				ack, err := js.Publish(t.Context(), subjects[i], []byte("{}"))
				require.NoError(t, err)
				if i < 3 {
					open[ack.Sequence] = nil
					msg, err := s.GetMsg(t.Context(), ack.Sequence)
					require.NoError(t, err)
					times[ack.Sequence] = msg.Time
				}
			}
		case n < 11:
			batch, err := consumer.FetchNoWait(1 + rnd.IntN(5))
			require.NoError(t, err)
			for msg := range batch.Messages() {
				meta, err := msg.Metadata()
				require.NoError(t, err)
				require.Contains(t, open, meta.Sequence.Stream)
				open[meta.Sequence.Stream] = msg
			}
			require.NoError(t, batch.Error())
		case n < 17 && len(held) > 0:
			seq := held[rnd.IntN(len(held))]
			require.NoError(t, open[seq].DoubleAck(t.Context()))
			delete(open, seq)
		case n < 18 && len(held) > 0:
			seq := held[rnd.IntN(len(held))]
			require.NoError(t, open[seq].Nak())
			open[seq] = nil
		case n < 19 && len(open) > 0: // an event is erased
			seqs := slices.Sorted(maps.Keys(open))
			seq := seqs[rnd.IntN(len(seqs))]
			require.NoError(t, s.DeleteMsg(t.Context(), seq))
			delete(open, seq)
		case step%40 == 0:
			broker.Stop()
			broker.Start()
			require.Eventually(t, func() bool { _, err := s.Info(t.Context()); return err == nil }, time.Minute, 10*time.Millisecond)
		}
		check(step)
	}
}

// TestFirstUnsettledIsNotHeldBackByAnEventThatWasGivenUp: of a consumer that is not Usher's, with a max_deliver of its own.
func TestFirstUnsettledIsNotHeldBackByAnEventThatWasGivenUp(t *testing.T) {
	t.Parallel()
	_, js := natstest.New(t).Setup()
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	consumer, err := s.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: "billing", AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: 1})
	require.NoError(t, err)
	publish := func() {
		_, err := js.Publish(t.Context(), "clerk.evt.clerk.user.created.user_1", []byte("{}"))
		require.NoError(t, err)
	}
	var first jetstream.Msg
	for i := range 8 {
		publish()
		msg, err := consumer.Next()
		require.NoError(t, err)
		if i == 0 {
			first = msg
			continue
		}
		require.NoError(t, msg.DoubleAck(t.Context()))
	}
	require.NoError(t, first.Nak())
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		none, err := consumer.FetchNoWait(1)
		require.NoError(c, err)
		require.Empty(c, none.Messages())
		info, err := consumer.Info(t.Context())
		require.NoError(c, err)
		require.Zero(c, info.NumAckPending, "it was given up")
	}, time.Minute, 20*time.Millisecond)
	publish()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		infos, err := stream.ConsumerInfos(t.Context(), s)
		require.NoError(c, err)
		info := infos["billing"]
		require.Zero(c, info.NumAckPending)
		require.Zero(c, info.AckFloor.Stream, "it is stuck")
		seq, _, err := stream.FirstUnsettled(t.Context(), s, info)
		require.NoError(c, err)
		assert.EqualValues(c, 9, seq)
	}, time.Minute, 20*time.Millisecond)
}
