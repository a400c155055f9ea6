// Package replay gives events to one handler again, at a rate, and watches what becomes of them.
//
// Every replay has an id, which is also its publish id: publishing it twice stores it once, and where the broker has
// forgotten it, the delivery log knows it. So a run may be broken off and repeated at any point. A run never gets far ahead of the
// handler, and stops where too many of its events fail again. The package does not choose events and does not touch dead letters.
package replay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/time/rate"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
)

// kept are the headers that an event has from its first delivery on; a replay carries them again. Others, such as those that
// make a dead letter, or the broker's own, it does not.
var kept = []string{
	stream.HeaderEventID, stream.HeaderType, stream.HeaderSource, stream.HeaderReceivedAt, stream.HeaderTraceParent, stream.HeaderReplayEffects,
	stream.HeaderFirstSequence,
}

// Item is one event for one handler.
type Item struct {
	Handler string
	Event   event.Ref
	ID      string // of the replay: the same for every attempt at it, and never that of another
	Message *nats.Msg

	what  todo
	seen  time.Time // when the log's row was written, the last time that it was looked at
	seq   uint64    // once it is stored
	known bool      // it was stored by somebody else before
}

// todo is what is to be done with an item of a selection.
type todo int

const (
	publish  todo = iota
	leaveOut      // it was discarded
	settled       // an earlier part of the run has seen to it
)

// name gives the item's replay an id.
func (i *Item) name(id string) {
	i.ID = id
	i.Message.Header.Set(stream.HeaderReplayID, id)
	i.Message.Header.Set(stream.HeaderMsgID, id)
}

// again makes the item another replay of the same run. A repetition changes nothing.
func (i *Item) again(word string) {
	if suffix := ":" + word; !strings.HasSuffix(i.ID, suffix) {
		i.name(i.ID + suffix)
	}
}

// NewItem makes the replay of a stored message (of [stream.Events] or [stream.DeadLetters]).
func NewItem(handler, id string, stored *jetstream.RawStreamMsg) Item {
	e, _ := stream.Parse(stored.Header, stored.Data, stored.Sequence) // what cannot be decoded may be by a newer worker
	msg := nats.NewMsg(stream.ReplaySubject(handler, &e))
	msg.Data = stored.Data
	for key, values := range maps.All(stored.Header) {
		if slices.ContainsFunc(kept, func(k string) bool { return strings.EqualFold(k, key) }) {
			msg.Header[key] = values
		}
	}
	msg.Header.Set(stream.HeaderEventID, e.ID) // a message published by hand may have none
	msg.Header.Set(stream.HeaderOrigin, string(event.OriginReplay))
	msg.Header.Set(stream.HeaderFirstOrigin, string(e.FirstOrigin)) // that of the very first, since a replay has it already
	if first := firstSequence(stored); first != "" {
		msg.Header.Set(stream.HeaderFirstSequence, first)
	}
	item := Item{Handler: handler, Event: e.Ref(), Message: msg}
	item.name(id)
	return item
}

// firstSequence is where the event itself lies in [stream.Events], or lay: a replay carries it on, a dead letter names the message that failed.
func firstSequence(stored *jetstream.RawStreamMsg) string {
	if strings.HasPrefix(stored.Subject, "clerk.evt.") {
		return strconv.FormatUint(stored.Sequence, 10)
	}
	return cmp.Or(stored.Header.Get(stream.HeaderFirstSequence), stored.Header.Get(stream.HeaderFailedSequence))
}

// WithEffects asks the handler for its effects on the outside as well.
func (i Item) WithEffects() Item {
	i.Message.Header.Set(stream.HeaderReplayEffects, "true")
	return i
}

// Seen tells when the log's row had been written before the item is published: what it says is no outcome until it is written again.
func (i Item) Seen(at time.Time) Item {
	i.seen = at
	return i
}

// Options say how a run behaves. A zero field means its default.
type Options struct {
	// Rate is how many events a second are published at most (no limit).
	Rate float64
	// StopAt is the share of events failing again above which the run stops (0.05). At 1 nothing is watched: the run
	// goes as fast as the broker takes it and knows nothing of outcomes.
	StopAt float64
	// MinSample is how many outcomes must be known before StopAt counts (20).
	MinSample int
	// Patience is how long the run waits without a new outcome (30 s).
	Patience time.Duration
	// Outage is how a database or a broker that is away is met.
	Outage Outage
	// Progress is called after every step, from the run's goroutine.
	Progress func(Progress)
}

