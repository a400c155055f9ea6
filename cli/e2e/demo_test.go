package e2e

import (
	"encoding/json"
	"net/http"
	"net/http/cookiejar"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/fixture"
)

// randomPorts lets several instances run on one machine.
var randomPorts = []string{"USHER_INGEST_ADDR=127.0.0.1:0", "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0"}

// ledger is what `usher dev --demo --exit --output json` ends with.
type ledger struct {
	Sent       int64 `json:"sent"`
	Accepted   int64 `json:"accepted"`
	Duplicates int64 `json:"duplicates"`
	Handlers   map[string]struct {
		Applied      int64 `json:"applied"`
		DeadLettered int64 `json:"dead_lettered"`
	} `json:"handlers"`
	Types           map[string]struct{ Sent int64 } `json:"types"`
	Rows            map[string]int64                `json:"rows"`
	MirrorEqual     *bool                           `json:"mirror_equal"`
	EventsPerSecond float64                         `json:"events_per_second"`
	Latency         struct{ P50, P99 float64 }      `json:"latency_ms"`
	Faults          struct {
		RetriedThenApplied int      `json:"retried_then_applied"`
		DeadLettered       []string `json:"dead_lettered"`
		Replayed           int      `json:"replayed"`
	} `json:"faults"`
}

func TestDemoEndsInABalancedLedger(t *testing.T) {
	t.Parallel()
	databases := map[string]func(t *testing.T) []string{
		"postgres":  func(t *testing.T) []string { return []string{"--database-url", dbtest.EmptyPostgresURL(t)} },
		"throwaway": func(*testing.T) []string { return nil },
	}
	for name, settings := range databases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dataDir := filepath.Join(t.TempDir(), "data")
			given := settings(t)
			env := append([]string{"USHER_DATA_DIR=" + dataDir}, randomPorts...)
			code, stdout, stderr := run(t, env, append([]string{"dev", "--demo", "--exit", "--output", "json", "--users", "60"}, given...)...)
			require.Equal(t, 0, code, stderr)
			var l ledger
			require.NoError(t, json.Unmarshal([]byte(stdout), &l), "one JSON object and nothing else: %s", stdout)
			assert.Positive(t, l.Sent)
			assert.Equal(t, l.Sent, l.Accepted)
			assert.Positive(t, l.Duplicates)
			mirror := l.Handlers["mirror"]
			assert.Equal(t, l.Accepted, mirror.Applied+mirror.DeadLettered)
			require.NotNil(t, l.MirrorEqual)
			assert.True(t, *l.MirrorEqual)
			assert.Equal(t, 3, l.Faults.RetriedThenApplied)
			assert.Len(t, l.Faults.DeadLettered, 1)
			assert.Equal(t, 1, l.Faults.Replayed, "repaired and replayed")
			assert.Zero(t, mirror.DeadLettered, "after the replay nothing is dead")
			assert.Positive(t, l.EventsPerSecond)
			assert.Positive(t, l.Latency.P99)
			assert.EqualValues(t, 60, l.Rows["users"])
			for _, typ := range fixture.Types() {
				assert.Contains(t, l.Types, typ)
			}
			assert.NoDirExists(t, dataDir, "dev leaves nothing behind")
			if len(given) > 0 { // a database that it keeps
				db, err := database.Open(t.Context(), given[1], "usher_dev")
				require.NoError(t, err)
				var silent int64
				require.NoError(t, db.Table("deliveries").Where("status = 'processed' AND effect IS NULL").Count(&silent).Error)
				assert.Zero(t, silent, "the log says what each event changed")
				require.NoError(t, database.Close(db))
			}
		})
	}
}

