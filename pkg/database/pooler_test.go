package database_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// ignored is what people are told to write where a pooler refuses a parameter: it is then dropped in silence.
const ignored = "ignore_startup_parameters = search_path,plan_cache_mode,extra_float_digits,options,synchronous_commit,default_transaction_isolation,statement_timeout,idle_in_transaction_session_timeout"

// throughPoolers runs a subtest behind each kind of real PgBouncer, with the address of its database, and that of the server itself.
func throughPoolers(t *testing.T, run func(t *testing.T, pooled, direct string)) {
	t.Helper()
	for _, mode := range []string{"transaction", "session"} {
		for name, settings := range map[string][]string{"refuses parameters": nil, "drops parameters": {ignored}} {
			t.Run(mode+" mode, "+name, func(t *testing.T) {
				t.Parallel()
				direct := dbtest.EmptyPostgresURL(t)
				// Fewer sessions than Usher has connections, but in session mode, where each holds one.
				settings := append([]string{"pool_mode = " + mode, map[string]string{"transaction": "default_pool_size = 3", "session": "default_pool_size = 40"}[mode]}, settings...)
				run(t, dbtest.PgBouncer(t, direct, settings...), direct)
			})
		}
	}
}

func TestEverythingWorksThroughAPoolerInTheRightSchema(t *testing.T) {
	t.Parallel()
	throughPoolers(t, func(t *testing.T, pooled, direct string) {
		hostileDefaults(t, direct)
		open := func() *gorm.DB {
			db, err := database.Open(t.Context(), pooled, "usher")
			require.NoError(t, err)
			t.Cleanup(func() { _ = database.Close(db) })
			return db
		}
		// Several migrate at once: one works.
		var running sync.WaitGroup
		errs := make([]error, 3)
		applied := make([]int, len(errs))
		pools := []*gorm.DB{open(), open(), open()}
		for i, db := range pools {
			running.Go(func() {
				var names []string
				names, errs[i] = database.Migrate(context.Background(), db)
				applied[i] = len(names)
			})
		}
		running.Wait()
		require.NoError(t, errors.Join(errs...))
		db := pools[0]
		require.NoError(t, database.CheckMigrated(t.Context(), db))
		require.NoError(t, database.Probe(t.Context(), db, "deliveries"))

		// The same statements from many goroutines meet on few sessions.
		upsert := &database.Upsert{Table: "deliveries", Conflict: []string{"handler", "source", "event_id"}, Columns: []database.Column{
			{Name: "handler", Type: "text"},
			{Name: "event_id", Type: "text"},
			{Name: "type", Type: "text"},
			{Name: "source", Type: "text"},
			{Name: "origin", Type: "text"},
			{Name: "status", Type: "text"},
			{Name: "received_at", Type: "timestamptz"},
		}}
		const workers, rounds = 12, 10
		failed := make(chan error, workers)
		for worker := range workers {
			db := pools[worker%len(pools)]
			running.Go(func() {
				failed <- func() error {
					for round := range rounds {
						id := fmt.Sprintf("%d-%d", worker, round)
						if err := database.InTx(context.Background(), db, func(tx *gorm.DB) error {
							if err := tx.Exec("SET LOCAL lock_timeout = '20s'").Error; err != nil {
								return err
							}
							_, err := upsert.Exec(context.Background(), tx, [][]any{{"mirror", id, "t", "s", "o", "processed", "2026-01-02T03:04:05Z"}})
							return err
						}); err != nil {
							return err
						}
						if err := db.Exec("UPDATE deliveries SET attempts = attempts + ? WHERE event_id = ?", 1, id).Error; err != nil {
							return err
						}
						var found []string
						if err := db.Raw("SELECT event_id FROM deliveries WHERE event_id = ANY(ARRAY[?]::text[])", []string{id}).Scan(&found).Error; err != nil {
							return err
						}
						var commits, isolation, timeout, zone, path string
						if err := db.Raw("SELECT current_setting('synchronous_commit'), current_setting('transaction_isolation'), current_setting('statement_timeout'), current_setting('timezone'), current_setting('search_path')").
							Row().Scan(&commits, &isolation, &timeout, &zone, &path); err != nil {
							return err
						}
						if got := fmt.Sprint(found, commits, isolation, timeout, zone, path); got != fmt.Sprint([]string{id}, "on", "read committed", "0", "UTC", `"usher"`) {
							return fmt.Errorf("%s: %s", id, got)
						}
						if err := database.InReadTx(context.Background(), db, func(tx *gorm.DB) error {
							var n int64
							return tx.Raw("SELECT count(*) FROM deliveries").Scan(&n).Error
						}); err != nil {
							return err
						}
					}
					return nil
				}()
			})
		}
		running.Wait()
		close(failed)
		for err := range failed {
			require.NoError(t, err)
		}

		// What a statement alone returns is committed, and what fails leaves nothing open.
		var id string
		require.NoError(t, db.Raw("INSERT INTO deliveries (handler, event_id, type, source, origin, status, received_at) VALUES ('mirror', 'last', 't', 's', 'o', 'processed', now()) RETURNING event_id").Row().Scan(&id))
		require.Error(t, db.Exec("UPDATE deliveries SET attempts = 1/0").Error)
		require.Error(t, db.Raw("SELECT 1/(attempts-attempts) FROM deliveries").Scan(new([]int)).Error)

		admin := dbtest.Open(t, direct)
		var tables, others int
		require.NoError(t, admin.Raw("SELECT count(*) FILTER (WHERE schemaname = 'usher'), count(*) FILTER (WHERE schemaname NOT IN ('usher', 'pg_catalog', 'information_schema')) FROM pg_tables").Row().Scan(&tables, &others))
		assert.Positive(t, tables)
		assert.Zero(t, others, "nothing is in public")
		var schemas []string
		require.NoError(t, admin.Raw("SELECT nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg_%' AND nspname <> 'information_schema' ORDER BY 1").Scan(&schemas).Error)
		assert.Equal(t, []string{"public", "usher"}, schemas)
		var rows, attempts int
		require.NoError(t, admin.Raw("SELECT count(*), sum(attempts) FROM usher.deliveries").Row().Scan(&rows, &attempts))
		assert.Equal(t, workers*rounds+1, rows)
		assert.Equal(t, workers*rounds, attempts)
		var migrations, total int
		require.NoError(t, admin.Raw("SELECT count(*) FROM usher.goose_db_version WHERE version_id > 0").Scan(&migrations).Error)
		for _, n := range applied {
			total += n
		}
		assert.Equal(t, migrations, total, "each migration ran once")
		var locks, prepared int
		require.NoError(t, admin.Raw("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())").Scan(&locks).Error)
		assert.Zero(t, locks, "no lock is left on a session of the pooler")

		// The sessions are others' too: they have nothing of ours.
		other, err := database.Open(t.Context(), pooled, "public")
		require.NoError(t, err)
		t.Cleanup(func() { _ = database.Close(other) })
		require.NoError(t, other.Raw("SELECT count(*) FROM pg_prepared_statements").Scan(&prepared).Error)
		assert.Zero(t, prepared)
		require.ErrorContains(t, other.Exec("SELECT * FROM deliveries").Error, "does not exist")

		warnings, err := database.Warnings(t.Context(), db)
		require.NoError(t, err)
		assert.Contains(t, strings.Join(warnings, "\n"), "a pooler in front of PostgreSQL keeps no settings")
	})
}

