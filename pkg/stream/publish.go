package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"

	"github.com/usherhq/usher/pkg/event"
)

// Bounds of one group commit. From minBatch events on, one atomic batch (a fixed number of fsyncs) is
// cheaper than one fsync an event; the break-even was measured at about 12 (docs/performance.md).
const (
	minBatch      = 12
	maxBatch      = 500
	maxBatchBytes = 4 << 20
	queueSize     = 4096
	afterBatch    = 300 * time.Microsecond
)

// Ack says that an event is on disk.
type Ack struct {
	Duplicate bool // it already was
}

// Publisher stores events so that its answer means "on disk" (where the broker syncs always).
//
// On one replica it commits in groups: whatever queued while the last commit ran goes out as one
// atomic batch, without waiting for more. On several replicas the broker groups by itself and every
// event is published plainly. It is safe for concurrent use.
type Publisher struct {
	js      jetstream.JetStream
	grouped bool
	queue   chan *item
	recent  *recent

	closing chan struct{}
	once    sync.Once
	done    chan struct{}
	plain   sync.WaitGroup // publishes past the queue
	mu      sync.RWMutex   // orders every Add to plain before closing

	// Only the commit loop uses these.
	busy         bool // the last group was a batch
	noBatchUntil time.Time
}

type item struct {
	ctx   context.Context //nolint:containedctx // a queued request carries its caller's deadline
	event *event.Event
	done  chan result
}

type result struct {
	ack Ack
	err error
}

// NewPublisher starts a publisher for a stream of so many replicas. Close stops it.
func NewPublisher(js jetstream.JetStream, replicas int) *Publisher {
	p := &Publisher{
		js:      js,
		grouped: replicas <= 1,
		queue:   make(chan *item, queueSize),
		recent:  newRecent(1<<15, 10*time.Minute),
		closing: make(chan struct{}),
		done:    make(chan struct{}),
	}
	if p.grouped {
		go p.commitLoop()
	} else {
		go func() {
			defer close(p.done)
			<-p.closing
			p.plain.Wait()
		}()
	}
	return p
}

// Publish stores one event and returns once it is durable, or with an error once ctx is done. After
// an error that is not ErrFull or ErrTooLarge the event may still be stored; publishing it again with
// the same id is safe. ctx should have a deadline.
func (p *Publisher) Publish(ctx context.Context, e *event.Event) (Ack, error) {
	if !p.grouped {
		if !p.enter() {
			return Ack{}, ErrClosed
		}
		defer p.plain.Done()
		return p.publishOne(ctx, e)
	}
	it := &item{ctx: ctx, event: e, done: make(chan result, 1)}
	select {
	case <-p.closing:
		return Ack{}, ErrClosed
	default:
	}
	select {
	case p.queue <- it:
	case <-p.closing:
		return Ack{}, ErrClosed
	case <-ctx.Done():
		return Ack{}, fmt.Errorf("publish %s: %w", e.ID, classify(ctx.Err()))
	}
	select {
	case r := <-it.done:
		return r.ack, r.err
	case <-ctx.Done():
		return Ack{}, fmt.Errorf("publish %s: %w", e.ID, classify(ctx.Err()))
	case <-p.done:
		select { // answered in the last moment?
		case r := <-it.done:
			return r.ack, r.err
		default:
			return Ack{}, ErrClosed
		}
	}
}

// enter counts a publish past the queue, unless the publisher is closing.
func (p *Publisher) enter() bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	select {
	case <-p.closing:
		return false
	default:
		p.plain.Add(1)
		return true
	}
}

// Close commits what is queued, then refuses everything. It returns once every caller was answered.
func (p *Publisher) Close() {
	p.once.Do(func() {
		p.mu.Lock() // whoever saw the publisher open is counted in plain
		defer p.mu.Unlock()
		close(p.closing)
	})
	<-p.done
}

func (p *Publisher) commitLoop() {
	defer close(p.done)
	for {
		select {
		case it := <-p.queue:
			p.commit(p.collect(it))
		case <-p.closing:
			for {
				select {
				case it := <-p.queue:
					p.commit(p.collect(it))
				default:
					return
				}
			}
		}
	}
}

// collect takes what is queued right now. It waits for more only under load, and only once and for less than a
// commit takes: right after a batch its callers are about to send again, and whoever comes first would else
// go out alone with an fsync that all the others wait for.
func (p *Publisher) collect(first *item) []*item {
	group, size := []*item{first}, len(first.event.Raw)
	for len(group) < maxBatch && size < maxBatchBytes {
		select {
		case it := <-p.queue:
			group = append(group, it)
			size += len(it.event.Raw)
			continue
		default:
		}
		if !p.busy || len(group) >= minBatch {
			break
		}
		p.busy = false
		time.Sleep(afterBatch)
	}
	p.busy = len(group) >= minBatch
	return group
}

// commit stores one group and answers every item of it.
func (p *Publisher) commit(group []*item) {
	var todo, again []*item // one an id, in order
	followers := map[event.Ref][]*item{}
	for _, it := range group {
		switch {
		case it.ctx.Err() != nil: // its caller has gone: do not store for nobody
			it.done <- result{err: fmt.Errorf("publish %s: %w", it.event.ID, classify(it.ctx.Err()))}
		default:
			if _, seen := followers[it.event.Ref()]; seen {
				followers[it.event.Ref()] = append(followers[it.event.Ref()], it)
				continue
			}
			followers[it.event.Ref()] = nil
			if p.recent.has(it.event.Ref()) {
				again = append(again, it)
			} else {
				todo = append(todo, it)
			}
		}
	}
	answer := func(it *item, r result) {
		if r.err == nil {
			p.recent.add(it.event.Ref())
		}
		it.done <- r
		for _, f := range followers[it.event.Ref()] {
			if r.err == nil {
				r.ack.Duplicate = true
			}
			f.done <- r
		}
	}
	var singly sync.WaitGroup
	if len(again) > 0 {
		singly.Go(func() { p.commitEach(again, answer) })
	}
	p.commitAll(todo, answer)
	singly.Wait()
}

