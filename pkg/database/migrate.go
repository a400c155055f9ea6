package database

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/pressly/goose/v3"
	"gorm.io/gorm"
)

//go:embed migrations
var migrations embed.FS

// versionTable is goose's, in the schema itself.
const versionTable = "goose_db_version"

// lockKey is the advisory lock ("usher" in ASCII) under which schemas of one PostgreSQL database are migrated.
const lockKey = 0x7573686572

// Migrate brings the schema up to this program and returns the names of the migrations it applied. It creates
// the PostgreSQL schema where it is missing. Any number may run at once: one works, the others wait and find
// nothing to do. What was applied before an error stays applied.
func Migrate(ctx context.Context, db *gorm.DB) ([]string, error) {
	pool, err := db.DB()
	if err != nil {
		return nil, fmt.Errorf("migrate database: %w", err)
	}
	pending, err := Pending(ctx, db)
	if err != nil { // a newer database is refused before anything is touched
		return nil, err
	}
	if len(pending) == 0 {
		return nil, nil
	}
	if d, ok := db.Dialector.(pgDialector); ok {
		return migratePostgres(ctx, pool, d)
	}
	return migrateSQLite(ctx, db, pool)
}

func migratePostgres(ctx context.Context, pool *sql.DB, d pgDialector) ([]string, error) {
	if err := createSchema(ctx, pool, d.schema); err != nil {
		return nil, err
	}
	provider, err := goose.NewProvider(goose.DialectPostgres, pool, sub("postgres"), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	// The lock is an open transaction's, on a connection of its own: behind a pooler no session outlives a transaction.
	lock, err := lockSchema(ctx, pool)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Rollback() }()
	if d.connector.pooled.Load() {
		second, cancel := context.WithTimeout(ctx, secondSession)
		defer cancel()
		if err := pool.PingContext(second); err != nil && ctx.Err() == nil && second.Err() != nil {
			return nil, unusable("the pooler in front of PostgreSQL gave no second session within %s, and migrations need two at a time: raise its pool size (PgBouncer: default_pool_size)", secondSession)
		}
	}
	return up(ctx, provider)
}

// secondSession is how long a pooler may take to give a session while others have them all.
const secondSession = 10 * time.Second

// lockPoll is how often a lock that another process holds is asked for.
const lockPoll = 100 * time.Millisecond

