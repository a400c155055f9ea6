package stream_test

import (
	"context"
	"testing"
	"time"

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
		require.EventuallyWithT(t, func(c *assert.CollectT) { assert.ErrorIs(c, presence.Check(), want) }, 15*time.Second, 10*time.Millisecond)
	}
	eventually(stream.ErrSetup)
	broker.Setup()
	require.Eventually(t, func() bool { return presence.Check() == nil }, 15*time.Second, 10*time.Millisecond)
	require.NoError(t, js.DeleteStream(t.Context(), stream.DeadLetters))
	eventually(stream.ErrSetup)
	broker.Stop()
	require.Eventually(t, func() bool { return presence.Check() != nil && !nc.IsConnected() }, 15*time.Second, 10*time.Millisecond)
}
