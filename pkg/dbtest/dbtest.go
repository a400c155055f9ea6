// Package dbtest gives tests real databases: PostgreSQL from the machine's own binaries, started once a test process, and
// SQLite. Only tests import it.
//
// Every database is fresh, migrated and the test's own: a copy of a template (some 0.1 s), closed and removed with the test. The
// server ends with the test process, also when that panics or is killed. TEST_DATABASE_URL names a server
// to use instead, by a URL whose user may create databases. Where there is no PostgreSQL its tests are skipped and say so; where CI is
// set they fail.
package dbtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
)

// Schema is the schema of the tables in every PostgreSQL database of this package.
const Schema = "usher"

// New is [Postgres].
func New(t testing.TB) *gorm.DB {
	t.Helper()
	return Postgres(t)
}

// Postgres opens a fresh, migrated PostgreSQL database.
func Postgres(t testing.TB) *gorm.DB {
	t.Helper()
	return Open(t, PostgresURL(t))
}

// SQLite opens a fresh, migrated SQLite database.
func SQLite(t testing.TB) *gorm.DB {
	t.Helper()
	return Open(t, SQLiteURL(t))
}

// Each runs a subtest on each kind of database: "postgres" and "sqlite".
func Each(t *testing.T, run func(t *testing.T, db *gorm.DB)) {
	t.Helper()
	t.Run("postgres", func(t *testing.T) { t.Parallel(); run(t, Postgres(t)) })
	t.Run("sqlite", func(t *testing.T) { t.Parallel(); run(t, SQLite(t)) })
}

// Open opens a database as a service does. It closes with the test.
func Open(t testing.TB, url string) *gorm.DB {
	t.Helper()
	db, err := database.Open(context.Background(), url, Schema)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = database.Close(db) })
	return db
}

// PostgresURL is the address of a fresh, migrated PostgreSQL database with the schema [Schema].
func PostgresURL(t testing.TB) string {
	t.Helper()
	s := shared(t)
	need(t, s.templateErr)
	return s.create(t, s.template)
}

// EmptyPostgresURL is the address of a fresh PostgreSQL database that nobody migrated.
func EmptyPostgresURL(t testing.TB) string {
	t.Helper()
	return shared(t).create(t, "template0")
}

// SQLiteURL is the address of a fresh, migrated SQLite database.
func SQLiteURL(t testing.TB) string {
	t.Helper()
	template, err := sqliteTemplate()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "usher.db")
	if err := os.WriteFile(file, template, 0o600); err != nil {
		t.Fatal(err)
	}
	return "sqlite:" + file
}

// EmptySQLiteURL is the address of a SQLite database that does not exist yet.
func EmptySQLiteURL(t testing.TB) string {
	t.Helper()
	return "sqlite:" + filepath.Join(t.TempDir(), "usher.db")
}

// IgnoreLeaks are the goroutines that outlive the tests by design, for goleak.VerifyTestMain.
func IgnoreLeaks() []goleak.Option {
	return []goleak.Option{goleak.IgnoreAnyFunction("github.com/usherhq/usher/pkg/dbtest.(*Server).start.func1")}
}

// sqliteTemplate is the bytes of a migrated database, so that a copy is one write.
var sqliteTemplate = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "dbtest-")
	if err != nil {
		return nil, fmt.Errorf("create folder: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	file := filepath.Join(dir, "usher.db")
	if err := migrate("sqlite:" + file); err != nil {
		return nil, err
	}
	return os.ReadFile(file)
})

// cluster is the server that all tests of the process share.
type cluster struct {
	base        *url.URL
	template    string
	templateErr error
}

var (
	sharedServer = sync.OnceValues(startShared)
	databases    atomic.Int64
)

func startShared() (*cluster, error) {
	address := os.Getenv("TEST_DATABASE_URL")
	if address == "" {
		server, err := newServer("")
		if err != nil {
			return nil, err
		}
		keep = server
		address = server.URL("postgres")
	}
	base, err := url.Parse(address)
	if err != nil {
		return nil, errors.New("TEST_DATABASE_URL is not a URL")
	}
	c := &cluster{base: base, template: unique()}
	if c.templateErr = execOn(c.url(""), "CREATE DATABASE "+c.template); c.templateErr == nil {
		c.templateErr = migrate(c.url(c.template))
	}
	if keep == nil { // nothing of ours runs after the last test that could drop it
		_ = execOn(c.url(""), "COMMENT ON DATABASE "+c.template+" IS 'template of a test run of usher, may be dropped'")
	}
	return c, nil
}

// keep holds the shared server, so that the pipe to its watchdog stays open as long as the process lives.
var keep *Server

func shared(t testing.TB) *cluster {
	t.Helper()
	c, err := sharedServer()
	need(t, err)
	return c
}

// need skips or fails the test for want of a PostgreSQL or PgBouncer.
func need(t testing.TB, err error) {
	t.Helper()
	switch {
	case err == nil:
	case errors.Is(err, errNoPostgres) && os.Getenv("CI") == "":
		t.Skipf("skipped: %v; install it or set TEST_DATABASE_URL", err)
	case errors.Is(err, errNoPgBouncer) && os.Getenv("CI") == "":
		t.Skipf("skipped: %v; install it", err)
	default:
		t.Fatalf("PostgreSQL for tests: %v", err)
	}
}

func (c *cluster) url(name string) string {
	u := *c.base
	if name != "" {
		u.Path = "/" + name
	}
	return u.String()
}

func (c *cluster) create(t testing.TB, template string) string {
	t.Helper()
	name := unique()
	if err := execOn(c.url(""), "CREATE DATABASE "+name+" TEMPLATE "+pgx.Identifier{template}.Sanitize()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = execOn(c.url(""), "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)") })
	return c.url(name)
}

func unique() string {
	return strings.ToLower(fmt.Sprintf("usher_test_%d_%x_%d", os.Getpid(), time.Now().UnixNano(), databases.Add(1)))
}

func migrate(address string) error {
	db, err := database.Open(context.Background(), address, Schema)
	if err != nil {
		return err
	}
	_, err = database.Migrate(context.Background(), db)
	return errors.Join(err, database.Close(db))
}
