package reconciler_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/reconciler"
)

// A big organization whose delete was lost: its members are more than may be deleted unasked, and go with it.
func TestTheChildrenOfWhatIsGoneAreNoExtras(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(60, all)
	var organization, member string
	for o := range w.clerk.Objects("organization_memberships") {
		member, organization = o.ID, gjson.GetBytes(o.JSON, "organization.id").Str
	}
	require.NotEmpty(t, organization)
	var twins []emulator.Event
	for range 60 {
		_, e, ok := w.clerk.Twin("organization_memberships", member)
		require.True(t, ok)
		twins = append(twins, e)
	}
	w.deliver(twins...)
	before := w.living("organization_memberships")
	require.Greater(t, len(before), 60)
	_, ok := w.clerk.Remove("organizations", organization)
	require.True(t, ok)

	found := w.verify()
	assert.EqualValues(t, 1, found.Drift.Extra, "the organization alone")
	report, err := w.full(reconciler.Options{})
	require.NoError(t, err)
	assert.Empty(t, report.Stopped)
	assert.EqualValues(t, 1, report.Drift.Extra)
	w.settle()
	assert.Less(t, len(w.living("organization_memberships")), len(before)-60)
	assert.Zero(t, w.verify().Drift.Sum())
	report, err = w.full(reconciler.Options{})
	require.NoError(t, err)
	assert.Empty(t, report.Stopped, "nor does it stop the next")
}

func TestAReportNamesTheTablesThatAreNotCompared(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(5, all)
	report := w.verify()
	for _, table := range []string{"sessions", "subscriptions", "subscription_items", "payment_attempts"} {
		assert.Contains(t, report.NotCompared[table], "Clerk's API", table)
	}
	assert.Len(t, report.NotCompared, 4)
	for table := range report.NotCompared {
		assert.NotContains(t, report.Checked, table)
	}
}
