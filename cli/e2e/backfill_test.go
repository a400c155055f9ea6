package e2e

import (
	"encoding/json"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
)

// productionKey makes the reader keep to its share of a production instance's quota.
const productionKey = "sk_live_backfill"

// backfillUsers is how many users Clerk has; USHER_TEST_BACKFILL asks for more (make backfill).
func backfillUsers(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(setting("USHER_TEST_BACKFILL", "6000"))
	require.NoError(t, err)
	return n
}

// reads are the pages of users that Clerk was asked for, in the order of the requests: the number of the first user of each.
type reads struct {
	crowd *emulator.Crowd
	mu    sync.Mutex
	from  []int
}

func (r *reads) note(req *http.Request) {
	if req.URL.Path != "/v1/users" || req.URL.Query().Get("limit") != "500" {
		return
	}
	from := 0
	if after := req.URL.Query().Get("starting_after"); after != "" {
		number, _ := r.crowd.Number(after)
		from = number + 1
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.from = append(r.from, from)
}

func (r *reads) take() []int {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := r.from
	r.from = nil
	return from
}

// TestABackfillThatIsKilledGoesOnWhereItWas kills `usher backfill` at different moments and runs it again, beside `usher serve`, within the limits of a
// production instance.
func TestABackfillThatIsKilledGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	t.Run("postgres", func(t *testing.T) { t.Parallel(); backfillTest(t, dbtest.EmptyPostgresURL(t)) })
	t.Run("sqlite", func(t *testing.T) { t.Parallel(); backfillTest(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db")) })
}

func backfillTest(t *testing.T, databaseURL string) {
	users := backfillUsers(t)
	large := users >= 50_000
	clerk := emulator.New(emulator.Config{Seed: 12})
	for range clerk.Story(200) { // for organizations and what belongs to them
	}
	pages := &reads{crowd: emulator.NewCrowd(users)}
	cfg := emulator.APIConfig{Key: productionKey, Quota: 1000, Crowd: pages.crowd, Hook: pages.note}
	if !large { // else there is no time to kill it
		cfg.Moods, cfg.Delay = map[emulator.Mood]float64{emulator.Slow: 1}, 300*time.Millisecond
	}
	api := clerk.API(cfg)
	var connections atomic.Int64
	server := httptest.NewUnstartedServer(api)
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			connections.Add(1)
		case http.StateClosed, http.StateHijacked:
			connections.Add(-1)
		case http.StateActive, http.StateIdle:
		}
	}
	server.Start()
	t.Cleanup(server.Close)

	dataDir := t.TempDir()
	env := append([]string{"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + databaseURL, "USHER_LOG_LEVEL=warn"}, randomPorts...)
	serve := start(t, env, "serve") // without the key: it does not sweep by itself
	serve.ready(dataDir)
	env = append(env, "CLERK_SECRET_KEY="+productionKey, "CLERK_API_URL="+server.URL+"/v1")
	db, err := database.Open(t.Context(), databaseURL, "usher")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, database.Close(db)) })

	began, working := time.Now(), time.Duration(0)
	peak, requested, again := 0, 0, 0
	run := func(kill func(p *process)) *process {
		p := start(t, env, "backfill", "--output", "json")
		first := time.Now()
		for len(p.done) == 0 {
			peak = max(peak, peakMemory(p.cmd.Process.Pid))
			if kill != nil && pages.any() {
				kill(p)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		working += time.Since(first)
		return p
	}
	// The first kill comes before any checkpoint, the others each time so many users are done.
	marks := []float64{0, .2}
	if large {
		marks = []float64{0, .15, .4, .7}
	}
	for _, mark := range marks {
		before := checkpoint(t, db, pages.crowd)
		p := run(func(p *process) {
			require.Eventually(t, func() bool {
				require.Empty(t, p.done, "it ended before it was killed: %s", &p.stderr)
				at := checkpoint(t, db, pages.crowd)
				peak = max(peak, peakMemory(p.cmd.Process.Pid))
				return mark == 0 || at > before && float64(at) >= mark*float64(users)
			}, 3*time.Minute, 5*time.Millisecond)
			time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond) // any moment between two checkpoints
			p.kill()
		})
		assert.Equal(t, -1, p.cmd.ProcessState.ExitCode(), "killed")
		require.Eventually(t, func() bool { return connections.Load() == 0 }, 60*time.Second, 10*time.Millisecond, "its last request is noted")
		read := pages.take()
		assert.Equal(t, before, read[0], "it went on where the checkpoint was")
		reached := read[len(read)-1]
		after := checkpoint(t, db, pages.crowd)
		requested += len(read)
		again += max(0, reached-after)
		t.Logf("killed with the checkpoint at user %d: read %d pages, from user %d to %d", after, len(read), read[0], reached)
	}
	before := checkpoint(t, db, pages.crowd)
	require.Positive(t, before)
	p := run(nil)
	require.Equal(t, 0, p.wait(time.Minute), p.stderr.String())
	took := time.Since(began)
	read := pages.take()
	requested += len(read)
	assert.Equal(t, before, read[0], "it went on where the checkpoint was")
	assert.LessOrEqual(t, len(read), (users-before)/500+1, "it read no page of before")
	var report struct {
		Checked   map[string]int64
		Published int64
		Stopped   string
	}
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &report), p.stdout.String())
	assert.Empty(t, report.Stopped)
	assert.EqualValues(t, users, report.Checked["users"])

	living := func() (n int64) {
		require.NoError(t, db.Table("users").Where("deleted_at IS NULL AND version > 0").Count(&n).Error)
		return n
	}
	require.Eventually(t, func() bool { return living() == int64(users) }, 3*time.Minute, 50*time.Millisecond)
	applied := time.Since(began)
	memory := peakMemory(serve.cmd.Process.Pid)
	api.SetMoods(nil)
	p = start(t, env, "verify", "--output", "json")
	require.Equal(t, 0, p.wait(3*time.Minute), "%s%s", &p.stdout, &p.stderr)

	var origins []string
	require.NoError(t, db.Raw("SELECT DISTINCT origin FROM deliveries").Scan(&origins).Error)
	assert.Equal(t, []string{"backfill"}, origins)
	var runs []struct{ Kind, Status string }
	require.NoError(t, db.Raw("SELECT kind, status FROM reconcile_runs").Scan(&runs).Error)
	assert.Equal(t, []struct{ Kind, Status string }{{"backfill", "succeeded"}}, runs, "one run, however often it was taken up")
	var mails int64
	require.NoError(t, db.Table("notifications").Count(&mails).Error)
	assert.Zero(t, mails, "nobody is written to because of a backfill")
	assert.LessOrEqual(t, api.Peak(), 200, "requests in 10 s, of the 1000 that all who have the key may make")
	assert.Equal(t, 0, serve.stop(), serve.stderr.String())
	t.Logf("%d users, killed %d times: %s until all was published (%s of them running), %s until it was applied; %d pages for %d, %d users read again; "+
		"at most %d requests in 10 s; backfill at most %d MiB, serve %d MiB", users, len(marks), took.Round(time.Second/10), working.Round(time.Second/10),
		applied.Round(time.Second/10), requested, users/500, again, api.Peak(), peak>>10, memory>>10)
}

func (r *reads) any() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.from) > 0
}

// checkpoint is the number of the user from which on a new process goes on.
func checkpoint(t *testing.T, db *gorm.DB, crowd *emulator.Crowd) int {
	t.Helper()
	var state string
	require.NoError(t, db.Raw("SELECT state FROM reconcile_runs ORDER BY started_at DESC LIMIT 1").Scan(&state).Error)
	ids := gjson.Get(gjson.Get(state, "tables.users.cursor").Str, "ids").Array()
	if len(ids) == 0 {
		return 0
	}
	number, ok := crowd.Number(ids[len(ids)-1].Str)
	require.True(t, ok)
	return number + 1
}

// peakMemory is the most that a process had resident, in KiB; 0 where it is gone.
func peakMemory(pid int) int {
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, _ := strconv.Atoi(strings.Fields(rest)[0])
			return n
		}
	}
	return 0
}
