package worker

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker/internal/inbox"
)

// loop works on one handler's events. Its two lanes share everything here.
type loop struct {
	broker  trouble // of the subscription
	letters *letters
	watch   *watch
	last    position
	outage  outage
	proof   *proof
	aside   chan *delivery // to the lane of events that take long
	calls   calls
	pace    pace
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
	known inbox.Known // what the log said before this attempt
	aside bool        // it is worked on by itself, beside the lanes

	effect event.Effect // what it changed, where the handler says so
}

// failure is one event that failed for its own reason.
type failure struct {
	*delivery
	err error
}

// work is what the fast lane leaves to the slow one: a batch in which something failed, or events that did.
type work struct {
	batch    []*delivery
	failures []failure
}

func newLoop(w *Worker, h Handler, p *proof) *loop {
	return &loop{
		proof: p, letters: &w.letters, watch: w.watches[h.Name()],
		cfg: w.cfg, handler: h, js: w.deps.JetStream, db: w.deps.DB, inbox: inbox.New(h.Name()), metrics: w.metrics,
		log: w.deps.Log.With(zap.String("service", "worker"), zap.String("handler", h.Name())),
	}
}

// prefetchBytes bounds what the client library holds ahead of the loop. It is a limit of bytes and not of messages, because
// the library drops what comes when as many messages as the limit wait to be taken, the broker's own words included: in
// an outage events were lost from sight until AckWait. Half of it must hold the largest event.
const prefetchBytes = 5 << 19

