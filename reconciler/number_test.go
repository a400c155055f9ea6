package reconciler_test

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/reconciler"
)

// PostgreSQL's jsonb rewrites numbers (1e+21 with all its zeros), and no float64 holds them all.
func TestEqualNumbersWrittenDifferentlyAreNoDrift(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		w := newWorld(t, db, emulator.APIConfig{})
		w.tell(20, all)
		var id string
		for o := range w.clerk.Objects("users") {
			id = o.ID
		}
		for _, numbers := range []string{
			`{"n":1e+21,"small":1e2,"long":12345678901234567890.5}`,
			`{"zero":-0,"one":1.0,"tiny":1.50E-7,"large":1e400,"many":0.10000000000000000001,"absurd":-1e999999999,"padded":1e500}`,
		} {
			e, ok := w.clerk.Edit("users", id, map[string]any{"public_metadata": json.RawMessage(numbers)})
			require.True(t, ok)
			require.Contains(t, string(e.Body), numbers)
			w.deliver(e)
			report, err := w.sweeper().Verify(t.Context(), reconciler.Options{})
			require.NoError(t, err)
			assert.Zero(t, report.Drift.Sum(), report.Items)
		}
		e, ok := w.clerk.Edit("users", id, map[string]any{"public_metadata": json.RawMessage(`{"long":12345678901234567890.5}`)})
		require.True(t, ok)
		w.deliver(e)
		require.NoError(t, db.Exec(`UPDATE users SET raw = REPLACE(CAST(raw AS text), '7890.5', '7890.25')`+map[bool]string{true: "::jsonb"}[db.Name() == "postgres"]+` WHERE id = ?`, id).Error)
		assert.Positive(t, w.verify().Drift.Different, "numbers that no float64 tells apart still differ")
	})
}
