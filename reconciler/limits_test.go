package reconciler_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/reconciler"
)

// The service backfills and then reads again what differs, several at once, and looks for silence. The server counts: at most a fifth of the
// instance's quota. USHER_TEST_LIMITS runs it at the size and for the time that a real instance has, and counts over any ten seconds.
func TestTheServiceKeepsToItsShareOfTheQuota(t *testing.T) {
	t.Parallel()
	type instance struct {
		key           string
		quota, users  int
		pageSize      int
		window        time.Duration
		most, differs int
		silence       time.Duration
	}
	// A second of it, of which only the mean is looked at: a busy machine may hold requests up and let them go at once.
	instances := map[string]instance{"shortened": {"sk_live_share", 100, 8 * page, page, time.Second, 0, 20, 500 * time.Millisecond}}
	if os.Getenv("USHER_TEST_LIMITS") != "" {
		instances = map[string]instance{
			"production":  {"sk_live_share", 1000, 100_000, 0, 10 * time.Second, 200, 190, 5 * time.Second},
			"development": {"sk_test_share", 100, 5000, 0, 10 * time.Second, 20, 40, 20 * time.Second},
		}
	}
	for name, test := range instances {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
			w.tell(20, func(emulator.Event) bool { return false })
			w.serveTo(test.key, emulator.APIConfig{Quota: test.quota, Window: test.window, Crowd: emulator.NewCrowd(test.users)})
			reg := prometheus.NewRegistry()
			r, err := reconciler.New(reconciler.Config{
				Sources: []clerk.Source{{Name: "clerk", APIURL: w.server.URL + "/v1", SecretKey: test.key, PageSize: test.pageSize}},
				Poll:    50 * time.Millisecond, FullInterval: time.Millisecond, SilenceEvery: test.silence,
				Sweep: reconciler.SweepConfig{Pause: 20 * time.Millisecond},
			}, reconciler.Deps{JetStream: w.js, DB: w.db, Log: zap.NewNop(), Registerer: reg, Health: &observe.Health{}})
			require.NoError(t, err)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			began := time.Now()
			go func() { done <- r.Run(ctx) }()
			defer func() {
				cancel()
				require.NoError(t, <-done)
			}()
			// runs sums the good runs up, while a worker applies what they publish.
			runs := func(until func(n, different int64) bool) {
				t.Helper()
				require.Eventually(t, func() bool {
					w.settle()
					var sum struct{ N, Different int64 }
					err := w.db.Raw("SELECT count(*) AS n, coalesce(sum(different), 0) AS different FROM reconcile_runs WHERE status = 'succeeded'").Scan(&sum).Error
					return err == nil && until(sum.N, sum.Different)
				}, 3*time.Minute, 20*time.Millisecond)
			}
			runs(func(n, _ int64) bool { return n >= 1 })
			first := time.Since(began)
			w.settle()
			require.NoError(t, w.db.Exec(`UPDATE users SET raw = '{}' WHERE id IN (SELECT id FROM users WHERE version > 0 ORDER BY id LIMIT ?)`, test.differs).Error)
			runs(func(_, different int64) bool { return different >= int64(test.differs) })
			asked, took := w.api.Requests(), time.Since(began)
			assert.LessOrEqual(t, float64(asked), 1+float64(test.quota)/5*took.Seconds()/test.window.Seconds())
			assert.Greater(t, asked, 60, "or this shows nothing")
			if test.most > 0 {
				assert.LessOrEqual(t, w.api.Peak(), test.most)
				assert.GreaterOrEqual(t, w.api.Peak(), test.most/2, "it uses its share")
			}
			for _, result := range []string{"limited", "unavailable", "unreadable", "unauthorized"} {
				assert.Zero(t, requests(t, reg, result), result)
			}
			assert.Len(t, w.living("users"), test.users)
			t.Logf("%d users: first sweep %s, until the second had read %d objects again %s; %d requests, at most %d in %s, none refused", test.users,
				first.Round(time.Second/10), test.differs, took.Round(time.Second/10), w.api.Requests(), w.api.Peak(), test.window)
		})
	}
}

// requests are those to Clerk's API that ended so.
func requests(t *testing.T, reg *prometheus.Registry, result string) float64 {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "usher_clerk_requests_total" && m.GetLabel()[0].GetValue() == result {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("no counter of %s", result)
	return 0
}
