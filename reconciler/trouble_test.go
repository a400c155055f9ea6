package reconciler_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
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

// drifted is a world of two pages of users, with so many of each kind of drift.
func drifted(t *testing.T, each int) (w *world, before, removed map[string]bool) {
	t.Helper()
	w = newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(66, all)
	before, removed = w.living("users"), map[string]bool{}
	require.Greater(t, len(before), page+2)
	n, edited := 0, 0
	for o := range w.clerk.Objects("users") {
		if n++; n%15 == 0 && len(removed) < each {
			_, ok := w.clerk.Remove("users", o.ID)
			require.True(t, ok)
			removed[o.ID] = true
		} else if n%8 == 0 && edited < each {
			_, ok := w.clerk.Edit("users", o.ID, map[string]any{"first_name": "Grace"})
			require.True(t, ok)
			edited++
		}
	}
	for range each {
		w.clerk.SignUp()
	}
	require.Len(t, removed, each)
	require.Equal(t, each, edited)
	return w, before, removed
}

// isUsersPage tells whether a request is for a page of a sweep.
func isUsersPage(r *http.Request) bool {
	return r.URL.Path == "/v1/users" && isPage(r)
}

// isPage reports whether a request is for a page of a list.
func isPage(r *http.Request) bool { return r.URL.Query().Get("limit") == strconv.Itoa(page) }

func TestTroubleHalfWayThroughASweepCostsTimeOnly(t *testing.T) {
	t.Parallel()
	const each = 3
	for name, test := range map[string]struct {
		moods []emulator.Mood // of the requests from then on
		least time.Duration   // that the sweep takes longer
	}{
		"Limited":        {[]emulator.Mood{emulator.Limited, emulator.LimitedText, emulator.LimitedDate, emulator.LimitedBare}, 2 * time.Second},
		"Broken":         {[]emulator.Mood{emulator.BadGateway, emulator.BadGateway, emulator.Cut, emulator.Unavailable}, 0},
		"Slow":           {[]emulator.Mood{emulator.Slow, emulator.Slow}, 1200 * time.Millisecond},
		"PastTheTimeOut": {[]emulator.Mood{emulator.Slow}, 1500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, before, removed := drifted(t, each)
			var pages, asked atomic.Int64
			delay := 600 * time.Millisecond
			if name == "PastTheTimeOut" {
				delay = 3 * time.Second // so that a busy machine is not past it too
			}
			var api *emulator.API
			api = w.clerk.API(emulator.APIConfig{Key: key, Delay: delay, Hook: func(r *http.Request) {
				switch _, id, _ := strings.Cut(r.URL.Path, "/v1/users/"); {
				case isUsersPage(r) && pages.Add(1) == 2: // half of the pages
					api.Next(test.moods...)
				case removed[id] && asked.Add(1) == each/2: // half of the rows that are to go
					api.Next(test.moods...)
				}
			}})
			server := httptest.NewServer(api)
			t.Cleanup(server.Close)
			cfg := clerk.Config{BaseURL: server.URL + "/v1", SecretKey: key, Quota: -1, PageSize: page, HTTPClient: &http.Client{Transport: &http.Transport{}, Timeout: 20 * time.Second}}
			if name == "PastTheTimeOut" {
				cfg.HTTPClient.Timeout = delay / 2
			}
			client, err := clerk.New(cfg)
			require.NoError(t, err)
			t.Cleanup(client.Close)

			began := time.Now()
			report, err := w.sweeperOf(client).Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Full})
			require.NoError(t, err)
			assert.GreaterOrEqual(t, time.Since(began), test.least)
			assert.GreaterOrEqual(t, asked.Load(), int64(each))
			assert.Zero(t, api.Pending())
			assert.Empty(t, report.Stopped)
			assert.EqualValues(t, each, report.Drift.Missing)
			assert.EqualValues(t, each, report.Drift.Stale)
			assert.EqualValues(t, each, report.Drift.Extra)
			assert.Zero(t, report.Drift.Different)
			w.settle()
			w.nobodyWronged(before)
			for id := range removed {
				assert.False(t, w.living("users")[id])
			}
			assert.Zero(t, w.verify().Drift.Sum())
		})
	}
}

// ended is how the only run ended.
func (w *world) ended() (status, failure string) {
	w.t.Helper()
	var runs []struct{ Status, Error string }
	require.NoError(w.t, w.db.Raw("SELECT status, error FROM reconcile_runs").Scan(&runs).Error)
	require.Len(w.t, runs, 1)
	return runs[0].Status, runs[0].Error
}