// run consumes until ctx is done. It opens the consumer again, with backoff, whenever that is lost.
func (l *loop) run(ctx context.Context) error {
	policy := outageBackoff()
	for {
		opened := time.Now()
		err := l.consume(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // a stop is not a failure
		}
		if time.Since(opened) > time.Minute {
			policy.Reset()
		}
		delay := policy.NextBackOff()
		l.broker.setTrouble(fmt.Errorf("broker: %w", err))
		l.log.Warn("broker is unavailable, handler pauses", zap.Error(err), zap.Duration("delay", delay))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
}

// consume works until ctx is done (nil) or the subscription fails. It has two lanes, so that a flood of failing
// events does not stop healthy ones: the fast lane takes events that come for the first time, the slow lane those
// that come again and the batches in which something failed. Beside them is one for single events that take long.
func (l *loop) consume(ctx context.Context) error {
	consumer, err := l.js.Consumer(ctx, stream.Events, l.handler.Name())
	if err != nil {
		return fmt.Errorf("open consumer %s: %w", l.handler.Name(), stream.Explain(err))
	}
	l.watch.opens(consumer.CachedInfo().Delivered.Stream)
	iter, err := consumer.Messages(
		jetstream.PullMaxBytes(prefetchBytes),
		jetstream.PullHeartbeat(5*time.Second), jetstream.PullExpiry(30*time.Second))
	if err != nil {
		return fmt.Errorf("pull from consumer %s: %w", l.handler.Name(), stream.Explain(err))
	}
	defer iter.Stop()
	l.last.opened(consumer.CachedInfo())
	if l.broker.check() != nil {
		l.log.Info("broker is back, handler goes on")
	}
	l.broker.setTrouble(nil)
	fresh, again := newQueue(l.cfg.BatchSize), newQueue(l.cfg.BatchSize)
	left := make(chan work, 4)
	l.aside = make(chan *delivery, 1) // the one that waits and the one before it stay below AckWait
	var slow, beside sync.WaitGroup
	slow.Go(func() { l.slowLane(ctx, again, left) })
	beside.Go(func() { l.besideLane(ctx) })
	pumped := make(chan error, 1)
	go func() {
		defer close(fresh.messages)
		defer close(again.messages)
		pumped <- l.pump(ctx, iter, fresh, again)
	}()
	for msg := range fresh.messages {
		if ctx.Err() != nil {
			l.giveBack(fresh.took(msg))
			continue
		}
		batch, failures := l.parse(fresh.collect(msg, l.cfg.BatchSize))
		if len(failures) > 0 {
			select {
			case left <- work{failures: failures}:
			default:
				l.failAll(ctx, failures)
			}
		}
		l.apply(ctx, batch, left)
	}
	close(left)
	slow.Wait()
	close(l.aside)
	beside.Wait()
	err = <-pumped
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("consume %s: %w", l.handler.Name(), stream.Explain(err))
}

// pump moves messages from the blocking iterator to the lanes, so that a lane can take what is there without
// lingering for more. It returns when the iterator ends, or once everything was given back after ctx is done.
func (l *loop) pump(ctx context.Context, iter jetstream.MessagesContext, fresh, again *queue) error {
	for {
		msg, err := iter.Next(jetstream.NextContext(ctx))
		if ctx.Err() != nil {
			if err == nil {
				l.giveBack(msg)
			}
			return l.drain(iter)
		}
		if errors.Is(err, jetstream.ErrNoHeartbeat) {
			// The broker is away, or this machine is slow. The iterator asks again by itself, and giving it up would
			// lose sight of what it holds until AckWait; unless the consumer is gone for good.
			if err = l.heartbeat(ctx); err == nil {
				continue
			}
		}
		if err != nil {
			return err
		}
		if l.broker.check() != nil {
			l.log.Info("broker is back, handler goes on")
			l.broker.setTrouble(nil)
		}
		meta, err := msg.Metadata()
		if err == nil {
			if s := l.last.passed(meta); !s.empty() {
				l.watch.skipped(s)
			}
		}
		if err != nil || meta.NumDelivered == 1 {
			if !fresh.put(ctx, msg) { // a batch may take longer than the broker's last words
				l.giveBack(msg)
			}
			continue
		}
		if !again.offer(msg) {
			// The slow lane has enough to do, and this one must not block the way for fresh events.
			l.nak(msg, l.pace.next())
		}
	}
}

// drainWait is how long a stop waits for the broker's next word. The client library would wait for 10 s.
const drainWait = 2 * time.Second

// drain gives back what the client library holds, and what the broker had on the way, without asking for more. A broker
// that hangs is not waited for: what it still has comes again after AckWait.
func (l *loop) drain(iter jetstream.MessagesContext) error {
	iter.Drain()
	for {
		msg, err := iter.Next(jetstream.NextMaxWait(drainWait))
		switch {
		case err == nil:
			l.giveBack(msg)
		case errors.Is(err, nats.ErrTimeout):
			l.broker.setTrouble(fmt.Errorf("broker: %w", stream.Explain(err)))
			return err //nolint:wrapcheck // a stop is not a failure
		case !errors.Is(err, jetstream.ErrNoHeartbeat):
			l.broker.setTrouble(nil)
			return err //nolint:wrapcheck // the iterator has ended
		}
	}
}

// heartbeat looks at the consumer after it was silent for too long, and keeps what it finds for the readiness. The
// error says that the consumer does not exist any more.
func (l *loop) heartbeat(stop context.Context) error {
	ctx, cancel := context.WithTimeout(stop, stream.PublishTimeout)
	defer cancel()
	_, err := l.js.Consumer(ctx, stream.Events, l.handler.Name())
	if stop.Err() != nil {
		return nil // nobody waits for the answer
	}
	if errors.Is(err, jetstream.ErrConsumerNotFound) || errors.Is(err, jetstream.ErrStreamNotFound) {
		return err //nolint:wrapcheck // run says what it was for
	}
	if err != nil {
		err = fmt.Errorf("broker: %w", stream.Explain(err))
		l.log.Warn("broker is unavailable, handler pauses", zap.Error(err))
	}
	l.broker.setTrouble(err)
	return nil
}

// pace spreads what is put off, so that it comes again one by one: the broker hands out what comes again before what is new,
// and a flood that came again all at once would keep it from ever coming to that.
type pace struct {
	mu   sync.Mutex
	step time.Duration // between two events that were put off
	last time.Time
}

// The bounds of the step between two events that were put off.
const minStep, maxStep = 2 * time.Millisecond, 50 * time.Millisecond

// worked tells how long the worker needed for so many single events: what is put off comes half as fast.
func (p *pace) worked(n int, took time.Duration) {
	if n == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.step = (7*p.step + 2*took/time.Duration(n)) / 8
}

func (p *pace) next() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.last = p.last.Add(min(max(p.step, minStep), maxStep))
	if soon := now.Add(time.Second); p.last.Before(soon) {
		p.last = soon
	}
	return p.last.Sub(now)
}

