package worker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
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
	database, broker trouble // what keeps the handler from working
	cfg              Config
	handler          Handler
	js               jetstream.JetStream
	db               *gorm.DB
	inbox            *inbox.Inbox
	log              *zap.Logger
	metrics          *metrics
}

// delivery is one event in the hands of the loop.
type delivery struct {
	msg   jetstream.Msg
	event event.Event
	known inbox.Known // what the log said before this attempt
}

// retrySlack is how much before its time a retry may be made.
const retrySlack = 100 * time.Millisecond

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
	policy := outageBackoff()
	for {
		opened := time.Now()
		err := l.consume(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // a stop is not a failure
		}
		if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrConsumerNotFound) {
			err = fmt.Errorf("%w: %w", stream.ErrSetup, err)
		}
		if time.Since(opened) > time.Minute {
			policy.Reset()
		}
		delay := policy.NextBackOff()
		l.broker.setTrouble(fmt.Errorf("broker: %w", err))
		l.log.Warn("broker is away, handler pauses", zap.Error(err), zap.Duration("delay", delay))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
}

// consume works until ctx is done (nil) or the subscription fails. It has two lanes, so that a flood of failing
// events does not stop healthy ones: the fast lane takes events that come for the first time, the slow lane those
// that come again and the batches in which something failed.
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
	defer iter.Stop()
	if l.broker.check() != nil {
		l.log.Info("broker is back, handler goes on")
	}
	l.broker.setTrouble(nil)
	// Drain stops asking for more and lets the pump hand over what the client holds already, so that it can be
	// given back at once.
	defer context.AfterFunc(ctx, iter.Drain)()

	fresh, again := make(chan jetstream.Msg, l.cfg.BatchSize), make(chan jetstream.Msg, l.cfg.BatchSize)
	failed := make(chan []*delivery, 4)
	var slow sync.WaitGroup
	slow.Go(func() { l.slowLane(ctx, again, failed) })
	pumped := make(chan error, 1)
	go func() {
		defer close(fresh)
		defer close(again)
		pumped <- l.pump(iter, fresh, again)
	}()
	for msg := range fresh {
		if ctx.Err() != nil {
			l.giveBack(msg)
			continue
		}
		l.apply(ctx, l.parse(ctx, collect(msg, fresh, l.cfg.BatchSize)), failed)
	}
	close(failed)
	slow.Wait()
	err = <-pumped
	if ctx.Err() != nil {
		return nil //nolint:nilerr // a stop is not a failure
	}
	return fmt.Errorf("consume %s: %w", l.handler.Name(), err)
}

// pump moves messages from the blocking iterator to the lanes, so that a lane can take what is there without
// lingering for more. It returns when the iterator ends.
func (l *loop) pump(iter jetstream.MessagesContext, fresh, again chan<- jetstream.Msg) error {
	for {
		msg, err := iter.Next()
		if err != nil {
			return err //nolint:wrapcheck // the caller says what it was for
		}
		if meta, err := msg.Metadata(); err != nil || meta.NumDelivered == 1 {
			fresh <- msg
			continue
		}
		select {
		case again <- msg:
		default: // the slow lane has enough to do: this one must not block the way for fresh events
			l.nak(msg, 5*time.Second+rand.N(10*time.Second))
		}
	}
}

// slowLane works until both channels are closed.
func (l *loop) slowLane(ctx context.Context, again <-chan jetstream.Msg, failed <-chan []*delivery) {
	for again != nil || failed != nil {
		select {
		case msg, ok := <-again:
			if !ok {
				again = nil
				continue
			}
			if ctx.Err() != nil {
				l.giveBack(msg)
				continue
			}
			l.apply(ctx, l.parse(ctx, collect(msg, again, l.cfg.BatchSize)), nil)
		case batch, ok := <-failed:
			if !ok {
				failed = nil
				continue
			}
			l.halve(ctx, batch)
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

// parse decodes messages. What can never be applied is dead-lettered here; the rest is for apply.
func (l *loop) parse(ctx context.Context, messages []jetstream.Msg) []*delivery {
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
			// Not acked: if the first one fails, this one is as good.
			l.nak(msg, time.Second)
		default:
			byID[d.event.ID] = true
			batch = append(batch, d)
		}
	}
	return batch
}

// apply applies a batch in one transaction and settles every event of it. A batch that fails for an event's own
// reason is cut in halves until the bad event stands alone: by the slow lane where it has room, else here. An
// outage is waited out with the batch in hand.
func (l *loop) apply(ctx context.Context, batch []*delivery, slow chan<- []*delivery) {
	for len(batch) > 0 {
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
			select {
			case slow <- batch: // never ready where there is none
			default:
				l.halve(ctx, batch)
			}
			return
		default:
			l.fail(ctx, batch[0], err)
			return
		}
	}
}

