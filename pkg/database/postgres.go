package database

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/stdlib"
	"gorm.io/driver/postgres"
	"gorm.io/gorm"
)

// The pool of a process. Ten connections are more than a worker has handlers; a small server takes a hundred.
// Connections are renewed so that a failover or a new DNS answer is found, and given back when nothing happens.
const (
	maxConns        = 10
	connMaxLifetime = 30 * time.Minute
	connMaxIdleTime = 5 * time.Minute
)

// minPostgres is the oldest server that is tested, as server_version_num.
const minPostgres = 150000

// execModes are pgx's ways to run a statement (default_query_exec_mode) that work. The other two, exec and simple_protocol, cannot encode
// the arrays that rows are written with.
var execModes = []string{"cache_statement", "cache_describe", "describe_exec"}

func openPostgres(ctx context.Context, address, schema string) (*gorm.DB, error) {
	if schema == "" {
		return nil, unusable("the schema is empty; set USHER_DATABASE_SCHEMA")
	}
	if mode, given := parameter(address, "default_query_exec_mode"); given && !slices.Contains(execModes, mode) {
		return nil, unusable("default_query_exec_mode=%.40q in USHER_DATABASE_URL cannot work: rows are written with arrays, which pgx cannot encode in that mode; "+
			"remove the parameter, or use cache_describe behind a pooler that knows no prepared statements", mode)
	}
	cfg, err := pgx.ParseConfig(address)
	if err != nil { // pgx hides a password that it understood; what it did not understand is not repeated
		return nil, unusable("the URL is not valid; it looks like postgres://user:password@host:5432/name (special characters of the password as %%XX)")
	}
	if cfg.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement && cfg.StatementCacheCapacity == 0 { // who says so wants no prepared statements
		cfg.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	}
	if cfg.DefaultQueryExecMode == pgx.QueryExecModeCacheDescribe && cfg.DescriptionCacheCapacity == 0 {
		cfg.DefaultQueryExecMode = pgx.QueryExecModeDescribeExec
	}
	cfg.ConnectTimeout = connectTimeout
	session(cfg.RuntimeParams, schema)
	connector := &pgConnector{cfg: cfg}
	connector.Connector = stdlib.GetConnector(*cfg, stdlib.OptionAfterConnect(connector.prepare))
	pool := sql.OpenDB(connector)
	pool.SetMaxOpenConns(maxConns)
	pool.SetMaxIdleConns(maxConns)
	pool.SetConnMaxLifetime(connMaxLifetime)
	pool.SetConnMaxIdleTime(connMaxIdleTime)

	db, err := gorm.Open(pgDialector{Dialector: postgres.New(postgres.Config{Conn: pool}), schema: schema}, gormConfig())
	if err == nil {
		err = connector.look(ctx, pool)
	}
	if err != nil {
		_ = pool.Close()
		return nil, openError(err, cfg)
	}
	return db, nil
}

// pgDialector remembers which schema was asked for.
type pgDialector struct {
	gorm.Dialector
	schema string
}

// SavePoint implements gorm.SavePointerDialectorInterface.
func (pgDialector) SavePoint(tx *gorm.DB, name string) error {
	return tx.Exec("SAVEPOINT " + name).Error
}

// RollbackTo implements gorm.SavePointerDialectorInterface.
func (pgDialector) RollbackTo(tx *gorm.DB, name string) error {
	return tx.Exec("ROLLBACK TO SAVEPOINT " + name).Error
}

// session are the settings of every connection. As parameters of its start they come before the defaults of server, database and
// role. A pooler may drop them, so what a transaction must not do without is in its begin again.
func session(params map[string]string, schema string) {
	params["search_path"] = pgx.Identifier{schema}.Sanitize()
	params["timezone"] = "UTC"
	params["client_encoding"] = "UTF8"
	params["synchronous_commit"] = "on"
	params["default_transaction_isolation"] = "read committed" // the guards of upserts are made for it
	params["standard_conforming_strings"] = "on"
	// A connection lives while tables grow from nothing to millions of rows. A generic plan that was made for the empty table
	// stays until the next ANALYZE (measured: 88 ms instead of 2 for a batch's look into the inbox); a new plan costs some 0.1 ms.
	setDefault(params, "plan_cache_mode", "force_custom_plan")
	setDefault(params, "application_name", "usher")
	// Limits that were made for an application would end migrations, sweeps and slow handlers. Usher has its own.
	setDefault(params, "statement_timeout", "0")
	setDefault(params, "idle_in_transaction_session_timeout", "0")
}

// parameter is what a URL says of a name.
func parameter(address, name string) (value string, given bool) {
	u, err := url.Parse(address)
	if err != nil {
		return "", false
	}
	query := u.Query()
	return query.Get(name), query.Has(name)
}

// pgConnector makes connections whose transactions are durable.
type pgConnector struct {
	driver.Connector
	cfg *pgx.ConnConfig
	// dropped: something between here and the server drops the parameters of a connection's start.
	dropped atomic.Bool
}

