package reconciler_test

import (
	"context"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/reconciler"
)

func TestAFullSweepHealsEveryClassAndPublishesOneEventForEach(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		n := 0
		w.tell(70, func(e emulator.Event) bool { n++; return n%9 != 0 })
		// Other content, same version: written by hand.
		var id string
		require.NoError(t, w.db.Raw("SELECT id FROM users WHERE deleted_at IS NULL ORDER BY id LIMIT 1").Scan(&id).Error)
		require.NoError(t, w.db.Exec(`UPDATE users SET raw = '{"id":"`+id+`","object":"user"}' WHERE id = ? AND version > 0`, id).Error)

		before := w.verify()
		require.Positive(t, before.Drift.Missing)
		require.Positive(t, before.Drift.Stale)
		require.Positive(t, before.Drift.Extra)
		require.Positive(t, before.Drift.Different)
		report, err := w.full(reconciler.Options{Force: true})
		require.NoError(t, err)
		assert.Equal(t, before.Drift, report.Drift)
		assert.Equal(t, report.Drift.Sum(), report.Published)
		again, err := w.full(reconciler.Options{Force: true}) // before anything of it was applied
		require.NoError(t, err)
		assert.Zero(t, again.Published, "what is on its way is not published again")

		applied := w.settle()
		assert.Len(t, applied, int(report.Published))
		for _, e := range applied {
			assert.Equal(t, event.OriginReconcile, e.Origin)
			assert.Regexp(t, `^rec_[0-9a-f]{32}$`, e.ID)
		}
		after := w.verify()
		assert.Zero(t, after.Drift.Sum(), after.Items)

		var runs []struct {
			Status                           string
			Missing, Stale, Different, Extra int64
		}
		require.NoError(t, w.db.Table("reconcile_runs").Order("started_at").Find(&runs).Error)
		require.Len(t, runs, 2)
		assert.Equal(t, "succeeded", runs[0].Status)
		var drifts int64
		require.NoError(t, w.db.Table("drifts").Where("event_id <> ''").Count(&drifts).Error)
		assert.Equal(t, report.Published, drifts)

		// The same drift once more is another event: the inbox knows the first.
		require.NoError(t, w.db.Exec("DELETE FROM users WHERE id = ?", id).Error)
		report, err = w.full(reconciler.Options{})
		require.NoError(t, err)
		assert.EqualValues(t, 1, report.Published)
		w.settle()
		require.NoError(t, w.db.Exec("DELETE FROM users WHERE id = ?", id).Error)
		report, err = w.full(reconciler.Options{})
		require.NoError(t, err)
		assert.EqualValues(t, 1, report.Published)
		w.settle()
		assert.Zero(t, w.verify().Drift.Sum())
	})
}

func TestDryRunAndVerifyPublishNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(30, func(e emulator.Event) bool { return e.Type != "user.updated" })
	report, err := w.full(reconciler.Options{DryRun: true})
	require.NoError(t, err)
	assert.Positive(t, report.Drift.Sum())
	assert.Zero(t, report.Published)
	assert.Equal(t, report.Drift, w.verify().Drift)
	assert.Empty(t, w.settle())
}

