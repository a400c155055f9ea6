package command

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
)

// dev is a running `usher dev`.
type dev struct {
	*harness
	state  allinone.State
	stderr *lockedBuffer
	stop   func() int
}

func startDev(t *testing.T, h *harness, args ...string) *dev {
	t.Helper()
	d := &dev{harness: h, stderr: &lockedBuffer{}}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	code := 0
	go func() {
		defer close(ended)
		code = Run(ctx, append([]string{"dev"}, args...), Env{Environ: h.env, Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: d.stderr})
	}()
	d.stop = func() int { stop(); <-ended; return code }
	t.Cleanup(func() { d.stop() })
	require.Eventually(t, func() bool {
		select {
		case <-ended:
			require.FailNow(t, "dev ended", d.stderr.String())
		default:
		}
		var err error
		d.state, err = allinone.ReadState(strings.TrimPrefix(h.env[0], "USHER_DATA_DIR="))
		return err == nil
	}, time.Minute, 5*time.Millisecond)
	return d
}

var anyPorts = []string{"USHER_INGEST_ADDR=127.0.0.1:0", "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0"}

// trigger has an event applied.
func (d *dev) trigger() {
	d.t.Helper()
	d.Run("trigger", "user.created").want(exitOK)
	require.Eventually(d.t, func() bool {
		r := d.Run("events", "list", "--output", "json")
		return r.code == exitOK && len(into[listing[struct{ ID string }]](r).Items) == 1
	}, time.Minute, 10*time.Millisecond)
}

// TestDevTouchesNoDatabaseButItsOwn: applications have their database in the environment, and so has production.
func TestDevTouchesNoDatabaseButItsOwn(t *testing.T) {
	t.Parallel()
	theirs := dbtest.EmptyPostgresURL(t)
	h := newHarness(t, append([]string{
		"DATABASE_URL=" + theirs, "USHER_DATABASE_URL=" + theirs, "USHER_DATABASE_SCHEMA=public", "USHER_NATS_URL=nats://127.0.0.1:1",
	}, anyPorts...)...)
	d := startDev(t, h)
	assert.Equal(t, 1, strings.Count(d.stderr.String(), "note: "), d.stderr.String())
	assert.Contains(t, d.stderr.String(), "note: DATABASE_URL, USHER_DATABASE_URL, USHER_DATABASE_SCHEMA, USHER_NATS_URL are not used: ")
	d.trigger()

	r := h.Run("config", "--output", "json").want(exitOK)
	assert.Contains(t, r.err, "note: USHER_DATABASE_URL, USHER_DATABASE_SCHEMA, USHER_NATS_URL are not used: `usher dev` runs in ")
	shown := map[string]config.Setting{}
	for _, s := range into[listing[config.Setting]](r).Items {
		shown[s.Name] = s
	}
	assert.Contains(t, shown["USHER_DATABASE_URL"].Value, "/dev/usher.db")
	assert.Equal(t, "dev", shown["USHER_DATABASE_URL"].Origin)
	assert.Regexp(t, `^nats://\w+:redacted@127.0.0.1:\d+$`, shown["USHER_NATS_URL"].Value)
	assert.Equal(t, config.Setting{Name: "USHER_DATABASE_SCHEMA", Value: "usher", Origin: "default", Default: "usher", Doc: shown["USHER_DATABASE_SCHEMA"].Doc}, shown["USHER_DATABASE_SCHEMA"])
	assert.Empty(t, shown["DATABASE_URL"].Value)
	assert.Equal(t, "redacted", shown["CLERK_WEBHOOK_SIGNING_SECRET"].Value)
	assert.NotContains(t, r.out, d.state.SigningSecret)

	h.with("USHER_DATABASE_URL=nonsense").Run("events", "list").want(exitOK)
	assert.Equal(t, exitOK, d.stop(), d.stderr.String())

	db := openDatabase(t, theirs)
	var schemas []string
	require.NoError(t, db.Raw("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'usher%' UNION SELECT tablename FROM pg_tables WHERE schemaname = 'public'").Scan(&schemas).Error)
	assert.Empty(t, schemas)
}

