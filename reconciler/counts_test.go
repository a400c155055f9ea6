package reconciler_test

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/reconciler"
)

// busy is an instance where one to three of each kind are always on their way: they have joined just before somebody counts, and their webhooks come a
// moment later.
type busy struct {
	*world
	member string // whose membership is the model of those that come
	on     atomic.Bool
	joined atomic.Int64
	mu     sync.Mutex
	swept  map[string]int  // pages of whole sweeps, by path
	coming []chan struct{} // closed once a webhook was delivered
}

const busyPause = 100 * time.Millisecond

func newBusy(t *testing.T, db *gorm.DB, users int) *busy {
	t.Helper()
	b := &busy{world: newWorld(t, db, emulator.APIConfig{}), swept: map[string]int{}}
	b.tell(users, all)
	for o := range b.clerk.Objects("organization_memberships") {
		b.member = o.ID
	}
	b.serve(emulator.APIConfig{Hook: func(r *http.Request) {
		query := r.URL.Query()
		if isPage(r) && query.Get("order_by") != "-updated_at" {
			b.mu.Lock()
			b.swept[r.URL.Path]++
			b.mu.Unlock()
		}
		b.arrived() // however slow the machine is, the pause was long enough
		if !b.on.Load() {
			return
		}
		var events []emulator.Event
		for range 1 + b.joined.Add(1)%3 {
			switch {
			case r.URL.Path == "/v1/users/count":
				_, some := b.clerk.SignUp()
				events = append(events, some...)
			case r.URL.Path == "/v1/organization_memberships" && !isPage(r):
				_, e, ok := b.clerk.Twin("organization_memberships", b.member)
				assert.True(t, ok)
				events = append(events, e)
			}
		}
		if len(events) > 0 {
			b.soon(events...)
		}
	}})
	t.Cleanup(b.arrived)
	return b
}

// soon delivers events within the pause of a sweep.
func (b *busy) soon(events ...emulator.Event) {
	done := make(chan struct{})
	b.mu.Lock()
	b.coming = append(b.coming, done)
	b.mu.Unlock()
	time.AfterFunc(busyPause/10, func() {
		defer close(done)
		b.deliver(events...)
	})
}

// arrived waits until all that is on its way was delivered.
func (b *busy) arrived() {
	b.mu.Lock()
	coming := b.coming
	b.mu.Unlock()
	for _, done := range coming {
		<-done
	}
}

// run runs a sweep and says which lists were swept whole.
func (b *busy) run(opts reconciler.Options) (*reconciler.Report, map[string]int) {
	b.t.Helper()
	b.mu.Lock()
	clear(b.swept)
	b.mu.Unlock()
	report, err := b.sweeper(func(c *reconciler.SweepConfig) { c.Pause = busyPause }).Reconcile(b.t.Context(), opts)
	require.NoError(b.t, err)
	require.Empty(b.t, report.Stopped)
	b.settle()
	b.mu.Lock()
	defer b.mu.Unlock()
	swept := map[string]int{}
	for path, n := range b.swept {
		swept[path] = n
	}
	return report, swept
}

func TestABusyInstanceIsNotSweptWholeForWhatIsOnItsWay(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		b := newBusy(t, db, 60)
		b.on.Store(true)
		_, swept := b.run(reconciler.Options{Kind: reconciler.Full})
		require.NotEmpty(t, swept["/v1/users"])
		opts := reconciler.Options{Kind: reconciler.Incremental}
		for range 3 {
			_, swept = b.run(opts)
			assert.Empty(t, swept)
		}

		// A delete is missed among all that: it is found within two runs.
		for _, table := range []string{"users", "organization_memberships"} {
			for o := range b.clerk.Objects(table) { // the oldest; a user's memberships go with him
				_, ok := b.clerk.Remove(table, o.ID)
				require.True(t, ok)
				break
			}
		}
		model, _ := b.clerk.Object("organization_memberships", b.member)
		require.Zero(t, model.DeletedAt)
		extra := int64(0)
		for range 2 {
			report, _ := b.run(opts)
			extra += report.Drift.Extra
		}
		assert.EqualValues(t, 2, extra)
		_, swept = b.run(opts)
		assert.Empty(t, swept)
		b.on.Store(false)
		b.arrived()
		assert.Zero(t, b.verify().Drift.Sum())
	})
}

