package command

import (
	"context"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/reconciler"
)

// clerkRoad is a road beside an emulated Clerk, whose API the harness knows.
func clerkRoad(t *testing.T, databaseURL string, cfg emulator.Config) (*road, *emulator.Clerk, *emulator.API) {
	t.Helper()
	r := newRoad(t, databaseURL)
	clerk := emulator.New(cfg)
	api := clerk.API(emulator.APIConfig{Key: "sk_live_emulator"})
	server := httptest.NewServer(api)
	t.Cleanup(server.Close)
	// As beside a demo, whose Clerk has no limits.
	r.env = slices.DeleteFunc(r.env, func(e string) bool { return strings.HasPrefix(e, "USHER_NATS_URL=") })
	r.pretendRunning(allinone.State{NATSURL: r.nats.URL(), ClerkAPIURL: server.URL + "/v1", ClerkSecretKey: "sk_live_emulator"})
	return r, clerk, api
}

// deliver tells a story with faults and waits until the mirror has settled what arrived.
func (r *road) deliver(clerk *emulator.Clerk, users int, faults emulator.Faults) {
	r.t.Helper()
	sender, err := emulator.NewSender(emulator.SenderConfig{URL: r.ingest, Secret: fixture.Secret, Seed: 7, Compress: 1000, Concurrency: 64, Faults: faults})
	require.NoError(r.t, err)
	require.NoError(r.t, sender.Deliver(r.t.Context(), clerk.Story(users)))
	r.quiet()
}

// quiet waits until the mirror has nothing before it.
func (r *road) quiet() {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		consumer, err := r.js.Consumer(r.t.Context(), "CLERK_EVENTS", "mirror")
		return err == nil && consumer.CachedInfo().NumPending == 0 && consumer.CachedInfo().NumAckPending == 0
	}, time.Minute, 20*time.Millisecond)
}

func (h *harness) report(code int, args ...string) reconciler.Report {
	h.t.Helper()
	defer func(began time.Time) { h.t.Log(args, time.Since(began)) }(time.Now())
	return into[reconciler.Report](h.Run(append(args, "--output", "json")...).want(code))
}

func TestDriftIsFoundAndHealed(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		r, clerk, api := clerkRoad(t, url, emulator.Config{Seed: 3, NULs: true})
		r.deliver(clerk, stories(150), emulator.Faults{Drop: .1, Duplicate: .1, Reorder: .3})

		before := r.report(exitNo, "verify")
		t.Log(before.Drift, before.Checked, api.Requests())
		assert.NotZero(t, before.Drift.Missing, before.Drift)
		assert.NotZero(t, before.Drift.Stale, before.Drift)
		assert.NotZero(t, before.Drift.Extra, before.Drift)
		assert.Zero(t, before.Published)
		assert.Empty(t, before.Stopped)

		found := r.report(exitOK, "reconcile", "--full", "--force")
		assert.Equal(t, before.Drift, found.Drift)
		assert.Equal(t, found.Drift.Sum(), found.Published)
		r.quiet()
		after := r.report(exitOK, "verify")
		assert.Zero(t, after.Drift.Sum())
		diffs, err := allinone.Compare(context.Background(), r.db, clerk, 20)
		require.NoError(t, err)
		t.Log(diffs)
	})
}

func TestWhatClerksAPIRefusesSaysWhatToDo(t *testing.T) {
	t.Parallel()
	clerk := httptest.NewServer(emulator.New(emulator.Config{}).API(emulator.APIConfig{Key: "sk_live_right"}))
	t.Cleanup(clerk.Close)
	r := newRoad(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"))
	wrong := r.with("CLERK_API_URL="+clerk.URL, "CLERK_SECRET_KEY=sk_live_wrong")
	for _, command := range []string{"verify", "reconcile", "portal"} {
		result := wrong.Run(command).want(exitUsage)
		assert.Contains(t, result.err, "check CLERK_SECRET_KEY", command)
		assert.NotContains(t, result.out, "missing 0", command)
	}
	assert.Contains(t, r.with("CLERK_API_URL=http://127.0.0.1:1", "CLERK_SECRET_KEY=sk_live_right").Run("portal").want(exitUsage).err,
		"Clerk's API (http://127.0.0.1:1) does not answer: check the network and CLERK_API_URL")
}

func TestWithoutAKeyNothingCanBeCompared(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	for _, command := range []string{"verify", "reconcile", "backfill", "portal"} {
		assert.Contains(t, h.Run(command).want(exitUsage).err, "CLERK_SECRET_KEY is not set: Clerk's Backend API wants the secret key (sk_…)")
	}
	assert.Contains(t, h.Run("verify", "--resource", "sessions").want(exitUsage).err, "--resource sessions: want users")
	assert.Contains(t, h.with("CLERK_SECRET_KEY=pk_live_x").Run("verify").want(exitUsage).err, "publishable")
}

func TestVerifyAgainstAnAPIThatIsAwayCouldNotCheck(t *testing.T) {
	t.Parallel()
	r, _, api := clerkRoad(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"), emulator.Config{Seed: 4})
	api.SetMoods(map[emulator.Mood]float64{emulator.Empty: 1})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	result := r.RunIn(ctx, "", "verify", "--resource", "roles").want(exitUsage)
	assert.Contains(t, result.err, "unreadable")
}

func TestBackfillFillsAnEmptyMirrorAndSaysSoInItsEvents(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		r, clerk, _ := clerkRoad(t, url, emulator.Config{Seed: 8})
		for range clerk.Story(600) { // nobody heard of it
		}
		report := r.report(exitOK, "backfill")
		live, _ := clerk.Count("users")
		assert.EqualValues(t, live, report.Checked["users"])
		assert.Equal(t, report.Drift.Missing, report.Published)
		r.quiet()
		assert.Zero(t, r.report(exitOK, "verify").Drift.Sum())
		var origins []string
		require.NoError(t, r.db.Raw("SELECT DISTINCT origin FROM users").Scan(&origins).Error)
		assert.Equal(t, []string{"backfill"}, origins)
		again := r.report(exitOK, "backfill")
		assert.Zero(t, again.Published)
	})
}

