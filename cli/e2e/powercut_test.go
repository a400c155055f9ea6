package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/e2e/internal/powercut"
	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/stream"
)

// powerCuts is how often the power is cut; `make powercut` says so. The disk that loses what was not synced needs FUSE, which a
// machine for `make test` need not have.
func powerCuts(t *testing.T) int {
	t.Helper()
	s := os.Getenv("USHER_POWER_CUTS")
	if s == "" {
		t.Skip("skipped: needs FUSE and root; make powercut runs it")
	}
	n, err := strconv.Atoi(s)
	require.NoError(t, err)
	return n
}

// disk is a disk of its own, in a process of its own, that loses what was not synced when its power is cut.
type disk struct {
	t       *testing.T
	dir     string
	tell    io.WriteCloser
	answers *bufio.Reader
	rng     *rand.Rand
	cuts    int
}

func newDisk(t *testing.T) *disk {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	d := &disk{t: t, dir: t.TempDir(), rng: rand.New(rand.NewPCG(seed, 0))}
	require.NoError(t, os.Chmod(filepath.Dir(d.dir), 0o755)) // PostgreSQL runs as another user
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), diskEnv+"="+d.dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt is the test's; the disk ends with its input, however the test ends
	var err error
	d.tell, err = cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = d.tell.Close()
		assert.NoError(t, cmd.Wait(), "the disk")
		_ = syscall.Unmount(d.dir, syscall.MNT_DETACH) // of a disk that ended before its time
	})
	d.answers = bufio.NewReader(out)
	d.answered()
	return d
}

func (d *disk) answered() {
	d.t.Helper()
	line, err := d.answers.ReadString('\n')
	require.NoError(d.t, err)
	require.Equal(d.t, "ok\n", line, "the disk: this test needs /dev/fuse and the right to mount")
}

// sync keeps all that is on the disk.
func (d *disk) sync() {
	d.t.Helper()
	_, err := io.WriteString(d.tell, "sync\n")
	require.NoError(d.t, err)
	d.answered()
}

// cut takes away what was not synced, by turns all of it and only a part. The processes on the disk must have ended.
func (d *disk) cut() powercut.Loss {
	d.t.Helper()
	loss := powercut.Loss(d.cuts % 3)
	d.cuts++
	_, err := fmt.Fprintf(d.tell, "cut %d %d\n", loss, d.rng.Uint64())
	require.NoError(d.t, err)
	d.answered()
	return loss
}

// moment waits for some more answers, and then some microseconds, wherever that hits.
func (d *disk) moment(l *load) {
	d.t.Helper()
	l.wait(l.accepted.Load() + 1 + d.rng.Int64N(400))
	for until := time.Now().Add(time.Duration(d.rng.IntN(3000)) * time.Microsecond); time.Now().Before(until); {
	}
}

// TestPowerCutOfServeLosesNothing cuts the power of the machine that `usher serve` and its database run on. After each cut all that was
// answered 202 before is applied or dead-lettered, and nothing twice.
func TestPowerCutOfServeLosesNothing(t *testing.T) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		powerCuts(t)
		d := newDisk(t)
		powerCutTest(t, d, "sqlite:"+filepath.Join(d.dir, "usher.db"), func() {}, func() {}, []string{
			"CREATE TABLE effects (event_id text NOT NULL)",
			"CREATE TRIGGER effect_insert AFTER INSERT ON deliveries WHEN NEW.status = 'processed' BEGIN INSERT INTO effects VALUES (NEW.event_id); END",
			"CREATE TRIGGER effect_update AFTER UPDATE ON deliveries WHEN NEW.status = 'processed' BEGIN INSERT INTO effects VALUES (NEW.event_id); END",
		})
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		powerCuts(t)
		d := newDisk(t)
		server := dbtest.NewServerIn(t, d.dir)
		powerCutTest(t, d, server.Create(t, "usher"), func() { server.PowerOff(t) }, func() { server.Start(t) }, []string{
			"CREATE TABLE usher.effects (event_id text NOT NULL)",
			"CREATE FUNCTION usher.effect() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO usher.effects VALUES (NEW.event_id); RETURN NULL; END'",
			"CREATE TRIGGER effect AFTER INSERT OR UPDATE ON usher.deliveries FOR EACH ROW WHEN (NEW.status = 'processed') EXECUTE FUNCTION usher.effect()",
		})
	})
}

