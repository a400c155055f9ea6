package worker_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/faults"
)

// Errors that say "outage" and that one event alone meets, and events that alone take long: the others go on, and it costs the one
// no attempt that the database does not take it.

// others waits until every event but one is applied, and returns the row of that one, once it has one.
func (b *bundle) others(handler string, n int, alone string) row {
	b.t.Helper()
	var rows map[string]row
	require.Eventually(b.t, func() bool {
		rows = b.deliveries(handler)
		if _, ok := rows[alone]; !ok || len(rows) != n {
			return false
		}
		for id, r := range rows {
			if id != alone && r.Status != "processed" {
				return false
			}
		}
		return true
	}, 60*time.Second, 10*time.Millisecond, "%d events but %s", n, alone)
	return rows[alone]
}

func (b *bundle) mixed(prefix, alone string) int {
	b.t.Helper()
	const n = 60
	for i := range n {
		id := fmt.Sprintf("%s_%d", prefix, i)
		if i == n/2 {
			id = alone
		}
		b.publish(id, user("user_"+id))
	}
	return n
}

// TestRowThatSomebodyHoldsHoldsUpItsEventsAlone: a transaction that was left open, as by an operator who went to lunch.
func TestRowThatSomebodyHoldsHoldsUpItsEventsAlone(t *testing.T) {
	t.Parallel()
	db := dbtest.Postgres(t)
	b := start(t, db, worker.Config{Attempts: 2})
	b.publish("first", user("user_held"))
	b.settled("mirror", 1)
	holder := db.Begin()
	require.NoError(t, holder.Exec("SELECT 1 FROM users WHERE id = 'user_held' FOR UPDATE").Error)

	n := b.mixed("beside", "held")
	held := b.others("mirror", n+1, "held")
	assert.Equal(t, "retrying", held.Status)
	assert.Zero(t, held.Attempts, "somebody else's lock costs no attempt")
	require.NotNil(t, held.Error)
	assert.Contains(t, *held.Error, "lock timeout")
	b.publish("later", user("user_later")) // while the lock is held still
	require.Eventually(t, func() bool { return b.deliveries("mirror")["later"].Status == "processed" }, 60*time.Second, 10*time.Millisecond)
	require.Eventually(t, func() bool { return len(b.health.Problems()) == 0 }, 60*time.Second, 10*time.Millisecond)

	require.NoError(t, holder.Rollback().Error)
	rows := b.settled("mirror", n+2)
	assert.Equal(t, "processed", rows["held"].Status)
	assert.Equal(t, 1, rows["held"].Attempts)
	assert.Empty(t, b.deadLetters())
}

// TestQuietHandlerIsNotHeldUpByARowThatSomebodyHolds: nothing but events of that row comes for a while, more of them than the lanes
// hold, and then a healthy one.
func TestQuietHandlerIsNotHeldUpByARowThatSomebodyHolds(t *testing.T) {
	t.Parallel()
	db := dbtest.Postgres(t)
	b := start(t, db, worker.Config{Attempts: 2, Concurrency: 1, BatchSize: 1})
	b.publish("first", user("user_held"))
	b.settled("mirror", 1)
	holder := db.Begin()
	require.NoError(t, holder.Exec("SELECT 1 FROM users WHERE id = 'user_held' FOR UPDATE").Error)
	const n = 8
	for i := range n {
		b.publish(fmt.Sprintf("held_%d", i), user("user_held"))
	}
	require.Eventually(t, func() bool { return strings.Contains(b.health.Problems()["worker mirror"], "lock timeout") }, 60*time.Second, 10*time.Millisecond)
	for i := range 3 {
		id := fmt.Sprintf("healthy_%d", i)
		b.publish(id, user("user_"+id))
		require.Eventually(t, func() bool { return b.deliveries("mirror")[id].Status == "processed" }, 60*time.Second, 10*time.Millisecond, "the row is held still")
	}
	require.NoError(t, holder.Rollback().Error)
	for id, r := range b.settled("mirror", 1+n+3) {
		assert.Equal(t, "processed", r.Status, id)
		assert.Equal(t, 1, r.Attempts, id)
	}
	assert.Empty(t, b.deadLetters())
}

