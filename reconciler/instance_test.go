package reconciler_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/reconciler"
)

// Whatever a run is about, the users tell whose key it has.
func TestTheKeyOfAnotherInstancePublishesNothingOfIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(50, all)
	report, err := w.full(reconciler.Options{})
	require.NoError(t, err)
	require.Zero(t, report.Drift.Sum(), report.Items)
	before := w.counts()

	other := emulator.New(emulator.Config{Seed: 77})
	for range other.Story(50) {
	}
	w.serve(emulator.APIConfig{Others: map[string]*emulator.Clerk{"sk_test_other": other}})
	source := w.source()
	source.SecretKey = "sk_test_other"
	client, err := reconciler.Client(source, nil, reconciler.NewMetrics(nil))
	require.NoError(t, err)
	t.Cleanup(client.Close)
	for _, kind := range []reconciler.Kind{reconciler.Full, reconciler.Incremental, reconciler.Backfill} {
		for _, resources := range [][]string{nil, {"users"}, {"organizations"}, {"roles", "permissions"}, optional()} {
			report, err := w.sweeperOf(client).Reconcile(t.Context(), reconciler.Options{Kind: kind, Resources: resources})
			require.NoError(t, err)
			assert.Contains(t, report.Stopped, "another instance", "%s %v", kind, resources)
			assert.Zero(t, report.Published)
		}
	}
	verified, err := w.sweeperOf(client).Verify(t.Context(), reconciler.Options{Resources: []string{"organizations"}})
	require.NoError(t, err)
	assert.Contains(t, verified.Stopped, "another instance")
	assert.Empty(t, w.settle())
	assert.Equal(t, before, w.counts())

	// Of a mirror that knows hardly anybody it cannot be told.
	require.NoError(t, w.db.Exec("DELETE FROM users").Error)
	report, err = w.sweeperOf(client).Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Backfill, Resources: []string{"users"}})
	require.NoError(t, err)
	assert.Empty(t, report.Stopped)
}
