package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// chaosKills is how often a process is killed; `make chaos` asks for more.
func chaosKills(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(setting("USHER_CHAOS_KILLS", "5"))
	require.NoError(t, err)
	return n
}

// chaosOutage is how long a database or a broker is away; `make chaos` asks for longer.
func chaosOutage(t *testing.T) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(setting("USHER_CHAOS_OUTAGE", "6s"))
	require.NoError(t, err)
	return d
}

func setting(name, otherwise string) string {
	if s := os.Getenv(name); s != "" {
		return s
	}
	return otherwise
}

// programs are the broker and the services as processes of their own, built once for all tests.
var programs = sync.OnceValues(func() (string, error) {
	usher, err := binary()
	if err != nil {
		return "", err
	}
	dir := filepath.Dir(usher) // which goes after the last test
	for name, pkg := range map[string]string{
		"nats-server": "github.com/nats-io/nats-server/v2", "ingest": "github.com/usherhq/usher/ingest/cmd/ingest", "worker": "github.com/usherhq/usher/worker/cmd/worker",
		"reconciler": "github.com/usherhq/usher/reconciler/cmd/reconciler", "console": "github.com/usherhq/usher/console/cmd/console",
	} {
		if out, err := exec.Command("go", "build", "-o", filepath.Join(dir, name), pkg).CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s: %w: %s", name, err, out)
		}
	}
	return dir, nil
})

// cluster is Usher on many machines, all of them this one: broker, ingest and worker as processes of their own, with
// PostgreSQL.
type cluster struct {
	t           *testing.T
	dir         string
	processes   map[string]*process
	args        map[string][]string
	env         []string
	own         map[string][]string // environment of one program, beside env
	ops         map[string]string   // addresses
	brokers     []string            // names of their processes
	monitors    map[string]string   // URLs, by broker
	natsURL     string
	webhooks    string
	db          *gorm.DB
	js          jetstream.JetStream
	databaseURL string
}

// clusterConfig says what a cluster consists of.
type clusterConfig struct {
	databaseURL string
	ackWait     time.Duration // how long the broker waits for what a killed worker held
	brokers     int           // 0 is one, without a cluster
	store       string        // folder of the brokers' data; "" is one that goes with the test
	services    []string      // beside ingest and worker
	env         []string
}

// newCluster sets broker and database up and starts everything, with one broker.
func newCluster(t *testing.T, databaseURL string, ackWait time.Duration) *cluster {
	t.Helper()
	return newClusterOf(t, clusterConfig{databaseURL: databaseURL, ackWait: ackWait})
}

func newClusterOf(t *testing.T, cfg clusterConfig) *cluster {
	t.Helper()
	dir, err := programs()
	require.NoError(t, err)
	databaseURL, in := cfg.databaseURL, freeAddr(t)
	c := &cluster{
		t: t, dir: dir, processes: map[string]*process{}, args: map[string][]string{}, ops: map[string]string{}, monitors: map[string]string{}, databaseURL: databaseURL,
		webhooks: "http://" + in + "/webhooks/clerk",
	}
	services := append([]string{"ingest", "worker"}, cfg.services...)
	for _, name := range services {
		c.ops[name] = freeAddr(t)
	}
	replicas := c.configureBrokers(cfg)
	c.env = append([]string{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATABASE_URL=" + databaseURL, "USHER_NATS_URL=" + c.natsURL,
		"USHER_NATS_MONITOR_URL=" + strings.Join(slices.Sorted(maps.Values(c.monitors)), ","),
		"USHER_INGEST_ADDR=" + in, "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=info", "USHER_LOG_FORMAT=json",
	}, cfg.env...)
	c.db, err = database.Open(t.Context(), databaseURL, "usher")
	require.NoError(t, err)
	t.Cleanup(func() { _ = database.Close(c.db) })
	_, err = database.Migrate(t.Context(), c.db)
	require.NoError(t, err)
	// Every row that becomes processed leaves a line, in the same transaction.
	for _, sql := range []string{
		"CREATE TABLE usher.effects (event_id text NOT NULL)",
		"CREATE FUNCTION usher.effect() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO usher.effects VALUES (NEW.event_id); RETURN NULL; END'",
		"CREATE TRIGGER effect AFTER INSERT OR UPDATE ON usher.deliveries FOR EACH ROW WHEN (NEW.status = 'processed') EXECUTE FUNCTION usher.effect()",
	} {
		require.NoError(t, c.db.Exec(sql).Error)
	}
	for _, name := range c.brokers {
		c.start(name)
	}
	nc, err := stream.Connect(c.natsURL, "", "test", zap.NewNop())
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	require.Eventually(t, nc.IsConnected, 60*time.Second, 10*time.Millisecond)
	c.js, err = stream.JetStream(nc)
	require.NoError(t, err)
	topology := stream.Topology{Replicas: replicas, MaxBytes: 4 << 30, Handlers: worker.Specs()}
	require.Eventually(t, func() bool { // brokers of a cluster elect a leader first
		_, err = topology.Ensure(t.Context(), c.js)
		return err == nil || replicas == 1
	}, 60*time.Second, 200*time.Millisecond, "%v", &err)
	require.NoError(t, err)
	for _, h := range topology.Handlers {
		consumer := topology.Consumer(h)
		consumer.AckWait = cfg.ackWait
		_, err = c.js.UpdateConsumer(t.Context(), stream.Events, consumer)
		require.NoError(t, err)
	}
	for _, name := range services {
		c.start(name)
	}
	return c
}