func TestNeverAWrongDelete(t *testing.T) {
	t.Parallel()
	type moods = []emulator.Mood
	for name, test := range map[string]struct {
		cfg   emulator.APIConfig
		moods moods // of every request to a list, after the first
		key   string
		// what must come of it
		fails   error
		stopped string
		either  bool // or nothing
	}{
		"WrongKey":      {key: "sk_test_wrong", fails: clerk.ErrUnauthorized},
		"WrongInstance": {key: "sk_test_other", stopped: "another instance"},
		"CountTooHigh":  {moods: moods{emulator.CountHigh}, stopped: "Clerk counts"},
		"CountTooLow":   {moods: moods{emulator.CountLow}, stopped: "Clerk counts"},
		"ShortPages":    {moods: moods{emulator.Short}, fails: clerk.ErrUnreadable, either: true},
		"LimitOfTen":    {moods: moods{emulator.TenOnly}, fails: clerk.ErrUnreadable},
		"BadGateway":    {moods: moods{emulator.BadGateway}, fails: context.Canceled},
		"EmptyAnswers":  {moods: moods{emulator.Empty}, fails: clerk.ErrUnreadable},
		"Redirects":     {moods: moods{emulator.Redirect}, fails: clerk.ErrUnreadable},
		"Pages of HTML": {moods: moods{emulator.Garbled}, fails: clerk.ErrUnreadable},
		"NoIDs":         {moods: moods{emulator.NoID}, fails: clerk.ErrUnreadable},
		"SaysDeleted":   {moods: moods{emulator.SaysDeleted}, fails: clerk.ErrUnreadable},
		"OldAPI":        {cfg: emulator.APIConfig{NoCursor: true}},
		"IgnoredCursor": {cfg: emulator.APIConfig{IgnoreCursor: true}},
		"StrictLimit":   {cfg: emulator.APIConfig{Strict: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
			w.tell(60, func(e emulator.Event) bool { return e.Type != "user.deleted" }) // enough for a tenth of them to be more than is let pass
			other := emulator.New(emulator.Config{Seed: 99})
			for range other.Story(50) {
			}
			test.cfg.Others = map[string]*emulator.Clerk{"sk_test_other": other}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var asked atomic.Int64
			test.cfg.Hook = func(*http.Request) {
				if asked.Add(1) == 4 && test.fails == context.Canceled { //nolint:errorlint // of the table
					cancel() // no patience for an API that only fails
				}
			}
			w.serve(test.cfg)
			before, extra := w.living("users"), int64(0)
			for id := range before {
				if o, _ := w.clerk.Object("users", id); o.DeletedAt != 0 {
					extra++
				}
			}
			require.Positive(t, extra)
			source := w.source()
			if test.key != "" {
				source.SecretKey = test.key
			}
			metrics := reconciler.NewMetrics(nil)
			client, err := reconciler.Client(source, nil, metrics)
			require.NoError(t, err)
			defer client.Close()
			if len(test.moods) > 0 {
				w.api.SetMoods(map[emulator.Mood]float64{test.moods[0]: 1})
			}
			report, err := w.sweeperOf(client, func(c *reconciler.SweepConfig) { c.ExtraShare = .5 }).Reconcile(ctx, reconciler.Options{Resources: []string{"users"}})
			if test.either && err == nil {
				test.fails = nil
			}
			switch {
			case test.fails != nil:
				require.ErrorIs(t, err, test.fails)
			case test.stopped != "":
				require.NoError(t, err)
				assert.Contains(t, report.Stopped, test.stopped)
			default:
				require.NoError(t, err)
				assert.Empty(t, report.Stopped)
				assert.Equal(t, extra, report.Drift.Extra)
			}
			w.settle()
			w.nobodyWronged(before)
			if test.fails != nil || test.stopped != "" {
				assert.Len(t, w.living("users"), len(before), "nothing was deleted, and nobody of another instance came")
			}
			var status string
			require.NoError(t, w.db.Raw("SELECT status FROM reconcile_runs").Scan(&status).Error)
			assert.Equal(t, test.fails == nil && test.stopped == "", status == "succeeded")
		})
	}
}

func TestManyExtrasStopTheRunUnlessForced(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(80, all)
	before := w.living("users")
	n := 0
	for id := range before {
		if n++; n > 10 {
			break
		}
		_, ok := w.clerk.Remove("users", id)
		require.True(t, ok)
	}
	report, err := w.full(reconciler.Options{})
	require.NoError(t, err)
	assert.Contains(t, report.Stopped, "--force")
	assert.Empty(t, w.settle())
	assert.EqualValues(t, 10, w.verify().Drift.Extra)
	report, err = w.full(reconciler.Options{Force: true})
	require.NoError(t, err)
	assert.Empty(t, report.Stopped)
	assert.EqualValues(t, 10, report.Drift.Extra)
	w.settle()
	assert.Zero(t, w.verify().Drift.Sum())
}

// A table that stops the run comes after others, of which little is to go: nothing goes of those either.
func TestATableThatStopsTheRunKeepsTheDeletesOfAllOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(120, all)
	removeOf := func(table string, n int) {
		for o := range w.clerk.Objects(table) {
			if n--; n < 0 {
				return
			}
			_, ok := w.clerk.Remove(table, o.ID)
			require.True(t, ok)
		}
	}
	removeOf("users", 2) // and their memberships
	left, _ := w.clerk.Count("organization_memberships")
	removeOf("organization_memberships", left/2)
	users, memberships := w.living("users"), w.living("organization_memberships")
	report, err := w.full(reconciler.Options{})
	require.NoError(t, err)
	assert.Contains(t, report.Stopped, "organization_memberships: at least")
	assert.Zero(t, report.Drift.Extra)
	assert.Empty(t, w.settle())
	assert.Equal(t, users, w.living("users"))
	assert.Equal(t, memberships, w.living("organization_memberships"))
	report, err = w.full(reconciler.Options{Force: true})
	require.NoError(t, err)
	assert.Empty(t, report.Stopped)
	assert.GreaterOrEqual(t, report.Drift.Extra, int64(2+len(memberships)/2))
	w.settle()
	assert.Zero(t, w.verify().Drift.Sum())
}