// Connect implements driver.Connector. The error says what to do.
func (c *pgConnector) Connect(ctx context.Context) (driver.Conn, error) {
	inner, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, openError(err, c.cfg)
	}
	conn, ok := inner.(*stdlib.Conn)
	if !ok {
		_ = inner.Close()
		return nil, fmt.Errorf("the PostgreSQL driver's connection %T is not known", inner)
	}
	return &pgConn{Conn: conn, connector: c}, nil
}

// prepare sees every new connection first. The server tells its encodings unasked.
func (*pgConnector) prepare(_ context.Context, conn *pgx.Conn) error {
	for _, name := range []string{"server_encoding", "client_encoding"} {
		if encoding := conn.PgConn().ParameterStatus(name); encoding != "" && encoding != "UTF8" {
			return badEncoding(name, encoding, conn.Config().Database)
		}
	}
	conn.TypeMap().RegisterType(&pgtype.Type{Name: "timestamptz", OID: pgtype.TimestamptzOID, Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC}})
	return nil
}

func badEncoding(name, encoding, database string) error {
	if name == "client_encoding" {
		return unusable("the connection's client_encoding is %s, although UTF8 was asked for: have the pooler in between pass client_encoding on", encoding)
	}
	return unusable("the encoding of database %q is %s, which cannot hold what Clerk sends; Usher needs UTF8: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0, and name that one in USHER_DATABASE_URL", database, encoding)
}

// look asks a server whether it can be used.
func (c *pgConnector) look(ctx context.Context, pool *sql.DB) error {
	var version int
	var server, client, commits string
	err := pool.QueryRowContext(ctx, "SELECT current_setting('server_version_num')::int, current_setting('server_encoding'), current_setting('client_encoding'), current_setting('synchronous_commit')").
		Scan(&version, &server, &client, &commits)
	switch {
	case err != nil:
		return err //nolint:wrapcheck // the caller says what it was for
	case version < minPostgres:
		return unusable("PostgreSQL %d is too old; Usher needs %d or newer", version/10000, minPostgres/10000)
	case server != "UTF8": // a pooler may not have told
		return badEncoding("server_encoding", server, c.cfg.Database)
	case client != "UTF8":
		return badEncoding("client_encoding", client, c.cfg.Database)
	}
	c.dropped.Store(commits != "on")
	return nil
}

// Warnings names settings of the server, in words that say what to do, under which rows of acknowledged events can be lost or look other
// than expected, and which are not Usher's to change. None for SQLite.
func Warnings(ctx context.Context, db *gorm.DB) ([]string, error) {
	if !IsPostgres(db) {
		return nil, nil
	}
	var fsync, pages, commits, role string
	err := db.WithContext(ctx).Raw("SELECT current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit'), current_setting('session_replication_role')").
		Row().Scan(&fsync, &pages, &commits, &role)
	if err != nil {
		return nil, fmt.Errorf("read the server's settings: %w", err)
	}
	var warnings []string
	if fsync != "on" {
		warnings = append(warnings, "PostgreSQL runs with fsync = off: a crash of its machine loses rows of acknowledged events, or the whole database; set fsync = on and reload it")
	}
	if pages != "on" {
		warnings = append(warnings, "PostgreSQL runs with full_page_writes = off: a crash of its machine can corrupt tables; set full_page_writes = on and reload it, unless its filesystem writes pages whole")
	}
	if role != "origin" {
		warnings = append(warnings, "session_replication_role = "+role+" is a default of this database or role: triggers on Usher's tables do not fire; ALTER DATABASE or ALTER ROLE … RESET session_replication_role")
	}
	if commits != "on" {
		warnings = append(warnings, "a pooler in front of PostgreSQL drops the parameters of connections: have it pass them on, or name the server itself in USHER_DATABASE_URL. Usher's transactions commit synchronously all the same")
	}
	return warnings, nil
}

// pgConn is used by one goroutine at a time, as database/sql promises.
type pgConn struct {
	*stdlib.Conn
	connector *pgConnector
}

// BeginTx implements driver.ConnBeginTx. A transaction commits synchronously and has the isolation that was asked for, whatever the
// defaults of server, database and role, also where a pooler drops what a connection's start says: both go with the begin, in one message.
func (c *pgConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	if c.Conn.Conn().IsClosed() {
		return nil, driver.ErrBadConn
	}
	begin := "begin isolation level "
	switch sql.IsolationLevel(opts.Isolation) {
	case sql.LevelDefault, sql.LevelReadCommitted, sql.LevelReadUncommitted:
		begin += "read committed"
	case sql.LevelRepeatableRead, sql.LevelSnapshot:
		begin += "repeatable read"
	case sql.LevelSerializable:
		begin += "serializable"
	case sql.LevelWriteCommitted, sql.LevelLinearizable:
		return nil, fmt.Errorf("begin transaction: PostgreSQL has no isolation level %v", sql.IsolationLevel(opts.Isolation))
	}
	if opts.ReadOnly {
		begin += " read only"
	} else {
		begin += "; set local synchronous_commit = on"
	}
	tx, err := c.Conn.Conn().BeginTx(ctx, pgx.TxOptions{BeginQuery: begin})
	if err != nil {
		return nil, err //nolint:wrapcheck // transparent
	}
	return &pgTx{ctx: ctx, tx: tx}, nil
}

