package reconciler_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/reconciler"
)

// Clerk's lists leave some invitations out: by their status, and those that a domain made. That they are not listed proves nothing.
func TestInvitationsThatAreNotListedAreNotGone(t *testing.T) {
	t.Parallel()
	const table = "organization_invitations"
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(100, all)
		before := w.living(table)
		listed, renamed, lost, n := 0, "", "", 0
		for o := range w.clerk.Objects(table) {
			if n++; n%3 == 0 {
				listed++
				renamed, lost = lost, o.ID
			}
		}
		require.NotEmpty(t, renamed)
		shown := map[string]bool{}
		n = 0
		for o := range w.clerk.Objects(table) {
			n++
			shown[o.ID] = n%3 == 0
		}
		w.serve(emulator.APIConfig{Unlisted: func(of string, o emulator.Object) bool { return of == table && !shown[o.ID] }})
		require.Greater(t, len(before), 2*listed)
		assert.Zero(t, w.verify().Drift.Sum())

		// What is listed is compared as ever.
		_, ok := w.clerk.Edit(table, renamed, map[string]any{"role": "org:admin", "public_metadata.by": "hand"})
		require.True(t, ok)
		require.NoError(t, w.db.Exec("DELETE FROM organization_invitations WHERE id = ?", lost).Error)
		report, err := w.full(reconciler.Options{Force: true})
		require.NoError(t, err)
		assert.Empty(t, report.Stopped)
		assert.Equal(t, reconciler.Counts{Missing: 1, Stale: 1}, report.Drift, report.Items)
		for _, e := range w.settle() {
			assert.False(t, strings.HasSuffix(string(e.Type), ".deleted"), e.Type)
		}
		assert.Equal(t, before, w.living(table))
		assert.Zero(t, w.incremental().Drift.Sum())

		// One more is left out: there is nothing to look for.
		shown[renamed] = false
		requests := w.api.Requests()
		for range 2 {
			assert.Zero(t, w.incremental().Drift.Sum())
		}
		assert.LessOrEqual(t, w.api.Requests()-requests, 40)
		assert.Zero(t, w.verify().Drift.Sum())
		assert.Equal(t, before, w.living(table))
	})
}