// slowLane works until both channels are closed. What came for the first time goes first: there may be healthy events in it.
func (l *loop) slowLane(ctx context.Context, again *queue, left <-chan work) {
	fromLeft := func(w work, ok bool) {
		if !ok {
			left = nil
			return
		}
		l.failAll(ctx, w.failures)
		l.takeApart(ctx, w.batch)
	}
	messages := again.messages
	for messages != nil || left != nil {
		select {
		case w, ok := <-left:
			fromLeft(w, ok)
			continue
		default:
		}
		select {
		case msg, ok := <-messages:
			if !ok {
				messages = nil
				continue
			}
			if ctx.Err() != nil {
				l.giveBack(again.took(msg))
				continue
			}
			batch, failures := l.parse(again.collect(msg, l.cfg.BatchSize))
			l.failAll(ctx, failures)
			l.apply(ctx, batch, nil)
		case w, ok := <-left:
			fromLeft(w, ok)
		}
	}
}

// parse decodes messages and tells apart what can never be applied.
func (l *loop) parse(messages []jetstream.Msg) (batch []*delivery, failures []failure) {
	batch = make([]*delivery, 0, len(messages))
	seen := make(map[event.Ref]bool, len(messages))
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
		case seen[d.event.Ref()]: // the same event twice in one batch: the second is a redelivery of the first
			// Not acked: if the first one fails, this one is as good.
			l.nak(msg, time.Second)
		case err != nil:
			seen[d.event.Ref()] = true
			failures = append(failures, failure{d, Permanent(err)})
		default:
			seen[d.event.Ref()] = true
			batch = append(batch, d)
		}
	}
	return batch, failures
}

// In the lanes a batch may take batchLimit where the database is quick, and an event that is told apart from others eventLimit: what
// takes longer is worked on beside them, with all of its HandleTimeout, and holds up nobody else.
const batchLimit, eventLimit = 5 * time.Second, time.Second

// apply applies a batch in one transaction and settles every event of it. A batch that fails because of single events is
// taken apart: by the slow lane where it has room, else here. An outage is waited out with the batch in hand.
func (l *loop) apply(ctx context.Context, batch []*delivery, left chan<- work) {
	limit := min(l.cfg.HandleTimeout, batchLimit)
	if len(batch) == 1 && batch[0].aside {
		limit = l.cfg.HandleTimeout
	}
	for len(batch) > 0 {
		err := l.attempt(ctx, batch, limit)
		switch {
		case err == nil:
			return
		case errors.Is(err, inbox.ErrRaced):
			continue // another worker applied one of them meanwhile; the next look at the inbox shows it
		case ctx.Err() != nil:
			l.giveBackAll(batch)
			return
		case limit < l.cfg.HandleTimeout && (errors.Is(err, errSlow) || errors.Is(err, errTimeout) && l.slowDatabase(ctx)):
			limit = l.cfg.HandleTimeout
			continue
		case l.isOutage(ctx, err) && !isStatement(err):
			if !l.waitOut(ctx, err) {
				l.giveBackAll(batch)
				return
			}
			continue
		case len(batch) > 1 || isStatement(err):
			select {
			case left <- work{batch: batch}:
			default:
				l.takeApart(ctx, batch)
			}
			return
		case errors.Is(err, errTimeout) && limit < l.cfg.HandleTimeout:
			l.putAside(ctx, batch[0])
			return
		default:
			l.failAll(ctx, []failure{{batch[0], err}})
			return
		}
	}
}

