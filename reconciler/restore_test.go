package reconciler_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/reconciler"
)

// backup copies what a backup of the mirror's database would have, and returns what takes the database back to it.
func (w *world) backup() (restore func()) {
	w.t.Helper()
	tables := append(clerk.Resources(), "sessions", "deliveries", "reconcile_runs")
	for _, table := range tables {
		require.NoError(w.t, w.db.Exec("CREATE TABLE backup_"+table+" AS SELECT * FROM "+table).Error)
	}
	return func() {
		w.t.Helper()
		require.NoError(w.t, w.db.Exec("DELETE FROM drifts").Error)
		for _, table := range tables {
			require.NoError(w.t, w.db.Exec("DELETE FROM "+table).Error)
			require.NoError(w.t, w.db.Exec("INSERT INTO "+table+" SELECT * FROM backup_"+table).Error)
		}
	}
}

func nothing(emulator.Event) bool { return false }

func TestANewDatabaseBesideTheSameBrokerIsFilled(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(25, nothing)
		opts := reconciler.Options{Kind: reconciler.Backfill}
		sweeper := w.sweeper() // one process: it remembers what it published
		empty := w.backup()
		var missing int64
		for range 4 {
			report, err := sweeper.Reconcile(t.Context(), opts)
			require.NoError(t, err)
			if missing == 0 {
				missing = report.Drift.Missing
			}
			require.Positive(t, missing)
			assert.Equal(t, missing, report.Drift.Missing)
			assert.Equal(t, missing, report.Published)
			again, err := w.sweeper().Reconcile(t.Context(), opts)
			require.NoError(t, err)
			assert.Zero(t, again.Published, "it is on its way: what two runs find is one event")
			assert.Len(t, w.settle(), int(missing))
			assert.Zero(t, w.verify().Drift.Sum())
			empty()
		}
	})
}

func TestADatabaseTakenBackToABackupIsHealed(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(60, nothing)
		heal := func() *reconciler.Report {
			report, err := w.full(reconciler.Options{})
			require.NoError(t, err)
			require.Empty(t, report.Stopped)
			w.settle()
			return report
		}
		heal()
		restore := w.backup()
		n := 0
		for o := range w.clerk.Objects("users") {
			switch n++; n {
			case 1, 2:
				w.clerk.Edit("users", o.ID, map[string]any{"first_name": "Grace"})
			case 3, 4:
				w.clerk.Remove("users", o.ID)
			}
		}
		w.clerk.SignUp()
		after := heal()
		require.EqualValues(t, 2, after.Drift.Stale)
		require.EqualValues(t, 2, after.Drift.Extra)
		require.EqualValues(t, 1, after.Drift.Missing)
		require.Zero(t, w.verify().Drift.Sum())
		for range 2 {
			restore()
			report := heal()
			assert.Equal(t, after.Drift, report.Drift)
			assert.Equal(t, after.Drift.Sum(), report.Published)
			assert.Zero(t, w.verify().Drift.Sum())
		}
	})
}

// Sweeps find what others have published, while a worker applies it: it is at most applied, or on its way, and never lost.
func TestWhatIsBeingAppliedIsNotLost(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{Crowd: emulator.NewCrowd(300)})
	ctx, stop := context.WithCancel(t.Context())
	var applied []event.Event
	var group sync.WaitGroup
	group.Go(func() {
		for ctx.Err() == nil {
			applied = append(applied, w.settle()...)
		}
	})
	for range 4 {
		_, err := w.sweeper().Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Backfill, Resources: []string{"users"}})
		require.NoError(t, err)
	}
	stop()
	group.Wait()
	applied = append(applied, w.settle()...)
	assert.Len(t, applied, 300, "each once")
}

// A delete that ended as a dead letter is for a person to look at: the sweep does not send it again and again.
func TestADeadLetterIsNoLostEvent(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(20, all)
	w.clerk.SignUp()
	report, err := w.full(reconciler.Options{})
	require.NoError(t, err)
	require.EqualValues(t, 1, report.Published)
	w.settle()
	id := report.Items[0].ID
	require.NoError(t, w.db.Exec("UPDATE deliveries SET status = 'dead' WHERE event_id = ?", report.Items[0].EventID).Error)
	require.NoError(t, w.db.Exec("DELETE FROM users WHERE id = ?", id).Error)
	report, err = w.full(reconciler.Options{})
	require.NoError(t, err)
	assert.EqualValues(t, 1, report.Drift.Missing)
	assert.Zero(t, report.Published)
}

func TestTheServiceFillsANewDatabase(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(25, nothing)
	_, err := w.sweeper().Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Backfill})
	require.NoError(t, err)
	w.settle()
	want := w.living("users")
	require.NotEmpty(t, want)
	w.db = dbtest.SQLite(t)
	r, err := reconciler.New(reconciler.Config{
		Poll: 20 * time.Millisecond, SilenceEvery: time.Hour, Sources: []clerk.Source{w.source()}, Sweep: reconciler.SweepConfig{Pause: 10 * time.Millisecond},
	}, reconciler.Deps{JetStream: w.js, DB: w.db, Log: zap.NewNop(), Health: &observe.Health{}})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	defer func() {
		cancel()
		require.NoError(t, <-done)
	}()
	require.Eventually(t, func() bool { w.settle(); return len(w.living("users")) == len(want) }, 60*time.Second, 50*time.Millisecond)
}