// halve applies a batch that failed in two parts. Events that failed before are likely to be bad again, so a batch of
// nothing else is taken apart at once.
func (l *loop) halve(ctx context.Context, batch []*delivery) {
	if !slices.ContainsFunc(batch, func(d *delivery) bool { return d.known.Attempts == 0 }) {
		for i := range batch {
			l.apply(ctx, batch[i:i+1], nil)
		}
		return
	}
	l.apply(ctx, batch[:len(batch)/2], nil)
	l.apply(ctx, batch[len(batch)/2:], nil)
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
	var todo, early []*delivery
	err := database.InTx(handleCtx, l.db, func(tx *gorm.DB) error {
		known, err := l.inbox.Find(handleCtx, tx, eventIDs(batch))
		if err != nil {
			return fmt.Errorf("look into the inbox: %w", err)
		}
		todo, early = todo[:0], early[:0]
		events := make([]event.Event, 0, len(batch))
		for _, d := range batch {
			d.known = known[d.event.ID].For(&d.event)
			if d.known.Settled() {
				continue
			}
			if time.Until(d.known.NextAttemptAt) > retrySlack { // a restart brought it back before its time
				early = append(early, d)
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
			entries[i] = inbox.Entry{Event: &d.event, Status: inbox.Processed, Attempts: d.known.Attempts + 1, Duration: took}
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
	l.metrics.deliveries.WithLabelValues(name, "duplicate").Add(float64(len(batch) - len(todo) - len(early)))
	age := l.metrics.age.WithLabelValues(name)
	for _, d := range todo {
		if d.event.Timestamp > 0 {
			age.Observe(max(0, time.Since(time.UnixMilli(d.event.Timestamp)).Seconds()))
		}
	}
	for _, d := range batch {
		if slices.Contains(early, d) {
			l.nak(d.msg, time.Until(d.known.NextAttemptAt))
			continue
		}
		l.ack(d)
	}
	l.log.Debug("batch applied", zap.Int("events", len(todo)), zap.Int("duplicates", len(batch)-len(todo)-len(early)), zap.Duration("duration", time.Since(start)))
	return nil
}

// stopGrace is how long a batch that has begun may go on after the worker was told to stop.
const stopGrace = 10 * time.Second

// withGrace returns a context that ends a while after its parent. The function releases it.
func withGrace(parent context.Context, grace time.Duration) (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(parent))
	stop := context.AfterFunc(parent, func() {
		select {
		case <-time.After(grace):
			cancel()
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		stop()
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
	now := time.Now()
	attempt := d.known.Attempts + 1
	reason := reasonOf(err)
	verdict := decide(err, attempt, l.cfg.Attempts, ctx.Err() != nil)
	fields := []zap.Field{
		zap.String("event_id", d.event.ID), zap.String("event_type", string(d.event.Type)), zap.String("source", d.event.Source),
		zap.Uint64("stream_seq", d.event.Seq), zap.Int("attempt", attempt), zap.String("reason", string(reason)), zap.Error(err),
	}
	if verdict == retry || verdict == deadLetter {
		l.metrics.failures.WithLabelValues(l.handler.Name(), string(reason)).Inc()
	}
	entry := inbox.Entry{Event: &d.event, Attempts: attempt, Error: deadletter.OneLine(err.Error()), Reason: string(reason), FirstFailedAt: d.known.FirstFailedAt,
		Fingerprint: deadletter.Fingerprint(l.handler.Name(), reason, err.Error())}
	if entry.FirstFailedAt.IsZero() {
		entry.FirstFailedAt = now
	}
	for {
		var settleErr error
		switch verdict {
		case retry:
			delay := delayOf(err, l.schedule(attempt))
			entry.Status, entry.NextAttemptAt = inbox.Retrying, now.Add(delay)
			if settleErr = l.record(ctx, entry); settleErr == nil {
				l.nak(d.msg, delay)
				l.metrics.deliveries.WithLabelValues(l.handler.Name(), "retried").Inc()
				l.log.Warn("event failed, will retry", append(fields, zap.Duration("delay", delay))...)
			}
		case deadLetter:
			entry.Status = inbox.Dead
			// The letter first: the original is given up only when the letter is durable.
			if entry.LetterSeq, settleErr = l.putDeadLetter(ctx, d, entry, now); settleErr == nil {
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

func (l *loop) putDeadLetter(ctx context.Context, d *delivery, entry inbox.Entry, now time.Time) (uint64, error) {
	putCtx, cancel := context.WithTimeout(ctx, stream.PublishTimeout)
	defer cancel()
	seq, err := deadletter.Put(putCtx, l.js, &deadletter.Record{
		Handler: l.handler.Name(), Event: d.event, Reason: deadletter.Reason(entry.Reason), Error: entry.Error, Attempts: entry.Attempts,
		FirstFailedAt: entry.FirstFailedAt, LastFailedAt: now, Subject: d.msg.Subject(), Sequence: d.event.Seq, Header: d.msg.Headers(),
	})
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errBroker, err)
	}
	return seq, nil
}

// errBroker marks an outage of the broker.
var errBroker = errors.New("broker")

// waitOut waits with backoff until the database and the broker answer again; false means that the worker stops.
func (l *loop) waitOut(ctx context.Context, cause error) bool {
	started := time.Now()
	l.database.setTrouble(fmt.Errorf("paused: %w", cause))
	l.log.Warn("outage, handler pauses", zap.Error(cause))
	policy := outageBackoff()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(policy.NextBackOff()):
		}
		err := l.probe(ctx)
		if err == nil {
			l.database.setTrouble(nil)
			l.log.Info("outage is over, handler goes on", zap.Duration("duration", time.Since(started)))
			return true
		}
		l.database.setTrouble(fmt.Errorf("paused: %w", err))
	}
}

// probe asks what an event needs for a sign of life.
func (l *loop) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := database.Ping(ctx, l.db); err != nil {
		return err //nolint:wrapcheck // says what it did
	}
	if _, err := l.js.Consumer(ctx, stream.Events, l.handler.Name()); err != nil {
		return fmt.Errorf("%w: %w", errBroker, err)
	}
	return nil
}

// check is the readiness of the handler.
func (l *loop) check() error {
	if err := l.database.check(); err != nil {
		return err
	}
	return l.broker.check()
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

func (l *loop) nak(msg jetstream.Msg, delay time.Duration) {
	l.settled(msg.NakWithDelay(max(delay, 0)))
}

func (l *loop) term(d *delivery, reason string) { l.settled(d.msg.TermWithReason(reason)) }

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
