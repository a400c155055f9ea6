package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
)

// trouble is the last known reason why something cannot work; nil while it can.
type trouble struct{ p atomic.Pointer[error] }

func (t *trouble) setTrouble(err error) {
	if err == nil {
		t.p.Store(nil)
		return
	}
	t.p.Store(&err)
}

func (t *trouble) check() error {
	if p := t.p.Load(); p != nil {
		return *p
	}
	return nil
}

// outage is the pause of one handler. It ends when work has succeeded, not when something answers: a database that is
// read-only or has lost its rights answers a ping.
type outage struct {
	trouble
	mu     sync.Mutex
	since  time.Time // zero: none
	told   bool      // its beginning was logged
	policy *backoff.ExponentialBackOff
}

// next notes one more failure and returns how long to wait, and whether it should be told of.
func (o *outage) next(cause error) (delay time.Duration, tell bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	first := o.since.IsZero()
	if first {
		o.since, o.policy, o.told = time.Now(), outageBackoff(), false
	}
	delay = o.policy.NextBackOff()
	if first && isConflict(cause) { // the usual fate of two writers, over with the next try
		return delay, false
	}
	o.setTrouble(fmt.Errorf("paused: %w", cause))
	tell, o.told = !o.told, true
	return delay, tell
}

// over ends the outage and returns how long it was; zero where there was none to tell of.
func (o *outage) over() time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() {
		return 0
	}
	took := time.Since(o.since)
	told := o.told
	o.since, o.told = time.Time{}, false
	o.setTrouble(nil)
	if !told {
		return 0
	}
	return took
}

// waitOut waits with backoff until the database and the broker answer, so that the work can be tried again; false
// means that the worker stops.
func (l *loop) waitOut(ctx context.Context, cause error) bool {
	for {
		delay, tell := l.outage.next(cause)
		if tell && !errors.Is(cause, errForeign) { // the watch has said that
			l.log.Warn("outage, handler pauses", zap.Error(cause), zap.Duration("delay", delay))
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(delay):
		}
		if cause = l.probe(ctx); cause == nil {
			return true
		}
	}
}

// works tells that the database took work.
func (l *loop) works() {
	if took := l.outage.over(); took > 0 {
		l.log.Info("outage is over, handler goes on", zap.Duration("duration", took))
	}
}

// isOutage tells whether err is the infrastructure's. A handler that ran out of time is asked about: where the database
// does not answer either, it was not the handler.
func (l *loop) isOutage(ctx context.Context, err error) bool {
	return isOutage(err) || errors.Is(err, errTimeout) && l.probe(ctx) != nil
}

// probe asks what an event needs for a sign of life.
func (l *loop) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := database.Ping(ctx, l.db); err != nil {
		return err
	}
	if _, err := l.js.Consumer(ctx, stream.Events, l.handler.Name()); err != nil {
		if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrConsumerNotFound) {
			return nil // the subscription ends by itself and says so
		}
		return fmt.Errorf("%w: %w", errBroker, stream.Explain(err))
	}
	return nil
}

// check is the readiness of the handler.
func (l *loop) check() error {
	if err := l.outage.check(); err != nil {
		return err
	}
	if err := stream.Connected(l.js.Conn()); err != nil {
		return err
	}
	if err := l.broker.check(); err != nil {
		return err
	}
	if since := l.calls.oldest(); !since.IsZero() && time.Since(since) > 2*l.cfg.HandleTimeout {
		return fmt.Errorf("handler does not return since %s, although its time was over after %s: restart the worker", since.UTC().Format(time.RFC3339), l.cfg.HandleTimeout)
	}
	return nil
}

// calls are the calls of a handler that have not returned.
type calls struct {
	mu   sync.Mutex
	next int
	open map[int]time.Time
}

// begin notes a call; the function that it returns ends it.
func (c *calls) begin() func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		c.open = map[int]time.Time{}
	}
	c.next++
	id := c.next
	c.open[id] = time.Now()
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.open, id)
	}
}

func (c *calls) oldest() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	var oldest time.Time
	for _, at := range c.open {
		if oldest.IsZero() || at.Before(oldest) {
			oldest = at
		}
	}
	return oldest
}

// outageBackoff is how often something that is away is probed: from 100 ms to 5 s, with jitter, for ever.
func outageBackoff() *backoff.ExponentialBackOff {
	return backoff.NewExponentialBackOff(backoff.WithInitialInterval(100*time.Millisecond), backoff.WithMaxInterval(5*time.Second), backoff.WithMaxElapsedTime(0))
}

// letters is what all loops of a worker know of the dead-letter stream: why it did not take a letter last time. Its zero value
// is no trouble.
type letters struct {
	mu     sync.Mutex
	err    error
	single bool               // it is about single letters, and says nothing of others
	kept   map[event.Ref]bool // those, by their events
	at     time.Time          // when the stream was asked last
	until  time.Time          // when it is stale, since whoever was refused has had its next try
	told   time.Time          // when it was logged last
}

// Of a stream that takes no letters, each one is not asked again so soon, and no more often told of.
const (
	lettersPause = time.Second
	lettersTell  = time.Minute
)

// failed notes that the letter of an event was not stored, and reports whether to log it. single: for a reason that is not the stream's.
func (l *letters) failed(e event.Ref, err error, single bool, again time.Duration) (tell bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	tell = l.err == nil || l.single != single || now.Sub(l.told) > lettersTell
	if tell {
		l.told = now
	}
	if single {
		if l.kept == nil || len(l.kept) > mostRefused {
			l.kept = map[event.Ref]bool{}
		}
		l.kept[e] = true
	}
	if now.Sub(l.at) > lettersPause { // else it was not asked
		l.at = now
	}
	l.err, l.single, l.until = err, single, now.Add(again+time.Minute)
	return tell
}

// stored notes that the letter of an event was.
func (l *letters) stored(e event.Ref) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.kept, e)
	if !l.single || len(l.kept) == 0 {
		l.err = nil
	}
}

// refusal is why a letter need not be tried right now.
func (l *letters) refusal() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil || l.single || time.Since(l.at) > lettersPause {
		return nil
	}
	return errors.Unwrap(l.err)
}

// check is readiness: healthy events are applied all the same, so no handler is paused.
func (l *letters) check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil || time.Now().After(l.until) {
		return nil
	}
	return fmt.Errorf("dead letters are not stored, their events are kept: %w", l.err)
}