// TestBrokenTriggerOfOneRowHoldsUpItsEventsAlone: the words are those of a table that is away, which else is an outage. SQLite
// compiles a trigger with every statement on its table, so there it is one.
func TestBrokenTriggerOfOneRowHoldsUpItsEventsAlone(t *testing.T) {
	t.Parallel()
	db := dbtest.Postgres(t)
	require.NoError(t, db.Exec("CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO nowhere (id) VALUES (NEW.id); RETURN NEW; END $$").Error)
	require.NoError(t, db.Exec("CREATE TRIGGER broken BEFORE INSERT ON users FOR EACH ROW WHEN (NEW.id = 'user_alone') EXECUTE FUNCTION broken()").Error)
	b := start(t, db, worker.Config{Attempts: 2, RetryMax: 4 * time.Second})
	n := b.mixed("beside", "alone")
	alone := b.others("mirror", n, "alone")
	assert.Equal(t, "retrying", alone.Status)
	assert.Zero(t, alone.Attempts)
	require.NotNil(t, alone.Error)
	assert.Contains(t, *alone.Error, "nowhere")
	require.Eventually(t, func() bool { return len(b.health.Problems()) == 0 }, 60*time.Second, 10*time.Millisecond)

	require.NoError(t, db.Exec("CREATE TABLE nowhere (id text)").Error)
	rows := b.settled("mirror", n)
	assert.Equal(t, "processed", rows["alone"].Status)
	assert.Equal(t, 1, rows["alone"].Attempts)
	assert.Empty(t, b.deadLetters())
}

// TestSlowEventHoldsUpItselfAlone: the events beside it, and those that come later, are applied before its time is over.
func TestSlowEventHoldsUpItselfAlone(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{Attempts: 2, RetryInitial: 10 * time.Millisecond, RetryMax: 20 * time.Millisecond, HandleTimeout: 12 * time.Second}, func(h worker.Handler) worker.Handler {
			return faults.Hang(h, faults.Always, faults.IDs("slow"))
		})
		r.send(ids("before", 30)...)
		r.send("slow")
		r.send(ids("behind", 30)...)
		r.work()
		require.Eventually(t, func() bool { return len(r.effects.Count(t)) == 60 }, 60*time.Second, 10*time.Millisecond, "the others do not wait for it")
		assert.NotContains(t, r.deliveries("effects"), "slow")
		if database.IsPostgres(db) { // SQLite has one writer, and the slow event is in its transaction
			r.send("later")
			require.Eventually(t, func() bool { return r.effects.Count(t)["later"] == 1 }, 60*time.Second, 10*time.Millisecond)
			assert.NotContains(t, r.deliveries("effects"), "slow")
		}
		rows, dead := r.ledger(90 * time.Second)
		assert.Equal(t, map[string]bool{"slow": true}, dead)
		assert.Equal(t, 2, rows["slow"].Attempts)
		require.NotNil(t, rows["slow"].Reason)
		assert.Equal(t, "timeout", *rows["slow"].Reason)
	})
}

// TestSlowEventThatComesByItselfHoldsUpItselfAlone is the same where nothing else is on its way.
func TestSlowEventThatComesByItselfHoldsUpItselfAlone(t *testing.T) {
	t.Parallel()
	hangs := make(chan struct{})
	first := sync.OnceFunc(func() { close(hangs) })
	r := newRig(t, dbtest.Postgres(t), worker.Config{Concurrency: 1, Attempts: 1, HandleTimeout: 20 * time.Second}, func(h worker.Handler) worker.Handler {
		h = faults.Hang(h, faults.Always, faults.IDs("slow"))
		return faults.New("effects", func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
			if batch[0].ID == "slow" {
				first()
			}
			return h.Handle(ctx, tx, batch)
		})
	})
	r.work()
	r.send("slow")
	<-hangs
	r.send("later")
	require.Eventually(t, func() bool { return r.effects.Count(t)["later"] == 1 }, 60*time.Second, 10*time.Millisecond)
	assert.NotContains(t, r.deliveries("effects"), "slow", "its time is not over yet")
	_, dead := r.ledger(60 * time.Second)
	assert.Equal(t, map[string]bool{"slow": true}, dead)
}

// TestWhereEveryEventTakesLongAllAreApplied: it is not one event's fault, and nothing is put off for it.
func TestWhereEveryEventTakesLongAllAreApplied(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.Postgres(t), worker.Config{Concurrency: 1}, func(h worker.Handler) worker.Handler {
		return faults.New("effects", func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
			for range batch {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(1200 * time.Millisecond):
				}
			}
			return h.Handle(ctx, tx, batch)
		})
	})
	r.send(ids("each", 12)...)
	r.work()
	r.untouched(50 * time.Second) // below AckWait: none of them comes twice
}
