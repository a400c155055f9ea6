package reconciler

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

// lossy is a broker that stores what it is given, and some of whose answers do not arrive.
type lossy struct {
	jetstream.JetStream
	lose   atomic.Int64 // so many answers
	stored chan struct{}
}

func (l *lossy) Publish(ctx context.Context, subject string, data []byte, opts ...jetstream.PublishOpt) (*jetstream.PubAck, error) {
	ack, err := l.JetStream.Publish(context.WithoutCancel(ctx), subject, data, opts...)
	if err == nil {
		l.stored <- struct{}{}
	}
	if l.lose.Add(-1) >= 0 {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return ack, err
}

func TestALostAnswerLosesNoLease(t *testing.T) {
	t.Parallel()
	_, js := natstest.New(t).Setup()
	broker := &lossy{JetStream: js, stored: make(chan struct{}, 100)}
	const ttl = 6 * time.Second // each try has a quarter of it
	l, ctx, err := acquire(t.Context(), broker, "sweep", "me", ttl)
	require.NoError(t, err)
	renewed := func() {
		t.Helper()
		select {
		case <-broker.stored:
		case <-ctx.Done():
			t.Fatal(context.Cause(ctx))
		}
	}
	for range 2 {
		broker.lose.Store(1)
		renewed() // without an answer
		renewed()
	}
	_, _, err = acquire(t.Context(), js, "sweep", "you", ttl)
	require.ErrorIs(t, err, errBusy)
	l.release()

	// The end of the context cuts off an answer: the lease is free at once all the same.
	ending, end := context.WithCancel(t.Context())
	l, _, err = acquire(ending, broker, "sweep", "me again", time.Hour)
	require.NoError(t, err)
	l.rev-- // as if the renewal had been stored
	end()
	l.release()
	l, _, err = acquire(t.Context(), js, "sweep", "you", ttl)
	require.NoError(t, err)
	l.release()
}

func TestALeaseThatAnotherHasIsLost(t *testing.T) {
	t.Parallel()
	_, js := natstest.New(t).Setup()
	l, ctx, err := acquire(t.Context(), js, "sweep", "me", time.Second)
	require.NoError(t, err)
	defer l.release()
	kv, err := js.KeyValue(t.Context(), stream.Leases)
	require.NoError(t, err)
	_, err = kv.Put(t.Context(), "sweep", []byte("you"))
	require.NoError(t, err)
	select {
	case <-ctx.Done():
		assert.ErrorIs(t, context.Cause(ctx), errLeaseLost)
	case <-time.After(time.Minute):
		t.Fatal("it is still held")
	}
}

func TestALeaseIsLostBeforeItEndsWhereTheBrokerDoesNotAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const ttl = 2 * time.Second
		began := time.Now()
		l, ctx, err := acquire(t.Context(), mute{}, "sweep", "me", ttl)
		require.NoError(t, err)
		defer l.release()
		<-ctx.Done()
		require.ErrorIs(t, context.Cause(ctx), errLeaseLost)
		assert.Equal(t, ttl-ttl/4, time.Since(began), "time for a clock that runs otherwise, and for what is being done")
	})
}

// mute is a broker that gives one lease, and after that takes nothing and says nothing.
type mute struct{ jetstream.JetStream }

type muteKV struct{ jetstream.KeyValue }

func (mute) KeyValue(context.Context, string) (jetstream.KeyValue, error) { return muteKV{}, nil }

func (muteKV) Create(context.Context, string, []byte, ...jetstream.KVCreateOpt) (uint64, error) {
	return 1, nil
}

func (muteKV) Delete(ctx context.Context, _ string, _ ...jetstream.KVDeleteOpt) error {
	<-ctx.Done()
	return ctx.Err()
}

func (mute) Publish(ctx context.Context, _ string, _ []byte, _ ...jetstream.PublishOpt) (*jetstream.PubAck, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}