func powerCutTest(t *testing.T, d *disk, databaseURL string, powerOff, powerOn func(), countEffects []string) {
	dataDir, addr := filepath.Join(d.dir, "data"), freeAddr(t)
	env := []string{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + databaseURL,
		"USHER_INGEST_ADDR=" + addr, "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=warn",
	}
	p := start(t, env, "serve")
	p.ready(dataDir)
	withDB := func(do func(db *gorm.DB)) {
		db, err := database.Open(t.Context(), databaseURL, "usher")
		require.NoError(t, err)
		defer func() { assert.NoError(t, database.Close(db)) }()
		do(db)
	}
	withDB(func(db *gorm.DB) {
		for _, sql := range countEffects {
			require.NoError(t, db.Exec(sql).Error)
		}
	})
	d.sync()
	clerk := newClerk()
	load := startLoadWith(t, "http://"+addr+"/webhooks/clerk", clerk, loadOptions{junk: true, pace: 3 * time.Millisecond})

	lost := func(answered map[string]bool) (missing int) {
		withDB(func(db *gorm.DB) {
			statuses := deliveries(t, db)
			for id := range answered {
				if s := statuses[id]; s != "processed" && s != "dead" {
					missing++
				}
			}
		})
		return missing
	}
	for range powerCuts(t) {
		d.moment(load)
		p.kill()
		powerOff()
		loss := d.cut()
		answered := load.sofar() // an answer that is read late was given before
		powerOn()
		p = start(t, env, "serve")
		p.ready(dataDir)
		if !assert.Eventually(t, func() bool { return lost(answered) == 0 }, 2*time.Minute, 100*time.Millisecond) {
			require.Failf(t, "events are lost", "after cut %d (%s), %d of %d answered; stderr:\n%s", d.cuts, loss, lost(answered), len(answered), p.stderr.String())
		}
	}
	answered := load.finish()
	require.Eventually(t, func() bool { return lost(answered) == 0 }, 60*time.Second, 100*time.Millisecond)

	dead := 0
	withDB(func(db *gorm.DB) {
		statuses := deliveries(t, db)
		assert.Len(t, statuses, len(answered), "accepted = applied + dead-lettered")
		for id, status := range statuses {
			if strings.HasPrefix(id, undecodable) {
				dead++
				assert.Equal(t, "dead", status, id)
			} else {
				assert.Equal(t, "processed", status, id)
			}
		}
		var effects, distinct int
		require.NoError(t, db.Raw("SELECT count(*) FROM effects").Scan(&effects).Error)
		require.NoError(t, db.Raw("SELECT count(DISTINCT event_id) FROM effects").Scan(&distinct).Error)
		assert.Equal(t, len(statuses)-dead, effects, "an effect happened twice, or not at all")
		assert.Equal(t, len(statuses)-dead, distinct)
		diffs, err := allinone.Compare(t.Context(), db, clerk, 10)
		require.NoError(t, err)
		assert.Empty(t, diffs)
	})
	s, err := allinone.ReadState(dataDir)
	require.NoError(t, err)
	nc, err := stream.Connect(s.NATSURL, "", "test", zap.NewNop())
	require.NoError(t, err)
	defer nc.Close()
	js, err := stream.JetStream(nc)
	require.NoError(t, err)
	letters, err := js.Stream(t.Context(), stream.DeadLetters)
	require.NoError(t, err)
	assert.EqualValues(t, dead, letters.CachedInfo().State.Msgs, "dead letters")
	assert.Positive(t, load.refused.Load())
	assert.Equal(t, 0, p.stop(), p.stderr.String())
	t.Logf("%d power cuts; %d events answered 202: %d applied once, %d dead-lettered; %d forged refused", d.cuts, len(answered), len(answered)-dead, dead, load.refused.Load())
}

// TestPowerCutOfThreeBrokersLosesNothing cuts the power of all three brokers at once. Ingest and worker run on, elsewhere.
func TestPowerCutOfThreeBrokersLosesNothing(t *testing.T) {
	t.Parallel()
	n := powerCuts(t)
	d := newDisk(t)
	c := newClusterOf(t, clusterConfig{databaseURL: dbtest.EmptyPostgresURL(t), ackWait: 5 * time.Second, brokers: 3, store: d.dir})
	c.ready()
	clerk := newClerk()
	load := startLoadWith(t, c.webhooks, clerk, loadOptions{junk: true, pace: 3 * time.Millisecond})
	for range n {
		d.moment(load)
		for _, name := range c.brokers { // killed, not ended: one that has lost the others must not write while they end
			_ = c.processes[name].cmd.Process.Kill()
		}
		for _, name := range c.brokers {
			c.processes[name].kill()
		}
		d.cut()
		for _, name := range c.brokers {
			c.start(name)
		}
	}
	answered := load.finish()
	c.ready()
	c.settled(len(answered), 60*time.Second)
	c.ledger(answered, clerk)
	t.Logf("%d power cuts of three brokers; %d events answered 202, each applied or dead-lettered once", d.cuts, len(answered))
}

// TestPowerCutBites shows that the disk takes what is not synced: a broker as it comes, which syncs every two minutes, loses what it
// confirmed, and one that syncs always loses nothing.
func TestPowerCutBites(t *testing.T) {
	t.Parallel()
	powerCuts(t)
	for name, lines := range map[string]string{"as it comes": "", "sync_interval always": "jetstream { sync_interval: always }\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDisk(t)
			dir, err := programs()
			require.NoError(t, err)
			addr, conf := freeAddr(t), filepath.Join(t.TempDir(), "nats.conf")
			require.NoError(t, os.WriteFile(conf, []byte(lines), 0o600))
			host, port, _ := strings.Cut(addr, ":")
			c := &cluster{t: t, dir: dir, processes: map[string]*process{}, args: map[string][]string{"nats-server": {"-js", "-c", conf, "-sd", d.dir, "-a", host, "-p", port}}}
			c.start("nats-server")
			nc, err := nats.Connect("nats://"+addr, nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
			require.NoError(t, err)
			defer nc.Close()
			require.Eventually(t, nc.IsConnected, 60*time.Second, 10*time.Millisecond)
			js, err := jetstream.New(nc)
			require.NoError(t, err)
			_, err = js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}})
			require.NoError(t, err)
			const confirmed = 1000
			for i := range confirmed {
				_, err := js.Publish(t.Context(), "s", []byte(strconv.Itoa(i)))
				require.NoError(t, err)
			}
			c.processes["nats-server"].kill()
			d.cut()
			c.start("nats-server")
			var found uint64
			require.Eventually(t, func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				s, err := js.Stream(ctx, "S")
				if err == nil {
					found = s.CachedInfo().State.Msgs
				}
				return err == nil || errors.Is(err, jetstream.ErrStreamNotFound)
			}, 60*time.Second, 50*time.Millisecond)
			t.Logf("%d confirmed, %d found after the power cut", confirmed, found)
			if lines == "" {
				assert.Less(t, found, uint64(confirmed))
			} else {
				assert.EqualValues(t, confirmed, found)
			}
		})
	}
}