// Progress is how far a run has come.
type Progress struct {
	Published int // stored by the broker, by this run and not before; without dead letters that were discarded meanwhile
	Earlier   int // stored by the broker before: by an earlier part of this run, or by another with the same ids
	LeftOut   int // not published, since they were discarded for the handler
	Applied   int // of the published and the earlier, known to be applied
	Failed    int // of these, known to have failed again, since this part of the run began
	Open      int // of these, watched and without an outcome yet
}

// Why a run stops before its end. What it published stays published.
var (
	ErrFailing = errors.New("too many fail again")
	ErrStalled = errors.New("the handler does not get on")
)

// Sizes of a run: how many events are published before the acks are awaited, and how many may be without an outcome. The second
// doubles from its first to its last value while all goes well, so that an error which is still there costs little.
const (
	maxWindow   = 500
	firstAhead  = 100
	lastAhead   = 4000
	pollEvery   = 50 * time.Millisecond
	pollSlowest = time.Second
)

// PageBytes is how many bytes of bodies whoever reads events for a run holds at once; EventBytes is how many one event has at most
// (what ingest takes, and the headers), so that no more is begun to be read than there is room for.
const (
	PageBytes  = 16 << 20
	EventBytes = 1<<20 + stream.HeaderRoom
)

// Ready returns [stream.ErrSetup], with the handler's name, where one of the handlers has no consumer: what is published for it would lie there.
func Ready(ctx context.Context, js jetstream.JetStream, handlers ...string) error {
	for _, handler := range handlers {
		_, err := js.Consumer(ctx, stream.Events, handler)
		switch {
		case errors.Is(err, jetstream.ErrConsumerNotFound), errors.Is(err, jetstream.ErrStreamNotFound):
			return fmt.Errorf("handler %s has no consumer: %w", handler, stream.ErrSetup)
		case err != nil:
			return fmt.Errorf("look up the consumer of %s: %w", handler, Explain(err))
		}
	}
	return nil
}

// Run publishes items and watches them. It is for one goroutine.
type Run struct {
	js      jetstream.JetStream
	db      *gorm.DB
	opts    Options
	limiter *rate.Limiter

	progress Progress
	passed   int           // of the applied, those whose outcome was waited for
	ahead    int           // how many may be open
	open     map[key]watch // published and without an outcome
	failed   map[key]watch // failed again, maybe to be retried
	moved    time.Time     // when the last outcome was seen, or the last event published
}

type key struct {
	handler string
	event   event.Ref
}

// watch is what an outcome is known by.
type watch struct {
	id      string
	seq     uint64    // of the message
	earlier bool      // it was published before this part of the run began
	seen    time.Time // when the log's row had been written, as it was before the message was published
}

// New prepares a run; it publishes nothing.
func New(js jetstream.JetStream, db *gorm.DB, o Options) *Run {
	limit := rate.Inf
	if o.Rate > 0 {
		limit = rate.Limit(o.Rate)
	}
	if o.StopAt == 0 {
		o.StopAt = 0.05
	}
	if o.MinSample == 0 {
		o.MinSample = 20
	}
	if o.Patience == 0 {
		o.Patience = 30 * time.Second
	}
	return &Run{js: js, db: db, opts: o, limiter: rate.NewLimiter(limit, 1), ahead: firstAhead, open: map[key]watch{}, failed: map[key]watch{}, moved: time.Now()}
}

// Progress is how far the run has come.
func (r *Run) Progress() Progress {
	p := r.progress
	p.Open = len(r.open)
	return p
}

// watching tells whether outcomes matter.
func (r *Run) watching() bool { return r.opts.StopAt < 1 }

// Window is how many items the next call of Publish should have: with a low rate few, so that what was published is settled by
// the caller within a second or so.
func (r *Run) Window() int {
	n := maxWindow
	if r.watching() {
		n = min(n, r.ahead/2)
	}
	if r.opts.Rate > 0 {
		n = min(n, max(1, int(r.opts.Rate)))
	}
	return n
}

// Publish publishes a window of items and returns those that the broker has stored. The error is about the others: whether they are
// stored is not known, and publishing them again is harmless. What another run had published under the same id is returned as well; it
// counts as Earlier, and that run watches it.
func (r *Run) Publish(ctx context.Context, items []Item) ([]Item, error) {
	var stored []Item
	unsure := map[string]bool{}                     // sent, and not known to be stored
	err := r.Try(ctx, func(context.Context) error { // its own time limit is that of an ack; a rate may need more
		done, rest, err := r.publish(ctx, items, unsure)
		stored, items = append(stored, done...), rest
		return err
	})
	for _, item := range stored {
		if item.known {
			r.progress.Earlier++
			continue
		}
		r.progress.Published++
		r.watch(item)
	}
	r.moved = time.Now()
	r.report()
	return stored, err
}

