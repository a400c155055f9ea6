package reconciler_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sync/errgroup"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/outbox"
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
		Sources: []clerk.Source{{Name: "clerk", APIURL: os.Getenv("CHILD_API"), SecretKey: key, Quota: -1, PageSize: page}},
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
	const users = 10 * page
	w := newWorld(t, dbtest.Open(t, url), emulator.APIConfig{Crowd: emulator.NewCrowd(users)})
	var sweeping [2]atomic.Int64 // requests for pages by each process
	killed := make(chan struct{})
	var processes [2]*exec.Cmd
	for i := range processes {
		server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
			if isPage(req) && sweeping[i].Add(1) > 3 {
				select { // half way, until its process is killed
				case <-killed:
				case <-req.Context().Done():
				}
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
	require.NoError(t, processes[leader].Process.Kill())
	_ = processes[leader].Wait()
	since := time.Now()
	close(killed)
	require.Eventually(t, func() bool { r, _ := read(); return r.Holder != first.Holder }, 60*time.Second, 20*time.Millisecond)
	t.Logf("taken over after %s", time.Since(since))
	require.Eventually(t, func() bool { r, _ := read(); return r.Status == "succeeded" }, 90*time.Second, 50*time.Millisecond)
	_, runs := read()
	assert.EqualValues(t, 1, runs, "it went on with the same run")
	w.settle()
	assert.Len(t, w.living("users"), users)
}

// watcher is a reconciler that looks for silence every 30 ms, until stop is called.
func (w *world) watcher(change func(*reconciler.Config)) (logs *observer.ObservedLogs, reg *prometheus.Registry, stop func()) {
	w.t.Helper()
	core, logs := observer.New(zapcore.WarnLevel)
	reg = prometheus.NewRegistry()
	cfg := reconciler.Config{
		Sources: []clerk.Source{w.source()}, Poll: 20 * time.Millisecond, Interval: time.Hour, SilenceAfter: 300 * time.Millisecond, SilenceEvery: 30 * time.Millisecond,
		Sweep: reconciler.SweepConfig{Pause: 10 * time.Millisecond},
	}
	if change != nil {
		change(&cfg)
	}
	r, err := reconciler.New(cfg, reconciler.Deps{JetStream: w.js, DB: w.db, Log: zap.New(core), Registerer: reg, Health: &observe.Health{}})
	require.NoError(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		assert.NoError(w.t, <-done)
	})
	w.t.Cleanup(stop)
	// It knows how things stand once it has looked a few times.
	looked := w.api.RequestsTo("/v1/users/count")
	require.Eventually(w.t, func() bool { return w.api.RequestsTo("/v1/users/count") > looked+5 }, 60*time.Second, 10*time.Millisecond)
	return logs, reg, stop
}

func (w *world) notifications(kind string) []outbox.Notification {
	w.t.Helper()
	var found []outbox.Notification
	require.NoError(w.t, w.db.Where("kind = ?", kind).Order("created_at").Find(&found).Error)
	return found
}

func (w *world) notified(kind string, n int) {
	w.t.Helper()
	require.Eventually(w.t, func() bool { return len(w.notifications(kind)) >= n }, 60*time.Second, 10*time.Millisecond, "%d of %s", n, kind)
}

// looks waits until the detector has looked so often again.
func (w *world) looks(n int) {
	w.t.Helper()
	before := w.api.RequestsTo("/v1/users/count")
	require.Eventually(w.t, func() bool { return w.api.RequestsTo("/v1/users/count") > before+n }, 60*time.Second, 10*time.Millisecond)
}

