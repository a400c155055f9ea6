package command

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gofrs/flock"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/ingest"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

// harness runs commands as a shell does, with an environment of its own.
type harness struct {
	t   testing.TB
	env []string
}

// newHarness has a data folder in which nothing runs.
func newHarness(t testing.TB, env ...string) *harness {
	t.Helper()
	return &harness{t, append([]string{"USHER_DATA_DIR=" + t.TempDir(), "USHER_STREAM_MAX_BYTES=1GiB"}, env...)}
}

// with is the same harness with more environment.
func (h *harness) with(env ...string) *harness {
	return &harness{h.t, append(append([]string{}, h.env...), env...)}
}

// result is what a command left.
type result struct {
	t        testing.TB
	code     int
	out, err string
}

func (h *harness) Run(args ...string) result {
	h.t.Helper()
	return h.RunIn(h.t.Context(), "", args...)
}

func (h *harness) RunIn(ctx context.Context, stdin string, args ...string) result {
	h.t.Helper()
	var out, err bytes.Buffer
	code := Run(ctx, args, Env{Environ: h.env, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &err})
	return result{h.t, code, out.String(), err.String()}
}

// want asserts the exit code.
func (r result) want(code int) result {
	r.t.Helper()
	require.Equal(r.t, code, r.code, "stdout: %s\nstderr: %s", r.out, r.err)
	return r
}

// into decodes stdout, which must be one JSON value.
func into[T any](r result) T {
	r.t.Helper()
	var value T
	require.NoError(r.t, json.Unmarshal([]byte(r.out), &value), r.out)
	return value
}

// lines decodes stdout, which must be one JSON value a line.
func lines[T any](r result) []T {
	r.t.Helper()
	var list []T
	for line := range strings.Lines(r.out) {
		var value T
		require.NoError(r.t, json.Unmarshal([]byte(line), &value), line)
		list = append(list, value)
	}
	return list
}

// eachDatabase runs a test on a SQLite file and on a PostgreSQL database, both empty, given by URL.
func eachDatabase(t *testing.T, test func(t *testing.T, url string)) {
	t.Helper()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		test(t, dbtest.SQLiteURL(t))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		test(t, dbtest.PostgresURL(t))
	})
}

func openDatabase(t testing.TB, url string) *gorm.DB {
	t.Helper()
	db, err := database.Open(t.Context(), url, "usher")
	require.NoError(t, err)
	t.Cleanup(func() { _ = database.Close(db) })
	return db
}

// road is a real Usher in parts: broker, database, ingest and worker, set up by `usher setup`.
type road struct {
	*harness
	nats   *natstest.Server
	js     jetstream.JetStream
	db     *gorm.DB
	ingest string
}

// newRoad builds a road; the harness knows broker, database and secret from its environment, and the ingest's URL from road.ingest.
func newRoad(t *testing.T, databaseURL string) *road {
	t.Helper()
	r := &road{nats: natstest.New(t)}
	r.harness = newHarness(t, "USHER_NATS_URL="+r.nats.URL(), "USHER_DATABASE_URL="+databaseURL, "CLERK_WEBHOOK_SIGNING_SECRET="+fixture.Secret)
	r.Run("setup").want(exitOK)
	r.db = openDatabase(t, databaseURL)
	_, r.js = r.nats.Connect()

	health := &observe.Health{}
	publisher := stream.NewPublisher(r.js, 1)
	in, err := ingest.New(ingest.Config{
		Addr:    "127.0.0.1:0",
		Sources: []ingest.Source{{Name: "clerk", Secrets: config.Secrets{fixture.Secret}}, {Name: "staging", Secrets: config.Secrets{stagingSecret}}},
	}, ingest.Deps{Publisher: publisher, JetStream: r.js, Health: health})
	require.NoError(t, err)
	w, err := worker.New(worker.Config{}, worker.Deps{JetStream: r.js, DB: r.db, Log: zap.NewNop(), Registerer: prometheus.NewRegistry(), Health: health})
	require.NoError(t, err)
	r.ingest = "http://" + in.Addr() + ingest.Path
	ctx, stop := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() { stopped <- lifecycle.Run(ctx, in, w) }()
	t.Cleanup(func() {
		stop()
		require.NoError(t, <-stopped)
		publisher.Close()
	})
	return r
}

const stagingSecret = "whsec_c3RhZ2luZy1zdGFnaW5nLXN0YWdpbmcx"

// trigger sends events and returns what was answered.
func (r *road) trigger(args ...string) []sent {
	r.t.Helper()
	return lines[sent](r.Run(append([]string{"trigger", "--url", r.ingest, "--output", "ndjson"}, args...)...).want(exitOK))
}

// settled waits until every handler has settled an event.
func (r *road) settled(ids ...string) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		var n int64
		err := r.db.Table("deliveries").Where("event_id IN ? AND status IN ('processed', 'dead')", ids).Count(&n).Error
		return err == nil && n == int64(len(ids)*len(worker.Specs()))
	}, 60*time.Second, 5*time.Millisecond)
}

// pretendRunning makes the data folder look like that of a running instance, as a dev in another process does.
func (h *harness) pretendRunning(s allinone.State) {
	h.t.Helper()
	dir := strings.TrimPrefix(h.env[0], "USHER_DATA_DIR=")
	body, err := json.Marshal(s)
	require.NoError(h.t, err)
	require.NoError(h.t, os.WriteFile(filepath.Join(dir, "usher.json"), body, 0o600))
	lock := flock.New(filepath.Join(dir, "usher.lock"))
	held, err := lock.TryLock()
	require.NoError(h.t, err)
	require.True(h.t, held)
	h.t.Cleanup(func() { _ = lock.Unlock() })
}

// lockedBuffer is written by a command and read by its test at the same time.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