// attempt runs one transaction: what the inbox has is dropped, the handler gets the rest, the log is written. After
// the commit everything is acked.
func (l *loop) attempt(ctx context.Context, batch []*delivery, limit time.Duration) error {
	start := time.Now()
	var s sorted
	err := l.inTx(ctx, limit, lockTimeout, func(ctx context.Context, tx *gorm.DB) error {
		var err error
		if s, err = l.sort(ctx, tx, batch); err != nil || len(s.todo) == 0 {
			return err
		}
		if err := l.handle(ctx, tx, s.todo); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("%w (%s): %w", errTimeout, limit, err)
			}
			return err
		}
		return l.settle(ctx, tx, s.todo, time.Since(start))
	})
	if err != nil {
		return l.explain(ctx, err)
	}
	l.works()
	l.applied(ctx, batch, s, s.todo, start)
	return nil
}

// A statement waits so long for a lock of somebody else's, and so long where an event is told apart from others: a table that is
// being altered, a row in a transaction that somebody left open. That is an outage, or one event's alone, and never its own fault.
const (
	lockTimeout      = "SET LOCAL lock_timeout = '2s'"
	eventLockTimeout = "SET LOCAL lock_timeout = '500ms'"
)

// inTx runs fn in a transaction within limit. A batch that has begun is finished when the worker stops, within the
// grace period. Time that passes outside of the handler is the database's: then the error is errSlow.
func (l *loop) inTx(ctx context.Context, limit time.Duration, locks string, fn func(ctx context.Context, tx *gorm.DB) error) error {
	finish, release := withGrace(ctx, stopGrace)
	defer release()
	if err := l.watch.admit(finish); err != nil {
		return err
	}
	txCtx, cancel := context.WithTimeout(finish, limit)
	defer cancel()
	err := database.InTx(txCtx, l.db, func(tx *gorm.DB) error {
		if database.IsPostgres(tx) {
			if err := exec(txCtx, tx, locks); err != nil {
				return err
			}
		}
		return fn(txCtx, tx)
	})
	if err != nil && !errors.Is(err, errTimeout) && finish.Err() == nil && txCtx.Err() != nil {
		return fmt.Errorf("%w within %s: %w", errSlow, limit, err)
	}
	return err
}

// sorted is a batch after a look into the inbox. What is in neither part is settled already.
type sorted struct {
	todo  []*delivery
	early []*delivery // a restart brought them back before their time
	late  []*delivery // took too long last time: they are worked on aside
}

// retrySlack is how much before its time a retry may be made, clockSlack how far the clocks of two workers may be apart.
const (
	retrySlack = 100 * time.Millisecond
	clockSlack = time.Minute
)

func (l *loop) sort(ctx context.Context, tx *gorm.DB, batch []*delivery) (sorted, error) {
	known, err := l.inbox.Find(ctx, tx, refs(batch))
	if err != nil {
		return sorted{}, logFailed("look into the delivery log", err)
	}
	var s sorted
	for _, d := range batch {
		d.known = known[d.event.Ref()].For(&d.event)
		if d.known.Status == inbox.Dead { // a crash came between the row and the end of the original; else nobody would send it
			there, err := deadletter.Exists(ctx, l.js, l.handler.Name(), d.event.Ref(), d.known.LetterSeq)
			if err != nil {
				return sorted{}, fmt.Errorf("look up dead letter of %s: %w: %w", d.event.ID, errBroker, stream.Explain(err))
			}
			if !there {
				d.known = inbox.Known{}
			}
		}
		switch {
		case d.known.Settled():
		case time.Until(d.known.NextAttemptAt) > retrySlack && time.Until(d.known.WrittenAt) < clockSlack: // else the clock was set back
			s.early = append(s.early, d)
		case d.known.Late && !d.aside:
			s.late = append(s.late, d)
		default:
			s.todo = append(s.todo, d)
		}
	}
	return s, nil
}