// lockSchema begins a transaction that holds the lock until it ends. It does not wait in the server: those who wait would keep a small
// pooler's sessions from the one that works.
func lockSchema(ctx context.Context, pool *sql.DB) (*sql.Tx, error) {
	for {
		tx, err := pool.BeginTx(ctx, nil)
		if err != nil {
			return nil, fmt.Errorf("lock schema: %w", err)
		}
		var locked bool
		err = tx.QueryRowContext(ctx, "SELECT pg_try_advisory_xact_lock($1)", lockKey).Scan(&locked)
		if err == nil && locked {
			return tx, nil
		}
		_ = tx.Rollback()
		if err != nil {
			return nil, fmt.Errorf("lock schema: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock schema: %w", ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// migrateSQLite has no lock to take, but every migration is one transaction of the one writer: who comes second
// finds the tables there, rolls back, and looks again.
func migrateSQLite(ctx context.Context, db *gorm.DB, pool *sql.DB) ([]string, error) {
	provider, err := goose.NewProvider(goose.DialectSQLite3, pool, sub("sqlite"), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	var applied []string
	for left := len(names("sqlite")) + 1; ; left-- {
		names, err := up(ctx, provider)
		applied = append(applied, names...)
		if err == nil {
			return applied, nil
		}
		pending, pendingErr := Pending(ctx, db)
		switch {
		case pendingErr != nil || left == 0 || ctx.Err() != nil:
			return applied, err
		case len(pending) == 0:
			return applied, nil
		}
	}
}

func up(ctx context.Context, provider *goose.Provider) ([]string, error) {
	results, err := provider.Up(ctx)
	var partial *goose.PartialError
	if errors.As(err, &partial) {
		results = partial.Applied
	}
	applied := make([]string, len(results))
	for i, r := range results {
		applied[i] = name(r.Source.Path)
	}
	if err != nil {
		return applied, fmt.Errorf("migrate database: %w", err)
	}
	return applied, nil
}

// createSchema asks first, since CREATE SCHEMA IF NOT EXISTS wants the right to create even where nothing is to be created. A schema in which
// the user may not create tables is [ErrAuth].
func createSchema(ctx context.Context, pool *sql.DB, schema string) error {
	tx, err := lockSchema(ctx, pool)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	var user, owner string
	var mayCreate bool
	err = tx.QueryRowContext(ctx, `SELECT current_user, pg_get_userbyid(nspowner), has_schema_privilege(oid, 'CREATE')
		FROM pg_namespace WHERE nspname = $1`, schema).Scan(&user, &owner, &mayCreate)
	switch {
	case err == nil && mayCreate:
		return nil
	case err == nil: // the server would speak of a table that does not exist
		return fmt.Errorf("migrate database: schema %s belongs to user %q, and %q may not create tables in it: connect as %[2]q, or make %[3]q the owner of the schema, its tables and views (%[4]w)", schema, owner, user, ErrAuth)
	case !errors.Is(err, sql.ErrNoRows):
		return fmt.Errorf("create schema: %w", err)
	}
	_, err = tx.ExecContext(ctx, "CREATE SCHEMA "+pgx.Identifier{schema}.Sanitize())
	if err == nil {
		err = tx.Commit()
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42501" {
		return fmt.Errorf("create schema %s: the user may not create schemas here: GRANT CREATE ON DATABASE, or create it for this user (%w)", schema, errors.Join(ErrAuth, err))
	}
	if err != nil {
		return fmt.Errorf("create schema %s: %w", schema, err)
	}
	return nil
}

// Pending returns the names of the migrations that this program has and the database has not, in order. It only reads. A
// database that has a migration which this program does not know is [ErrNewer].
func Pending(ctx context.Context, db *gorm.DB) ([]string, error) {
	pool, err := db.DB()
	if err != nil {
		return nil, fmt.Errorf("read schema version: %w", err)
	}
	dialect := "sqlite"
	if IsPostgres(db) {
		dialect = "postgres"
	}
	pending := names(dialect)
	rows, err := pool.QueryContext(ctx, "SELECT version_id FROM "+versionTable+" WHERE is_applied AND version_id > 0 ORDER BY version_id")
	if isMissingTable(err) {
		if d, ok := db.Dialector.(pgDialector); ok {
			return pending, schemaUsable(ctx, pool, d.schema)
		}
		return pending, nil
	}
	var pg *pgconn.PgError
	if d, ok := db.Dialector.(pgDialector); ok && errors.As(err, &pg) && pg.Code == "42501" {
		return nil, fmt.Errorf("read schema version: %s: GRANT SELECT ON %s.%s, or for the user who sets up: make it the owner of the schema, its tables and views (%w)", pg.Message, d.schema, versionTable, ErrAuth)
	}
	if err != nil {
		return nil, fmt.Errorf("read schema version: %w", err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var version int64
		if err := rows.Scan(&version); err != nil {
			return nil, fmt.Errorf("read schema version: %w", err)
		}
		known := slices.ContainsFunc(names(dialect), func(n string) bool { return versionOf(n) == version })
		if !known {
			return nil, fmt.Errorf("%w: it has migration %d, which this program does not know: run the newer Usher, or restore the backup from before its setup", ErrNewer, version)
		}
		pending = slices.DeleteFunc(pending, func(n string) bool { return versionOf(n) == version })
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read schema version: %w", err)
	}
	return pending, nil
}

// schemaUsable tells a schema without tables from one in which the user may see none: PostgreSQL passes over that in silence, and says that a
// table does not exist.
func schemaUsable(ctx context.Context, pool *sql.DB, schema string) error {
	var user string
	var usable bool
	err := pool.QueryRowContext(ctx, "SELECT current_user, coalesce((SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = $1), true)", schema).
		Scan(&user, &usable)
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if !usable {
		return mayNotUse(user, schema)
	}
	return nil
}

// CheckMigrated is what a service asks before it begins: nil, [ErrPending], [ErrNewer], or why it cannot tell.
func CheckMigrated(ctx context.Context, db *gorm.DB) error {
	pending, err := Pending(ctx, db)
	if err != nil {
		return err
	}
	if len(pending) > 0 {
		return fmt.Errorf("%w: run `usher setup` (%s)", ErrPending, strings.Join(pending, ", "))
	}
	return nil
}

// Schema is the numbered SQL of a dialect ("postgres" or "sqlite"), for those who want to read or print it.
func Schema(dialect string) fs.FS { return sub(dialect) }

func sub(dialect string) fs.FS {
	files, err := fs.Sub(migrations, path.Join("migrations", dialect))
	if err != nil {
		panic(err) // a constant name
	}
	return files
}

// names are the migrations of a dialect in order, "0001_users".
func names(dialect string) []string {
	files, err := fs.Glob(sub(dialect), "*.sql")
	if err != nil {
		panic(err) // a constant pattern
	}
	for i, file := range files {
		files[i] = name(file)
	}
	return files
}

func name(file string) string { return strings.TrimSuffix(path.Base(file), ".sql") }

func versionOf(name string) int64 {
	var version int64
	_, _ = fmt.Sscanf(name, "%d_", &version)
	return version
}
