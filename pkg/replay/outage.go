package replay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v4"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/stream"
)

// What the broker's own errors mean to the person who began the run.
var (
	ErrAway = stream.ErrUnavailable
	ErrFull = errors.New("stream " + stream.Events + " has no room, so nothing more can be published: see what is not settled, " +
		"shorten USHER_RETENTION (workers purge what is older and settled every five minutes) or give the stream more room")
)

// full is an error of the broker's in words that say what to do.
type full struct{ cause error }

func (e *full) Unwrap() []error { return []error{ErrFull, e.cause} }

func (e *full) Error() string {
	if errors.Is(e.cause, stream.ErrStorage) {
		return e.cause.Error()
	}
	return ErrFull.Error()
}

// Explain is [stream.Explain] for a run: it says of a full stream which one it is.
func Explain(err error) error {
	err = stream.Explain(err)
	if errors.Is(err, stream.ErrFull) && !errors.Is(err, ErrFull) {
		return &full{err}
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
