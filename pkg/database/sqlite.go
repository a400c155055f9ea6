package database

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"gorm.io/gorm"
	"modernc.org/sqlite"
)

// SQLiteTime is the one text form of a time in SQLite: UTC with ms, so that texts sort like times. Connections
// of [Open] put every time.Time that they are given into it.
const SQLiteTime = "2006-01-02 15:04:05.000+00:00"

// sqliteConns is the size of the pool: one writer and some readers, which WAL lets go on meanwhile.
const sqliteConns = 8

// pragmas of every connection, in this order. The page size holds for a new file only: rows carry 2 to 3 KB, of which a page of
// 4 KB fits one; with 8 KB a batch writes a third less (measured). synchronous=FULL syncs the WAL at every commit:
// the worker acks after it, so a commit that a power cut could take back would lose events.
var pragmas = []string{
	"busy_timeout=10000", "page_size=8192", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON",
	"cache_size=-16384", "temp_store=MEMORY", "wal_autocheckpoint=2000", "journal_size_limit=67108864",
}

func openSQLite(ctx context.Context, path, setting string) (*gorm.DB, error) {
	path = strings.TrimPrefix(path, "//") // sqlite:///var/lib/usher.db is what other programs write
	if path == "" || strings.HasPrefix(path, ":memory:") {
		return nil, unusable("sqlite needs the path of a file, as in sqlite:usher-data/usher.db")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, &OpenError{kind: ErrUnreachable, err: err, text: fmt.Sprintf("the folder of %s cannot be created (%v)", path, err)}
	}
	if err := private(path); err != nil {
		return nil, &OpenError{kind: ErrUnreachable, err: err, text: fmt.Sprintf("%s cannot be opened for writing (%v)", path, err)}
	}
	pool := sql.OpenDB(&connector{
		dsn:    (&url.URL{Scheme: "file", Path: path, RawQuery: "_timezone=UTC"}).String(),
		writer: writerOf(path),
	})
	pool.SetMaxOpenConns(sqliteConns)
	pool.SetMaxIdleConns(sqliteConns)
	opened, err := os.Stat(path)
	if err != nil {
		_ = pool.Close()
		return nil, &OpenError{kind: ErrUnreachable, err: err, text: fmt.Sprintf("%s cannot be opened for writing (%v)", path, err)}
	}
	db, err := gorm.Open(dialector{pool: pool, path: path, opened: opened}, gormConfig())
	var encoding string
	if err == nil {
		err = pool.QueryRowContext(ctx, "PRAGMA encoding").Scan(&encoding)
	}
	if err == nil && encoding != "UTF-8" { // ids would be compared by the bytes of UTF-16, and rows be won by other events
		_ = pool.Close()
		return nil, unusable("the encoding of %s is %s; Usher needs UTF-8: name a new file in %s, and fill it with `usher setup` and `usher backfill`", path, encoding, setting)
	}
	if err != nil {
		_ = pool.Close()
		return nil, &OpenError{kind: ErrUnreachable, err: err, text: fmt.Sprintf("%s is not a SQLite database that can be used (%v)", path, err)}
	}
	return db, nil
}

// private creates the file for its owner alone: it holds addresses.
func private(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err //nolint:wrapcheck // the caller says what it was for
	}
	return f.Close() //nolint:wrapcheck // as above
}

// exposed says that everyone on this machine can read the file or change it. Its group may: a file that is named by its path can be shared so.
func exposed(db *gorm.DB) []string {
	d, ok := db.Dialector.(dialector)
	if !ok {
		return nil
	}
	info, err := os.Stat(d.path)
	if mode := fs.FileMode(0o007); err != nil || runtime.GOOS == "windows" || info.Mode().Perm()&mode == 0 {
		return nil
	}
	return []string{fmt.Sprintf("everyone on this machine can read the database %s (mode %s): chmod o= it", d.path, info.Mode().Perm())}
}

// writers holds one turn a file. SQLite has one writer, and those who come while it is busy poll with growing
// pauses, in no order: a queue inside the process is fair and wakes at once. Other processes still poll.
var (
	writersMu sync.Mutex
	writers   = map[string]chan struct{}{}
)

func writerOf(path string) chan struct{} {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	writersMu.Lock()
	defer writersMu.Unlock()
	if writers[path] == nil {
		writers[path] = make(chan struct{}, 1)
	}
	return writers[path]
}

// connector makes connections that write times in one form and take turns as the writer.
type connector struct {
	dsn    string
	writer chan struct{}
}

func (c *connector) Driver() driver.Driver { return &sqlite.Driver{} }

func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	inner, err := (&sqlite.Driver{}).Open(c.dsn)
	if err != nil {
		return nil, err //nolint:wrapcheck // database/sql hands it on to the caller, who says what it was for
	}
	full, ok := inner.(sqliteConn)
	if !ok {
		_ = inner.Close()
		return nil, fmt.Errorf("the SQLite driver's connection %T lacks a method", inner)
	}
	for _, pragma := range pragmas {
		if _, err := full.ExecContext(ctx, "PRAGMA "+pragma, nil); err != nil {
			_ = inner.Close()
			return nil, err //nolint:wrapcheck // as above
		}
	}
	return &conn{sqliteConn: full, writer: c.writer, kept: map[string]sqliteStmt{}}, nil
}

