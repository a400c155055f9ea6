package worker

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker/internal/inbox"
)

var errUndecodable = event.ErrMalformed

// loop works on one handler's events, one batch after the other.
type loop struct {
	trouble
	cfg     Config
	handler Handler
	js      jetstream.JetStream
	db      *gorm.DB
	inbox   *inbox.Inbox
	log     *zap.Logger
	metrics *metrics
}

// delivery is one event in the hands of the loop.
type delivery struct {
	msg   jetstream.Msg
	event event.Event
	// attempts that were counted before this one.
	attempts int
}

func newLoop(w *Worker, h Handler) *loop {
	return &loop{
		cfg: w.cfg, handler: h, js: w.deps.JetStream, db: w.deps.DB, inbox: inbox.New(h.Name()), metrics: w.metrics,
		log: w.deps.Log.With(zap.String("service", "worker"), zap.String("handler", h.Name())),
	}
}

// prefetchBytes bounds what the client library holds ahead of the loop.
const prefetchBytes = 16 << 20

// run consumes until ctx is done. It opens the consumer again, with backoff, whenever that is lost.
func (l *loop) run(ctx context.Context) error {
	err := backoffUntil(ctx, func() error { return l.consume(ctx) }, func(err error, wait time.Duration) {
		if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrConsumerNotFound) {
			err = fmt.Errorf("%w: %w", stream.ErrSetup, err)
		}
		l.setTrouble(fmt.Errorf("broker: %w", err))
		l.metrics.paused.WithLabelValues(l.handler.Name()).Set(1)
		l.log.Warn("waiting for the broker", zap.Error(err), zap.Duration("delay", wait))
	})
	if ctx.Err() != nil {
		return nil //nolint:nilerr // a stop is not a failure
	}
	return err
}

// consume works until ctx is done (nil) or the subscription fails.
func (l *loop) consume(ctx context.Context) error {
	consumer, err := l.js.Consumer(ctx, stream.Events, l.handler.Name())
	if err != nil {
		return fmt.Errorf("open consumer %s: %w", l.handler.Name(), err)
	}
	iter, err := consumer.Messages(
		jetstream.PullMaxMessagesWithBytesLimit(2*l.cfg.BatchSize, prefetchBytes),
		jetstream.PullHeartbeat(5*time.Second), jetstream.PullExpiry(30*time.Second))
	if err != nil {
		return fmt.Errorf("pull from consumer %s: %w", l.handler.Name(), err)
	}
	l.recovered()

	// The pump moves messages from the blocking iterator to a channel, so that the loop can take what is there
	// without lingering for more.
	messages := make(chan jetstream.Msg, l.cfg.BatchSize)
	pumped := make(chan error, 1)
	go func() {
		defer close(messages)
		for {
			msg, err := iter.Next()
			if err != nil {
				pumped <- err
				return
			}
			messages <- msg
		}
	}()
	stopping := ctx.Done()
	for {
		select {
		case <-stopping:
			// Drain stops asking for more and lets the pump hand over what the client holds already, so that
			// it can be given back at once.
			iter.Drain()
			stopping = nil
			continue
		case msg, ok := <-messages:
			if !ok {
				if ctx.Err() != nil {
					return nil
				}
				return fmt.Errorf("consume %s: %w", l.handler.Name(), <-pumped)
			}
			if ctx.Err() != nil {
				l.giveBack(msg)
				continue
			}
			l.process(ctx, collect(msg, messages, l.cfg.BatchSize))
		}
	}
}

// collect takes what is there right now.
func collect(first jetstream.Msg, messages <-chan jetstream.Msg, limit int) []jetstream.Msg {
	batch := []jetstream.Msg{first}
	for len(batch) < limit {
		select {
		case msg, ok := <-messages:
			if !ok {
				return batch
			}
			batch = append(batch, msg)
		default:
			return batch
		}
	}
	return batch
}

