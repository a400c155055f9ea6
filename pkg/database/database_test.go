package database_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

// eachEmpty runs a subtest with the URL of a database of each kind that nobody migrated.
func eachEmpty(t *testing.T, run func(t *testing.T, url string)) {
	t.Helper()
	t.Run("postgres", func(t *testing.T) { t.Parallel(); run(t, dbtest.EmptyPostgresURL(t)) })
	t.Run("sqlite", func(t *testing.T) { t.Parallel(); run(t, dbtest.EmptySQLiteURL(t)) })
}

func TestOpenSaysWhatIsWrongAndWhatToDo(t *testing.T) {
	t.Parallel()
	good, err := url.Parse(dbtest.EmptyPostgresURL(t))
	require.NoError(t, err)
	change := func(edit func(u *url.URL)) string {
		u := *good
		edit(&u)
		return u.String()
	}
	folder := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(folder, "text.db"), []byte(strings.Repeat("no database ", 1000)), 0o600))
	const secret = "s3cr3t-never-shown"
	tests := map[string]struct {
		url, schema string
		is          error
		says        string
	}{
		"nothing listens":     {change(func(u *url.URL) { u.Host, u.User = "127.0.0.1:1", url.UserPassword("ada", secret) }), "usher", database.ErrUnreachable, "no PostgreSQL answers at 127.0.0.1:1: check that it runs"},
		"unknown host":        {change(func(u *url.URL) { u.Host, u.User = "db.invalid:5432", url.UserPassword("ada", secret) }), "usher", database.ErrUnreachable, "no PostgreSQL answers at db.invalid:5432"},
		"wrong password":      {change(func(u *url.URL) { u.User = url.UserPassword(good.User.Username(), secret) }), "usher", database.ErrAuth, "check user and password"},
		"unknown role":        {change(func(u *url.URL) { u.User = url.UserPassword("nobody_known", secret) }), "usher", database.ErrAuth, `refuses user "nobody_known"`},
		"no such database":    {change(func(u *url.URL) { u.Path = "/not_there" }), "usher", database.ErrNoDatabase, "createdb not_there"},
		"no URL":              {"", "usher", nil, "use postgres://… or sqlite:PATH"},
		"unknown scheme":      {"mysql://ada:" + secret + "@localhost/usher", "usher", nil, "neither postgres://… nor sqlite:PATH"},
		"not a URL":           {"postgres://ada:" + secret + "@[::1/usher", "usher", nil, "not valid"},
		"odd port":            {"postgres://ada:" + secret + "@localhost:port/usher", "usher", nil, "not valid"},
		"no schema":           {good.String(), "", nil, "USHER_DATABASE_SCHEMA"},
		"SQLite without path": {"sqlite:", "", nil, "needs the path of a file"},
		"SQLite in memory":    {"sqlite::memory:", "", nil, "needs the path of a file"},
		"SQLite of a folder":  {"sqlite:" + folder, "", database.ErrUnreachable, "cannot be opened for writing"},
		"SQLite of a text":    {"sqlite:" + folder + "/text.db", "", database.ErrUnreachable, "is not a SQLite database"},
		"SQLite below a file": {"sqlite:" + folder + "/text.db/usher.db", "", database.ErrUnreachable, "cannot be created"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db, err := database.Open(t.Context(), test.url, test.schema)
			require.Error(t, err)
			assert.Nil(t, db)
			if test.is != nil {
				require.ErrorIs(t, err, test.is)
				assert.True(t, database.IsInfrastructure(err))
			}
			assert.ErrorContains(t, err, test.says)
			for ; err != nil; err = errors.Unwrap(err) {
				assert.NotContains(t, err.Error(), secret)
			}
		})
	}
}

func TestOpenGivesUpOnAServerThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = silent.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = database.Open(ctx, "postgres://ada:x@"+silent.Addr().String()+"/usher", "usher")
	require.ErrorIs(t, err, database.ErrUnreachable)
}

func TestOpenCreatesAPrivateFolderAndFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "a folder", "with #? and %41", "usher.db")
	db := dbtest.Open(t, "sqlite:"+file)
	require.NoError(t, db.Exec("CREATE TABLE t (a text)").Error)
	for path, mode := range map[string]os.FileMode{filepath.Dir(file): 0o700, file: 0o600, file + "-wal": 0o600} {
		info, err := os.Stat(path)
		require.NoError(t, err)
		assert.Equal(t, mode, info.Mode().Perm(), path)
	}
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "page_size": "8192", "busy_timeout": "10000"} {
		var got string
		require.NoError(t, db.Raw("PRAGMA "+pragma).Row().Scan(&got))
		assert.Equal(t, want, got, pragma)
	}
}

func TestPostgresConnectionsAreSetUp(t *testing.T) {
	t.Parallel()
	db := dbtest.Postgres(t)
	for setting, want := range map[string]string{"search_path": `"usher"`, "TimeZone": "UTC", "application_name": "usher"} {
		var got string
		require.NoError(t, db.Raw("SHOW "+setting).Row().Scan(&got))
		assert.Equal(t, want, got)
	}
	pool, err := db.DB()
	require.NoError(t, err)
	assert.Equal(t, 10, pool.Stats().MaxOpenConnections)
}

func TestTimesAreUTCAndSort(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		type delivery struct {
			Handler, EventID, Type, Source, Origin, Status string
			ReceivedAt                                     time.Time
			ProcessedAt                                    *time.Time
		}
		zone := time.FixedZone("far", -7*3600)
		times := []time.Time{time.UnixMilli(1_768_471_200_036), time.UnixMilli(1_768_471_200_500).In(zone), time.UnixMilli(1_768_471_201_000).UTC()}
		for i, at := range times {
			d := delivery{Handler: "mirror", EventID: fmt.Sprint(i), Type: "t", Source: "s", Origin: "o", Status: "processed", ReceivedAt: at, ProcessedAt: &at}
			require.NoError(t, db.Table("deliveries").Create(&d).Error)
		}
		var found []delivery
		require.NoError(t, db.Table("deliveries").Where("received_at >= ? AND processed_at >= ?", times[1], &times[1]).Order("received_at").Find(&found).Error)
		require.Len(t, found, 2)
		for i, d := range found {
			assert.True(t, times[i+1].Equal(d.ReceivedAt), d.ReceivedAt)
			assert.Equal(t, time.UTC, d.ReceivedAt.Location())
			assert.Equal(t, time.UTC, d.ProcessedAt.Location())
		}
	})
}

func TestMigrateIsIdempotentAndReportsWhatItDid(t *testing.T) {
	t.Parallel()
	eachEmpty(t, func(t *testing.T, url string) {
		db := dbtest.Open(t, url)
		pending, err := database.Pending(t.Context(), db)
		require.NoError(t, err)
		assert.Contains(t, pending, "0001_users")
		err = database.CheckMigrated(t.Context(), db)
		require.ErrorIs(t, err, database.ErrPending)
		assert.ErrorContains(t, err, "usher setup")

		applied, err := database.Migrate(t.Context(), db)
		require.NoError(t, err)
		assert.Equal(t, pending, applied)
		require.NoError(t, database.CheckMigrated(t.Context(), db))
		applied, err = database.Migrate(t.Context(), db)
		require.NoError(t, err)
		assert.Empty(t, applied)

		require.NoError(t, db.Exec("DELETE FROM goose_db_version WHERE version_id = (SELECT max(version_id) FROM goose_db_version)").Error)
		pending, err = database.Pending(t.Context(), db)
		require.NoError(t, err)
		assert.Len(t, pending, 1)
	})
}

func TestMigrateRefusesANewerDatabase(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		require.NoError(t, db.Exec("INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, true)").Error)
		for _, err := range []error{database.CheckMigrated(t.Context(), db), func() error { _, err := database.Migrate(t.Context(), db); return err }()} {
			require.ErrorIs(t, err, database.ErrNewer)
			assert.ErrorContains(t, err, "9999")
		}
	})
}

