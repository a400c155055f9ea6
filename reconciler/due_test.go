package reconciler

import (
	"context"
	"encoding/json"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
)

// history writes runs as others have made them.
type history struct {
	t  *testing.T
	db *gorm.DB

	source string
	n      int
}

func (h *history) run(kind Kind, status string, ago time.Duration, change ...func(*runRow, *state)) {
	h.t.Helper()
	h.n++
	at := time.Now().UTC().Add(-ago)
	r := &runRow{ID: "run_" + h.source + strconv.Itoa(h.n), Source: h.source, Kind: kind, Status: status, StartedAt: at, UpdatedAt: at, Checked: "{}"}
	if status != running {
		r.FinishedAt = &at
	}
	st := &state{Resources: clerk.Resources(), Origin: event.OriginReconcile, Tables: map[string]*progress{}}
	for _, f := range change {
		f(r, st)
	}
	body, err := json.Marshal(st)
	require.NoError(h.t, err)
	r.State = string(body)
	require.NoError(h.t, h.db.Create(r).Error)
}

func TestWhatIsDue(t *testing.T) {
	t.Parallel()
	const hour = time.Hour
	users := func(_ *runRow, st *state) { st.Resources = []string{"users"} }
	forced := func(_ *runRow, st *state) { st.Force = true }
	dry := func(r *runRow, _ *state) { r.DryRun = true }
	interruptedRun := func(r *runRow, _ *state) { r.Stopped = interrupted }
	full, firstFull, incremental := Options{Kind: Full}, Options{Kind: Full, origin: event.OriginBackfill}, Options{Kind: Incremental}
	cases := map[string]struct {
		history func(h *history)
		want    Options
	}{
		"Nothing":    {func(*history) {}, firstFull},
		"Yesterday":  {func(h *history) { h.run(Full, succeeded, 25*hour) }, full},
		"JustNow":    {func(h *history) { h.run(Full, succeeded, time.Minute) }, Options{}},
		"AnHourAgo":  {func(h *history) { h.run(Full, succeeded, hour) }, incremental},
		"Backfilled": {func(h *history) { h.run(Backfill, succeeded, 25*hour) }, full},
		"OnlyLooked": {func(h *history) { h.run(Full, succeeded, hour, dry) }, firstFull},
		"ALongOutage": {func(h *history) {
			h.run(Full, succeeded, 25*hour)
			for i := range 30 {
				h.run(Full, failed, time.Duration(i)*time.Minute)
			}
		}, full},
		"ManyPartialRuns": {func(h *history) {
			h.run(Full, succeeded, 2*hour)
			for i := range 30 {
				h.run(Full, succeeded, time.Duration(i)*time.Minute, users)
				h.run(Incremental, succeeded, time.Duration(i)*time.Minute, users)
			}
		}, incremental},
		"ManyStopped": {func(h *history) {
			h.run(Full, succeeded, 100*24*hour)
			for i := range 30 {
				h.run(Full, stopped, 25*hour+time.Duration(i)*24*hour)
			}
		}, full},
		"StoppedToday": {func(h *history) {
			h.run(Full, succeeded, 25*hour)
			h.run(Full, stopped, time.Minute)
		}, Options{}},
		"NeverSucceeded": {func(h *history) { h.run(Full, stopped, 25*hour); h.run(Full, succeeded, 25*hour, users) }, firstFull},
		"Interrupted": {func(h *history) {
			h.run(Full, succeeded, 25*hour)
			h.run(Full, stopped, time.Minute, interruptedRun)
		}, full},
		"CutOff": {func(h *history) {
			h.run(Full, succeeded, hour)
			h.run(Full, running, time.Minute, users)
		}, Options{Kind: Full, Resources: []string{"users"}, origin: event.OriginReconcile}},
		"CutOffAndForced": {func(h *history) {
			h.run(Full, succeeded, time.Minute)
			h.run(Full, running, 0, forced)
		}, Options{}},
		"CutOffLongAgo": {func(h *history) {
			h.run(Full, running, 25*hour)
			h.run(Full, succeeded, time.Minute)
		}, Options{}},
	}
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for name, test := range cases {
			t.Run(name, func(t *testing.T) {
				test.history(&history{t: t, db: db, source: name})
				s := NewSweeper(SweepConfig{Source: name}, SweepDeps{DB: db, Log: zap.NewNop()})
				got, next, err := s.due(t.Context(), Config{Interval: 10 * time.Minute, FullInterval: 24 * hour})
				require.NoError(t, err)
				assert.Equal(t, test.want, got)
				assert.Equal(t, got.Kind == "", time.Now().Before(next))
			})
		}
	})
}

// Where a full sweep is so rare that the books of the last one are old, they are kept all the same.
func TestTheLastWholeRunIsNotForgotten(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		h := &history{t: t, db: db, source: "clerk"}
		h.run(Full, succeeded, 2*keepRuns)
		h.run(Full, succeeded, keepRuns+time.Hour)
		h.run(Incremental, succeeded, keepRuns+time.Minute)
		h.run(Incremental, succeeded, time.Minute)
		s := NewSweeper(SweepConfig{Source: "clerk"}, SweepDeps{DB: db, Log: zap.NewNop()})
		s.forget(t.Context())
		var ids []string
		require.NoError(t, db.Table("reconcile_runs").Order("id").Pluck("id", &ids).Error)
		assert.Equal(t, []string{"run_clerk2", "run_clerk4"}, ids)
	})
}

// A service that has nothing to do asks the database a few times a minute, however often it looks.
func TestAnIdleServiceLeavesTheDatabaseAlone(t *testing.T) {
	t.Parallel()
	_, js := natstest.New(t).Setup()
	db := dbtest.SQLite(t)
	h := &history{t: t, db: db, source: "clerk"}
	h.run(Full, succeeded, time.Minute)
	r, err := New(Config{Sources: []clerk.Source{{Name: "clerk", APIURL: "http://127.0.0.1:1/v1", SecretKey: "sk_test_idle"}}},
		Deps{JetStream: js, DB: db, Log: zap.NewNop(), Health: &observe.Health{}})
	require.NoError(t, err)
	defer r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() { r.presence.Run(ctx) })
	defer group.Wait()
	defer cancel()
	require.Eventually(t, func() bool { return r.presence.Check() == nil }, 60*time.Second, 10*time.Millisecond)
	var asked int
	require.NoError(t, db.Callback().Query().After("gorm:query").Register("count", func(*gorm.DB) { asked++ }))
	s := r.sources[0]
	for range 100 {
		r.turn(ctx, s)
	}
	assert.Positive(t, asked)
	assert.LessOrEqual(t, asked, 5)
	assert.WithinDuration(t, time.Now().Add(9*time.Minute), s.next, time.Minute)

	// The time has come: the lease is tried at each look, and the database asked under it only.
	asked, s.next = 0, time.Now()
	held, _, err := acquire(ctx, js, leaseKey, "another", time.Minute)
	require.NoError(t, err)
	for range 20 {
		r.turn(ctx, s)
	}
	assert.Zero(t, asked)
	held.release()
	r.turn(ctx, s)
	assert.Positive(t, asked)
	assert.True(t, time.Now().Before(s.next), "it was not due after all")

	// Another process was killed.
	h.run(Incremental, running, 0, func(_ *runRow, st *state) { st.Force = true })
	s.asked = s.asked.Add(-askEvery)
	asked = 0
	r.turn(ctx, s)
	assert.Positive(t, asked)
	assert.True(t, time.Now().Before(s.next), "a person's")
}