// A pooler may be put in front of a server, or be told to drop parameters, while Usher runs.
func TestARefusalOfAPoolerIsRecognizedAndNamed(t *testing.T) {
	t.Parallel()
	direct := dbtest.EmptyPostgresURL(t)
	pooled := dbtest.PgBouncer(t, direct, "pool_mode = transaction")
	open := func(edit func(u *url.URL), parameters ...string) error {
		u, err := url.Parse(pooled)
		require.NoError(t, err)
		if edit != nil {
			edit(u)
		}
		u.RawQuery = strings.Join(parameters, "&")
		db, err := database.Open(t.Context(), u.String(), "usher", "DATABASE_URL")
		if err == nil {
			require.NoError(t, database.Close(db))
		}
		return err
	}
	require.NoError(t, open(nil))
	require.NoError(t, open(nil, "statement_timeout=7s", "pgbouncer=true"))

	for _, parameter := range []string{"no_such_setting=5s", "statement_timeout=soon", "shared_buffers=1GB", "options=-c%20search_path%3Dpublic"} {
		name, _, _ := strings.Cut(parameter, "=")
		err := open(nil, parameter)
		require.ErrorIs(t, err, database.ErrUnusable, parameter)
		require.ErrorContains(t, err, name)
		require.ErrorContains(t, err, "DATABASE_URL")
		require.NotContains(t, err.Error(), "USHER_DATABASE_URL")
	}
	err := open(func(u *url.URL) { u.Path = "/not_there" })
	require.ErrorIs(t, err, database.ErrNoDatabase)
	require.ErrorContains(t, err, "not_there")
}

// What a pooler says while the server behind it is stopped is waited for.
func TestAPoolerWithoutItsServerIsWaitedFor(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	pooled := dbtest.PgBouncer(t, server.Create(t, "usher"), "pool_mode = transaction", "server_login_retry = 1", "query_wait_timeout = 2")
	server.Stop()
	_, err := database.Open(t.Context(), pooled, "usher")
	require.ErrorIs(t, err, database.ErrUnreachable)
	server.Start(t)
	require.Eventually(t, func() bool {
		db, err := database.Open(t.Context(), pooled, "usher")
		return err == nil && database.Close(db) == nil
	}, time.Minute, 10*time.Millisecond)
}

// Migrations need two sessions at a time. A pooler that has one is named, instead of waited for.
func TestAPoolerWithOneSessionIsNamed(t *testing.T) {
	t.Parallel()
	db := dbtest.Open(t, dbtest.PgBouncer(t, dbtest.EmptyPostgresURL(t), "pool_mode = transaction", "default_pool_size = 1"))
	_, err := database.Migrate(t.Context(), db)
	require.ErrorIs(t, err, database.ErrUnusable)
	require.ErrorContains(t, err, "default_pool_size")
}
