package reconciler_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/reconciler"
)

// handwork is one change of a row by hand: SET what, of a row of which holds.
type handwork struct{ table, set, where, column string }

var handworks = []handwork{
	{"users", "email = 'hacked'", "email IS NOT NULL", "email"},
	{"users", "first_name = NULL", "first_name IS NOT NULL", "first_name"},
	{"users", "external_id = 'x'", "external_id IS NULL", "external_id"},
	{"users", "last_name = ''", "last_name IS NOT NULL", "last_name"},
	{"users", "banned = NOT banned", "true", "banned"},
	{"users", "email_verified = NOT email_verified", "true", "email_verified"},
	{"users", `public_metadata = '{"admin":true}'`, "public_metadata IS NOT NULL", "public_metadata"},
	{"users", "unsafe_metadata = NULL", "unsafe_metadata IS NOT NULL", "unsafe_metadata"},
	{"users", `private_metadata = '[1]'`, "true", "private_metadata"},
	{"users", "last_sign_in_at = '2001-02-03 04:05:06.789+00:00'", "last_sign_in_at IS NOT NULL", "last_sign_in_at"},
	{"users", "last_active_at = '2001-02-03 04:05:06.789+00:00'", "last_active_at IS NOT NULL", "last_active_at"},
	{"users", "clerk_created_at = '2001-02-03 04:05:06.789+00:00'", "true", "clerk_created_at"},
	{"users", "clerk_created_at = NULL", "true", "clerk_created_at"},
	{"users", "clerk_updated_at = NULL", "true", "clerk_updated_at"},
	{"organizations", "name = 'hacked'", "true", "name"},
	{"organizations", "max_allowed_memberships = -1", "true", "max_allowed_memberships"},
	{"organization_memberships", "role = 'org:admin2'", "true", "role"},
	{"organization_memberships", "role_name = NULL", "role_name IS NOT NULL", "role_name"},
	{"organization_memberships", `permissions = '["org:everything"]'`, "true", "permissions"},
	{"organization_memberships", "public_metadata = NULL", "public_metadata IS NOT NULL", "public_metadata"},
	{"organization_memberships", "clerk_created_at = '2001-02-03 04:05:06.789+00:00'", "true", "clerk_created_at"},
	{"organization_memberships", "clerk_updated_at = '2001-02-03 04:05:06.789+00:00'", "true", "clerk_updated_at"},
}

// do changes a row that was not changed yet, and notes its column. It tells whether there was one.
func (h handwork) do(t *testing.T, db *gorm.DB, want map[string]string) bool {
	t.Helper()
	taken := []string{""}
	for id := range want {
		taken = append(taken, id)
	}
	var id string
	require.NoError(t, db.Raw("SELECT id FROM "+h.table+" WHERE deleted_at IS NULL AND version > 0 AND id NOT IN ? AND "+h.where+" ORDER BY id LIMIT 1", taken).Scan(&id).Error)
	if id == "" {
		return false
	}
	require.NoError(t, db.Exec("UPDATE "+h.table+" SET "+h.set+" WHERE id = ?", id).Error, h.set)
	want[id] = h.column
	return true
}

// named are the columns that a report names, by object.
func named(t *testing.T, report *reconciler.Report) map[string]string {
	t.Helper()
	got := map[string]string{}
	for _, item := range report.Items {
		assert.Equal(t, reconciler.Different, item.Drift, item.ID)
		for _, f := range item.Fields {
			assert.NotEqual(t, string(f.Mirror), string(f.Clerk), f.Field)
			got[item.ID] += f.Field
		}
	}
	return got
}