// ExecContext implements driver.ExecerContext. A statement outside a transaction gets one of its own where the connection itself does not
// commit synchronously.
func (c *pgConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if !c.connector.dropped.Load() || c.Conn.Conn().IsClosed() || c.Conn.Conn().PgConn().TxStatus() != 'I' {
		return c.Conn.ExecContext(ctx, query, args) //nolint:wrapcheck // transparent
	}
	tx, err := c.BeginTx(ctx, driver.TxOptions{})
	if err != nil {
		return nil, err
	}
	result, err := c.Conn.ExecContext(ctx, query, args)
	if err != nil {
		_ = tx.Rollback()
		return nil, err //nolint:wrapcheck // transparent
	}
	return result, tx.Commit() //nolint:wrapcheck // transparent
}

// pgTx is a transaction of pgx for database/sql, which gives the context only to its begin.
type pgTx struct {
	ctx context.Context //nolint:containedctx // as above
	tx  pgx.Tx
}

// Commit implements driver.Tx.
func (t *pgTx) Commit() error { return t.tx.Commit(t.ctx) } //nolint:wrapcheck // transparent

// Rollback implements driver.Tx.
func (t *pgTx) Rollback() error { return t.tx.Rollback(t.ctx) } //nolint:wrapcheck // transparent

// OpenError is why a database cannot be used. It wraps one of the sentinels and its cause; its text says what to do.
type OpenError struct {
	kind error // a sentinel
	text string
	err  error
}

// Error says what is wrong and what to do. It never holds the password.
func (e *OpenError) Error() string { return "open database: " + e.text }

// Unwrap gives the sentinel and the cause.
func (e *OpenError) Unwrap() []error {
	if e.err == nil {
		return []error{e.kind}
	}
	return []error{e.kind, e.err}
}

// WrongSettings reports whether waiting is no cure: the settings must change, or the database.
func (e *OpenError) WrongSettings() bool { return errors.Is(e.kind, ErrUnusable) }

func unusable(format string, args ...any) error {
	return &OpenError{kind: ErrUnusable, text: fmt.Sprintf(format, args...)}
}

func openError(err error, cfg *pgx.ConnConfig) error {
	var open *OpenError
	if errors.As(err, &open) { // of our own making
		return open
	}
	where := net.JoinHostPort(cfg.Host, strconv.Itoa(int(cfg.Port)))
	if strings.HasPrefix(cfg.Host, "/") {
		where = cfg.Host
	}
	e := &OpenError{kind: ErrUnreachable, err: err}
	var pg *pgconn.PgError
	switch {
	case !errors.As(err, &pg):
		e.text = fmt.Sprintf("no PostgreSQL answers at %s: check that it runs and that USHER_DATABASE_URL is right (%s)", where, reason(err))
	case pg.Code == "28P01" || pg.Code == "28000":
		e.kind, e.text = ErrAuth, fmt.Sprintf("PostgreSQL at %s refuses user %q: check user and password in USHER_DATABASE_URL and pg_hba.conf (%s)", where, cfg.User, pg.Message)
	case pg.Code == "3D000":
		e.kind, e.text = ErrNoDatabase, fmt.Sprintf("PostgreSQL at %s has no database %q: create it (createdb %s) or correct USHER_DATABASE_URL", where, cfg.Database, cfg.Database)
	case pg.Code == "42704" || pg.Code == "22023": // unrecognized configuration parameter, invalid value for one
		e.kind, e.text = ErrUnusable, fmt.Sprintf("PostgreSQL at %s does not take a parameter of USHER_DATABASE_URL: remove or correct it (%s)", where, pg.Message)
	case pg.Code == "42501":
		e.kind, e.text = ErrAuth, fmt.Sprintf("user %q may not use database %q at %s: GRANT CONNECT ON DATABASE (%s)", cfg.User, cfg.Database, where, pg.Message)
	default:
		e.text = fmt.Sprintf("PostgreSQL at %s answers, but takes no connection now (%s, SQLSTATE %s)", where, pg.Message, pg.Code)
	}
	if cfg.Password != "" {
		e.text = strings.ReplaceAll(e.text, cfg.Password, "redacted")
	}
	return e
}

// reason is the innermost cause, without the addresses and names that pgconn puts around it.
func reason(err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer within " + connectTimeout.String()
	}
	var errno syscall.Errno // "connection refused"
	if errors.As(err, &errno) {
		return errno.Error()
	}
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			text, _, _ := strings.Cut(err.Error(), "\n")
			return text
		}
		err = inner
	}
}

// setDefault leaves what the URL says.
func setDefault(params map[string]string, name, value string) {
	if params[name] == "" {
		params[name] = value
	}
}