// login is what the brokers let in.
const login = `authorization { user: usher, password: "right" }`

// configureBrokers writes the brokers' configurations and returns how many replicas a stream may have.
func (c *cluster) configureBrokers(cfg clusterConfig) (replicas int) {
	c.t.Helper()
	store := cfg.store
	if store == "" {
		store = c.t.TempDir()
	}
	n := max(cfg.brokers, 1)
	var urls, routes, listens []string
	for range n {
		client, route := freeAddr(c.t), freeAddr(c.t)
		listens, urls, routes = append(listens, client), append(urls, "nats://usher:right@"+client), append(routes, route)
	}
	configs := c.t.TempDir()
	for i := range n {
		name, folder, monitor := "nats-server", store, freeAddr(c.t)
		if n > 1 {
			name = fmt.Sprintf("nats-%d", i+1)
			folder = filepath.Join(store, name)
		}
		text := fmt.Sprintf("server_name: %s\nlisten: %q\nhttp: %q\njetstream { store_dir: %q, max_file_store: 8GB, sync_interval: always }\n%s\n", name, listens[i], monitor, folder, login)
		if n > 1 {
			text += fmt.Sprintf("cluster { name: usher, listen: %q, routes: [nats://%s] }\n", routes[i], strings.Join(routes, ", nats://"))
		}
		conf := filepath.Join(configs, name+".conf")
		require.NoError(c.t, os.WriteFile(conf, []byte(text), 0o600))
		c.args[name], c.monitors[name] = []string{"-c", conf}, "http://"+monitor
		c.brokers = append(c.brokers, name)
	}
	c.natsURL = strings.Join(urls, ",")
	return n
}

// start starts a program of the cluster, again where it was killed.
func (c *cluster) start(name string) {
	c.t.Helper()
	program := name
	if slices.Contains(c.brokers, name) {
		program = "nats-server"
	}
	p := &process{t: c.t, cmd: exec.Command(filepath.Join(c.dir, program), c.args[name]...), done: make(chan error, 1)}
	p.cmd.Env = append([]string{"HOME=" + c.dir, "PATH=" + os.Getenv("PATH"), "USHER_OPS_ADDR=" + c.ops[name]}, slices.Concat(c.env, c.own[name])...)
	p.cmd.Dir = c.t.TempDir()
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(c.t, p.cmd.Start())
	go func() { p.done <- p.cmd.Wait() }()
	c.t.Cleanup(p.kill)
	c.processes[name] = p
}

// problems are what a service's readiness says; nil where it is ready, one entry "" where it does not answer.
func (c *cluster) problems(name string) map[string]string { return problemsAt("http://" + c.ops[name]) }

func problemsAt(ops string) map[string]string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, ops+"/readyz", nil)
	if err != nil {
		return map[string]string{"": err.Error()}
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return map[string]string{"": err.Error()}
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode == http.StatusOK {
		return nil
	}
	var body struct{ Problems map[string]string }
	_ = json.NewDecoder(res.Body).Decode(&body)
	return body.Problems
}

