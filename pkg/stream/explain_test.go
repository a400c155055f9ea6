package stream_test

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"

	"github.com/usherhq/usher/pkg/stream"
)

func TestErrorsOfTheBrokerAreInWords(t *testing.T) {
	t.Parallel()
	api := func(code jetstream.ErrorCode) error { return &jetstream.APIError{Code: 500, ErrorCode: code} }
	for name, test := range map[string]struct {
		err, want error
		waiting   bool // it may cure it
	}{
		"no connection, publish":       {nats.ErrReconnectBufExceeded, stream.ErrUnavailable, true},
		"no connection, headers":       {nats.ErrHeadersNotSupported, stream.ErrUnavailable, true},
		"no answer":                    {nats.ErrTimeout, stream.ErrUnavailable, true},
		"no answer in the time given":  {context.DeadlineExceeded, stream.ErrUnavailable, true},
		"nobody listens":               {syscall.ECONNREFUSED, stream.ErrUnavailable, true},
		"broker shuts down":            {jetstream.ErrServerShutdown, stream.ErrUnavailable, true},
		"nobody serves JetStream":      {nats.ErrNoResponders, stream.ErrNoJetStream, true},
		"JetStream is not enabled":     {jetstream.ErrJetStreamNotEnabled, stream.ErrNoJetStream, true},
		"login refused":                {nats.ErrAuthorization, stream.ErrRefused, true},
		"not permitted":                {fmt.Errorf("%w: publish to x", nats.ErrPermissionViolation), stream.ErrForbidden, true},
		"an election":                  {api(10008), stream.ErrNoLeader, true},
		"consumer changes its leader":  {jetstream.ErrConsumerLeadershipChanged, stream.ErrNoLeader, true},
		"stream is missing":            {jetstream.ErrStreamNotFound, stream.ErrSetup, false},
		"consumer was deleted":         {jetstream.ErrConsumerDeleted, stream.ErrSetup, false},
		"stream is full":               {api(10077), stream.ErrFull, false},
		"broker is full":               {api(10023), stream.ErrStorage, false},
		"no room for the stream":       {api(10047), stream.ErrStorage, false},
		"larger than the stream takes": {api(10054), stream.ErrTooLarge, false},
		"larger than the broker takes": {nats.ErrMaxPayload, stream.ErrTooLarge, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := stream.Explain(fmt.Errorf("ask: %w", test.err))
			assert.ErrorIs(t, got, test.want)
			assert.ErrorIs(t, got, test.err, "the cause stays in the chain")
			assert.Contains(t, got.Error(), test.want.Error())
			assert.NotContains(t, got.Error(), "nats: ")
			assert.Equal(t, test.waiting, errors.Is(got, stream.ErrUnavailable))
			assert.Equal(t, got, stream.Explain(got), "said once")
		})
	}
	other := errors.New("of something else")
	assert.Equal(t, other, stream.Explain(other))
	assert.NoError(t, stream.Explain(nil))
}
