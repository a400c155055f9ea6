package reconciler_test

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/reconciler"
)

// counting is an API whose counts of users are another's.
type counting struct {
	reconciler.API
	count func(call int, n int64) (int64, error) // call is 1 before the pages
	calls atomic.Int64
}

func (c *counting) Count(ctx context.Context, resource string) (int64, error) {
	n, err := c.API.Count(ctx, resource)
	if err != nil || resource != "users" {
		return n, err
	}
	return c.count(int(c.calls.Add(1)), n)
}

func (w *world) client() *clerk.Client {
	w.t.Helper()
	client, err := reconciler.Client(w.source(), nil, reconciler.NewMetrics(nil))
	require.NoError(w.t, err)
	w.t.Cleanup(client.Close)
	return client
}

// removeSome deletes users at Clerk without a webhook.
func (w *world) removeSome(n int) {
	w.t.Helper()
	for o := range w.clerk.Objects("users") {
		if n--; n < 0 {
			return
		}
		_, ok := w.clerk.Remove("users", o.ID)
		require.True(w.t, ok)
	}
}

func TestPagesThatLackWhatIsCountedDeleteNothing(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		gone    int // users that neither the pages nor single answers have
		count   func(call int, n int64) (int64, error)
		stopped bool
	}{
		"Steady":             {3, func(_ int, n int64) (int64, error) { return n + 3, nil }, true},
		"SteadyByOne":        {1, func(_ int, n int64) (int64, error) { return n + 1, nil }, true},
		"MovedByLess":        {3, func(call int, n int64) (int64, error) { return n + 3 - int64(min(call-1, 1)), nil }, true},
		"TrueAtSecondSight":  {3, func(call int, n int64) (int64, error) { return n + 3*int64(call%2), nil }, false},
		"BehindForAMoment":   {3, func(call int, n int64) (int64, error) { return n + 3*int64(max(0, 3-call)), nil }, false},
		"LeftAndStillCounts": {3, func(call int, n int64) (int64, error) { return n + 3*int64(max(0, 2-call)), nil }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
			w.tell(66, all)
			before := w.living("users")
			w.removeSome(test.gone)
			opts := reconciler.Options{Resources: []string{"users"}}
			report, err := w.sweeperOf(&counting{API: w.client(), count: test.count}).Reconcile(t.Context(), opts)
			require.NoError(t, err)
			w.settle()
			if !test.stopped {
				assert.Empty(t, report.Stopped)
				assert.EqualValues(t, test.gone, report.Drift.Extra)
				return
			}
			assert.Contains(t, report.Stopped, "Clerk counts")
			assert.Len(t, w.living("users"), len(before), "nobody was deleted")
			found, err := w.sweeperOf(&counting{API: w.client(), count: test.count}).Verify(t.Context(), opts)
			require.NoError(t, err)
			assert.Contains(t, found.Stopped, "Clerk counts")
		})
	}
}

// Who leaves before the pages come to him, and who comes after the last page, cancel out in the count.
func TestWhoCameAfterTheLastPageIsNotMissedInIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(66, all)
	api := &counting{API: w.client()}
	api.count = func(call int, n int64) (int64, error) {
		switch call {
		case 1:
			w.removeSome(3) // after the count
			return n, nil
		case 2:
			for range 3 {
				w.clerk.SignUp()
			}
			return api.API.Count(t.Context(), "users")
		}
		return n, nil
	}
	report, err := w.sweeperOf(api).Reconcile(t.Context(), reconciler.Options{Resources: []string{"users"}})
	require.NoError(t, err)
	assert.Empty(t, report.Stopped)
	assert.EqualValues(t, 3, report.Drift.Extra)
	assert.EqualValues(t, 2, api.calls.Load(), "at first sight")
}

// A run that failed behind its last page is taken up with the pages that it had: none is counted twice, to hide what is missing or to
// seem too many.
func TestARunThatFailedAtItsCountIsTakenUpWithWhatItsPagesHad(t *testing.T) {
	t.Parallel()
	for _, lacks := range []int{0, 3} {
		t.Run(fmt.Sprint("PagesLack", lacks), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
			w.tell(66, all)
			before := w.living("users")
			require.Greater(t, len(before), page+5)
			w.removeSome(lacks)
			fails := true
			api := &counting{API: w.client(), count: func(call int, n int64) (int64, error) {
				if call > 1 && fails {
					return 0, fmt.Errorf("count users: %w", clerk.ErrUnavailable)
				}
				return n + int64(lacks), nil
			}}
			opts := reconciler.Options{Kind: reconciler.Full, Resources: []string{"users"}}
			soon := func(c *reconciler.SweepConfig) { c.Checkpoint, c.Pause = time.Nanosecond, time.Nanosecond }
			_, err := w.sweeperOf(api, soon).Reconcile(t.Context(), opts)
			require.ErrorIs(t, err, clerk.ErrUnavailable)
			fails = false
			report, err := w.sweeperOf(api, soon).Reconcile(t.Context(), opts)
			require.NoError(t, err)
			assert.EqualValues(t, len(before)-lacks, report.Checked["users"])
			assert.Equal(t, lacks > 0, report.Stopped != "", report.Stopped)
			w.settle()
			assert.Len(t, w.living("users"), len(before))
		})
	}
}

// A list that lacks objects which exist is no list, though its count agrees with it.
func TestAListThatLacksWhatExistsIsUnreadable(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		users, hidden int // of every hundred
		fails         bool
	}{
		"Empty":     {150, 100, true},
		"Thin":      {150, 80, true},
		"TwoOrSo":   {70, 3, false},
		"EmptyTiny": {6, 100, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
			w.tell(test.users, all)
			before, n, hidden := w.living("users"), 0, map[string]bool{}
			for id := range before {
				hidden[id] = n%100 < test.hidden
				n++
			}
			var gone string
			for id := range before { // one that is gone indeed
				if !hidden[id] || test.hidden == 100 {
					gone = id
				}
			}
			_, ok := w.clerk.Remove("users", gone)
			require.True(t, ok)
			var asked atomic.Int64
			w.serve(emulator.APIConfig{
				Unlisted: func(table string, o emulator.Object) bool { return table == "users" && hidden[o.ID] },
				Hook: func(r *http.Request) {
					if len(r.URL.Path) > len("/v1/users/user_") {
						asked.Add(1)
					}
				},
			})
			opts := reconciler.Options{Resources: []string{"users"}, Force: true}
			report, err := w.sweeper().Verify(t.Context(), opts)
			if !test.fails {
				require.NoError(t, err)
				assert.EqualValues(t, 1, report.Drift.Extra)
				return
			}
			require.ErrorIs(t, err, clerk.ErrUnreadable)
			assert.ErrorContains(t, err, "the list lacks")
			assert.LessOrEqual(t, asked.Load(), int64(110), "it stops asking")
			_, err = w.sweeper().Reconcile(t.Context(), opts)
			require.ErrorIs(t, err, clerk.ErrUnreadable)
			assert.Empty(t, w.settle())
			assert.Equal(t, before, w.living("users"))
		})
	}
}
