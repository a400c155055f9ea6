package database

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pressly/goose/v3"
	"gorm.io/gorm"
)

// ErrMissing is wrapped by the errors of [Probe] that name what of Usher's the database has no more.
var ErrMissing = errors.New("database lacks what belongs to Usher")

// errNotThere is ErrMissing of tables and columns.
var errNotThere = fmt.Errorf("%w", ErrMissing)

var errReadOnly = errors.New("database is read-only")

// Probe asks, in two short queries, whether Usher's tables can be used now: that the database answers, that schema, tables and columns
// are there, and that this user may read them all and write those of writes. The error says what is wrong and what to do.
func Probe(ctx context.Context, db *gorm.DB, writes ...string) error {
	pool, err := db.DB()
	if err != nil {
		return fmt.Errorf("look at the database: %w", err)
	}
	want, err := schemaColumns()
	if err != nil {
		return err
	}
	switch d := db.Dialector.(type) {
	case pgDialector:
		err = probePostgres(ctx, pool, d, want, writes)
	case dialector:
		err = probeSQLite(ctx, pool, d, want)
	}
	if errors.Is(err, errNotThere) { // never, perhaps
		if pending := CheckMigrated(ctx, db); errors.Is(pending, ErrPending) {
			return pending
		}
	}
	var open *OpenError
	if err == nil || errors.As(err, &open) || errors.Is(err, ErrMissing) || errors.Is(err, ErrAuth) || errors.Is(err, errReadOnly) {
		return err
	}
	return fmt.Errorf("look at the database: %w", err)
}

// tableColumn is a column that a table must have.
type tableColumn struct{ table, column string }