// What a sweep of a busy instance notes is no difference that stays.
func TestAWholeSweepOfABusyInstanceLeavesBooksThatAreRight(t *testing.T) {
	t.Parallel()
	b := newBusy(t, dbtest.SQLite(t), 30)
	b.on.Store(true)
	_, _ = b.run(reconciler.Options{Kind: reconciler.Full})
	b.on.Store(false)
	b.arrived()
	for range 2 {
		requests := b.api.Requests()
		report, swept := b.run(reconciler.Options{Kind: reconciler.Incremental})
		assert.Zero(t, report.Drift.Sum(), report.Items)
		assert.Empty(t, swept)
		assert.LessOrEqual(t, b.api.Requests()-requests, 12)
	}
}

func TestCountsThatDifferTwiceAreLookedInto(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(60, all)
	report, err := w.full(reconciler.Options{})
	require.NoError(t, err)
	require.Zero(t, report.Drift.Sum(), report.Items)

	// Created, and its webhook is late: one run sees it, the next does not.
	var member string
	for id := range w.living("organization_memberships") {
		member = id
	}
	_, late, ok := w.clerk.Twin("organization_memberships", member)
	require.True(t, ok)
	assert.Zero(t, w.incremental().Drift.Sum())
	w.deliver(late)
	assert.Zero(t, w.incremental().Drift.Sum())

	// Lost: the second run looks.
	_, _, ok = w.clerk.Twin("organization_memberships", member)
	require.True(t, ok)
	assert.Zero(t, w.incremental().Drift.Sum())
	report = w.incremental()
	assert.EqualValues(t, 1, report.Drift.Missing)
	w.settle()

	// Deleted while nothing moves: that can only have been missed.
	_, ok = w.clerk.Remove("organization_memberships", member)
	require.True(t, ok)
	report = w.incremental()
	assert.EqualValues(t, 1, report.Drift.Extra)
	w.settle()

	// The user who came last, too, of whom nothing newer says how old he is.
	id, events := w.clerk.SignUp()
	w.deliver(events...)
	assert.Zero(t, w.incremental().Drift.Sum())
	_, ok = w.clerk.Remove("users", id)
	require.True(t, ok)
	extra := w.incremental().Drift.Extra + w.incremental().Drift.Extra
	assert.EqualValues(t, 1, extra)
	w.settle()
	assert.Zero(t, w.incremental().Drift.Sum())
	assert.Zero(t, w.verify().Drift.Sum())
}

// A run that turned into a whole sweep and was cut off in it is taken up as one.
func TestAnIncrementalSweepThatTurnedWholeIsTakenUpWhole(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(230, all)
	report, err := w.full(reconciler.Options{Resources: []string{"users"}})
	require.NoError(t, err)
	require.Zero(t, report.Drift.Sum(), report.Items)
	users := w.living("users")
	require.Greater(t, len(users), 4*page)
	for id := range users {
		_, ok := w.clerk.Remove("users", id) // unheard of
		require.True(t, ok)
		break
	}
	step := func(c *reconciler.SweepConfig) { c.Checkpoint, c.Pause = time.Nanosecond, time.Nanosecond }
	ctx, cancel := context.WithCancel(t.Context())
	opts := reconciler.Options{Kind: reconciler.Incremental, Resources: []string{"users"}, Progress: func(p reconciler.Progress) {
		if p.Total > 0 && p.Done > 90 {
			cancel()
		}
	}}
	_, err = w.sweeper(step).Reconcile(ctx, opts)
	require.ErrorIs(t, err, context.Canceled)
	opts.Progress = nil
	var from []string
	w.serve(emulator.APIConfig{Hook: func(r *http.Request) {
		if isUsersPage(r) {
			from = append(from, r.URL.Query().Get("starting_after"))
		}
	}})
	report, err = w.sweeper(step).Reconcile(t.Context(), opts)
	require.NoError(t, err)
	assert.Empty(t, report.Stopped)
	assert.EqualValues(t, 1, report.Drift.Extra)
	assert.EqualValues(t, len(users)-1, report.Checked["users"])
	require.NotEmpty(t, from)
	assert.NotEmpty(t, from[0], "it began again")
	w.settle()
	assert.Zero(t, w.incremental().Drift.Sum())
}