func (r *Run) watch(item Item) {
	if r.watching() {
		r.open[key{item.Handler, item.Event}] = watch{item.ID, item.seq, item.known, item.seen}
	}
}

// publish tries once and returns what is stored and what is not known to be.
func (r *Run) publish(ctx context.Context, items []Item, unsure map[string]bool) (stored, rest []Item, first error) {
	futures := make([]jetstream.PubAckFuture, 0, len(items))
	for _, item := range items {
		if first = r.limiter.Wait(ctx); first != nil {
			break
		}
		future, err := r.js.PublishMsgAsync(item.Message)
		if err != nil {
			first = fmt.Errorf("replay %s: %w", item.Event.ID, Explain(err))
			break
		}
		futures = append(futures, future)
	}
	// Acks come in order or time out together, so that waiting for one after the other costs nothing. An interrupted run waits as
	// well: what is stored is better known.
	for i, future := range futures {
		select {
		case ack := <-future.Ok():
			item := items[i]
			item.seq, item.known = ack.Sequence, ack.Duplicate && !unsure[item.ID]
			stored = append(stored, item)
		case err := <-future.Err():
			rest, unsure[items[i].ID] = append(rest, items[i]), true
			if first == nil {
				first = fmt.Errorf("replay %s: %w", items[i].Event.ID, Explain(err))
			}
		}
	}
	return stored, append(rest, items[len(futures):]...), first
}

// Try does a step of the run, again and again while the database or the broker is away. See [Outage.Try].
func (r *Run) Try(ctx context.Context, step func(context.Context) error) error {
	o := r.opts.Outage
	o.Tell = func(cause error, took time.Duration) {
		if cause == nil {
			r.moved = time.Now() // nobody got on meanwhile
		}
		if r.opts.Outage.Tell != nil {
			r.opts.Outage.Tell(cause, took)
		}
	}
	return o.Try(ctx, step)
}

func (r *Run) report() {
	if r.opts.Progress != nil {
		r.opts.Progress(r.Progress())
	}
}

// Wait returns when the next window may be published. The error is ErrFailing or ErrStalled, or about the database or the context.
func (r *Run) Wait(ctx context.Context) error {
	return r.await(ctx, func() (bool, error) {
		known := r.passed + r.progress.Failed
		if known >= r.opts.MinSample && float64(r.progress.Failed) > r.opts.StopAt*float64(known) {
			return true, fmt.Errorf("%w: %d of %d", ErrFailing, r.progress.Failed, known)
		}
		return len(r.open)+r.Window() <= r.ahead, nil
	})
}

// Finish waits for the outcomes of what was published. The error is ErrStalled where one does not come: the event is in the stream, and the
// handler will come to it.
func (r *Run) Finish(ctx context.Context) error {
	return r.await(ctx, func() (bool, error) { return len(r.open) == 0, nil })
}

func (r *Run) await(ctx context.Context, enough func() (bool, error)) error {
	if !r.watching() {
		return ctx.Err() //nolint:wrapcheck // the context's own
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for pause := pollEvery; ; {
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the context's own
		case <-timer.C:
		}
		seen := 0
		err := r.Try(ctx, func(ctx context.Context) (err error) {
			seen, err = r.look(ctx)
			return err
		})
		if err != nil {
			return err
		}
		pause = min(2*pause, pollSlowest)
		if seen > 0 {
			pause, r.moved = pollEvery, time.Now()
			r.report()
		}
		if ok, err := enough(); ok || err != nil {
			return err
		}
		if time.Since(r.moved) > r.opts.Patience {
			return r.stalled(ctx)
		}
		timer.Reset(pause)
	}
}

// stalled says why nothing moves. A consumer that is gone is not waited for.
func (r *Run) stalled(ctx context.Context) error {
	handlers := map[string]bool{}
	for k := range r.open {
		handlers[k.handler] = true
	}
	names := slices.Sorted(maps.Keys(handlers))
	if err := Ready(ctx, r.js, names...); errors.Is(err, stream.ErrSetup) {
		return err
	}
	return fmt.Errorf("%w: no news of %d within %s; is a worker running with handler %s, and what does its /readyz say? They are in the stream, and are applied once it goes on",
		ErrStalled, len(r.open), r.opts.Patience, strings.Join(names, ", "))
}