func TestManyMayMigrateAtOnce(t *testing.T) {
	t.Parallel()
	eachEmpty(t, func(t *testing.T, url string) {
		var wg sync.WaitGroup
		var total atomic.Int64
		errs := make([]error, 4)
		for i := range errs {
			db := dbtest.Open(t, url)
			wg.Go(func() {
				var applied []string
				applied, errs[i] = database.Migrate(context.Background(), db)
				total.Add(int64(len(applied)))
			})
		}
		wg.Wait()
		for _, err := range errs {
			require.NoError(t, err)
		}
		db := dbtest.Open(t, url)
		require.NoError(t, database.CheckMigrated(t.Context(), db))
		var n int64
		require.NoError(t, db.Raw("SELECT count(*) FROM goose_db_version WHERE version_id > 0").Scan(&n).Error)
		assert.Equal(t, n, total.Load(), "each migration ran once")
	})
}

func TestSchemasOfOneDatabaseAreApart(t *testing.T) {
	t.Parallel()
	address := dbtest.EmptyPostgresURL(t)
	for _, schema := range []string{"usher", `My "odd" Schema`} {
		db, err := database.Open(t.Context(), address, schema)
		require.NoError(t, err)
		applied, err := database.Migrate(t.Context(), db)
		require.NoError(t, err)
		assert.NotEmpty(t, applied, schema)
		require.NoError(t, database.CheckMigrated(t.Context(), db))
		require.NoError(t, database.Close(db))
	}
}

// withRole is an empty database, as its administrator and as a role without rights of its own.
func withRole(t *testing.T) (admin *gorm.DB, role string, db *gorm.DB) {
	t.Helper()
	address := dbtest.EmptyPostgresURL(t)
	role = fmt.Sprintf("usher_role_%d_%d", os.Getpid(), time.Now().UnixNano())
	admin = dbtest.Open(t, address)
	require.NoError(t, admin.Exec("CREATE ROLE "+role+" LOGIN PASSWORD 'pw'").Error)
	t.Cleanup(func() {
		_ = admin.Exec("DROP OWNED BY " + role).Error
		_ = admin.Exec("DROP ROLE " + role).Error
	})
	u, err := url.Parse(address)
	require.NoError(t, err)
	u.User = url.UserPassword(role, "pw")
	return admin, role, dbtest.Open(t, u.String())
}

// TestMigrateNeedsNoRightToCreateAnExistingSchema is the usual set-up of a managed PostgreSQL: an administrator made the schema.
func TestMigrateNeedsNoRightToCreateAnExistingSchema(t *testing.T) {
	t.Parallel()
	admin, role, db := withRole(t)
	_, err := database.Migrate(t.Context(), db)
	require.ErrorIs(t, err, database.ErrAuth)
	assert.ErrorContains(t, err, "GRANT CREATE ON DATABASE")
	require.NoError(t, admin.Exec("CREATE SCHEMA usher").Error)
	var owner string
	require.NoError(t, admin.Raw("SELECT current_user").Scan(&owner).Error)
	require.NoError(t, admin.Exec("GRANT USAGE ON SCHEMA usher TO "+role).Error)
	_, err = database.Migrate(t.Context(), db)
	require.ErrorIs(t, err, database.ErrAuth)
	require.ErrorContains(t, err, fmt.Sprintf("schema usher belongs to user %q, and %q may not create tables in it", owner, role))
	require.NoError(t, admin.Exec("ALTER SCHEMA usher OWNER TO "+role).Error)
	_, err = database.Migrate(t.Context(), db)
	require.NoError(t, err)
}

// TestMigrateNamesTablesOfAnotherUser is a set-up by another user than the one who began it.
func TestMigrateNamesTablesOfAnotherUser(t *testing.T) {
	t.Parallel()
	admin, role, db := withRole(t)
	_, err := database.Migrate(t.Context(), admin)
	require.NoError(t, err)
	require.NoError(t, admin.Exec("GRANT USAGE ON SCHEMA usher TO "+role).Error)
	_, err = database.Migrate(t.Context(), db)
	require.ErrorIs(t, err, database.ErrAuth)
	require.ErrorContains(t, err, "GRANT SELECT ON usher.goose_db_version, or for the user who sets up: make it the owner of the schema, its tables and views")
}

