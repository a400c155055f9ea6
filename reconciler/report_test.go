package reconciler_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/reconciler"
)

// serveThrough opens an API some of whose requests are answered by another.
func (w *world) serveThrough(other func(http.ResponseWriter, *http.Request) bool) {
	w.t.Helper()
	w.api = w.clerk.API(emulator.APIConfig{Key: key})
	w.server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if !other(rw, r) {
			w.api.ServeHTTP(rw, r)
		}
	}))
	w.t.Cleanup(w.server.Close)
}

// status is how the newest run ended.
func (w *world) status() string {
	w.t.Helper()
	var status string
	require.NoError(w.t, w.db.Raw("SELECT status FROM reconcile_runs ORDER BY started_at DESC LIMIT 1").Scan(&status).Error)
	return status
}

func TestATableThatCannotBeReadKeepsNoOtherFromBeingSwept(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(60, all)
		removed := map[string]string{}
		for _, table := range []string{"users", "organization_domains"} {
			for id := range w.living(table) {
				_, ok := w.clerk.Remove(table, id)
				require.True(t, ok)
				removed[table] = id
				break
			}
		}
		var role string
		for role = range w.living("roles") {
		}
		_, ok := w.clerk.Edit("roles", role, map[string]any{"name": "Other"})
		require.True(t, ok)
		answer := func(status int, code string) {
			w.serveThrough(func(rw http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "domains") || r.URL.Path == "/v1/organization_domains" && status == http.StatusNotFound {
					return false
				}
				rw.WriteHeader(status)
				_, _ = rw.Write([]byte(`{"errors":[{"code":"` + code + `","message":"not found","long_message":"not found"}]}`))
				return true
			})
		}
		answer(http.StatusNotFound, "resource_not_found")
		found, err := w.sweeper().Verify(t.Context(), reconciler.Options{})
		require.ErrorIs(t, err, clerk.ErrUnreadable)
		assert.Contains(t, found.Failed["organization_domains"], "organization_domains")
		report, err := w.full(reconciler.Options{})
		require.ErrorIs(t, err, clerk.ErrUnreadable)
		assert.ErrorContains(t, err, "sweep organization_domains")
		assert.Len(t, report.Failed, 1)
		assert.Equal(t, "failed", w.status())
		for _, table := range []string{"roles", "permissions", "waitlist_entries"} {
			assert.Contains(t, report.Checked, table)
		}
		assert.NotContains(t, report.Checked, "organization_domains")
		assert.Equal(t, reconciler.Counts{Stale: 1, Extra: 1}, report.Drift, report.Items)
		w.settle()
		assert.False(t, w.living("users")[removed["users"]])
		assert.True(t, w.living("organization_domains")[removed["organization_domains"]])

		// A key that is refused is no matter of one table.
		answer(http.StatusUnauthorized, "clerk_key_invalid")
		report, err = w.full(reconciler.Options{DryRun: true})
		require.ErrorIs(t, err, clerk.ErrUnauthorized)
		assert.NotContains(t, report.Checked, "roles")
		assert.Empty(t, report.Failed)

		// The run that failed is taken up with what it lacks.
		w.serve(emulator.APIConfig{})
		report, err = w.full(reconciler.Options{})
		require.NoError(t, err)
		assert.Equal(t, reconciler.Counts{Stale: 1, Extra: 2}, report.Drift)
		assert.Zero(t, w.api.RequestsTo("/v1/organization_roles"))
		w.settle()
		assert.False(t, w.living("organization_domains")[removed["organization_domains"]])
		assert.Zero(t, w.verify().Drift.Sum())
	})
}