// process settles every message of a batch: acked, to be retried, dead-lettered, or given back.
func (l *loop) process(ctx context.Context, messages []jetstream.Msg) {
	batch := make([]*delivery, 0, len(messages))
	byID := make(map[string]bool, len(messages))
	for _, msg := range messages {
		meta, err := msg.Metadata()
		if err != nil { // not a JetStream message: nothing to settle
			l.log.Error("message without metadata", zap.Error(err))
			continue
		}
		d := &delivery{msg: msg}
		d.event, err = stream.Parse(msg.Headers(), msg.Data(), meta.Sequence.Stream)
		if d.event.ReceivedAt.IsZero() {
			d.event.ReceivedAt = meta.Timestamp
		}
		if err == nil {
			if want := l.cfg.Instances[d.event.Source]; want != "" && d.event.InstanceID != "" && d.event.InstanceID != want {
				err = fmt.Errorf("%w: %s, want %s", errWrongInstance, d.event.InstanceID, want)
			}
		}
		switch {
		case err != nil:
			l.fail(ctx, d, Permanent(err))
		case byID[d.event.ID]: // the same event twice in one batch: the second is a redelivery of the first
			l.settleDuplicate(d)
		default:
			byID[d.event.ID] = true
			batch = append(batch, d)
		}
	}
	if len(batch) > 0 {
		l.apply(ctx, batch)
	}
}

// apply applies a batch in one transaction. A batch that fails for an event's own reason is cut in halves until
// the bad event stands alone; an outage is waited out with the batch in hand.
func (l *loop) apply(ctx context.Context, batch []*delivery) {
	for {
		err := l.attempt(ctx, batch)
		switch {
		case err == nil:
			return
		case errors.Is(err, inbox.ErrRaced):
			continue // another worker applied one of them meanwhile; the next look at the inbox shows it
		case ctx.Err() != nil:
			l.giveBackAll(batch)
			return
		case isOutage(err):
			if !l.waitOut(ctx, err) {
				l.giveBackAll(batch)
				return
			}
			continue
		case len(batch) > 1:
			l.apply(ctx, batch[:len(batch)/2])
			l.apply(ctx, batch[len(batch)/2:])
			return
		default:
			l.fail(ctx, batch[0], err)
			return
		}
	}
}

// attempt runs one transaction: what the inbox has is dropped, the handler gets the rest, the log is written. After
// the commit everything is acked.
func (l *loop) attempt(ctx context.Context, batch []*delivery) error {
	start := time.Now()
	// A batch that has begun is finished when the worker stops, within the grace period.
	finish, release := withGrace(ctx, stopGrace)
	defer release()
	handleCtx, cancel := context.WithTimeout(finish, l.cfg.HandleTimeout)
	defer cancel()
	var todo []*delivery
	err := database.InTx(handleCtx, l.db, func(tx *gorm.DB) error {
		known, err := l.inbox.Find(handleCtx, tx, eventIDs(batch))
		if err != nil {
			return fmt.Errorf("look into the inbox: %w", err)
		}
		todo = todo[:0]
		events := make([]event.Event, 0, len(batch))
		for _, d := range batch {
			entry := known[d.event.ID]
			d.attempts = entry.Attempts
			if entry.Settled() {
				continue
			}
			todo = append(todo, d)
			events = append(events, d.event)
		}
		if len(events) == 0 {
			return nil
		}
		if err := l.handle(handleCtx, tx, events); err != nil {
			return err
		}
		took := time.Since(start) / time.Duration(len(events))
		entries := make([]inbox.Entry, len(todo))
		for i, d := range todo {
			entries[i] = inbox.Entry{Event: &d.event, Status: inbox.Processed, Attempts: d.attempts + 1, Duration: took}
		}
		if err := l.inbox.Settle(handleCtx, tx, entries); err != nil {
			return fmt.Errorf("write the delivery log: %w", err)
		}
		return nil
	})
	if err != nil {
		if finish.Err() == nil && errors.Is(handleCtx.Err(), context.DeadlineExceeded) {
			return fmt.Errorf("%w (%s): %w", errTimeout, l.cfg.HandleTimeout, err)
		}
		return err //nolint:wrapcheck // the chain already says it
	}
	name := l.handler.Name()
	l.metrics.duration.WithLabelValues(name).Observe(time.Since(start).Seconds())
	l.metrics.deliveries.WithLabelValues(name, "processed").Add(float64(len(todo)))
	l.metrics.deliveries.WithLabelValues(name, "duplicate").Add(float64(len(batch) - len(todo)))
	age := l.metrics.age.WithLabelValues(name)
	for _, d := range todo {
		if d.event.Timestamp > 0 {
			age.Observe(max(0, time.Since(time.UnixMilli(d.event.Timestamp)).Seconds()))
		}
	}
	for _, d := range batch {
		l.ack(d)
	}
	l.log.Debug("batch applied", zap.Int("events", len(todo)), zap.Int("duplicates", len(batch)-len(todo)), zap.Duration("duration", time.Since(start)))
	return nil
}