func TestInTxCommitsOrRollsBackAll(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		insert := func(tx *gorm.DB, id string) error {
			return tx.Exec("INSERT INTO deliveries (handler, event_id, type, source, origin, status, received_at) VALUES ('h', ?, 't', 's', 'o', 'processed', ?)", id, time.Now()).Error
		}
		require.NoError(t, database.InTx(t.Context(), db, func(tx *gorm.DB) error { return insert(tx, "kept") }))
		fault := errors.New("fault")
		require.ErrorIs(t, database.InTx(t.Context(), db, func(tx *gorm.DB) error { return errors.Join(insert(tx, "lost"), fault) }), fault)
		assert.Panics(t, func() {
			_ = database.InTx(t.Context(), db, func(tx *gorm.DB) error { _ = insert(tx, "lost"); panic("fault") })
		})
		ctx, cancel := context.WithCancel(t.Context())
		err := database.InTx(ctx, db, func(tx *gorm.DB) error { err := insert(tx, "lost"); cancel(); return err })
		require.Error(t, err)
		assert.True(t, database.IsInfrastructure(err), err)
		var ids []string
		require.NoError(t, db.Raw("SELECT event_id FROM deliveries").Scan(&ids).Error)
		assert.Equal(t, []string{"kept"}, ids)

		err = insert(db, "kept")
		assert.True(t, database.IsConstraint(err))
		assert.False(t, database.IsInfrastructure(err))
	})
}