func TestUsersComeAndGoDuringTheSweep(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(180, all)
		before := w.living("users")
		var late []emulator.Event // whose webhooks come after the sweep
		var pages atomic.Int64
		w.serve(emulator.APIConfig{Hook: func(r *http.Request) {
			if r.URL.Path != "/v1/users" || pages.Add(1) > 4 {
				return
			}
			_, events := w.clerk.SignUp()
			late = append(late, events...)
			n := 0
			for o := range w.clerk.Objects("users") { // the oldest, whose page may be gone
				if n++; n%40 == 0 {
					if e, ok := w.clerk.Remove("users", o.ID); ok {
						late = append(late, e)
					}
				}
			}
		}})
		report, err := w.sweeper(func(c *reconciler.SweepConfig) { c.ExtraShare = .5 }).Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Full})
		require.NoError(t, err)
		assert.Empty(t, report.Stopped)
		w.settle()
		w.nobodyWronged(before)
		w.deliver(late...)
		after := w.verify()
		assert.Zero(t, after.Drift.Sum(), after.Items)
		for o := range w.clerk.Deleted("users") {
			assert.False(t, w.living("users")[o.ID], "%s is deleted and came back", o.ID)
		}
	})
}

func TestACutOffRunGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) { cutOff(t, db, 5*page+10, page) })
	t.Run("PagesAsLargeAsClerkHasThem", func(t *testing.T) {
		t.Parallel()
		cutOff(t, dbtest.SQLite(t), 1100, 500)
	})
}

// cutOff cuts a backfill of so many users off at its last page but one, or at its last where there are three, and lets another go on.
func cutOff(t *testing.T, db *gorm.DB, users, size int) {
	t.Helper()
	w := newWorld(t, db, emulator.APIConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	var requests atomic.Int64
	pages := (users + size - 1) / size
	w.serve(emulator.APIConfig{Crowd: emulator.NewCrowd(users), Hook: func(r *http.Request) {
		if r.URL.Path == "/v1/users" && requests.Add(1) == int64(2+max(3, pages-1)) { // two ask for the newest
			cancel()
		}
	}})
	source := w.source()
	source.PageSize = size
	client, err := reconciler.Client(source, nil, reconciler.NewMetrics(nil))
	require.NoError(t, err)
	t.Cleanup(client.Close)
	opts := reconciler.Options{Kind: reconciler.Backfill, Resources: []string{"users"}}
	quick := func(c *reconciler.SweepConfig) { c.Checkpoint = time.Nanosecond }
	first, err := w.sweeperOf(client, quick).Reconcile(ctx, opts)
	require.ErrorIs(t, err, context.Canceled)
	require.Positive(t, first.Published)
	requests.Store(100)
	second, err := w.sweeperOf(client, quick).Reconcile(t.Context(), opts)
	require.NoError(t, err)
	assert.EqualValues(t, users, second.Checked["users"])
	assert.Greater(t, second.Published, first.Published, "over both parts")
	assert.LessOrEqual(t, second.Published, int64(users), "but for those whose ack was cut off")
	assert.LessOrEqual(t, requests.Load(), int64(100+pages), "it began again")
	applied := w.settle()
	assert.Len(t, applied, users, "each once")
	for _, e := range applied {
		assert.Equal(t, event.OriginBackfill, e.Origin)
	}
	assert.Len(t, w.living("users"), users)
	var runs int64
	require.NoError(t, w.db.Table("reconcile_runs").Where("status = 'succeeded'").Count(&runs).Error)
	assert.EqualValues(t, 1, runs)
}

func TestAnIncrementalSweepIsCheapAndFindsWhatChanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(130, all)
	report, err := w.full(reconciler.Options{})
	require.NoError(t, err)
	require.Zero(t, report.Drift.Sum(), report.Items)
	incremental := func() (*reconciler.Report, int) {
		before := w.api.Requests()
		report, err := w.sweeper().Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Incremental})
		require.NoError(t, err)
		w.settle()
		return report, w.api.Requests() - before
	}
	report, requests := incremental()
	assert.Zero(t, report.Drift.Sum(), report.Items)
	assert.LessOrEqual(t, requests, 12)

	var id string
	for o := range w.clerk.Objects("users") {
		id = o.ID
	}
	_, ok := w.clerk.Edit("users", id, map[string]any{"first_name": "Grace"})
	require.True(t, ok)
	_, _ = w.clerk.SignUp()
	report, _ = incremental()
	assert.EqualValues(t, 1, report.Drift.Stale)
	assert.EqualValues(t, 1, report.Drift.Missing)
	_, ok = w.clerk.Remove("users", id)
	require.True(t, ok)
	report, _ = incremental()
	assert.EqualValues(t, 1, report.Drift.Extra, "the counts said so")
	report, requests = incremental()
	assert.Zero(t, report.Drift.Sum())
	assert.LessOrEqual(t, requests, 12)
	assert.Zero(t, w.verify().Drift.Sum())
}

func TestWhatIsOnItsWayIsNotDrift(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(40, all)
	_, events := w.clerk.SignUp()
	for _, e := range events {
		publishWebhook(t, w, e)
	}
	report, err := w.full(reconciler.Options{})
	require.NoError(t, err)
	assert.Zero(t, report.Drift.Sum(), report.Items)
	assert.Zero(t, w.verify().Drift.Sum())
	w.settle()
	assert.Zero(t, w.verify().Drift.Sum())
}