func TestSilenceIsToldOnceAndItsEndToo(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		// Held while several things change, so that the detector sees them at once.
		var changing sync.RWMutex
		w := newWorld(t, db, emulator.APIConfig{Hook: func(*http.Request) {
			changing.RLock()
			defer changing.RUnlock()
		}})
		w.tell(10, all)
		before, _ := w.clerk.SignUp()
		logs, reg, _ := w.watcher(nil)
		w.looks(20)
		assert.Empty(t, w.notifications("silence"), "nothing happens at Clerk: no silence")

		changing.Lock()
		_, events := w.clerk.SignUp() // and no webhook
		_, _ = w.clerk.SignUp()
		_, _ = w.clerk.Rename(before)
		gone, ok := w.clerk.Leave(before)
		changing.Unlock()
		require.True(t, ok)
		w.notified("silence", 1)
		w.looks(20)
		alerts := w.notifications("silence")
		require.Len(t, alerts, 1)
		assert.Equal(t, outbox.Suppressed, alerts[0].Status, "the settings have no way to send it")
		assert.Equal(t, "clerk", alerts[0].Source)
		assert.Contains(t, alerts[0].Body, "created, changed or deleted since then: 3.", "two that came, one that went")
		assert.Contains(t, alerts[0].Body, "usher portal --from ")
		assert.NotContains(t, alerts[0].Body, "svix.com", "a link is a credential")
		assert.Contains(t, alerts[0].Body, "replay missing")
		assert.Greater(t, silenceSeconds(t, reg), .2)
		assert.Equal(t, 1, logs.FilterMessageSnippet("no webhook comes").Len())
		for _, e := range logs.All() {
			assert.NotContains(t, fmt.Sprint(e.Message, e.ContextMap()), "#key=", "the link is a credential")
		}

		publishReconciled(t, w, gone[0])
		w.looks(10)
		assert.Empty(t, w.notifications("silence_over"), "what a sweep found is no webhook")
		for _, e := range events {
			publishWebhook(t, w, e)
		}
		w.notified("silence_over", 1)
		w.looks(20)
		assert.Len(t, w.notifications("silence_over"), 1)
		assert.Len(t, w.notifications("silence"), 1)
		assert.Zero(t, silenceSeconds(t, reg))
	})
}

func TestSilenceOutlivesTheProcessThatNoticedIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(10, all)
	_, _, stop := w.watcher(func(c *reconciler.Config) { c.SilenceAfter = 2 * time.Second })
	_, events := w.clerk.SignUp()
	w.looks(5)
	stop() // before it could tell

	_, _, stop = w.watcher(func(c *reconciler.Config) { c.SilenceAfter = 2 * time.Second })
	w.notified("silence", 1)
	stop()
	_, _, stop = w.watcher(nil)
	w.looks(20)
	assert.Len(t, w.notifications("silence"), 1, "another process tells of it again")
	stop()
	publishWebhook(t, w, events[0]) // while nobody listens
	w.watcher(nil)
	w.notified("silence_over", 1)
	w.looks(20)
	assert.Len(t, w.notifications("silence"), 1)
	assert.Len(t, w.notifications("silence_over"), 1)
}

func TestSilenceIsToldAgainAndWhereTheSettingsSay(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(10, all)
	w.watcher(func(c *reconciler.Config) {
		c.SilenceRepeat = 700 * time.Millisecond
		c.Alerts = outbox.Alerts{Slack: true, Mail: true, Email: "ops@example.com"}
	})
	_, _ = w.clerk.SignUp()
	w.notified("silence", 6)
	alerts := w.notifications("silence")
	for _, a := range alerts {
		assert.Equal(t, outbox.Pending, a.Status)
	}
	assert.NotContains(t, alerts[0].Subject, "(alert ")
	assert.Contains(t, alerts[2].Subject, "(alert ")
	for _, a := range alerts { // none before its time, however late the one before it was
		var since, n int64
		_, err := fmt.Sscanf(a.EffectKey, "silence/clerk/%d/%d", &since, &n)
		require.NoError(t, err)
		due := time.UnixMilli(since).Add(300*time.Millisecond + time.Duration(n-1)*700*time.Millisecond)
		assert.False(t, a.CreatedAt.Before(due), "%s at %s", a.EffectKey, a.CreatedAt)
	}
}