func TestAColumnThatWasChangedByHandIsDifferentAndIsHealed(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(70, all)
		require.Zero(t, w.verify().Drift.Sum())
		for round := range 2 { // the second finds the same again, whose first events the inbox knows
			want := map[string]string{}
			for _, h := range handworks {
				require.True(t, h.do(t, db, want), "nobody to change: %+v", h)
			}
			found := w.verify()
			assert.Equal(t, want, named(t, found))
			assert.Equal(t, reconciler.Counts{Different: int64(len(want))}, found.Drift)
			report, err := w.full(reconciler.Options{})
			require.NoError(t, err)
			assert.Empty(t, report.Stopped)
			assert.EqualValues(t, len(want), report.Published, round)
			assert.Len(t, w.settle(), len(want))
			after := w.verify()
			assert.Zero(t, after.Drift.Sum(), after.Items)
		}
	})
}

func TestSeveralColumnsOfARowAreOneDrift(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(20, all)
		var id string
		require.NoError(t, db.Raw("SELECT id FROM users WHERE deleted_at IS NULL AND version > 0 AND NOT banned ORDER BY id LIMIT 1").Scan(&id).Error)
		require.NoError(t, db.Exec(`UPDATE users SET email = 'hacked', banned = true, public_metadata = '{"admin": true}' WHERE id = ?`, id).Error)
		report := w.verify()
		require.Len(t, report.Items, 1)
		var fields []string
		for _, f := range report.Items[0].Fields {
			fields = append(fields, f.Field+" "+string(f.Mirror))
		}
		assert.ElementsMatch(t, []string{`email "hacked"`, "banned true", `public_metadata {"admin": true}`}, fields)
		assert.Equal(t, reconciler.Counts{Different: 1}, report.Drift)
	})
}

// No event can heal it before the user's next change, but nobody says that all is well.
func TestAColumnOfARowWhoseVersionWasRaisedIsNotClean(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(20, all)
		require.NoError(t, db.Exec("UPDATE users SET email = 'hacked', version = version + 1000 WHERE id = (SELECT min(id) FROM users WHERE deleted_at IS NULL AND version > 0)").Error)
		report := w.verify()
		require.Len(t, report.Items, 1)
		require.Len(t, report.Items[0].Fields, 1)
		assert.Equal(t, "email", report.Items[0].Fields[0].Field)
		assert.EqualValues(t, 1, report.HeldBack.ByVersion)
		assert.Positive(t, report.Drift.Sum())
	})
}

func TestAnIncrementalSweepHealsTheColumnsOfRowsThatItLooksAt(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(60, all)
		_, err := w.full(reconciler.Options{})
		require.NoError(t, err)
		id, events := w.clerk.SignUp()
		w.deliver(events...)
		require.NoError(t, db.Exec("UPDATE users SET first_name = 'hacked' WHERE id = ?", id).Error)
		report, err := w.sweeper().Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Incremental})
		require.NoError(t, err)
		assert.Equal(t, map[string]string{id: "first_name"}, named(t, report))
		assert.Len(t, w.settle(), 1)
		assert.Zero(t, w.verify().Drift.Sum())
	})
}

// Many rows of one moment that is no ms, or whose form is not the one that sorts: the pages must go on behind each.
func TestManyTimesOfCreationThatWereChangedByHandEndNoSweepAndDeleteNobody(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(130, all)
		living := w.living("users")
		require.Greater(t, len(living), 2*page)
		times := []string{"2026-01-15 10:00:00.0005+00:00"}
		if !database.IsPostgres(db) {
			times = append(times, "2026-01-15T10:00:00Z", "soon", "12")
		}
		for _, at := range times {
			require.NoError(t, db.Exec("UPDATE users SET clerk_created_at = ?", at).Error)
			report, err := w.full(reconciler.Options{Resources: []string{"users"}})
			require.NoError(t, err)
			assert.Empty(t, report.Stopped)
			assert.Equal(t, reconciler.Counts{Different: int64(len(living))}, report.Drift, at)
			w.settle()
			assert.Equal(t, living, w.living("users"))
			after := w.verify()
			assert.Zero(t, after.Drift.Sum(), fmt.Sprint(at, after.Drift))
		}
	})
}