// row is what the delivery log says of an event at a handler.
type row struct {
	Source, EventID, Status string
	Attempts                int
	ReplayID                *string
	StreamSeq               *uint64
	ProcessedAt             *time.Time
	NextAttemptAt           *time.Time
}

func (r row) ref() event.Ref { return event.Ref{Source: r.Source, ID: r.EventID} }

func (r row) replayID() string {
	if r.ReplayID == nil {
		return ""
	}
	return *r.ReplayID
}

func (r row) writtenAt() time.Time {
	if r.ProcessedAt == nil {
		return time.Time{}
	}
	return *r.ProcessedAt
}

func (r row) seq() uint64 {
	if r.StreamSeq == nil {
		return 0
	}
	return *r.StreamSeq
}

// rows looks events up in the log of a handler.
func (r *Run) rows(ctx context.Context, handler string, events []event.Ref) ([]row, error) {
	var rows []row
	for source, ids := range event.BySource(events) {
		var part []row
		err := r.db.WithContext(ctx).Table("deliveries").Where("handler = ? AND source = ? AND event_id IN ?", handler, source, ids).
			Select("source, event_id, status, attempts, replay_id, stream_seq, processed_at, next_attempt_at").Find(&part).Error
		if err != nil {
			return nil, fmt.Errorf("look what became of replays: %w", err)
		}
		rows = append(rows, part...)
	}
	return rows, nil
}

// look finds outcomes and returns how many are new.
func (r *Run) look(ctx context.Context) (int, error) {
	byHandler := map[string][]event.Ref{}
	for k := range r.open {
		byHandler[k.handler] = append(byHandler[k.handler], k.event)
	}
	before := len(r.open)
	for handler, events := range byHandler {
		for part := range slices.Chunk(events, maxWindow) {
			rows, err := r.rows(ctx, handler, part)
			if err != nil {
				return 0, err
			}
			for _, row := range rows {
				k := key{handler, row.ref()}
				switch r.open[k].outcome(row) {
				case applied:
					r.progress.Applied++
					r.passed++
					delete(r.open, k)
				case failed:
					r.progress.Failed++
					r.failed[k] = r.open[k]
					delete(r.open, k)
				case discarded:
					r.progress.Published--
					delete(r.open, k)
				case unknown:
				}
			}
		}
	}
	seen := before - len(r.open)
	if seen > 0 && r.progress.Failed == 0 {
		r.ahead = min(lastAhead, r.ahead+seen)
	}
	return seen, nil
}

// retryingTime bounds how long a run that has ended may ask what is left.
const retryingTime = 10 * time.Second

// Retrying is how many events of the run have failed and are tried again by their handlers, and when the first of them is. It looks again, also
// where ctx has ended; what the database does not tell is left out.
func (r *Run) Retrying(ctx context.Context) (n int, next *time.Time) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), retryingTime)
	defer cancel()
	byHandler := map[string][]event.Ref{}
	for _, left := range []map[key]watch{r.failed, r.open} {
		for k := range left {
			byHandler[k.handler] = append(byHandler[k.handler], k.event)
		}
	}
	for handler, events := range byHandler {
		for part := range slices.Chunk(events, maxWindow) {
			rows, err := r.rows(ctx, handler, part)
			if err != nil {
				return n, next
			}
			for _, row := range rows {
				if row.Status != "retrying" || row.NextAttemptAt == nil {
					continue
				}
				n++
				if at := row.NextAttemptAt.UTC(); next == nil || at.Before(*next) {
					next = &at
				}
			}
		}
	}
	return n, next
}

type outcome int

const (
	unknown outcome = iota
	applied
	failed
	discarded
)

// outcome is what a row says of a message. The row may be another's: whoever applied the event since it was published has settled it.
// A failure is the message's where the row names it, or where one behind it has failed.
func (w watch) outcome(r row) outcome {
	mine := r.replayID() == w.id
	since := mine || !r.writtenAt().Equal(w.seen)
	switch {
	case r.Status == "processed" && (since || w.earlier && r.seq() >= w.seq):
		return applied
	case r.Status != "processed" && r.Attempts > 0 && (mine || since && r.seq() > w.seq): // the schedule of its retries may last for hours
		return failed
	case r.Status == "discarded" && since && strings.HasPrefix(w.id, stream.LetterReplay): // between the reading of the letter and its mark: the worker leaves it
		return discarded
	default:
		return unknown
	}
}
