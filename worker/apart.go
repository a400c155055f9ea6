package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/worker/internal/inbox"
)

// A batch that fails is taken apart here, so that an event which fails, takes long or is refused alone holds up nobody else.

// slowDatabase tells whether the database takes long for next to nothing: then a batch did not take long because of one event.
func (l *loop) slowDatabase(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if database.Ping(ctx, l.db) != nil { // the first may have to connect
		return true
	}
	start := time.Now()
	return database.Ping(ctx, l.db) != nil || time.Since(start) > 100*time.Millisecond
}

// putAside lets an event that takes long be worked on beside the lanes, with all of its time; here where others are there before it.
func (l *loop) putAside(ctx context.Context, d *delivery) {
	d.aside = true
	l.settled(d.msg.InProgress()) // AckWait begins anew
	select {
	case l.aside <- d:
	default:
		l.applyAlone(ctx, d)
	}
}

// besideLane works on what is put aside, one event after the other.
func (l *loop) besideLane(ctx context.Context) {
	for d := range l.aside {
		l.settled(d.msg.InProgress())
		l.applyAlone(ctx, d)
	}
}

func (l *loop) applyAlone(ctx context.Context, d *delivery) {
	if ctx.Err() != nil {
		l.giveBack(d.msg)
		return
	}
	l.apply(ctx, []*delivery{d}, nil)
}

const (
	// chunkSize is how many events share the transaction in which they are told apart. PostgreSQL keeps up to 64
	// subtransactions a session where everybody finds them cheaply.
	chunkSize = 64
	// mostSlow is how many events of a batch may take long before it is the batch that does.
	mostSlow = 3
	// refusedDelay is when events come again that the database refuses, as far as one can see, like all others.
	refusedDelay = time.Second
)

// takeApart applies a batch that failed, so that only the events that fail by themselves stay behind.
func (l *loop) takeApart(ctx context.Context, batch []*delivery) {
	var slow []*delivery
	defer func() {
		for _, d := range slow { // after the others: SQLite has one writer
			l.putAside(ctx, d)
		}
	}()
	each := false // a row of the delivery log a statement
	for len(batch) > 0 {
		if ctx.Err() != nil {
			l.giveBackAll(batch)
			return
		}
		limit := min(l.cfg.HandleTimeout, eventLimit)
		if batch[0].aside || len(slow) >= mostSlow {
			limit = l.cfg.HandleTimeout
		}
		chunk := batch[:min(chunkSize, len(batch))]
		done, err := l.isolate(ctx, chunk, limit, each)
		var late *lateError
		var refused *logError
		switch {
		case err == nil:
			batch = batch[done:]
		case errors.Is(err, inbox.ErrRaced):
		case ctx.Err() != nil:
		case isStatement(err) && errors.As(err, &refused) && !each: // which of them does the log refuse?
			each = true
		case isStatement(err): // they do not keep the lane from what comes after them, which the database may take
			if !l.waitOut(ctx, err) {
				continue
			}
			for _, d := range chunk {
				l.nak(d.msg, refusedDelay)
			}
			l.metrics.deliveries.WithLabelValues(l.handler.Name(), "put_off").Add(float64(len(chunk)))
			batch = batch[len(chunk):]
		case l.isOutage(ctx, err):
			l.waitOut(ctx, err)
		case errors.As(err, &late):
			if limit < l.cfg.HandleTimeout {
				slow = append(slow, late.delivery)
			} else {
				l.failAll(ctx, []failure{{late.delivery, err}})
			}
			batch = slices.DeleteFunc(slices.Clone(batch), func(d *delivery) bool { return d == late.delivery })
		default: // the transaction itself failed: each in one of its own
			for i := range chunk {
				l.apply(ctx, chunk[i:i+1], nil)
			}
			batch = batch[len(chunk):]
		}
	}
}