// schemaColumns are the tables of the migrations with their columns, which are the same in both dialects: those of SQLite's are run in
// memory, once a process.
var schemaColumns = sync.OnceValues(func() ([]tableColumn, error) {
	pool := sql.OpenDB(&connector{dsn: "file::memory:?_timezone=UTC", writer: make(chan struct{}, 1)})
	defer func() { _ = pool.Close() }()
	pool.SetMaxOpenConns(1) // each connection to memory is a database of its own
	ctx := context.Background()
	provider, err := goose.NewProvider(goose.DialectSQLite3, pool, sub("sqlite"), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	if _, err := up(ctx, provider); err != nil {
		return nil, err
	}
	return columnsOf(ctx, pool)
})

func columnsOf(ctx context.Context, pool *sql.DB) ([]tableColumn, error) {
	rows, err := pool.QueryContext(ctx, "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite%' ORDER BY t.name, c.cid")
	if err != nil {
		return nil, err //nolint:wrapcheck // Probe wraps it
	}
	defer func() { _ = rows.Close() }()
	var columns []tableColumn
	for rows.Next() {
		var c tableColumn
		if err := rows.Scan(&c.table, &c.column); err != nil {
			return nil, err //nolint:wrapcheck // Probe wraps it
		}
		columns = append(columns, c)
	}
	return columns, rows.Err() //nolint:wrapcheck // Probe wraps it
}

// lacking are the columns, with their tables' and the user's rights, of which anything is not as it must be. A right that the user lacks
// is named; a table that is gone has no rights.
const lacking = `SELECT w.t, w.c, t.oid IS NOT NULL, a.attname IS NOT NULL,
	CASE WHEN NOT has_table_privilege(t.oid, 'SELECT') THEN 'SELECT' WHEN w.writes AND NOT has_table_privilege(t.oid, 'INSERT') THEN 'INSERT'
		WHEN w.writes AND NOT has_table_privilege(t.oid, 'UPDATE') THEN 'UPDATE' ELSE '' END AS lacks
FROM (SELECT t, c, t = ANY($4::text[]) AS writes FROM unnest($1::text[], $2::text[]) AS u(t, c)) AS w
LEFT JOIN pg_namespace n ON n.nspname = $3
LEFT JOIN pg_class t ON t.relnamespace = n.oid AND t.relname = w.t AND t.relkind IN ('r', 'p', 'f', 'v')
LEFT JOIN pg_attribute a ON a.attrelid = t.oid AND a.attname = w.c AND NOT a.attisdropped
WHERE t.oid IS NULL OR a.attname IS NULL OR NOT has_table_privilege(t.oid, 'SELECT')
	OR w.writes AND NOT (has_table_privilege(t.oid, 'INSERT') AND has_table_privilege(t.oid, 'UPDATE'))
ORDER BY 1, 2`

func probePostgres(ctx context.Context, pool *sql.DB, d pgDialector, want []tableColumn, writes []string) error {
	schema := d.schema
	var database, user string
	var exists, usable, standby, readOnly bool
	err := pool.QueryRowContext(ctx, `SELECT current_database(), current_user, n.oid IS NOT NULL, n.oid IS NULL OR has_schema_privilege(n.oid, 'USAGE'),
		pg_is_in_recovery(), current_setting('transaction_read_only') = 'on' FROM (SELECT) AS one LEFT JOIN pg_namespace n ON n.nspname = $1`, schema).
		Scan(&database, &user, &exists, &usable, &standby, &readOnly)
	switch {
	case err != nil:
		return err //nolint:wrapcheck // Probe wraps it
	case !exists:
		return fmt.Errorf("schema %q does not exist in database %q: run `usher setup`; where it was there before, it was dropped or renamed: rename it back or restore it, or begin with an empty one by `usher setup` and `usher backfill` (%w)", schema, database, ErrMissing)
	case !usable:
		return mayNotUse(user, schema)
	case standby && len(writes) > 0:
		return fmt.Errorf("%w: this PostgreSQL is a standby: name the primary in %s (target_session_attrs=read-write finds it), or promote this one", errReadOnly, d.connector.url.setting)
	case readOnly && len(writes) > 0:
		return fmt.Errorf("%w: default_transaction_read_only is on for database %q or user %q, perhaps by its provider because the disk is full: make room, then ALTER DATABASE … RESET default_transaction_read_only", errReadOnly, database, user)
	}
	tables, columns := make([]string, len(want)), make([]string, len(want))
	for i, c := range want {
		tables[i], columns[i] = c.table, c.column
	}
	if writes == nil {
		writes = []string{}
	}
	rows, err := pool.QueryContext(ctx, lacking, tables, columns, schema, writes)
	if err != nil {
		return err //nolint:wrapcheck // Probe wraps it
	}
	defer func() { _ = rows.Close() }()
	var gone []tableColumn
	var goneTables []string
	var lacks string
	for rows.Next() {
		var c tableColumn
		var hasTable, hasColumn bool
		var right string
		if err := rows.Scan(&c.table, &c.column, &hasTable, &hasColumn, &right); err != nil {
			return err //nolint:wrapcheck // Probe wraps it
		}
		switch {
		case !hasTable:
			goneTables = append(goneTables, c.table)
		case !hasColumn:
			gone = append(gone, c)
		case lacks == "":
			lacks = fmt.Sprintf("user %q may not %s on %s.%s: GRANT %s ON %s.%s TO that user", user, right, schema, c.table, right, schema, c.table)
		}
	}
	if err := rows.Err(); err != nil {
		return err //nolint:wrapcheck // Probe wraps it
	}
	if err := missing(fmt.Sprintf("schema %q", schema), goneTables, gone); err != nil {
		return err
	}
	if lacks != "" {
		return fmt.Errorf("%s (%w)", lacks, ErrAuth)
	}
	return nil
}

func mayNotUse(user, schema string) error {
	return fmt.Errorf("user %q may not use schema %q: GRANT USAGE ON SCHEMA %s (%w)", user, schema, schema, ErrAuth)
}

// missing says which tables and columns are gone.
func missing(where string, tables []string, columns []tableColumn) error {
	tables = slices.Compact(tables)
	var what []string
	for _, table := range tables {
		what = append(what, "table "+table)
	}
	for _, c := range columns {
		what = append(what, "column "+c.table+"."+c.column)
	}
	if len(what) == 0 {
		return nil
	}
	const most = 5
	more := ""
	if len(what) > most {
		more = fmt.Sprintf(" and %d more", len(what)-most)
		what = what[:most]
	}
	return fmt.Errorf("%s does not have %s%s: it was dropped or renamed; rename it back, or restore it from a backup (%w)", where, strings.Join(what, ", "), more, errNotThere)
}

func probeSQLite(ctx context.Context, pool *sql.DB, d dialector, want []tableColumn) error {
	if d.opened != nil { // a process whose open file is removed keeps writing to a file that nobody sees
		if now, err := os.Stat(d.path); err != nil || !os.SameFile(now, d.opened) {
			return fmt.Errorf("the file %s was removed or replaced while Usher has it open, and what is written now is lost: stop Usher, put the file back, start Usher (%w)", d.path, ErrMissing)
		}
	}
	have, err := columnsOf(ctx, pool)
	if err != nil {
		return err
	}
	var gone []tableColumn
	var goneTables []string
	for _, c := range want {
		switch {
		case slices.Contains(have, c):
		case slices.ContainsFunc(have, func(h tableColumn) bool { return h.table == c.table }):
			gone = append(gone, c)
		default:
			goneTables = append(goneTables, c.table)
		}
	}
	return missing(d.path, goneTables, gone)
}

// probeEvery is how often a Watch looks, and how long a look may take.
const probeEvery = 5 * time.Second

var errNotLooked = errors.New("database was not looked at yet")

// Watch keeps the last answer of [Probe] for readiness, which may be asked at any rate. It is safe for concurrent use.
type Watch struct {
	db     *gorm.DB
	writes []string
	last   atomic.Pointer[error]
	keys   atomic.Pointer[error] // foreign keys that are fatal
}

// NewWatch looks at nothing before Run. writes are the tables that the service writes.
func NewWatch(db *gorm.DB, writes ...string) *Watch {
	w := &Watch{db: db, writes: writes}
	w.last.Store(&errNotLooked)
	w.keys.Store(new(error))
	return w
}

// Check is the last answer, from memory.
func (w *Watch) Check() error { return *w.last.Load() }

// Foreign names the [ForeignKeys] on Usher's tables, nil for none: a detail of readiness, since only events in an unlucky order fail.
func (w *Watch) Foreign() error { return *w.keys.Load() }

// Run looks at once, and then every five seconds until ctx is done.
func (w *Watch) Run(ctx context.Context) {
	ticker := time.NewTicker(probeEvery)
	defer ticker.Stop()
	for {
		w.look(ctx)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (w *Watch) look(ctx context.Context) {
	look, cancel := context.WithTimeout(ctx, probeEvery)
	defer cancel()
	err := Probe(look, w.db, w.writes...)
	if err == nil {
		var keys []ForeignKey
		if keys, err = ForeignKeys(look, w.db); err == nil {
			trouble := foreignTrouble(keys)
			w.keys.Store(&trouble)
		}
	}
	if ctx.Err() != nil {
		return // nobody asks any more
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("database did not answer within %s: look at its load, its locks, and the way to it (%w)", probeEvery, err)
	}
	w.last.Store(&err)
}