func TestALimitThatDoesNotEndFailsTheSweepWhichIsTakenUpLater(t *testing.T) {
	t.Parallel()
	const each = 3
	for name, test := range map[string]struct {
		mood    emulator.Mood
		strikes func(r *http.Request, removed map[string]bool) bool
	}{
		"HalfWay": {emulator.Limited, func(r *http.Request, _ map[string]bool) bool {
			return strings.Contains(r.URL.RawQuery, "starting_after")
		}},
		"BeforeDeletes": {emulator.LimitedText, func(r *http.Request, removed map[string]bool) bool {
			return removed[strings.TrimPrefix(r.URL.Path, "/v1/users/")]
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, before, removed := drifted(t, each)
			var struck atomic.Bool
			w.serve(emulator.APIConfig{RetryAfter: time.Hour, Hook: func(r *http.Request) {
				if test.strikes(r, removed) && struck.CompareAndSwap(false, true) {
					w.api.SetMoods(map[emulator.Mood]float64{test.mood: 1})
				}
			}})
			opts := reconciler.Options{Kind: reconciler.Full}
			soon := func(c *reconciler.SweepConfig) { c.Checkpoint, c.Pause = time.Nanosecond, time.Nanosecond } // the first page is settled before the second is refused
			first, err := w.sweeper(soon).Reconcile(t.Context(), opts)
			require.ErrorIs(t, err, clerk.ErrLimited)
			status, failure := w.ended()
			assert.Equal(t, "failed", status)
			assert.Contains(t, failure, "rate limited")
			assert.Zero(t, first.Drift.Extra)
			w.settle()
			w.nobodyWronged(before)
			for id := range removed {
				assert.True(t, w.living("users")[id], "nothing was deleted yet")
			}

			// Later, in another process.
			var from []string
			w.serve(emulator.APIConfig{Hook: func(r *http.Request) {
				if isUsersPage(r) {
					from = append(from, r.URL.Query().Get("starting_after"))
				}
			}})
			second, err := w.sweeper().Reconcile(t.Context(), opts)
			require.NoError(t, err)
			status, failure = w.ended()
			assert.Equal(t, "succeeded", status, "the same run")
			assert.Empty(t, failure)
			require.NotEmpty(t, from)
			assert.NotEmpty(t, from[0], "it began again")
			assert.EqualValues(t, each, second.Drift.Extra, "over both parts")
			assert.EqualValues(t, each, second.Drift.Missing)
			w.settle()
			w.nobodyWronged(before)
			after := w.verify()
			assert.Zero(t, after.Drift.Sum(), after.Items)
			requests := w.api.Requests()
			_, err = w.sweeper().Reconcile(t.Context(), reconciler.Options{Kind: reconciler.Incremental})
			require.NoError(t, err)
			assert.LessOrEqual(t, w.api.Requests()-requests, 12, "its books are right: the next run is a cheap one")
		})
	}
}

// The service does the same by itself, and says meanwhile that it did not succeed.
func TestTheServiceGoesOnOnceClerkAnswersAgain(t *testing.T) {
	t.Parallel()
	w, before, _ := drifted(t, 3)
	var refused atomic.Bool
	w.serve(emulator.APIConfig{Hook: func(r *http.Request) {
		if strings.Contains(r.URL.RawQuery, "starting_after") && refused.CompareAndSwap(false, true) {
			w.api.SetMoods(map[emulator.Mood]float64{emulator.LimitedBare: 1})
		}
	}})
	reg := prometheus.NewRegistry()
	r, err := reconciler.New(reconciler.Config{
		Sources: []clerk.Source{w.source()}, Poll: 20 * time.Millisecond, Interval: 200 * time.Millisecond, SilenceEvery: time.Hour,
		Sweep: reconciler.SweepConfig{Pause: 20 * time.Millisecond, Checkpoint: time.Nanosecond},
	}, reconciler.Deps{JetStream: w.js, DB: w.db, Log: zap.NewNop(), Registerer: reg, Health: &observe.Health{}})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	defer func() {
		cancel()
		require.NoError(t, <-done)
	}()
	status := func() string {
		var status string
		_ = w.db.Raw("SELECT status FROM reconcile_runs ORDER BY started_at DESC LIMIT 1").Scan(&status).Error
		return status
	}
	require.Eventually(t, func() bool { return status() == "failed" }, 90*time.Second, 10*time.Millisecond)
	assert.Zero(t, lastSuccess(t, reg))
	w.api.SetMoods(nil)
	require.Eventually(t, func() bool { return lastSuccess(t, reg) > 0 }, 90*time.Second, 10*time.Millisecond)
	w.settle()
	w.nobodyWronged(before)
	assert.Zero(t, w.verify().Drift.Sum())
	var first string
	require.NoError(t, w.db.Raw("SELECT status FROM reconcile_runs ORDER BY started_at LIMIT 1").Scan(&first).Error)
	assert.Equal(t, "succeeded", first, "the run that failed was taken up")
}

func lastSuccess(t *testing.T, reg *prometheus.Registry) float64 {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == "usher_reconcile_last_success_timestamp_seconds" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatal("no such gauge")
	return 0
}
