// Package faults makes things go wrong on purpose: handlers that fail, panic, stall and forget, a broker that
// loses acks, a network that is cut, and a handler whose effects can be counted afterwards. Only tests
// import it.
//
// Every fault leaves the promise to be checked the same: what was accepted ends applied or dead-lettered, and
// no effect happens twice ([Effects.Count]).
package faults

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/worker"
)

// ErrFault is the error of a handler that fails on purpose.
var ErrFault = errors.New("fault on purpose")

// Handler is a worker.Handler out of a function.
type Handler struct {
	name   string
	handle func(ctx context.Context, tx *gorm.DB, batch []event.Event) error
}

// New makes a handler.
func New(name string, handle func(ctx context.Context, tx *gorm.DB, batch []event.Event) error) Handler {
	return Handler{name, handle}
}

// Name implements worker.Handler.
func (h Handler) Name() string { return h.name }

// Handle implements worker.Handler.
func (h Handler) Handle(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
	return h.handle(ctx, tx, batch)
}

// Effects is a handler whose effect is a row an event, written in the worker's transaction. Nothing in the table
// keeps a second one out, so that an effect that happens twice is seen.
type Effects struct {
	db   *gorm.DB
	name string
}

// NewEffects makes the table, if need be.
func NewEffects(t testing.TB, db *gorm.DB, name string) *Effects {
	t.Helper()
	if err := db.Exec("CREATE TABLE IF NOT EXISTS effects (handler text NOT NULL, event_id text NOT NULL)").Error; err != nil {
		t.Fatal(err)
	}
	return &Effects{db, name}
}

// Name implements worker.Handler.
func (f *Effects) Name() string { return f.name }

// Handle implements worker.Handler.
func (f *Effects) Handle(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
	rows := make([]map[string]any, len(batch))
	for i, e := range batch {
		rows[i] = map[string]any{"handler": f.name, "event_id": e.ID}
	}
	return tx.WithContext(ctx).Table("effects").Create(rows).Error
}

// Count is how often each event's effect happened.
func (f *Effects) Count(t testing.TB) map[string]int {
	t.Helper()
	var rows []struct {
		EventID string
		N       int
	}
	if err := f.db.Raw("SELECT event_id, count(*) AS n FROM effects WHERE handler = ? GROUP BY event_id", f.name).Scan(&rows).Error; err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, r := range rows {
		count[r.EventID] = r.N
	}
	return count
}

// When chooses events.
type When func(e *event.Event) bool

// Any chooses every event.
func Any(*event.Event) bool { return true }

// IDs chooses events by their ids.
func IDs(ids ...string) When {
	set := map[string]bool{}
	for _, id := range ids {
		set[id] = true
	}
	return func(e *event.Event) bool { return set[e.ID] }
}

// Always is a number of times without end.
const Always = -1

// Fail fails with err on each chosen event so many times, counted by the calls in which the event stands alone; a batch that holds
// such an event fails too.
func Fail(inner worker.Handler, times int, when When, err error) Handler {
	return before(inner, times, when, func(context.Context) error { return err })
}

// Panic is [Fail] with a panic.
func Panic(inner worker.Handler, times int, when When) Handler {
	return before(inner, times, when, func(context.Context) error { panic("fault on purpose") })
}

// Stall makes the handler wait for d on each chosen event, whatever ctx says, before it goes on; so many times.
func Stall(inner worker.Handler, times int, when When, d time.Duration) Handler {
	return before(inner, times, when, func(context.Context) error {
		time.Sleep(d)
		return nil
	})
}

// Hang makes the handler wait until its time is over.
func Hang(inner worker.Handler, times int, when When) Handler {
	return before(inner, times, when, func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
}

// before does something instead of the inner handler where it returns an error.
func before(inner worker.Handler, times int, when When, fault func(context.Context) error) Handler {
	left := newCountdown(times)
	return New(inner.Name(), func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
		for i := range batch {
			if e := &batch[i]; when(e) && left.hit(e.ID, len(batch) == 1) {
				if err := fault(ctx); err != nil {
					return err
				}
			}
		}
		return inner.Handle(ctx, tx, batch)
	})
}

// Forget applies each chosen event and then fails, so many times: the effect must be gone with the transaction.
func Forget(inner worker.Handler, times int, when When) Handler {
	left := newCountdown(times)
	return New(inner.Name(), func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
		if err := inner.Handle(ctx, tx, batch); err != nil {
			return err
		}
		for i := range batch {
			if e := &batch[i]; when(e) && left.hit(e.ID, len(batch) == 1) {
				return ErrFault
			}
		}
		return nil
	})
}

// countdown counts faults by event.
type countdown struct {
	mu    sync.Mutex
	times int
	spent map[string]int
}

func newCountdown(times int) *countdown { return &countdown{times: times, spent: map[string]int{}} }

func (c *countdown) hit(id string, count bool) bool {
	if c.times == Always {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.spent[id] >= c.times {
		return false
	}
	if count {
		c.spent[id]++
	}
	return true
}