func TestDevPrintsWhereItListensAndCleansUp(t *testing.T) {
	t.Parallel()
	dataDir := filepath.Join(t.TempDir(), "data")
	env := append([]string{"USHER_DATA_DIR=" + dataDir}, randomPorts...)
	p := start(t, env, "dev")
	s := p.ready(dataDir)
	info, err := os.Stat(filepath.Join(dataDir, "usher.json"))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o600), info.Mode().Perm())

	code, _, stderr := run(t, env, "trigger", "user.created", "--set", "data.first_name=Grace")
	assert.Equal(t, 0, code, stderr)
	var events struct {
		Items []struct {
			ID, Type string
		} `json:"items"`
	}
	require.Eventually(t, func() bool {
		code, stdout, _ := run(t, env, "events", "list", "--output", "json")
		return code == 0 && json.Unmarshal([]byte(stdout), &events) == nil && len(events.Items) == 1
	}, 60*time.Second, 20*time.Millisecond)
	assert.Equal(t, "user.created", events.Items[0].Type)
	code, stdout, _ := run(t, env, "events", "show", events.Items[0].ID)
	assert.Equal(t, 0, code)
	assert.Contains(t, stdout, "Grace")

	code, _, stderr = run(t, env, "dev")
	assert.Equal(t, 2, code)
	assert.Contains(t, stderr, "data folder is in use", "a second one must not touch the first one's broker")

	assert.Equal(t, 0, p.stop(), p.stderr.String())
	out := p.stdout.String()
	for _, want := range []string{s.IngestURL, s.ConsoleURL + "/admin/login?token=" + s.AdminToken, s.OpsURL, s.SigningSecret} {
		assert.Contains(t, out, want)
	}
	assert.True(t, strings.HasPrefix(s.SigningSecret, "whsec_"))
	assert.NoDirExists(t, dataDir)

	code, _, stderr = run(t, env, "events", "list")
	assert.Equal(t, 2, code)
	assert.Contains(t, stderr, "usher serve", "the error says what to do")
}

func TestWrongSettingsStopTheStartWithEveryProblem(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"dev", "serve", "config"} {
		code, _, stderr := run(t, []string{"USHER_DATA_DIR=" + t.TempDir(), "USHER_RETENTION=soon", "USHER_LOG_LEVEL=loud", "CLERK_WEBHOOK_SIGNING_SECRET=whsec_"}, command)
		assert.Equal(t, 2, code, command)
		for _, name := range []string{"USHER_RETENTION", "USHER_LOG_LEVEL", "CLERK_WEBHOOK_SIGNING_SECRET"} {
			assert.Contains(t, stderr, name, command)
		}
	}
	for _, command := range []string{"dev", "serve"} {
		code, _, stderr := run(t, []string{"USHER_DATA_DIR=" + t.TempDir(), "CLERK_WEBHOOK_SIGNING_SECRET=" + fixture.Secret, "USHER_ADMIN_TOKEN=123456789012345"}, command)
		assert.Equal(t, 2, code, command)
		assert.Contains(t, stderr, "USHER_ADMIN_TOKEN: has 15 characters, at least 16 are needed")
	}
	code, _, stderr := run(t, []string{"USHER_DATA_DIR=" + t.TempDir()}, "serve")
	assert.Equal(t, 2, code)
	assert.Contains(t, stderr, "CLERK_WEBHOOK_SIGNING_SECRET", "serve makes up no secret")
}

