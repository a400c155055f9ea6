package reconciler_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/reconciler"
)

// child is a reconciler process, for a test that kills it.
func child() {
	db, err := database.Open(context.Background(), os.Getenv("CHILD_DATABASE"), dbtest.Schema)
	if err != nil {
		panic(err)
	}
	nc, err := stream.Connect(os.Getenv("CHILD_NATS"), "", "child", zap.NewNop())
	if err != nil {
		panic(err)
	}
	js, err := stream.JetStream(nc)
	if err != nil {
		panic(err)
	}
	r, err := reconciler.New(reconciler.Config{
		Poll:    100 * time.Millisecond,
		Sources: []reconciler.Source{{Name: "clerk", APIURL: os.Getenv("CHILD_API"), SecretKey: key, Quota: -1}},
		Sweep:   reconciler.SweepConfig{Pause: 10 * time.Millisecond, Checkpoint: time.Millisecond},
	}, reconciler.Deps{JetStream: js, DB: db, Log: zap.NewNop(), Health: &observe.Health{}})
	if err != nil {
		panic(err)
	}
	_ = r.Run(context.Background())
}

func TestAnotherProcessGoesOnWithTheSweepOfAKilledOne(t *testing.T) {
	t.Parallel()
	url := dbtest.PostgresURL(t)
	w := newWorld(t, dbtest.Open(t, url), emulator.APIConfig{Moods: map[emulator.Mood]float64{emulator.Slow: 1}, Delay: 600 * time.Millisecond})
	w.tell(8000, func(emulator.Event) bool { return false })
	var sweeping [2]atomic.Int64 // requests for pages by each process
	var processes [2]*exec.Cmd
	for i := range processes {
		server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
			if req.URL.Query().Get("limit") == "500" {
				sweeping[i].Add(1)
			}
			w.api.ServeHTTP(rw, req)
		}))
		t.Cleanup(server.Close)
		processes[i] = exec.CommandContext(t.Context(), os.Args[0])
		processes[i].Env = append(os.Environ(), "RECONCILER_CHILD=sweep", "CHILD_DATABASE="+url, "CHILD_NATS="+w.nats.URL(), "CHILD_API="+server.URL+"/v1")
		require.NoError(t, processes[i].Start())
		t.Cleanup(func() { _ = processes[i].Process.Kill(); _ = processes[i].Wait() })
	}
	type run struct{ ID, Holder, Status, State string }
	read := func() (r run, n int64) {
		require.NoError(t, w.db.Table("reconcile_runs").Count(&n).Error)
		require.NoError(t, w.db.Raw("SELECT id, holder, status, state FROM reconcile_runs ORDER BY started_at LIMIT 1").Scan(&r).Error)
		return r, n
	}
	var first run
	require.Eventually(t, func() bool { first, _ = read(); return strings.Contains(first.State, `"cursor"`) }, 60*time.Second, 50*time.Millisecond)
	leader := 0
	if strings.Contains(first.Holder, fmt.Sprintf("/%d/", processes[1].Process.Pid)) {
		leader = 1
	}
	require.Contains(t, first.Holder, fmt.Sprintf("/%d/", processes[leader].Process.Pid))
	assert.Zero(t, sweeping[1-leader].Load(), "two sweeps at once")
	w.api.SetMoods(nil)
	killed := time.Now()
	require.NoError(t, processes[leader].Process.Kill())
	_ = processes[leader].Wait()
	require.Eventually(t, func() bool { r, _ := read(); return r.Holder != first.Holder }, 15*time.Second, 20*time.Millisecond)
	t.Logf("taken over after %s", time.Since(killed))
	require.Eventually(t, func() bool { r, _ := read(); return r.Status == "succeeded" }, 90*time.Second, 50*time.Millisecond)
	_, runs := read()
	assert.EqualValues(t, 1, runs, "it went on with the same run")
	w.settle()
	live, _ := w.clerk.Count("users")
	assert.Len(t, w.living("users"), live)
}

func TestSilenceIsNoticedOnceAndItsEndToo(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(10, all)
	core, logs := observer.New(zapcore.WarnLevel)
	reg := prometheus.NewRegistry()
	r, err := reconciler.New(reconciler.Config{
		Sources: []reconciler.Source{w.source()}, Poll: 20 * time.Millisecond, SilenceAfter: 300 * time.Millisecond, SilenceEvery: 30 * time.Millisecond,
		Sweep: reconciler.SweepConfig{Pause: 10 * time.Millisecond},
	}, reconciler.Deps{JetStream: w.js, DB: w.db, Log: zap.New(core), Registerer: reg, Health: &observe.Health{}})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	defer func() {
		cancel()
		require.NoError(t, <-done)
	}()
	require.Eventually(t, func() bool { return w.api.RequestsTo("/v1/users/count") > 5 }, 20*time.Second, 10*time.Millisecond)
	assert.Nil(t, r.Silence(), "nothing happens at Clerk: no silence")

	_, events := w.clerk.SignUp() // and no webhook
	require.Eventually(t, func() bool { return r.Silence() != nil }, 20*time.Second, 10*time.Millisecond)
	_, _ = w.clerk.SignUp()
	alerts := func() int { return logs.FilterMessageSnippet("no webhook comes").Len() }
	metric := func() float64 {
		n := 0.0
		families, err := reg.Gather()
		require.NoError(t, err)
		for _, f := range families {
			if f.GetName() == "usher_silence_seconds" {
				n = f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		return n
	}
	assert.Greater(t, metric(), .2)
	assert.Equal(t, 1, alerts())

	for _, e := range events {
		publishWebhook(t, w, e)
	}
	require.Eventually(t, func() bool { return r.Silence() == nil }, 20*time.Second, 10*time.Millisecond)
	assert.Equal(t, 1, logs.FilterMessageSnippet("silence has ended").Len())
	assert.Equal(t, 1, alerts())
}