// settle writes what was applied into the log.
func (l *loop) settle(ctx context.Context, tx *gorm.DB, good []*delivery, took time.Duration) error {
	if len(good) == 0 {
		return nil
	}
	entries := make([]inbox.Entry, len(good))
	for i, d := range good {
		entries[i] = inbox.Entry{Event: &d.event, Status: inbox.Processed, Attempts: d.known.Attempts + 1, Duration: took / time.Duration(len(good)), Effect: d.effect}
	}
	if err := l.inbox.Settle(ctx, tx, entries); err != nil {
		return logFailed("write the delivery log", err)
	}
	return nil
}

// explain tells, of a statement of the delivery log's own that was refused, whether the table refuses every row or this event's alone:
// by a plain row, which is taken back. It asks outside of the transaction that failed, which has ended.
func (l *loop) explain(ctx context.Context, err error) error {
	var refused *logError
	if !errors.As(err, &refused) || errors.Is(err, errSlow) {
		return err
	}
	plain := l.inTx(ctx, l.cfg.HandleTimeout, eventLockTimeout, func(ctx context.Context, tx *gorm.DB) error {
		if err := l.inbox.Try(ctx, tx); err != nil {
			return logFailed("write the delivery log", err)
		}
		return errRollback
	})
	switch {
	case errors.Is(plain, errRollback):
		return err
	case errors.As(plain, &refused):
		return &logError{err: refused.err, all: true}
	default:
		return plain
	}
}

// applied acks what the committed transaction settled and what was settled before, and counts.
func (l *loop) applied(ctx context.Context, batch []*delivery, s sorted, good []*delivery, start time.Time) {
	name := l.handler.Name()
	age := l.metrics.age.WithLabelValues(name)
	open := make(map[*delivery]bool, len(s.todo)+len(s.early)+len(s.late))
	for _, d := range s.todo {
		open[d] = true
	}
	for _, d := range s.early {
		open[d] = true
		if slices.Contains(batch, d) {
			l.nak(d.msg, time.Until(d.known.NextAttemptAt))
		}
	}
	for _, d := range s.late {
		open[d] = true
		if slices.Contains(batch, d) {
			l.putAside(ctx, d)
		}
	}
	if len(good) > 0 {
		l.watch.settled(&good[len(good)-1].event)
		l.proof.passed.Add(1)
	}
	for _, d := range good {
		l.ack(d)
		if d.event.Timestamp > 0 {
			age.Observe(max(0, time.Since(time.UnixMilli(d.event.Timestamp)).Seconds()))
		}
		if d.effect != "" {
			l.metrics.effects.WithLabelValues(name, string(d.effect)).Inc()
		}
	}
	duplicates := 0
	for _, d := range batch {
		if !open[d] {
			duplicates++
			l.ack(d)
		}
	}
	l.metrics.duration.WithLabelValues(name).Observe(time.Since(start).Seconds())
	l.metrics.deliveries.WithLabelValues(name, "processed").Add(float64(len(good)))
	l.metrics.deliveries.WithLabelValues(name, "duplicate").Add(float64(duplicates))
	l.log.Debug("batch applied", zap.Int("events", len(good)), zap.Int("duplicates", duplicates), zap.Duration("duration", time.Since(start)))
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

// handle calls the handler, notes what each event changed, and turns a panic into that batch's error.
func (l *loop) handle(ctx context.Context, tx *gorm.DB, batch []*delivery) (err error) {
	events := make([]event.Event, len(batch))
	for i, d := range batch {
		events[i], d.effect = d.event, ""
	}
	defer l.calls.begin()()
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", errPanic, r)
			if len(events) == 1 { // a larger batch is cut down to the one that panics
				l.log.Error("handler panicked", zap.String("event_id", events[0].ID), zap.String("source", events[0].Source), zap.String("panic", logged(fmt.Sprint(r))), zap.ByteString("stack", debug.Stack()))
			}
		}
	}()
	if teller, tells := l.handler.(Teller); tells {
		var effects []event.Effect
		effects, err = teller.HandleAndTell(ctx, tx, events)
		for i, d := range batch[:min(len(batch), len(effects))] {
			d.effect = effects[i]
		}
	} else {
		err = l.handler.Handle(ctx, tx, events)
	}
	if err != nil && ctx.Err() == nil && isForeign(err) && alive(ctx, tx) {
		return &ownError{err}
	}
	return err
}