func TestWhatTheVersionRuleHoldsBackIsSaid(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(40, all)
		_, err := w.full(reconciler.Options{})
		require.NoError(t, err)
		var ids []string
		for id := range w.living("users") {
			ids = append(ids, id)
		}
		// Clerk showed one in the future, and has other content since.
		day := time.Now().Add(24 * time.Hour).UnixMilli()
		e, ok := w.clerk.Edit("users", ids[0], map[string]any{"first_name": "Ada", "updated_at": day})
		require.True(t, ok)
		w.deliver(e)
		_, err = w.full(reconciler.Options{})
		require.NoError(t, err)
		_, ok = w.clerk.Edit("users", ids[0], map[string]any{"first_name": "Grace"})
		require.True(t, ok)
		// A delete was announced that did not happen.
		require.NoError(t, w.db.Exec("UPDATE users SET deleted_at = ?, version = ? WHERE id = ?", time.Now().UTC(), day, ids[1]).Error)
		_, ok = w.clerk.Edit("users", ids[2], map[string]any{"first_name": "Eve"}) // and this one was only missed
		require.True(t, ok)

		check := func(report *reconciler.Report) {
			t.Helper()
			assert.Equal(t, reconciler.HeldCounts{ByDelete: 1, ByVersion: 1}, report.HeldBack)
			held := map[string]reconciler.Item{}
			for _, item := range report.Items {
				held[item.ID] = item
			}
			assert.Equal(t, reconciler.Different, held[ids[0]].Drift)
			assert.Equal(t, reconciler.HeldByVersion, held[ids[0]].HeldBack)
			assert.NotEmpty(t, held[ids[0]].Fields)
			assert.Equal(t, reconciler.Missing, held[ids[1]].Drift)
			assert.Equal(t, reconciler.HeldByDelete, held[ids[1]].HeldBack)
		}
		found := w.verify()
		check(found)
		assert.Equal(t, reconciler.Counts{Missing: 1, Stale: 1, Different: 1}, found.Drift, found.Items)
		report, err := w.full(reconciler.Options{})
		require.NoError(t, err)
		check(report)
		assert.EqualValues(t, 1, report.Published)
		applied := w.settle()
		require.Len(t, applied, 1)
		assert.Equal(t, ids[2], applied[0].Object.ID)

		// A time in the future hides no other change from the runs after it.
		_, ok = w.clerk.Edit("users", ids[3], map[string]any{"first_name": "Joan", "updated_at": time.Now().UnixMilli()})
		require.True(t, ok)
		assert.EqualValues(t, 1, w.incremental().Drift.Stale)
	})
}

// TestARowOfAnotherSourceIsHeldBack: it is neither overwritten, nor deleted, nor hidden as if it were this source's, living or a tombstone.
func TestARowOfAnotherSourceIsHeldBack(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(40, all)
		_, err := w.full(reconciler.Options{})
		require.NoError(t, err)
		w.settle()
		var ids []string
		for id := range w.living("users") {
			ids = append(ids, id)
		}
		require.NoError(t, w.db.Exec("UPDATE users SET source = 'staging' WHERE id = ?", ids[0]).Error)
		require.NoError(t, w.db.Exec("UPDATE users SET source = 'staging', deleted_at = ? WHERE id = ?", time.Now().UTC(), ids[1]).Error)
		_, ok := w.clerk.Edit("users", ids[0], map[string]any{"first_name": "Grace"}) // newer than the row
		require.True(t, ok)
		_, ok = w.clerk.Remove("users", ids[2])
		require.True(t, ok) // this source's own, and missed
		require.NoError(t, w.db.Exec("UPDATE users SET source = 'staging' WHERE id = ?", ids[3]).Error)
		_, ok = w.clerk.Remove("users", ids[3])
		require.True(t, ok) // staging's, and none of this source's business

		check := func(report *reconciler.Report) {
			t.Helper()
			assert.Equal(t, reconciler.HeldCounts{BySource: 2}, report.HeldBack)
			assert.EqualValues(t, 2, report.Drift.Missing)
			for _, item := range report.Items {
				if item.ID == ids[0] || item.ID == ids[1] {
					assert.Equal(t, reconciler.Missing, item.Drift)
					assert.Equal(t, reconciler.HeldBySource, item.HeldBack)
				}
				assert.NotEqual(t, ids[3], item.ID)
			}
		}
		check(w.verify())
		report, err := w.full(reconciler.Options{})
		require.NoError(t, err)
		check(report)
		for _, e := range w.settle() {
			assert.NotContains(t, []string{ids[0], ids[1], ids[3]}, e.Object.ID)
		}
		var theirs int64
		require.NoError(t, w.db.Table("users").Where("source = 'staging'").Count(&theirs).Error)
		assert.EqualValues(t, 3, theirs)
	})
}