// stopGrace is how long a batch that has begun may go on after the worker was told to stop.
const stopGrace = 10 * time.Second

// withGrace returns a context that ends a while after its parent. The function releases it.
func withGrace(parent context.Context, grace time.Duration) (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(parent))
	var timer *time.Timer
	stop := context.AfterFunc(parent, func() { timer = time.AfterFunc(grace, cancel) })
	return ctx, func() {
		if !stop() && timer != nil {
			timer.Stop()
		}
		cancel()
	}
}

// handle calls the handler and turns a panic into that batch's error.
func (l *loop) handle(ctx context.Context, tx *gorm.DB, events []event.Event) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", errPanic, r)
			if len(events) == 1 { // a larger batch is cut down to the one that panics
				l.log.Error("handler panicked", zap.String("event_id", events[0].ID), zap.Any("panic", r), zap.ByteString("stack", debug.Stack()))
			}
		}
	}()
	return l.handler.Handle(ctx, tx, events) //nolint:wrapcheck // the handler's error is the verdict
}

// fail does what decide says about one event that failed for its own reason.
func (l *loop) fail(ctx context.Context, d *delivery, err error) {
	attempt := d.attempts + 1
	reason := reasonOf(err)
	verdict := decide(err, attempt, l.cfg.Attempts, ctx.Err() != nil)
	fields := []zap.Field{
		zap.String("event_id", d.event.ID), zap.String("event_type", string(d.event.Type)), zap.String("source", d.event.Source),
		zap.Uint64("stream_seq", d.event.Seq), zap.Int("attempt", attempt), zap.String("reason", string(reason)), zap.Error(err),
	}
	if verdict == retry || verdict == deadLetter {
		l.metrics.failures.WithLabelValues(l.handler.Name(), string(reason)).Inc()
	}
	entry := inbox.Entry{Event: &d.event, Attempts: attempt, Error: deadletter.OneLine(err.Error()), Reason: string(reason)}
	for {
		var settleErr error
		switch verdict {
		case retry:
			entry.Status = inbox.Retrying
			if settleErr = l.record(ctx, entry); settleErr == nil {
				delay := delayOf(err, l.schedule(attempt))
				l.nak(d, delay)
				l.metrics.deliveries.WithLabelValues(l.handler.Name(), "retried").Inc()
				l.log.Warn("event failed, will retry", append(fields, zap.Duration("delay", delay))...)
			}
		case deadLetter:
			entry.Status = inbox.Dead
			// The letter first: the original is given up only when the letter is durable.
			if settleErr = l.putDeadLetter(ctx, d, attempt, reason, err); settleErr == nil {
				if settleErr = l.record(ctx, entry); settleErr == nil {
					l.term(d, string(reason))
					l.metrics.deliveries.WithLabelValues(l.handler.Name(), "dead_lettered").Inc()
					l.log.Error("event dead-lettered", fields...)
				}
			}
		default:
			l.giveBack(d.msg)
		}
		if settleErr == nil {
			return
		}
		if !l.waitOut(ctx, settleErr) { // neither written nor lost: it comes again
			l.giveBack(d.msg)
			return
		}
	}
}

func (l *loop) record(ctx context.Context, entry inbox.Entry) error {
	err := database.InTx(ctx, l.db, func(tx *gorm.DB) error { return l.inbox.Record(ctx, tx, entry) })
	if err != nil {
		return fmt.Errorf("record attempt of %s: %w", entry.Event.ID, err)
	}
	return nil
}

