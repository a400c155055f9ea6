package replay_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/replay"
)

func TestBrokersErrorsSayWhatToDo(t *testing.T) {
	t.Parallel()
	for _, away := range []error{
		nats.ErrReconnectBufExceeded, nats.ErrDisconnected, nats.ErrTimeout, jetstream.ErrNoStreamResponse, jetstream.ErrAsyncPublishTimeout,
		context.DeadlineExceeded, &jetstream.APIError{Code: 503, ErrorCode: 10008},
	} {
		err := replay.Explain(fmt.Errorf("publish: %w", away))
		require.ErrorIs(t, err, replay.ErrAway)
		require.ErrorIs(t, err, away)
		assert.NotContains(t, err.Error(), "nats:")
		assert.Equal(t, err, replay.Explain(err))
	}
	for _, code := range []jetstream.ErrorCode{10077, 10023} {
		require.ErrorIs(t, replay.Explain(&jetstream.APIError{Code: 503, ErrorCode: code}), replay.ErrFull)
	}
	require.NoError(t, replay.Explain(nil))
	for _, other := range []error{context.Canceled, jetstream.ErrMsgNotFound, errors.New("odd")} {
		assert.Equal(t, other, replay.Explain(other))
	}
}

func TestAnOutageIsWaitedForAndEnds(t *testing.T) {
	t.Parallel()
	var told []string
	outage := replay.Outage{Limit: 400 * time.Millisecond, Tell: func(cause error, took time.Duration) {
		told = append(told, fmt.Sprint(cause, " ", took > 0))
	}}
	tries := 0
	require.NoError(t, outage.Try(t.Context(), func(context.Context) error {
		if tries++; tries < 3 {
			return context.DeadlineExceeded
		}
		return nil
	}))
	assert.Equal(t, []string{"context deadline exceeded false", "<nil> true"}, told)

	err := outage.Try(t.Context(), func(context.Context) error { return replay.Explain(nats.ErrDisconnected) })
	require.ErrorIs(t, err, replay.ErrAway)
	assert.Contains(t, err.Error(), "tried again for")

	odd, tries := errors.New("odd"), 0
	assert.Equal(t, odd, outage.Try(t.Context(), func(context.Context) error { tries++; return odd }))
	assert.Equal(t, 1, tries, "no waiting mends that")

	ctx, interrupt := context.WithCancel(t.Context())
	err = outage.Try(ctx, func(context.Context) error { interrupt(); return context.DeadlineExceeded })
	require.Error(t, err)
	assert.Len(t, told, 3, "an interrupted step is no outage")
}

func TestARunWhoseBrokerIsGoneSaysSo(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	server := natstest.New(t)
	_, js := server.Setup()
	server.Stop()
	run := replay.New(js, db, replay.Options{StopAt: 1, Outage: replay.Outage{Limit: 200 * time.Millisecond}})
	stored, err := run.Publish(t.Context(), []replay.Item{{Handler: "mirror", Event: event.Ref{Source: "clerk", ID: "msg_1"}, ID: "x", Message: &nats.Msg{Subject: "clerk.replay.mirror.x"}}})
	assert.Empty(t, stored)
	require.ErrorIs(t, err, replay.ErrAway)
	assert.NotContains(t, err.Error(), "outbound buffer")
}