// metric reads one series of the worker.
func (c *cluster) metric(series string) string { return c.metricOf("worker", series) }

func (c *cluster) metricOf(service, series string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.ops[service]+"/metrics", nil)
	if err != nil {
		return ""
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return ""
	}
	body, _ := io.ReadAll(res.Body)
	_ = res.Body.Close()
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func (c *cluster) ready() {
	c.t.Helper()
	require.Eventually(c.t, func() bool { return c.problems("ingest") == nil && c.problems("worker") == nil }, 60*time.Second, 20*time.Millisecond,
		"worker: %s", &c.processes["worker"].stderr)
}

// settled waits until as many deliveries are there as events were answered and nothing is pending, and returns how long that took.
func (c *cluster) settled(answered int, within time.Duration) time.Duration {
	c.t.Helper()
	start := time.Now()
	var now strings.Builder
	require.Eventually(c.t, func() bool {
		var n, open int64
		rows := func() *gorm.DB { return c.db.Table("deliveries").Where("handler = 'mirror' AND origin = 'webhook'") }
		if rows().Where("status IN ('processed', 'dead')").Count(&n).Error != nil || rows().Where("status = 'retrying'").Count(&open).Error != nil {
			return false
		}
		consumer, err := c.js.Consumer(context.Background(), stream.Events, "mirror")
		if err != nil {
			return false
		}
		info := consumer.CachedInfo()
		now.Reset()
		_, _ = fmt.Fprintf(&now, "%d settled, %d retrying, consumer: %+v", n, open, info)
		return n >= int64(answered) && open == 0 && info.NumPending == 0 && info.NumAckPending == 0
	}, within, 50*time.Millisecond, "%d events were answered; %s", answered, &now)
	return time.Since(start)
}

// ledger holds the end to the promise: every event that was answered 2xx was applied, once, at its first counted attempt.
func (c *cluster) ledger(answered map[string]bool, clerk *emulator.Clerk) {
	c.t.Helper()
	var rows []struct {
		EventID  string
		Status   string
		Attempts int
	}
	// Sweeps find what is still on its way, and publish it too.
	require.NoError(c.t, c.db.Table("deliveries").Where("handler = 'mirror' AND origin = 'webhook'").Find(&rows).Error)
	seen := map[string]bool{}
	dead := 0
	for _, r := range rows {
		seen[r.EventID] = true
		require.Equal(c.t, 1, r.Attempts, r.EventID)
		if strings.HasPrefix(r.EventID, undecodable) {
			require.Equal(c.t, "dead", r.Status, r.EventID)
			dead++
			continue
		}
		require.Equal(c.t, "processed", r.Status, r.EventID)
	}
	for id := range answered {
		require.True(c.t, seen[id], "%s was answered 2xx and is lost", id)
	}
	// What was stored and could not be answered any more is sent again, and so answered in the end.
	assert.Len(c.t, rows, len(answered))
	const ofWebhooks = "FROM usher.effects WHERE event_id LIKE 'msg%'"
	var effects, distinct int
	require.NoError(c.t, c.db.Raw("SELECT count(*) "+ofWebhooks).Scan(&effects).Error)
	require.NoError(c.t, c.db.Raw("SELECT count(DISTINCT event_id) "+ofWebhooks).Scan(&distinct).Error)
	assert.Equal(c.t, len(rows)-dead, effects, "an effect happened twice, or not at all")
	assert.Equal(c.t, len(rows)-dead, distinct)
	letters, err := c.js.Stream(c.t.Context(), stream.DeadLetters)
	require.NoError(c.t, err)
	assert.EqualValues(c.t, dead, letters.CachedInfo().State.Msgs, "dead letters")
	diffs, err := allinone.Compare(c.t.Context(), c.db, clerk, 10)
	require.NoError(c.t, err)
	assert.Empty(c.t, diffs)
}