// commitAll stores items in as few batches as it can. The broker refuses all of a batch for one event that it
// has, without saying which, so a refused one is cut in halves: one repeated event among 256 costs a few batches
// more and not 256 fsyncs. After any other failure (no room, a time-out) each is published by itself, to
// learn its own fate.
func (p *Publisher) commitAll(items []*item, answer func(*item, result)) {
	if len(items) < minBatch || time.Now().Before(p.noBatchUntil) {
		p.commitEach(items, answer)
		return
	}
	var api *jetstream.APIError
	switch err := p.commitBatch(items); {
	case err == nil:
		for _, it := range items {
			answer(it, result{})
		}
	case errors.As(err, &api) && api.ErrorCode == jetstreamext.JSErrCodeBatchPublishDuplicateMsgID:
		p.commitAll(items[:len(items)/2], answer)
		p.commitAll(items[len(items)/2:], answer)
	case errors.As(err, &api) && api.ErrorCode == jetstreamext.JSErrCodeBatchPublishNotEnabled:
		p.noBatchUntil = time.Now().Add(time.Minute) // the stream has more replicas than we were told
		p.commitEach(items, answer)
	default:
		p.commitEach(items, answer)
	}
}

// commitBatch stores all in one atomic batch. After an error they are not known to be stored.
func (p *Publisher) commitBatch(items []*item) error {
	msgs := make([]*nats.Msg, len(items))
	for i, it := range items {
		msgs[i] = Message(it.event)
	}
	// Half the time of a publish: the callers still wait when the fallback runs.
	ctx, cancel := context.WithTimeout(context.Background(), PublishTimeout/2)
	defer cancel()
	// The first ack has its own limit, which is not the context's.
	_, err := jetstreamext.PublishMsgBatch(ctx, p.js, msgs, jetstreamext.BatchFlowControl{AckFirst: true, AckTimeout: PublishTimeout / 4})
	return err //nolint:wrapcheck // only its code counts
}

// commitEach publishes all at once, each by itself, and answers them as their acks come. Nats-Msg-Id makes
// it safe for events that a failed batch stored after all.
func (p *Publisher) commitEach(items []*item, answer func(*item, result)) {
	futures := make([]jetstream.PubAckFuture, len(items))
	for i, it := range items {
		future, err := p.js.PublishMsgAsync(Message(it.event))
		if err != nil {
			answer(it, result{err: fmt.Errorf("publish %s: %w", it.event.ID, classify(err))})
			continue
		}
		futures[i] = future
	}
	for i, it := range items {
		if futures[i] == nil {
			continue
		}
		select {
		case ack := <-futures[i].Ok():
			answer(it, result{ack: Ack{Duplicate: ack.Duplicate}})
		case err := <-futures[i].Err(): // comes after PublishTimeout at the latest
			answer(it, result{err: fmt.Errorf("publish %s: %w", it.event.ID, classify(err))})
		}
	}
}

// publishOne is for several replicas. A duplicate of an event that is still in flight is refused by
// the broker (10158) until it is stored, which takes a moment.
func (p *Publisher) publishOne(ctx context.Context, e *event.Event) (Ack, error) {
	for wait := 20 * time.Millisecond; ; wait *= 2 {
		ack, err := p.js.PublishMsg(ctx, Message(e))
		if err == nil {
			return Ack{Duplicate: ack.Duplicate}, nil
		}
		var api *jetstream.APIError
		if !errors.As(err, &api) || api.ErrorCode != codeDuplicate {
			return Ack{}, fmt.Errorf("publish %s: %w", e.ID, classify(err))
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return Ack{}, fmt.Errorf("publish %s: %w", e.ID, classify(err))
		}
	}
}

// classify makes an error of a publish one of ErrFull, ErrTooLarge and ErrUnavailable.
func classify(err error) error {
	err = Explain(err)
	if errors.Is(err, ErrFull) || errors.Is(err, ErrTooLarge) || errors.Is(err, ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// recent remembers ids that this process stored a moment ago, so that the common duplicate (a sender's quick retry) does not refuse
// the batch that it stands in. Whether an event is stored only the broker knows: it may have lost it since, with the whole stream. The
// memory decides how an event is published, never what its sender is told. It holds at least the last size ids, unless they are older
// than age.
type recent struct {
	mu       sync.Mutex
	new, old map[event.Ref]struct{}
	size     int
	age      time.Duration
	turned   time.Time
}

func newRecent(size int, age time.Duration) *recent {
	return &recent{new: map[event.Ref]struct{}{}, old: map[event.Ref]struct{}{}, size: size, age: age, turned: time.Now()}
}

func (r *recent) has(id event.Ref) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.turn()
	_, isNew := r.new[id]
	_, isOld := r.old[id]
	return isNew || isOld
}

func (r *recent) add(id event.Ref) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.turn()
	r.new[id] = struct{}{}
}

func (r *recent) turn() {
	if len(r.new) >= r.size || time.Since(r.turned) > r.age {
		r.old, r.new, r.turned = r.new, map[event.Ref]struct{}{}, time.Now()
	}
}