func TestSilenceIsToldOnceTheDatabaseIsBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(10, all)
	logs, _, _ := w.watcher(nil)
	require.NoError(t, w.db.Exec("ALTER TABLE notifications RENAME TO away").Error)
	_, events := w.clerk.SignUp()
	require.Eventually(t, func() bool { return logs.FilterMessage("could not look for silence").Len() > 2 }, 60*time.Second, 10*time.Millisecond)
	require.NoError(t, w.db.Exec("ALTER TABLE away RENAME TO notifications").Error)
	w.notified("silence", 1)
	require.NoError(t, w.db.Exec("ALTER TABLE notifications RENAME TO away").Error)
	logs.TakeAll()
	publishWebhook(t, w, events[0])
	require.Eventually(t, func() bool { return logs.FilterMessage("could not look for silence").Len() > 2 }, 60*time.Second, 10*time.Millisecond)
	require.NoError(t, w.db.Exec("ALTER TABLE away RENAME TO notifications").Error)
	w.notified("silence_over", 1)
	assert.Len(t, w.notifications("silence"), 1)
}

// TestWebhookThatComesDuringALookIsNoSilence: Clerk was asked before the sign-up, the stream after its webhook.
func TestWebhookThatComesDuringALookIsNoSilence(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(10, all)
	var armed atomic.Bool
	between := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		w.api.ServeHTTP(rw, req)
		if strings.HasSuffix(req.URL.Path, "/users/count") && armed.CompareAndSwap(true, false) {
			_, events := w.clerk.SignUp()
			for _, e := range events {
				publishWebhook(t, w, e)
			}
		}
	}))
	t.Cleanup(between.Close)
	w.watcher(func(c *reconciler.Config) { c.Sources[0].APIURL = between.URL + "/v1" })
	armed.Store(true)
	require.Eventually(t, func() bool { return !armed.Load() }, 60*time.Second, 10*time.Millisecond)
	w.looks(30)
	assert.Empty(t, w.notifications("silence"), "every webhook came")
}

// TestBacklogIsNoSilence: the webhook lies behind more events of a sweep than one look goes through.
func TestBacklogIsNoSilence(t *testing.T) {
	t.Parallel()
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{})
	w.tell(10, all)
	soon := func(c *reconciler.Config) { c.SilenceAfter = time.Millisecond }
	_, _, stop := w.watcher(soon)
	stop()
	id, events := w.clerk.SignUp()
	publisher := stream.NewPublisher(w.js, 1)
	t.Cleanup(publisher.Close)
	var group errgroup.Group
	group.SetLimit(500)
	for i := range 2100 { // one look goes through 1,000
		group.Go(func() error {
			e := event.Event{ID: fmt.Sprintf("rec_%d", i), Type: "user.updated", Source: "clerk", Origin: event.OriginReconcile, Raw: []byte("{}"), Object: event.Object{ID: id}}
			_, err := publisher.Publish(t.Context(), &e)
			return err
		})
	}
	require.NoError(t, group.Wait())
	for _, e := range events {
		publishWebhook(t, w, e)
	}
	w.watcher(soon)
	w.looks(5)
	assert.Empty(t, w.notifications("silence"))
}

func silenceSeconds(t *testing.T, reg *prometheus.Registry) float64 {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == "usher_silence_seconds" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatal("no metric usher_silence_seconds")
	return 0
}

// publishReconciled stores an event as a sweep would.
func publishReconciled(t *testing.T, w *world, e emulator.Event) {
	t.Helper()
	decoded, err := event.Decode(e.Body)
	require.NoError(t, err)
	decoded.ID, decoded.Source, decoded.Origin, decoded.ReceivedAt = "rec_"+e.ID, "clerk", event.OriginReconcile, time.Now()
	_, err = w.js.PublishMsg(t.Context(), stream.Message(&decoded))
	require.NoError(t, err)
}
