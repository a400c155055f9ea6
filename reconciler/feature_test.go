package reconciler_test

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/reconciler"
)

// optional are the tables that an instance may do without.
func optional() []string {
	var tables []string
	for _, table := range clerk.Resources() {
		if clerk.Optional(table) {
			tables = append(tables, table)
		}
	}
	return tables
}

// counts are how many rows live.
func (w *world) counts() map[string]int {
	w.t.Helper()
	n := map[string]int{}
	for _, table := range clerk.Resources() {
		n[table] = len(w.living(table))
	}
	return n
}

func (w *world) incremental() *reconciler.Report {
	w.t.Helper()
	report, err := w.sweeper().Reconcile(w.t.Context(), reconciler.Options{Kind: reconciler.Incremental})
	require.NoError(w.t, err)
	return report
}

func TestAnInstanceWithoutOrganizationsIsReconciled(t *testing.T) {
	t.Parallel()
	for name, notFound := range map[string]bool{"Forbidden": false, "NotFound": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			each := dbtest.Each
			if notFound { // the difference is Clerk's, not the database's
				each = func(t *testing.T, run func(*testing.T, *gorm.DB)) { t.Helper(); run(t, dbtest.SQLite(t)) }
			}
			each(t, func(t *testing.T, db *gorm.DB) {
				w := newWorld(t, db, emulator.APIConfig{})
				n := 0
				w.tell(50, func(e emulator.Event) bool { n++; return n%9 != 0 || strings.HasSuffix(e.Type, ".deleted") })
				w.serve(emulator.APIConfig{Without: []emulator.Feature{emulator.Organizations, emulator.Waitlist}, AbsentIsNotFound: notFound})
				before := w.counts()
				require.NotZero(t, before["organizations"], "rows of when there were organizations")

				found := w.verify()
				require.Positive(t, found.Drift.Sum())
				assert.Equal(t, optional(), found.Absent)
				core, logs := observer.New(zap.InfoLevel)
				report, err := w.loggingSweeper(zap.New(core)).Reconcile(t.Context(), reconciler.Options{})
				require.NoError(t, err)
				assert.Empty(t, report.Stopped)
				assert.Equal(t, found.Drift, report.Drift)
				assert.Equal(t, optional(), report.Absent)
				for _, item := range report.Items {
					assert.Equal(t, "users", item.Resource, "nothing is judged of what cannot be read")
				}
				for _, table := range optional() {
					checked, done := report.Checked[table]
					assert.True(t, done)
					assert.Zero(t, checked)
				}
				assert.Len(t, logs.FilterMessageSnippet("not enabled").All(), len(optional()))
				w.settle()
				after := w.counts()
				for _, table := range optional() {
					assert.Equal(t, before[table], after[table], table)
				}
				assert.Zero(t, w.verify().Drift.Sum())
				backfill, err := w.sweeper().Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Backfill})
				require.NoError(t, err)
				assert.Zero(t, backfill.Published)

				// The runs after it are incremental, cheap, and say no more about it.
				_, _ = w.clerk.SignUp()
				requests := w.api.Requests()
				report, err = w.loggingSweeper(zap.New(core)).Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Incremental})
				require.NoError(t, err)
				assert.EqualValues(t, 1, report.Drift.Missing)
				assert.LessOrEqual(t, w.api.Requests()-requests, 16)
				assert.Len(t, logs.FilterMessageSnippet("not enabled").All(), len(optional()))
				w.settle()

				// Organizations are switched on again, with what was missed of them.
				w.api.SwitchOff(emulator.Waitlist)
				report = w.incremental()
				assert.Empty(t, report.Stopped)
				assert.Equal(t, []string{"waitlist_entries"}, report.Absent)
				assert.Positive(t, report.Checked["organizations"])
				assert.Positive(t, report.Drift.Sum(), "they are swept whole")
			})
		})
	}
}

func TestTheServiceGoesOnWithoutOrganizations(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{Without: []emulator.Feature{emulator.Organizations}})
	w.tell(50, all)
	r, err := reconciler.New(reconciler.Config{
		Sources: []clerk.Source{w.source()}, Poll: 20 * time.Millisecond, Interval: 100 * time.Millisecond, SilenceEvery: time.Hour,
		Sweep: reconciler.SweepConfig{Pause: 10 * time.Millisecond},
	}, reconciler.Deps{JetStream: w.js, DB: w.db, Log: zap.NewNop(), Health: &observe.Health{}})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	kinds := func() map[string]int {
		var runs []struct{ Kind, Status string }
		_ = w.db.Raw("SELECT kind, status FROM reconcile_runs").Scan(&runs).Error
		n := map[string]int{}
		for _, r := range runs {
			n[r.Kind+" "+r.Status]++
		}
		return n
	}
	assert.Eventually(t, func() bool { return kinds()["incremental succeeded"] >= 2 }, 60*time.Second, 20*time.Millisecond)
	cancel()
	require.NoError(t, <-done)
	assert.Equal(t, 1, kinds()["full succeeded"])
	assert.Zero(t, kinds()["full failed"]+kinds()["incremental failed"], kinds())
}

// A feature that is switched off while its table is swept makes every object of it look gone.
func TestAFeatureThatIsSwitchedOffDuringTheSweepDeletesNothing(t *testing.T) {
	t.Parallel()
	for name, notFound := range map[string]bool{"Forbidden": false, "NotFound": true} {
		for _, at := range []string{"AtThePages", "AtTheObjects"} {
			t.Run(name+at, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
				w.tell(60, all)
				before, n := w.counts(), 0
				for id := range w.living("organizations") {
					if n++; n <= 2 {
						_, ok := w.clerk.Remove("organizations", id)
						require.True(t, ok)
					}
				}
				off := false
				w.serve(emulator.APIConfig{AbsentIsNotFound: notFound, Hook: func(r *http.Request) {
					pages := r.URL.Path == "/v1/organizations" && isPage(r)
					object := strings.HasPrefix(r.URL.Path, "/v1/organizations/")
					if !off && (at == "AtThePages" && pages || at == "AtTheObjects" && object) {
						off = true
						w.api.SwitchOff(emulator.Organizations)
					}
				}})
				report, err := w.full(reconciler.Options{Resources: []string{"organizations"}, Force: true})
				require.NoError(t, err)
				require.True(t, off)
				assert.Zero(t, report.Drift.Sum(), report.Items)
				assert.Equal(t, []string{"organizations"}, report.Absent)
				assert.Empty(t, w.settle())
				assert.Equal(t, before, w.counts())
				w.api.SwitchOff()
				report, err = w.full(reconciler.Options{Resources: []string{"organizations"}, Force: true})
				require.NoError(t, err)
				assert.EqualValues(t, 2, report.Drift.Extra)
				assert.Empty(t, report.Absent)
			})
		}
	}
}

// Nobody can do without users: an answer that says so is none.
func TestUsersThatAreNotEnabledAreAnError(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(2, all)
	_, err := w.sweeperOf(refusing{}).Verify(t.Context(), reconciler.Options{Resources: []string{"users"}})
	require.ErrorIs(t, err, clerk.ErrNotEnabled)
}

type refusing struct{ reconciler.API }

func (refusing) Count(context.Context, string) (int64, error) { return 0, clerk.ErrNotEnabled }

func (refusing) Find(context.Context, string, string, string) (clerk.Object, bool, error) {
	return clerk.Object{}, false, clerk.ErrNotEnabled
}
