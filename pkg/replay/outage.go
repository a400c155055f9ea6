package replay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/stream"
)

// What the broker's own errors mean to the person who began the run.
var (
	ErrAway = errors.New("the broker does not answer: check that it runs and can be reached")
	ErrFull = errors.New("stream " + stream.Events + " has no room, so nothing more can be published: see what is not settled, " +
		"shorten USHER_RETENTION (workers purge what is older and settled every five minutes) or give the stream more room")
)

// explained is an error of the broker's in words that say what to do.
type explained struct{ words, cause error }

func (e *explained) Error() string   { return e.words.Error() }
func (e *explained) Unwrap() []error { return []error{e.words, e.cause} }

// Error codes of the broker that the client library has no names for (nats-server server/errors.json).
const (
	codeStreamFull  jetstream.ErrorCode = 10077
	codeNoResources jetstream.ErrorCode = 10023
)

// Explain turns an error of a call to the broker into [ErrAway] or [ErrFull] where it is one, and leaves others as they are.
func Explain(err error) error {
	var api *jetstream.APIError
	switch {
	case err == nil, errors.Is(err, ErrAway), errors.Is(err, ErrFull):
		return err
	case errors.As(err, &api) && (api.ErrorCode == codeStreamFull || api.ErrorCode == codeNoResources):
		return &explained{ErrFull, err}
	case errors.As(err, &api) && api.Code == 503: // it has just started, or has no leader
		return &explained{ErrAway, err}
	}
	for _, away := range []error{
		nats.ErrReconnectBufExceeded, nats.ErrDisconnected, nats.ErrConnectionReconnecting, nats.ErrConnectionClosed, nats.ErrStaleConnection,
		nats.ErrTimeout, nats.ErrNoResponders, nats.ErrNoServers, jetstream.ErrNoStreamResponse, jetstream.ErrAsyncPublishTimeout,
		context.DeadlineExceeded,
	} {
		if errors.Is(err, away) {
			return &explained{ErrAway, err}
		}
	}
	return err
}

// Outage says how a run meets a database or a broker that is away: it tries the step again, with growing pauses.
type Outage struct {
	// Limit is how long that may last before the run ends with the error (1 min; negative: no time at all).
	Limit time.Duration
	// Tell is called with the cause when an outage begins, and with nil and how long it was when it is over.
	Tell func(cause error, took time.Duration)
}

// stepTimeout bounds one try of a step, so that a database that says nothing is noticed.
const stepTimeout = 15 * time.Second

func (o Outage) limit() time.Duration { return cmp.Or(o.Limit, time.Minute) }

// Try does a step until it succeeds, fails by something that no waiting mends, or Limit is over. The step must bear to be repeated.
func (o Outage) Try(ctx context.Context, step func(context.Context) error) error {
	var began time.Time
	pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(100*time.Millisecond), backoff.WithMaxInterval(5*time.Second), backoff.WithMaxElapsedTime(o.limit()))
	away := false
	err := backoff.RetryNotify(func() error {
		attempt, cancel := context.WithTimeout(ctx, stepTimeout)
		defer cancel()
		err := step(attempt)
		away = err != nil && ctx.Err() == nil && (errors.Is(err, ErrAway) || database.IsInfrastructure(err))
		if err != nil && !away {
			return backoff.Permanent(err)
		}
		return err
	}, backoff.WithContext(pauses, ctx), func(cause error, _ time.Duration) {
		if began.IsZero() {
			began = time.Now()
			if o.Tell != nil {
				o.Tell(cause, 0)
			}
		}
	})
	switch {
	case err == nil && !began.IsZero() && o.Tell != nil:
		o.Tell(nil, time.Since(began))
	case err != nil && away && ctx.Err() == nil && !began.IsZero():
		return fmt.Errorf("%w (tried again for %s)", err, time.Since(began).Round(time.Second))
	}
	return err //nolint:wrapcheck // the step says what it did
}
