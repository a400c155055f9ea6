package reconciler_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/reconciler"
)

type run struct{ ID, Kind, Status, Stopped, Error string }

// runs are all runs, the oldest first.
func (w *world) runs() []run {
	w.t.Helper()
	var runs []run
	require.NoError(w.t, w.db.Table("reconcile_runs").Order("started_at").Find(&runs).Error)
	return runs
}

// emptied is a world in which nearly all users are gone at Clerk, as it looks with the key of another instance.
func emptied(t *testing.T) *world {
	t.Helper()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(80, all)
	users := w.living("users")
	left := len(users)
	for id := range users {
		if left--; left < 5 {
			break
		}
		_, ok := w.clerk.Remove("users", id)
		require.True(t, ok)
	}
	return w
}

// serviceRuns lets a service run until it has ended so many runs more.
func (w *world) serviceRuns(n int) {
	w.t.Helper()
	r, err := reconciler.New(reconciler.Config{
		Poll: 20 * time.Millisecond, Interval: 50 * time.Millisecond, SilenceEvery: time.Hour, Sources: []clerk.Source{w.source()},
		Sweep: reconciler.SweepConfig{Pause: 10 * time.Millisecond},
	}, reconciler.Deps{JetStream: w.js, DB: w.db, Log: zap.NewNop(), Health: &observe.Health{}})
	require.NoError(w.t, err)
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	ended := func() (n int64) {
		require.NoError(w.t, w.db.Table("reconcile_runs").Where("status <> 'running' AND stopped <> 'interrupted' AND kind <> 'backfill'").Count(&n).Error)
		return n
	}
	before := ended()
	require.Eventually(w.t, func() bool { return ended() >= before+int64(n) }, 60*time.Second, 10*time.Millisecond)
	cancel()
	require.NoError(w.t, <-done)
}

func TestTheServiceNeverGoesOnWithARunThatAPersonForced(t *testing.T) {
	t.Parallel()
	opts := reconciler.Options{Kind: reconciler.Full, Force: true, Resources: []string{"users"}}
	for name, end := range map[string]func(t *testing.T, w *world){
		"Interrupted": func(t *testing.T, w *world) {
			t.Helper()
			assert.Equal(t, []run{{w.runs()[0].ID, "full", "stopped", "interrupted", ""}}, w.runs())
		},
		"Killed": func(t *testing.T, w *world) { // which leaves the row as the last checkpoint wrote it
			t.Helper()
			require.NoError(t, w.db.Exec("UPDATE reconcile_runs SET status = 'running', stopped = '', finished_at = NULL").Error)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := emptied(t)
			before := w.living("users")
			ctx, cancel := context.WithCancel(t.Context())
			opts := opts
			opts.Progress = func(reconciler.Progress) { cancel() } // second thoughts
			report, err := w.sweeper().Reconcile(ctx, opts)
			require.ErrorIs(t, err, context.Canceled)
			require.Zero(t, report.Published)
			end(t, w)
			w.serviceRuns(1)
			w.settle()
			assert.Len(t, w.living("users"), len(before), "the service deleted what it may not")
			first := w.runs()[0]
			assert.NotEqual(t, "succeeded", first.Status)

			// The person says it again.
			report, err = w.sweeper().Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Full, Force: true, Resources: []string{"users"}})
			require.NoError(t, err)
			assert.Positive(t, report.Drift.Extra)
			w.settle()
			assert.Less(t, len(w.living("users")), 10)
		})
	}
}

func TestAnInterruptedRunIsOverForTheServiceAndGoesOnByCommand(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{Crowd: emulator.NewCrowd(260)})
	ctx, cancel := context.WithCancel(t.Context())
	var users, pages atomic.Int64
	quick := func(c *reconciler.SweepConfig) { c.Checkpoint = time.Nanosecond }
	opts := reconciler.Options{Kind: reconciler.Backfill, Progress: func(p reconciler.Progress) {
		if users.Store(p.Done); p.Done >= 150 {
			cancel()
		}
	}}
	_, err := w.sweeper(quick).Reconcile(ctx, opts)
	require.ErrorIs(t, err, context.Canceled)
	require.GreaterOrEqual(t, users.Load(), int64(150))
	first := w.runs()[0]
	assert.Equal(t, run{first.ID, "backfill", "stopped", "interrupted", ""}, first)
	w.settle()

	w.serviceRuns(1) // a full sweep: the mirror has had none yet
	runs := w.runs()
	assert.Equal(t, first, runs[0])
	assert.Equal(t, "full", runs[1].Kind)
	w.settle()

	pages.Store(0)
	opts.Progress = func(p reconciler.Progress) {
		if pages.Add(1) == 1 {
			assert.Greater(t, p.Done, int64(150), "it began again")
		}
	}
	_, err = w.sweeper(quick).Reconcile(t.Context(), opts)
	require.NoError(t, err)
	assert.Equal(t, run{first.ID, "backfill", "succeeded", "", ""}, w.runs()[0])
	assert.Zero(t, w.verify().Drift.Sum())
}