// alive tells whether the connection of a transaction still answers, be it that the transaction is void.
func alive(ctx context.Context, tx *gorm.DB) bool {
	_, err := tx.Statement.ConnPool.ExecContext(ctx, "SELECT 1")
	var pg *pgconn.PgError
	return err == nil || errors.As(err, &pg) && pg.Code == "25P02"
}

// maxPutOff is how long an event at most waits that the database refuses alone: somebody may mend the cause at any time.
const maxPutOff = time.Minute

// verdict is what decide says of a failure, and the row that the delivery log gets.
type verdict struct {
	failure
	action action
	entry  inbox.Entry
	delay  time.Duration // of a retry
	// unwritten: the log refuses the event's row
	unwritten bool
}

// judge gives the verdicts on events that failed for their own reasons.
func (l *loop) judge(ctx context.Context, failures []failure) []verdict {
	now := time.Now()
	verdicts := make([]verdict, len(failures))
	for i, f := range failures {
		attempt, reason, text := f.known.Attempts+1, reasonOf(f.err), errorText(f.err)
		v := verdict{failure: f, action: decide(f.err, attempt, l.cfg.Attempts, ctx.Err() != nil)}
		v.entry = inbox.Entry{
			Event: &f.event, Status: inbox.Retrying, Attempts: attempt, Error: deadletter.OneLine(text), Reason: string(reason), FirstFailedAt: f.known.FirstFailedAt,
			Fingerprint: deadletter.Fingerprint(l.handler.Name(), reason, text),
		}
		if v.entry.FirstFailedAt.IsZero() {
			v.entry.FirstFailedAt = now
		}
		switch v.action {
		case retry:
			v.delay = delayOf(f.err, l.schedule(attempt))
			v.entry.NextAttemptAt = now.Add(v.delay)
		case pause: // it costs no attempt, and comes again ever later
			v.entry.Attempts, v.entry.Reason, v.entry.Fingerprint = f.known.Attempts, "", ""
			v.delay = min(max(now.Sub(v.entry.FirstFailedAt), l.cfg.RetryInitial), l.cfg.RetryMax, maxPutOff)
			var refused *logError
			if v.unwritten = errors.As(f.err, &refused); v.unwritten { // nothing remembers how long it has been so
				v.delay = min(l.cfg.RetryMax, maxPutOff)
			}
			v.entry.NextAttemptAt = now.Add(v.delay)
		case ack, deadLetter, giveBack:
		}
		verdicts[i] = v
	}
	return verdicts
}

// errorText is an error with the name of the constraint first that it is about, so that it is read whatever quotes the rest.
func errorText(err error) string {
	text := err.Error()
	if name := database.Constraint(err); name != "" {
		return name + ": " + text
	}
	return text
}

// failAll does what decide says about events that failed for their own reasons.
func (l *loop) failAll(ctx context.Context, failures []failure) {
	if len(failures) == 0 {
		return
	}
	verdicts := l.judge(ctx, failures)
	l.settleFailed(l.record(ctx, verdicts, retry), retry)
	l.bury(ctx, verdicts)
	for _, v := range verdicts {
		if v.action == giveBack {
			l.giveBack(v.msg)
		}
	}
}

// recordIn writes the rows of one kind of verdict.
func (l *loop) recordIn(ctx context.Context, tx *gorm.DB, verdicts []verdict, of action) error {
	var entries []inbox.Entry
	for _, v := range verdicts {
		if v.action == of && !v.unwritten {
			entries = append(entries, v.entry)
		}
	}
	if len(entries) == 0 {
		return nil
	}
	if err := l.inbox.Record(ctx, tx, entries); err != nil {
		return logFailed("record failed attempts", err)
	}
	return nil
}