type sqliteConn interface {
	driver.Conn
	driver.Pinger
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.QueryerContext
}

type sqliteStmt interface {
	driver.Stmt
	driver.StmtExecContext
}

// conn is used by one goroutine at a time, as database/sql promises.
type conn struct {
	sqliteConn
	writer chan struct{}
	inTx   bool
	kept   map[string]sqliteStmt // by their text
}

// CheckNamedValue implements driver.NamedValueChecker: times in one form, the rest as database/sql does it.
func (c *conn) CheckNamedValue(v *driver.NamedValue) error {
	switch x := v.Value.(type) {
	case nil, string, int64, bool, float64, []byte:
		return nil
	case time.Time:
		v.Value = x.UTC().Format(SQLiteTime)
		return nil
	}
	value, err := driver.DefaultParameterConverter.ConvertValue(v.Value)
	if err != nil {
		return err //nolint:wrapcheck // database/sql names the argument
	}
	if at, ok := value.(time.Time); ok {
		value = at.UTC().Format(SQLiteTime)
	}
	v.Value = value
	return nil
}

// ExecContext implements driver.ExecerContext. Outside a transaction a statement is one of its own, so it waits for its turn.
func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if !c.inTx {
		if err := c.take(ctx); err != nil {
			return nil, err
		}
		defer c.give()
	}
	if c.inTx && strings.HasPrefix(query, "INSERT ") {
		return c.insert(ctx, query, args)
	}
	return c.sqliteConn.ExecContext(ctx, query, args) //nolint:wrapcheck // transparent
}

// maxKept bounds the compiled statements of a connection. The worker needs one for each table and number of rows.
const maxKept = 256

// insert executes a statement that is kept compiled: compiling the upsert of a few rows takes longer than they do.
func (c *conn) insert(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	stmt := c.kept[query]
	if stmt == nil {
		made, err := c.sqliteConn.PrepareContext(ctx, query)
		if err != nil {
			return nil, err //nolint:wrapcheck // transparent
		}
		stmt = made.(sqliteStmt) //nolint:forcetypeassert // the driver's own, which a test of this package would show
		if len(c.kept) >= maxKept {
			defer func() { _ = stmt.Close() }()
		} else {
			c.kept[query] = stmt
		}
	}
	return stmt.ExecContext(ctx, args) //nolint:wrapcheck // transparent
}

// Close implements driver.Conn.
func (c *conn) Close() error {
	for _, stmt := range c.kept {
		_ = stmt.Close()
	}
	return c.sqliteConn.Close() //nolint:wrapcheck // transparent
}

// BeginTx implements driver.ConnBeginTx. A transaction that may write is the writer from its begin on: one that became it
// later could find that another wrote in between, which SQLite answers with BUSY at once, whatever the timeout.
func (c *conn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	begin := "BEGIN IMMEDIATE"
	if opts.ReadOnly {
		begin = "BEGIN DEFERRED"
	} else if err := c.take(ctx); err != nil {
		return nil, err
	}
	if _, err := c.sqliteConn.ExecContext(ctx, begin, nil); err != nil {
		if !opts.ReadOnly {
			c.give()
		}
		return nil, err //nolint:wrapcheck // transparent
	}
	c.inTx = true
	return &tx{conn: c, readOnly: opts.ReadOnly}, nil
}

func (c *conn) take(ctx context.Context) error {
	select {
	case c.writer <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err() //nolint:wrapcheck // transparent
	}
}

func (c *conn) give() { <-c.writer }

type tx struct {
	conn     *conn
	readOnly bool
}

// Commit implements driver.Tx. Where it fails the transaction is rolled back, so that the connection is as good as new.
func (t *tx) Commit() error {
	err := t.end("COMMIT")
	if err != nil {
		_, _ = t.conn.sqliteConn.ExecContext(context.Background(), "ROLLBACK", nil)
	}
	t.done()
	return err
}

// Rollback implements driver.Tx.
func (t *tx) Rollback() error {
	err := t.end("ROLLBACK")
	t.done()
	return err
}

func (t *tx) end(how string) error {
	_, err := t.conn.sqliteConn.ExecContext(context.Background(), how, nil)
	return err //nolint:wrapcheck // transparent
}

func (t *tx) done() {
	t.conn.inTx = false
	if !t.readOnly {
		t.conn.give()
	}
}

// LargeWAL is the size in bytes from which on the write-ahead log of a SQLite file is too large. It is emptied at about 16 MB (wal_autocheckpoint)
// unless a reader never pauses: a transaction that stays open, or readers that overlap for ever.
const LargeWAL = 256 << 20

// WALSize is the size in bytes of the write-ahead log, 0 for PostgreSQL and where no log exists.
func WALSize(ctx context.Context, db *gorm.DB) (int64, error) {
	if IsPostgres(db) {
		return 0, nil
	}
	var path string
	if err := db.WithContext(ctx).Raw("SELECT file FROM pragma_database_list WHERE name = 'main'").Scan(&path).Error; err != nil {
		return 0, fmt.Errorf("find the file of the database: %w", err)
	}
	info, err := os.Stat(path + "-wal")
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look at the write-ahead log: %w", err)
	}
	return info.Size(), nil
}