// TestWorkerBrokerAndIngestKilledAtRandom kills one process or another at random moments under load.
func TestWorkerBrokerAndIngestKilledAtRandom(t *testing.T) {
	t.Parallel()
	c := newCluster(t, dbtest.EmptyPostgresURL(t), 5*time.Second)
	c.ready()
	clerk := newClerk()
	load := startLoad(t, c.webhooks, clerk)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	killed := map[string]int{}
	start := time.Now()
	for range chaosKills(t) {
		name := []string{"worker", "worker", "nats-server", "nats-server", "ingest"}[rng.IntN(5)]
		load.wait(load.accepted.Load() + 1 + rng.Int64N(150))
		for until := time.Now().Add(time.Duration(rng.IntN(3000)) * time.Microsecond); time.Now().Before(until); {
		}
		c.processes[name].kill()
		killed[name]++
		c.start(name)
	}
	took := time.Since(start)
	answered := load.finish()
	c.ready()
	wait := c.settled(len(answered), 60*time.Second)
	c.ledger(answered, clerk)
	t.Logf("killed %v in %s; %d events answered 2xx, each applied once; the last %s after the last answer", killed, took.Round(time.Second), len(answered), wait.Round(100*time.Millisecond))
}

// TestOutagesUnderLoad stops the database and then the broker under 200 events a second. The services go on by
// themselves: no attempt is counted, no letter written, no process restarted.
func TestOutagesUnderLoad(t *testing.T) {
	t.Parallel()
	const rate = 200
	away := chaosOutage(t)
	server := dbtest.NewServer(t)
	c := newCluster(t, server.Create(t, "usher"), min(stream.AckWait, max(5*time.Second, away/2)))
	c.ready()
	load, err := emulator.NewLoad(emulator.LoadConfig{URL: c.webhooks, Secret: secret, Rate: rate, Connections: 32, Pause: 250 * time.Millisecond, GiveUp: time.Hour})
	require.NoError(t, err)
	clerk := newClerk()
	stop, done := make(chan struct{}), make(chan error, 1)
	var report emulator.LoadReport
	go func() {
		var err error
		report, err = load.Run(context.Background(), func(yield func(emulator.Event) bool) {
			for {
				for e := range clerk.Story(50) {
					if !yield(e) {
						return
					}
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
		done <- err
	}()
	finish := sync.OnceValue(func() error { close(stop); return <-done })
	t.Cleanup(func() { _ = finish() })
	accepted := func() int64 { return load.Ledger().Totals().Accepted }
	applied := func() int64 {
		var n int64
		_ = c.db.Table("deliveries").Where("status = 'processed'").Count(&n).Error
		return n
	}
	// calm waits until the backlog has gone while the load goes on, and returns how long that took.
	calm := func() time.Duration {
		start := time.Now()
		require.Eventually(t, func() bool {
			return accepted()-applied() < rate && c.problems("worker") == nil && c.problems("ingest") == nil
		}, away+90*time.Second, 50*time.Millisecond)
		return time.Since(start)
	}
	require.Eventually(t, func() bool { return applied() > rate }, 60*time.Second, 20*time.Millisecond)

	before, attempts := accepted(), load.Ledger().Totals().Attempts
	server.Stop()
	gone := time.Now()
	require.Eventually(t, func() bool { return c.metric(`usher_worker_paused{handler="mirror"}`) == "1" }, 60*time.Second, 10*time.Millisecond)
	assert.Contains(t, c.problems("worker")["worker mirror"], "paused")
	assert.Nil(t, c.problems("ingest"), "ingest takes events while the database is away")
	<-time.After(away - time.Since(gone))
	meanwhile := accepted() - before
	// Of what was tried, not of the rate: a busy machine sends less.
	assert.Greater(t, float64(meanwhile), 0.8*float64(load.Ledger().Totals().Attempts-attempts), "ingest continues")
	assert.Positive(t, meanwhile)
	server.Start(t)
	caught := calm()
	t.Logf("database away for %s at %d events/s: %d events accepted meanwhile; backlog gone and ready %s after it was back", away, rate, meanwhile, caught.Round(100*time.Millisecond))

	require.NoError(t, c.processes["nats-server"].cmd.Process.Signal(syscall.SIGTERM))
	gone = time.Now()
	_ = c.processes["nats-server"].wait(20 * time.Second)
	require.Eventually(t, func() bool {
		return c.metric(`usher_worker_paused{handler="mirror"}`) == "1" && strings.Contains(c.problems("ingest")["broker"], "not connected")
	}, 60*time.Second, 10*time.Millisecond)
	assert.Contains(t, c.problems("worker")["worker mirror"], "broker")
	status, err := postOne(c.webhooks)
	require.NoError(t, err)
	assert.Equal(t, http.StatusServiceUnavailable, status)
	<-time.After(away - time.Since(gone))
	refused := load.Ledger().Totals().Sent - accepted()
	c.start("nats-server")
	caught = calm()
	t.Logf("broker away for %s at %d events/s: %d events were waiting at the sender; backlog gone and ready %s after it was back", away, rate, refused, caught.Round(100*time.Millisecond))

	require.NoError(t, finish())
	answered := map[string]bool{}
	for id := range load.Ledger().AcceptedIDs() {
		answered[id] = true
	}
	assert.Zero(t, report.Pending())
	c.settled(len(answered), 90*time.Second)
	c.ledger(answered, clerk)
	for _, name := range []string{"ingest", "worker"} {
		select {
		case err := <-c.processes[name].done:
			c.processes[name].done <- err
			t.Errorf("%s ended by itself: %v", name, err)
		default:
		}
	}
	t.Logf("%d events, all applied at their first attempt, each once", len(answered))
}

// postOne sends one event of another Clerk and returns the status of the answer.
func postOne(url string) (int, error) {
	for e := range newClerk().Story(1) {
		return send(url, e)
	}
	return 0, errors.New("no event")
}

func send(url string, e emulator.Event) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(e.Body))
	if err != nil {
		return 0, err
	}
	req.Header = fixture.Sign(secret, e.ID, time.Now(), e.Body)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

// TestFullDiskIsSaidAndMended fills the disk of `usher serve`. Nothing that was answered 2xx is lost, and readiness says what to do.
func TestFullDiskIsSaidAndMended(t *testing.T) {
	t.Parallel()
	dataDir := t.TempDir()
	if err := syscall.Mount("tmpfs", dataDir, "tmpfs", 0, "size=24m"); err != nil {
		t.Skipf("skipped: cannot mount a small file system: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dataDir, syscall.MNT_DETACH) })
	databaseURL := "sqlite:" + filepath.Join(t.TempDir(), "usher.db")
	env := append([]string{"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + databaseURL}, randomPorts...)
	p := start(t, env, "serve")
	s := p.ready(dataDir)
	answered := map[string]bool{}
	post := func(id string) int {
		status, err := send(s.IngestURL, emulator.Event{ID: id, Body: fmt.Appendf(nil, `{"type":"user.created","object":"event","data":{"id":"user_%s","object":"user","updated_at":1,"bio":%q}}`, id, strings.Repeat("x", 250<<10))})
		require.NoError(t, err)
		if status/100 == 2 {
			answered[id] = true
		}
		return status
	}
	n := 0
	require.Eventually(t, func() bool { n++; return post(fmt.Sprintf("msg_%d", n)) == http.StatusServiceUnavailable }, 60*time.Second, time.Millisecond)
	require.NotEmpty(t, answered)
	var text string
	require.Eventually(t, func() bool {
		text = fmt.Sprint(problemsAt(s.OpsURL))
		return strings.Contains(text, "free space")
	}, 60*time.Second, 50*time.Millisecond, "readiness must say what to do")
	t.Logf("%d events, then 503; readiness: %s", len(answered), text)

	require.NoError(t, syscall.Mount("tmpfs", dataDir, "tmpfs", syscall.MS_REMOUNT, "size=128m"))
	require.Equal(t, 1, p.wait(time.Minute), "only a restart helps now, so that it ends for its supervisor")
	require.Contains(t, p.stderr.String(), "the embedded broker froze")
	p = start(t, env, "serve")
	s = p.ready(dataDir)
	require.Equal(t, http.StatusAccepted, post("msg_after"))
	db, err := database.Open(t.Context(), databaseURL, "usher")
	require.NoError(t, err)
	defer func() { assert.NoError(t, database.Close(db)) }()
	require.Eventually(t, func() bool {
		statuses := deliveries(t, db)
		for id := range answered {
			if statuses[id] != "processed" {
				return false
			}
		}
		return true
	}, 60*time.Second, 50*time.Millisecond)
	assert.Equal(t, 0, p.stop(), p.stderr.String())
}