// TestSQLiteIsNeverLocked lets writers of two pools, with and without a transaction, and readers meet.
func TestSQLiteIsNeverLocked(t *testing.T) {
	t.Parallel()
	address := dbtest.SQLiteURL(t)
	pools := []*gorm.DB{dbtest.Open(t, address), dbtest.Open(t, address)}
	require.NoError(t, pools[0].Exec("CREATE TABLE counter (n integer)").Error)
	require.NoError(t, pools[0].Exec("INSERT INTO counter VALUES (0)").Error)
	const writers, rounds = 8, 25
	var wg sync.WaitGroup
	errs := make(chan error, 4*writers*rounds)
	for i := range writers {
		db := pools[i%2]
		wg.Go(func() {
			for range rounds {
				errs <- database.InTx(context.Background(), db, func(tx *gorm.DB) error {
					var n int
					if err := tx.Raw("SELECT n FROM counter").Scan(&n).Error; err != nil {
						return err
					}
					return tx.Exec("UPDATE counter SET n = ?", n+1).Error
				})
				errs <- db.Exec("UPDATE counter SET n = n + 1").Error
				errs <- database.InReadTx(context.Background(), db, func(tx *gorm.DB) error {
					var first, second int
					err := errors.Join(tx.Raw("SELECT n FROM counter").Scan(&first).Error, tx.Raw("SELECT n FROM counter").Scan(&second).Error)
					if first != second {
						return errors.New("a read transaction saw a change")
					}
					return err
				})
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		require.NoError(t, err)
	}
	var n int
	require.NoError(t, pools[0].Raw("SELECT n FROM counter").Scan(&n).Error)
	assert.Equal(t, 2*writers*rounds, n)
}

func TestSQLiteReadersDoNotWaitForTheWriter(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	require.NoError(t, database.InTx(t.Context(), db, func(tx *gorm.DB) error {
		require.NoError(t, tx.Exec("UPDATE users SET source = 'x'").Error)
		var n int
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		require.NoError(t, db.WithContext(ctx).Raw("SELECT count(*) FROM users").Scan(&n).Error)
		ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		err := db.WithContext(ctx).Exec("UPDATE users SET source = 'y'").Error
		require.Error(t, err, "there is one writer")
		assert.True(t, database.IsInfrastructure(err))
		return nil
	}))
	require.NoError(t, db.Exec("UPDATE users SET source = 'y'").Error, "a wait that was given up leaves no lock behind")
}

func TestIsInfrastructureTellsAnOutageFromTheDatasError(t *testing.T) {
	t.Parallel()
	for _, code := range []string{"57P01", "57P02", "57P03", "57P05", "57014", "25006", "53100", "53200", "53300", "40001", "40P01", "08006", "08P01", "28P01", "28000", "3D000", "42P01", "42501", "42703", "26000", "42P05", "55P03", "58030", "XX001"} {
		err := fmt.Errorf("apply: %w", &pgconn.PgError{Code: code})
		assert.True(t, database.IsInfrastructure(err), code)
		assert.False(t, database.IsConstraint(err), code)
	}
	for _, code := range []string{"22P05", "22001", "22003", "23502", "23505", "23514", "42601", "54000", "54001", "XX000", "P0001", ""} {
		err := fmt.Errorf("apply: %w", &pgconn.PgError{Code: code})
		assert.False(t, database.IsInfrastructure(err), code)
		assert.Equal(t, strings.HasPrefix(code, "23"), database.IsConstraint(err), code)
	}
	for _, err := range []error{
		context.Canceled, context.DeadlineExceeded, driver.ErrBadConn, sql.ErrConnDone, sql.ErrTxDone, io.EOF, io.ErrUnexpectedEOF, net.ErrClosed,
		syscall.ECONNREFUSED, syscall.ENOSPC, &net.OpError{Op: "dial", Err: errors.New("no route")}, &net.DNSError{Name: "db"}, &pgconn.ConnectError{},
		database.ErrUnreachable, database.ErrAuth, database.ErrNoDatabase, database.ErrPending, errors.New("sql: database is closed"),
	} {
		assert.True(t, database.IsInfrastructure(fmt.Errorf("apply: %w", err)) || database.IsInfrastructure(err), err)
	}
	for _, err := range []error{nil, errors.New("object has no id"), sql.ErrNoRows, gorm.ErrRecordNotFound} {
		assert.False(t, database.IsInfrastructure(err), err)
		assert.False(t, database.IsConstraint(err), err)
	}
}

func TestAMissingTableOrColumnIsAnOutage(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for statement, outage := range map[string]bool{
			"INSERT INTO nowhere (a) VALUES (1)":           true,
			"SELECT * FROM nowhere":                        true,
			"UPDATE nowhere SET a = 1":                     true,
			"SELECT absent FROM deliveries":                true,
			"INSERT INTO deliveries (absent) VALUES (1)":   true,
			"INSERT INTO deliveries (handler) VALUES ('')": false,
			"SELEC 1": false,
		} {
			err := db.Exec(statement).Error
			require.Error(t, err, statement)
			assert.Equal(t, outage, database.IsInfrastructure(fmt.Errorf("apply: %w", err)), "%s: %v", statement, err)
		}
	})
	db := dbtest.SQLite(t)
	require.NoError(t, db.Exec("CREATE TRIGGER odd BEFORE INSERT ON deliveries BEGIN SELECT RAISE(ABORT, 'no such table: x'); END").Error)
	err := db.Exec("INSERT INTO deliveries (handler) VALUES ('')").Error
	require.ErrorContains(t, err, "no such table: x")
	assert.False(t, database.IsInfrastructure(err), "a rule of the schema that only says so")
}

// TestOutagesOfARealServerAreInfrastructure stops and kills a server under open connections, and shuts it off in other ways.
func TestOutagesOfARealServerAreInfrastructure(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	db := dbtest.Open(t, server.Create(t, "usher"))
	_, err := database.Migrate(t.Context(), db)
	require.NoError(t, err)
	work := func(between func()) error {
		return database.InTx(t.Context(), db, func(tx *gorm.DB) error {
			if err := tx.Exec("UPDATE users SET source = 'x'").Error; err != nil {
				return err
			}
			between()
			return tx.Exec("UPDATE users SET source = 'y'").Error
		})
	}
	require.NoError(t, work(func() {}))
	for name, end := range map[string]func(){"stopped": server.Stop, "killed": server.Kill} {
		err := work(end)
		require.Error(t, err, name)
		assert.True(t, database.IsInfrastructure(err), "%s in a transaction: %v", name, err)
		err = work(func() {})
		require.Error(t, err, name)
		assert.True(t, database.IsInfrastructure(err), "%s: %v", name, err)
		assert.True(t, database.IsInfrastructure(database.Ping(t.Context(), db)), name)
		server.Start(t)
		require.NoError(t, work(func() {}), "%s: the pool heals by itself", name)
	}
	require.NoError(t, db.Exec("ALTER DATABASE usher SET default_transaction_read_only = on").Error)
	reopened := dbtest.Open(t, server.URL("usher"))
	err = reopened.Exec("UPDATE users SET source = 'x'").Error
	require.Error(t, err)
	assert.True(t, database.IsInfrastructure(err), err)
}

func TestAFullOrLockedSQLiteFileIsInfrastructure(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	pool, err := db.DB()
	require.NoError(t, err)
	conn, err := pool.Conn(t.Context())
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	_, err = conn.ExecContext(t.Context(), "PRAGMA max_page_count = 1")
	require.NoError(t, err)
	_, err = conn.ExecContext(t.Context(), "CREATE TABLE big AS SELECT randomblob(10000000) AS b")
	require.Error(t, err)
	assert.True(t, database.IsInfrastructure(err), err)
	_, err = conn.ExecContext(t.Context(), "PRAGMA query_only = on")
	require.NoError(t, err)
	_, err = conn.ExecContext(t.Context(), "UPDATE users SET source = 'x'")
	require.Error(t, err)
	assert.True(t, database.IsInfrastructure(err), err)
}

func TestUpsertCountsWhatItWrote(t *testing.T) {
	t.Parallel()
	upsert := &database.Upsert{
		Table: "deliveries", Conflict: []string{"handler", "source", "event_id"}, Guard: "deliveries.attempts < excluded.attempts",
		Columns: []database.Column{
			{Name: "handler", Type: "text"},
			{Name: "event_id", Type: "text"},
			{Name: "type", Type: "text"},
			{Name: "source", Type: "text"},
			{Name: "origin", Type: "text"},
			{Name: "status", Type: "text"},
			{Name: "attempts", Type: "bigint"},
			{Name: "received_at", Type: "timestamptz"},
			{Name: "duration_ms", Type: "float8"},
			{Name: "error", Type: "text"},
		},
	}
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		rows := func(n int, attempts int64) (rows [][]any) {
			for i := range n {
				rows = append(rows, []any{"mirror", fmt.Sprintf("msg_%03d", i), `odd "text", {NULL} \ 'é' 😀`, "", "NULL", "processed", attempts, time.UnixMilli(1_768_471_200_036).UTC(), 0.25, nil})
			}
			return rows
		}
		exec := func(rows [][]any) (n int64) {
			require.NoError(t, database.InTx(t.Context(), db, func(tx *gorm.DB) (err error) {
				n, err = upsert.Exec(t.Context(), tx, rows)
				return err
			}))
			return n
		}
		assert.EqualValues(t, 0, exec(nil))
		assert.EqualValues(t, 7, exec(rows(7, 1)))
		assert.EqualValues(t, 0, exec(rows(7, 1)), "the guard holds them")
		assert.EqualValues(t, 3, exec(rows(3, 2)))
		assert.EqualValues(t, 9-3, exec(rows(9, 2)), "two are new, four are older")
		var row struct {
			Type, Origin string
			DurationMs   float64
			Error        *string
			ReceivedAt   time.Time
		}
		require.NoError(t, db.Raw("SELECT * FROM deliveries WHERE event_id = 'msg_000'").Scan(&row).Error)
		assert.Equal(t, `odd "text", {NULL} \ 'é' 😀`, row.Type)
		assert.Equal(t, "NULL", row.Origin)
		assert.InDelta(t, 0.25, row.DurationMs, 0)
		assert.Nil(t, row.Error)
		assert.Equal(t, time.UnixMilli(1_768_471_200_036).UTC(), row.ReceivedAt)
	})
}