// A delete that was announced and did not happen: no event can take it back, and nobody is told that all is well.
func TestWhatIsHeldBackIsSaidAndIsNoSuccess(t *testing.T) {
	t.Parallel()
	r, clerk, _ := clerkRoad(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"), emulator.Config{Seed: 6})
	r.deliver(clerk, 20, emulator.Faults{})
	var id string
	require.NoError(t, r.db.Raw("SELECT id FROM users WHERE deleted_at IS NULL ORDER BY id LIMIT 1").Scan(&id).Error)
	later := time.Now().Add(time.Hour)
	require.NoError(t, r.db.Exec("UPDATE users SET deleted_at = ?, version = ? WHERE id = ?", later.UTC(), later.UnixMilli(), id).Error)
	result := r.Run("reconcile", "--full").want(exitNo)
	assert.Contains(t, result.out, "missing 1, stale 0, different 0, extra 0; published 0")
	assert.Contains(t, result.out, "1 is held back by a newer delete here: it comes back with its next change at Clerk")
	assert.Contains(t, result.out, "missing (held back)")
	report := r.report(exitNo, "reconcile", "--full")
	assert.EqualValues(t, 1, report.HeldBack.ByDelete)
	require.Len(t, report.Items, 1)
	assert.Equal(t, reconciler.HeldByDelete, report.Items[0].HeldBack)
	r.report(exitNo, "verify")
}

// What more rows than may be deleted unasked look like to who runs the command, and how to go on.
func TestManyDeletesNeedForce(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		r, clerk, _ := clerkRoad(t, url, emulator.Config{Seed: 3, NULs: true})
		told := stories(100)
		r.deliver(clerk, told, emulator.Faults{Drop: .1, Duplicate: .1, Reorder: .3})
		if n := 0; told < 10_000 { // there are enough in a long story
			for o := range clerk.Objects("users") {
				if n++; n%10 == 0 {
					clerk.Remove("users", o.ID)
				}
			}
		}
		living := func() (n int64) {
			require.NoError(t, r.db.Table("users").Where("deleted_at IS NULL").Count(&n).Error)
			return n
		}
		extra := r.report(exitNo, "verify").Drift.Extra
		before := living()

		result := r.Run("reconcile", "--full").want(exitNo)
		t.Logf("%d are extra:\n%s", extra, result.out)
		assert.Regexp(t, `stopped: \w+: at least \d+ of \d+ rows are unknown to Clerk, more than the \d+ that may be deleted unasked: nothing was deleted`, result.out)
		assert.Contains(t, result.out, "usher reconcile --full --force")
		assert.NotEmpty(t, r.report(exitNo, "reconcile", "--full").Stopped)
		r.quiet()
		assert.GreaterOrEqual(t, living(), before, "nothing was deleted, of no table")
		after := r.report(exitNo, "verify").Drift
		assert.Equal(t, extra, after.Extra)

		result = r.Run("reconcile", "--full", "--force", "--dry-run").want(exitNo)
		assert.Contains(t, result.out, fmt.Sprintf("extra %d; published 0", extra))
		found := r.report(exitOK, "reconcile", "--full", "--force")
		assert.Equal(t, extra, found.Drift.Extra)
		r.quiet()
		assert.Zero(t, r.report(exitOK, "verify").Drift.Sum())
	})
}

// stories is how many lives a test tells, or as many as USHER_TEST_STORIES says.
func stories(n int) int {
	if more, err := strconv.Atoi(os.Getenv("USHER_TEST_STORIES")); err == nil {
		return more
	}
	return n
}

func TestALongDifferenceIsShownWhereItIs(t *testing.T) {
	t.Parallel()
	short, same := []byte(`"Zoë"`), strings.Repeat("x", 500)
	a, b := excerpts(short, nil)
	assert.Equal(t, `"Zoë"`, a)
	assert.Empty(t, b)
	a, b = excerpts([]byte(same+"one"+same), []byte(same+"two"+same))
	assert.Contains(t, a, "xone")
	assert.Contains(t, b, "xtwo")
	assert.True(t, strings.HasPrefix(a, "…x") && strings.HasSuffix(a, "x…"), a)
	a, b = excerpts([]byte(same), []byte(same+"more"))
	assert.NotEmpty(t, a)
	assert.Contains(t, b, "more")
}