// record writes the rows of one kind of verdict in a transaction of their own and waits out an outage. It returns those that are
// written; the events of the others were given back, or deferred where the log refuses their rows alone.
func (l *loop) record(ctx context.Context, verdicts []verdict, of action) []verdict {
	verdicts = slices.DeleteFunc(slices.Clone(verdicts), func(v verdict) bool { return v.action != of })
	for len(verdicts) > 0 {
		err := l.explain(ctx, l.inTx(ctx, l.cfg.HandleTimeout, lockTimeout, func(ctx context.Context, tx *gorm.DB) error { return l.recordIn(ctx, tx, verdicts, of) }))
		switch {
		case err == nil:
			l.works()
			return verdicts
		case ctx.Err() != nil:
		case l.isOutage(ctx, err) && !isStatement(err):
			if l.waitOut(ctx, err) {
				continue
			}
		case len(verdicts) > 1:
			var written []verdict
			for i := range verdicts {
				written = append(written, l.record(ctx, verdicts[i:i+1], of)...)
			}
			return written
		default:
			delay := min(l.cfg.RetryMax, maxPutOff)
			l.nak(verdicts[0].msg, delay)
			l.metrics.deliveries.WithLabelValues(l.handler.Name(), "put_off").Inc()
			l.log.Warn("the delivery log refuses this event's failed attempt, deferred", zap.String("event_id", verdicts[0].event.ID),
				zap.Uint64("stream_seq", verdicts[0].event.Seq), zap.Duration("delay", delay), zap.String("error", logged(err.Error())))
			return nil
		}
		for _, v := range verdicts {
			l.giveBack(v.msg)
		}
		return nil
	}
	return nil
}

// settleFailed tells the broker what was recorded: a later redelivery, or none.
func (l *loop) settleFailed(verdicts []verdict, of action) {
	name := l.handler.Name()
	for _, v := range verdicts {
		if v.action != of {
			continue
		}
		fields := []zap.Field{
			zap.String("event_id", v.event.ID), zap.String("event_type", string(v.event.Type)), zap.String("source", v.event.Source),
			zap.Uint64("stream_seq", v.event.Seq), zap.Int("attempt", v.entry.Attempts), zap.String("reason", v.entry.Reason), zap.String("error", logged(v.entry.Error)),
		}
		if of == pause {
			l.nak(v.msg, v.delay)
			l.metrics.deliveries.WithLabelValues(name, "put_off").Inc()
			l.log.Warn("the database refuses this event alone, put off", append(fields, zap.Duration("delay", v.delay))...)
			continue
		}
		l.metrics.failures.WithLabelValues(name, v.entry.Reason).Inc()
		if of == retry {
			l.nak(v.msg, v.delay)
			l.metrics.deliveries.WithLabelValues(name, "retried").Inc()
			l.log.Warn("event failed, will retry", append(fields, zap.Duration("delay", v.delay))...)
			continue
		}
		l.term(v.delivery, v.entry.Reason)
		l.metrics.deliveries.WithLabelValues(name, "dead_lettered").Inc()
		l.log.Error("event dead-lettered", fields...)
	}
}

// logged is an error as a log line has it, at most 1 KiB of it on one line: an error may quote a whole event.
func logged(text string) string {
	const most = 1 << 10
	if text = deadletter.OneLine(text); len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}

// letterWriters is how many letters are put at once.
const letterWriters = 32