func (l *loop) putDeadLetter(ctx context.Context, d *delivery, attempts int, reason deadletter.Reason, cause error) error {
	now := time.Now()
	putCtx, cancel := context.WithTimeout(ctx, stream.PublishTimeout)
	defer cancel()
	err := deadletter.Put(putCtx, l.js, &deadletter.Record{
		Handler: l.handler.Name(), Event: d.event, Reason: reason, Error: cause.Error(), Attempts: attempts,
		FirstFailedAt: now, LastFailedAt: now, Subject: d.msg.Subject(), Sequence: d.event.Seq, Header: d.msg.Headers(),
	})
	return err //nolint:wrapcheck // it says what it did
}

// waitOut waits with backoff until the database answers again; false means that the worker stops.
func (l *loop) waitOut(ctx context.Context, cause error) bool {
	started := time.Now()
	l.setTrouble(fmt.Errorf("paused: %w", cause))
	l.metrics.paused.WithLabelValues(l.handler.Name()).Set(1)
	l.log.Warn("outage, handler pauses", zap.Error(cause))
	policy := outageBackoff()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(policy.NextBackOff()):
		}
		probe, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := database.Ping(probe, l.db)
		cancel()
		if err == nil {
			l.recovered()
			l.log.Info("outage is over, handler goes on", zap.Duration("duration", time.Since(started)))
			return true
		}
		l.setTrouble(fmt.Errorf("paused: %w", err))
	}
}

func (l *loop) recovered() {
	l.setTrouble(nil)
	l.metrics.paused.WithLabelValues(l.handler.Name()).Set(0)
}

// schedule is the delay after attempt number attempt.
func (l *loop) schedule(attempt int) time.Duration {
	policy := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(l.cfg.RetryInitial), backoff.WithMultiplier(l.cfg.RetryFactor),
		backoff.WithMaxInterval(l.cfg.RetryMax), backoff.WithRandomizationFactor(0.2), backoff.WithMaxElapsedTime(0))
	var delay time.Duration
	for range attempt {
		delay = policy.NextBackOff()
	}
	return delay
}

// Settling a message sends one line to the broker. A line that is lost means that the event comes again, and the
// inbox recognises it; so an error is only worth a debug line.

func (l *loop) ack(d *delivery) { l.settled(d.msg.Ack()) }

func (l *loop) nak(d *delivery, delay time.Duration) { l.settled(d.msg.NakWithDelay(delay)) }

func (l *loop) term(d *delivery, reason string) { l.settled(d.msg.TermWithReason(reason)) }

func (l *loop) settleDuplicate(d *delivery) {
	l.metrics.deliveries.WithLabelValues(l.handler.Name(), "duplicate").Inc()
	// Not acked: if the first one fails, this one is as good. The broker sends it again after the first was settled.
	l.nak(d, time.Second)
}

func (l *loop) giveBack(msg jetstream.Msg) {
	l.metrics.deliveries.WithLabelValues(l.handler.Name(), "given_back").Inc()
	l.settled(msg.Nak())
}

func (l *loop) giveBackAll(batch []*delivery) {
	for _, d := range batch {
		l.giveBack(d.msg)
	}
}

func (l *loop) settled(err error) {
	if err != nil {
		l.log.Debug("settle a message", zap.Error(err))
	}
}

func eventIDs(batch []*delivery) []string {
	ids := make([]string, len(batch))
	for i, d := range batch {
		ids[i] = d.event.ID
	}
	return ids
}

// outageBackoff is how often something that is away is probed: from 100 ms to 5 s, with jitter, for ever.
func outageBackoff() *backoff.ExponentialBackOff {
	return backoff.NewExponentialBackOff(backoff.WithInitialInterval(100*time.Millisecond), backoff.WithMaxInterval(5*time.Second), backoff.WithMaxElapsedTime(0))
}

// backoffUntil repeats operation until it succeeds, ctx is done, or its error is from stopRetrying.
func backoffUntil(ctx context.Context, operation func() error, notify func(error, time.Duration)) error {
	return backoff.RetryNotify(operation, backoff.WithContext(outageBackoff(), ctx), notify) //nolint:wrapcheck // the operation's own error
}

func stopRetrying(err error) error { return backoff.Permanent(err) }