// TestServeShowsTheLoginLinkOnce: a link that opens the console is printed at the start that makes the token, and at no other.
func TestServeShowsTheLoginLinkOnce(t *testing.T) {
	t.Parallel()
	dataDir := filepath.Join(t.TempDir(), "data")
	env := append([]string{"USHER_DATA_DIR=" + dataDir, "CLERK_WEBHOOK_SIGNING_SECRET=" + fixture.Secret}, randomPorts...)
	for round := range 2 {
		p := start(t, env, "serve")
		s := p.ready(dataDir)
		kept, err := os.ReadFile(filepath.Join(dataDir, "admin-token"))
		require.NoError(t, err)
		require.Equal(t, s.AdminToken+"\n", string(kept))
		info, err := os.Stat(filepath.Join(dataDir, "admin-token"))
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o600), info.Mode().Perm())
		link := s.ConsoleURL + "/admin/login?token=" + s.AdminToken
		if round == 0 {
			assert.Equal(t, http.StatusUnauthorized, get(s.ConsoleURL+"/admin"))
			jar, err := cookiejar.New(nil)
			require.NoError(t, err)
			browser := &http.Client{Jar: jar, Transport: &http.Transport{DisableKeepAlives: true}}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, link, nil)
			require.NoError(t, err)
			res, err := browser.Do(req)
			require.NoError(t, err)
			require.NoError(t, res.Body.Close())
			assert.Equal(t, http.StatusOK, res.StatusCode)
			assert.Equal(t, "/admin", res.Request.URL.Path)
		}
		assert.Equal(t, 0, p.stop(), p.stderr.String())
		assert.NotContains(t, p.stderr.String(), s.AdminToken, "no log holds it")
		if round == 0 {
			assert.Equal(t, 1, strings.Count(p.stdout.String(), link), p.stdout.String())
		} else {
			assert.Empty(t, p.stdout.String())
			assert.Contains(t, p.stderr.String(), "admin-token")
		}
	}
}

func TestInterruptedDemoIsNoSuccess(t *testing.T) {
	t.Parallel()
	dataDir := t.TempDir()
	p := start(t, append([]string{"USHER_DATA_DIR=" + dataDir}, randomPorts...), "dev", "--demo", "--exit", "--output", "json", "--users", "5000")
	p.ready(dataDir)
	assert.Equal(t, 130, p.stop(), p.stderr.String())
	assert.Empty(t, p.stdout.String())
	code, _, stderr := run(t, nil, "dev", "--demo", "--exit", "--users", "-1")
	assert.Equal(t, 2, code)
	assert.Contains(t, stderr, "--users -1: want 1 or more")
}

// TestServeWaitsForADatabaseThatStartsLater: a machine starts, and its PostgreSQL after it. Webhooks are taken meanwhile.
func TestServeWaitsForADatabaseThatStartsLater(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	url := server.Create(t, "usher")
	server.Stop()
	dataDir := t.TempDir()
	address, ops := freeAddr(t), freeAddr(t)
	env := []string{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + url,
		"USHER_INGEST_ADDR=" + address, "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=" + ops,
	}
	p := start(t, env, "serve")
	require.Eventually(t, func() bool { return get("http://"+address+"/webhooks/clerk") == http.StatusMethodNotAllowed }, 60*time.Second, 5*time.Millisecond,
		"ingest needs no database")
	code, out, stderr := run(t, env, "trigger", "user.created", "--count", "20", "--url", "http://"+address+"/webhooks/clerk")
	require.Equal(t, 0, code, out+stderr)
	assert.Equal(t, http.StatusServiceUnavailable, get("http://"+ops+"/readyz"))
	assert.NoFileExists(t, filepath.Join(dataDir, "usher.json"), "it is not ready")
	server.Start(t)
	p.ready(dataDir)
	db, err := database.Open(t.Context(), url, "usher")
	require.NoError(t, err)
	defer func() { _ = database.Close(db) }()
	require.Eventually(t, func() bool {
		var n int64
		return db.Table("users").Count(&n).Error == nil && n == 20
	}, 60*time.Second, 20*time.Millisecond, "what came before the database is applied")
	assert.Equal(t, 0, p.stop(), p.stderr.String())
	assert.Contains(t, p.stderr.String(), "database does not answer, waiting for it")
	assert.Contains(t, p.stderr.String(), "database answers")

	p = start(t, append(slices.Clone(env[:2]), "USHER_DATABASE_URL=sqlite:/proc/nowhere/usher.db"), "serve")
	assert.Equal(t, 2, p.wait(20*time.Second), "what waiting does not mend is said at once")
}