// isolate applies events one after the other in one transaction, each behind a savepoint, and settles those that
// it came to, from the first on: so many are done. A commit for all of them and one round trip for
// a failure are what makes a flood of failing events cheap.
//
// An event that the database refuses with an outage's words while it takes others is put off alone: somebody holds
// its row, or a trigger that only it meets is broken. Where it takes none the error is the outage's.
//
// each writes the row of every event behind its savepoint, which is slower: for where the log refuses some of them.
func (l *loop) isolate(ctx context.Context, batch []*delivery, limit time.Duration, each bool) (done int, err error) {
	start := time.Now()
	var s sorted
	var good []*delivery
	var verdicts []verdict
	locks := lockTimeout
	if limit < l.cfg.HandleTimeout {
		locks = eventLockTimeout
	}
	err = l.inTx(ctx, l.cfg.HandleTimeout, locks, func(ctx context.Context, tx *gorm.DB) error {
		var err error
		if s, err = l.sort(ctx, tx, batch); err != nil {
			return err
		}
		var failures []failure
		var stuck []*delivery
		var refused error
		good, verdicts, done = nil, nil, len(batch)
		if err := exec(ctx, tx, "SAVEPOINT event"); err != nil {
			return err
		}
		for i, d := range s.todo {
			if i > 0 && time.Since(start) > l.cfg.HandleTimeout/2 {
				done = slices.Index(batch, d)
				break
			}
			eventCtx, cancel := context.WithTimeout(ctx, limit)
			err := l.handle(eventCtx, tx.WithContext(eventCtx), []*delivery{d})
			late := err != nil && eventCtx.Err() != nil
			cancel()
			if err == nil && each {
				if err = l.settle(ctx, tx, []*delivery{d}, time.Since(start)/time.Duration(i+1)); errors.Is(err, inbox.ErrRaced) {
					return err
				}
			}
			switch {
			case err == nil:
				good = append(good, d)
				err = exec(ctx, tx, "RELEASE SAVEPOINT event")
				if err == nil {
					err = exec(ctx, tx, "SAVEPOINT event")
				}
			case late:
				return &lateError{d, limit, err}
			case isOutage(err) && !isStatement(err):
				return err
			default:
				if isOutage(err) {
					stuck, refused = append(stuck, d), err
				}
				failures = append(failures, failure{d, err})
				err = exec(ctx, tx, "ROLLBACK TO SAVEPOINT event") // which stays, for the next
			}
			if err != nil {
				return err
			}
		}
		if refused != nil && len(good) == 0 && !l.proof.alone(stuck) {
			return fmt.Errorf("event %s: %w", stuck[len(stuck)-1].event.ID, refused)
		}
		if !each {
			if err := l.settle(ctx, tx, good, time.Since(start)); err != nil {
				return err
			}
		}
		verdicts = l.judge(ctx, failures)
		if each {
			return nil
		}
		if err := l.recordIn(ctx, tx, verdicts, pause); err != nil {
			return err
		}
		return l.recordIn(ctx, tx, verdicts, retry)
	})
	if err != nil {
		return 0, l.explain(ctx, err)
	}
	l.works()
	l.pace.worked(done, time.Since(start))
	l.applied(ctx, batch[:done], s, good, start)
	for _, of := range []action{retry, pause} {
		recorded := verdicts
		if each {
			recorded = l.record(ctx, verdicts, of)
		}
		l.settleFailed(recorded, of)
	}
	l.bury(ctx, verdicts)
	for _, v := range verdicts {
		if v.action == giveBack {
			l.giveBack(v.msg)
		}
	}
	return done, nil
}

// exec runs a statement of the worker's own.
func exec(ctx context.Context, tx *gorm.DB, statement string) error {
	if _, err := tx.Statement.ConnPool.ExecContext(ctx, statement); err != nil {
		return fmt.Errorf("%s: %w", strings.ToLower(statement), err)
	}
	return nil
}

// proof is what tells, for all loops of a handler, an event that the database refuses alone from an outage: whether it took others
// since it first refused that one.
type proof struct {
	passed atomic.Uint64 // transactions that applied something
	mu     sync.Mutex
	first  map[event.Ref]uint64 // how many had passed when an event was first refused
}

// mostRefused bounds what a proof remembers. What it forgets is refused for the first time once more.
const mostRefused = 10_000

// alone tells whether it is so for each of the events. One that was put off before needs no other proof.
func (p *proof) alone(events []*delivery) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.first == nil || len(p.first) > mostRefused {
		p.first = map[event.Ref]uint64{}
	}
	passed, alone := p.passed.Load(), true
	for _, d := range events {
		if d.known.PutOff {
			continue
		}
		first, refused := p.first[d.event.Ref()]
		if !refused {
			p.first[d.event.Ref()] = passed
		}
		alone = alone && refused && first < passed
	}
	if alone {
		for _, d := range events {
			delete(p.first, d.event.Ref())
		}
	}
	return alone
}

// lateError is a handler that did not finish one event in time.
type lateError struct {
	delivery *delivery
	limit    time.Duration
	err      error
}

func (e *lateError) Error() string   { return fmt.Sprintf("%v (%s): %v", errTimeout, e.limit, e.err) }
func (e *lateError) Unwrap() []error { return []error{errTimeout, e.err} }