// TestDevUsesOnlyADatabaseWithoutForeignRows: it is given by flag, kept, and then dev's.
func TestDevUsesOnlyADatabaseWithoutForeignRows(t *testing.T) {
	t.Parallel()
	for name, empty := range map[string]func(testing.TB) string{
		"sqlite":   func(t testing.TB) string { return "sqlite:" + filepath.Join(t.TempDir(), "theirs.db") },
		"postgres": dbtest.EmptyPostgresURL,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := empty(t)
			h := newHarness(t, anyPorts...)
			d := startDev(t, h, "--database-url", url)
			assert.Equal(t, allinone.DevSchema, d.state.DatabaseSchema)
			d.trigger()
			d.stop()
			startDev(t, h, "--database-url", url).stop() // its own rows

			r := h.with("USHER_SOURCE=other").Run("dev", "--database-url", url).want(exitUsage)
			assert.Contains(t, r.err, `rows of source "clerk", which is not configured: 1 users`)
			assert.Contains(t, r.err, "leave out --database-url")

			other := empty(t)
			db, err := database.Open(t.Context(), other, "theirs")
			require.NoError(t, err)
			if database.IsPostgres(db) {
				require.NoError(t, db.Exec("CREATE SCHEMA theirs").Error)
			}
			require.NoError(t, db.Exec(`CREATE TABLE "User" (id int)`).Error)
			require.NoError(t, db.Exec(`INSERT INTO "User" VALUES (1)`).Error)
			r = h.Run("dev", "--database-url", other, "--database-schema", "theirs").want(exitUsage)
			assert.Contains(t, r.err, "refuse the database: table User holds rows that dev did not make")
			require.Error(t, db.Exec("SELECT 1 FROM deliveries").Error, "nothing was made in it")
			require.NoError(t, database.Close(db))
		})
	}
}

func TestDevTakesTheNextFreePort(t *testing.T) {
	t.Parallel()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:8081")
	if err == nil { // else another process holds it, which is as good
		defer func() { _ = l.Close() }()
	}
	d := startDev(t, newHarness(t, anyPorts[0], anyPorts[2]))
	address := strings.TrimPrefix(d.state.ConsoleURL, "http://")
	assert.NotEqual(t, "127.0.0.1:8081", address)
	assert.Contains(t, d.stderr.String(), "note: 127.0.0.1:8081 is taken: USHER_CONSOLE_ADDR is "+address)

	_, port, _ := net.SplitHostPort(address)
	next := freeAddr(t.Context(), address, []string{port, "9999"})
	assert.NotEqual(t, address, next, "another listener has it")
	_, other, _ := net.SplitHostPort(next)
	assert.NotEqual(t, next, freeAddr(t.Context(), address, []string{other}), "another listener is to have it")
	assert.Equal(t, "127.0.0.1:0", freeAddr(t.Context(), "127.0.0.1:0", nil))
}

// TestTheDemosStoryEndsInThePast: nothing in it is dated later than now but what is due later by its nature, as the end of a period.
func TestTheDemosStoryEndsInThePast(t *testing.T) {
	t.Parallel()
	for _, users := range []int{1, 20, 200, 1000} {
		for seed := range uint64(8) {
			o := devOptions{demo: true, users: users}
			now := time.Now()
			clerk := emulator.New(emulator.Config{Seed: seed, Start: now.Add(-o.before()), NULs: true})
			for e := range clerk.Story(users) {
				require.False(t, e.At.After(now), "%d users, seed %d: %s at %s", users, seed, e.Type, e.At)
				data := gjson.GetBytes(e.Body, "data")
				for _, field := range []string{"created_at", "updated_at", "last_active_at", "last_sign_in_at", "latest_activity.created_at", "period_start", "paid_at", "billing_date", "user.last_active_at"} {
					if ms := data.Get(field).Int(); ms > now.UnixMilli() {
						require.Fail(t, "in the future", "%d users, seed %d: %s of %s at %s", users, seed, field, e.Type, time.UnixMilli(ms))
					}
				}
			}
		}
	}
}