// bury dead-letters what is to be: the letters first, since an original is given up only when its letter is durable, then the
// rows, then the originals. An event whose letter cannot be stored is kept, and holds up nobody else.
func (l *loop) bury(ctx context.Context, verdicts []verdict) {
	var dead []verdict
	for _, v := range verdicts {
		if v.action == deadLetter {
			v.entry.Status = inbox.Dead
			dead = append(dead, v)
		}
	}
	for waited := false; len(dead) > 0; waited = true {
		errs := make([]error, len(dead))
		var group errgroup.Group
		group.SetLimit(letterWriters)
		for i := range dead {
			group.Go(func() error {
				dead[i].entry.LetterSeq, errs[i] = l.putDeadLetter(ctx, dead[i])
				return nil
			})
		}
		_ = group.Wait()
		var put, rest []verdict
		var cause error
		for i, v := range dead {
			switch {
			case errs[i] == nil:
				put = append(put, v)
			// Of a broker that answers everything but this, waiting for it has made nothing better.
			case isRefused(errs[i]), waited && ctx.Err() == nil && l.probe(ctx) == nil:
				l.keep(ctx, v, errs[i])
			default:
				rest, cause = append(rest, v), errs[i]
			}
		}
		if len(put) > 0 {
			for _, v := range put {
				l.letters.stored(v.event.Ref())
			}
			l.settleFailed(l.record(ctx, put, deadLetter), deadLetter)
		}
		if len(rest) > 0 && !l.waitOut(ctx, cause) {
			for _, v := range rest {
				l.giveBack(v.msg)
			}
			return
		}
		dead = rest
	}
}

// keep defers an event whose letter cannot be stored. The row says why it waits.
func (l *loop) keep(ctx context.Context, v verdict, cause error) {
	now := time.Now()
	cause = fmt.Errorf("%s: %w", advise(cause), cause)
	v.action, v.entry.Status, v.entry.LetterSeq = retry, inbox.Retrying, 0
	v.delay = min(max(now.Sub(v.entry.FirstFailedAt), l.cfg.RetryInitial), l.cfg.RetryMax)
	v.entry.NextAttemptAt = now.Add(v.delay)
	v.entry.Error = deadletter.OneLine("dead letter not stored, event is kept: " + cause.Error() + "; the event's own error: " + v.entry.Error)
	tell := l.letters.failed(v.event.Ref(), cause, isTooLarge(cause), v.delay)
	if len(l.record(ctx, []verdict{v}, retry)) == 0 {
		return
	}
	l.nak(v.msg, v.delay)
	l.metrics.deliveries.WithLabelValues(l.handler.Name(), "put_off").Inc()
	level := zap.DebugLevel
	if tell {
		level = zap.ErrorLevel
	}
	l.log.Log(level, "dead letter not stored, event is kept", zap.String("event_id", v.event.ID), zap.String("event_type", string(v.event.Type)),
		zap.String("source", v.event.Source), zap.Uint64("stream_seq", v.event.Seq), zap.Duration("delay", v.delay), zap.Error(cause))
}

func (l *loop) putDeadLetter(ctx context.Context, v verdict) (uint64, error) {
	if err := l.letters.refusal(); err != nil {
		return 0, err
	}
	putCtx, cancel := context.WithTimeout(ctx, stream.PublishTimeout)
	defer cancel()
	record := &deadletter.Record{
		Handler: l.handler.Name(), Event: v.event, Reason: deadletter.Reason(v.entry.Reason), Error: v.entry.Error, Attempts: v.entry.Attempts,
		FirstFailedAt: v.entry.FirstFailedAt, LastFailedAt: time.Now(), Subject: v.msg.Subject(), Sequence: v.event.Seq, Header: v.msg.Headers(),
	}
	seq, err := deadletter.Put(putCtx, l.js, record)
	if isTooLarge(err) { // the body is as large as the broker takes: the row keeps the whole error
		record.Error = record.Error[:min(len(record.Error), 64)]
		seq, err = deadletter.Put(putCtx, l.js, record)
	}
	if err != nil {
		if !isRefused(err) { // whose text is for the stream of events: advise knows better
			err = stream.Explain(err)
		}
		return 0, fmt.Errorf("%w: %w", errBroker, err)
	}
	return seq, nil
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

func refs(batch []*delivery) []event.Ref {
	events := make([]event.Ref, len(batch))
	for i, d := range batch {
		events[i] = d.event.Ref()
	}
	return events
}
