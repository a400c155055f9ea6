package database

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// pgConnector makes connections with the settings of [session], also through a pooler.
//
// A pooler in transaction mode gives every transaction another session of the server. It refuses the parameters of a connection's start
// or drops them in silence; what one sets on a session, all others get; and a statement that was prepared, or a lock that was taken, is on a
// session that the next transaction does not have. A pooler in session mode looks the same from here. So behind either one, every
// statement is in a transaction, whose begin has all settings, no statement is prepared by name, and nothing outlives a transaction.
type pgConnector struct {
	direct, viaPooler driver.Connector
	url               *pgURL
	pooled            atomic.Bool // found out by a connection, kept as long as the process lives
	// begins are appended to a transaction's begin, directly and through a pooler. Read-only transactions do without the first.
	begins [2]string
	expect string // what a session of the server says whose start had our parameters
	ask    string
}

// asked are the settings by which a session is known to have been started with ours: as PostgreSQL shows them. Those that the URL says
// otherwise are left out.
var asked = map[string]string{
	"synchronous_commit": "on", "default_transaction_isolation": "read committed", "standard_conforming_strings": "on",
	"plan_cache_mode": "force_custom_plan", "statement_timeout": "0", "idle_in_transaction_session_timeout": "0",
}

// untouched are the parameters of a start that every pooler takes, or that mean something to it alone.
var untouched = []string{"application_name", "client_encoding", "options"}

// startupParameter is a pooler's word for a parameter of a start that it refuses.
const startupParameter = "startup parameter"

// newConnector takes a configuration that is complete.
func newConnector(u *pgURL) *pgConnector {
	c := &pgConnector{url: u}
	c.direct = stdlib.GetConnector(*u.cfg, stdlib.OptionAfterConnect(c.prepare))

	pooled := u.cfg.Copy()
	if pooled.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement {
		pooled.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	}
	var settings, show, expect []string
	for _, name := range slices.Sorted(maps.Keys(u.cfg.RuntimeParams)) {
		value := u.cfg.RuntimeParams[name]
		if asked[name] == value || name == "search_path" {
			show, expect = append(show, "pg_catalog.current_setting("+literal(name)+")"), append(expect, value)
		}
		if slices.Contains(untouched, name) {
			continue
		}
		delete(pooled.RuntimeParams, name)
		if name != "default_transaction_isolation" { // the begin says it itself
			settings = append(settings, "pg_catalog.set_config("+literal(name)+", "+literal(value)+", true)")
		}
	}
	c.viaPooler = stdlib.GetConnector(*pooled, stdlib.OptionAfterConnect(c.prepare))
	c.begins = [2]string{"; set local synchronous_commit = on", "; select " + strings.Join(settings, ", ")}
	c.ask, c.expect = "select pg_catalog.concat_ws('|', "+strings.Join(show, ", ")+")", strings.Join(expect, "|")
	return c
}

// literal is a text in SQL, whatever standard_conforming_strings says.
func literal(s string) string {
	return "E'" + strings.NewReplacer(`\`, `\\`, `'`, `''`).Replace(s) + "'"
}

// Driver implements driver.Connector.
func (c *pgConnector) Driver() driver.Driver { return c.direct.Driver() }

// Connect implements driver.Connector. The error says what to do.
func (c *pgConnector) Connect(ctx context.Context) (driver.Conn, error) {
	if !c.pooled.Load() {
		conn, err := c.connect(ctx, c.direct)
		if err == nil {
			var kept bool
			if kept, err = c.kept(ctx, conn); err == nil && kept {
				return conn, nil
			}
			_ = conn.Close()
		}
		if err != nil && !c.url.refusesParameters(err) {
			return nil, c.url.openError(err)
		}
	}
	conn, err := c.connect(ctx, c.viaPooler)
	if err != nil {
		return nil, c.url.openError(err)
	}
	conn.pooled = true
	c.pooled.Store(true)
	return conn, nil
}

// refusesParameters reports whether a pooler does not take our parameters at a connection's start.
func (u *pgURL) refusesParameters(err error) bool {
	pg, _ := u.decisive(err)
	return pg != nil && isAbout(pg, startupParameter)
}

func (c *pgConnector) connect(ctx context.Context, connector driver.Connector) (*pgConn, error) {
	inner, err := connector.Connect(ctx)
	if err != nil {
		return nil, err //nolint:wrapcheck // openError says what to do
	}
	conn, ok := inner.(*stdlib.Conn)
	if !ok {
		_ = inner.Close()
		return nil, fmt.Errorf("the PostgreSQL driver's connection %T is not known", inner)
	}
	return &pgConn{Conn: conn, connector: c}, nil
}

// kept reports whether a new connection has the settings that its start asked for: one round trip, and nothing is prepared.
func (c *pgConnector) kept(ctx context.Context, conn *pgConn) (bool, error) {
	results, err := conn.Conn.Conn().PgConn().Exec(ctx, c.ask).ReadAll()
	if err != nil {
		return false, err //nolint:wrapcheck // openError says what to do
	}
	return len(results) == 1 && len(results[0].Rows) == 1 && string(results[0].Rows[0][0]) == c.expect, nil
}

// pgConn is used by one goroutine at a time, as database/sql promises.
type pgConn struct {
	*stdlib.Conn
	connector *pgConnector
	pooled    bool
}

// BeginTx implements driver.ConnBeginTx. A transaction commits synchronously and has the isolation that was asked for, whatever the
// defaults of server, database and role; through a pooler it has all settings. They go with the begin, in one message.
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
	}
	switch {
	case c.pooled:
		begin += c.connector.begins[1]
	case !opts.ReadOnly:
		begin += c.connector.begins[0]
	}
	tx, err := c.Conn.Conn().BeginTx(ctx, pgx.TxOptions{BeginQuery: begin})
	if err != nil {
		return nil, err //nolint:wrapcheck // transparent
	}
	return &pgTx{ctx: ctx, tx: tx}, nil
}

// alone reports whether a statement needs a transaction of its own.
func (c *pgConn) alone() bool {
	return c.pooled && !c.Conn.Conn().IsClosed() && c.Conn.Conn().PgConn().TxStatus() == 'I'
}

// ExecContext implements driver.ExecerContext.
func (c *pgConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if !c.alone() {
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

// QueryContext implements driver.QueryerContext.
func (c *pgConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if !c.alone() {
		return c.Conn.QueryContext(ctx, query, args) //nolint:wrapcheck // transparent
	}
	tx, err := c.BeginTx(ctx, driver.TxOptions{})
	if err != nil {
		return nil, err
	}
	rows, err := c.Conn.QueryContext(ctx, query, args)
	if err != nil {
		_ = tx.Rollback()
		return nil, err //nolint:wrapcheck // transparent
	}
	inner, ok := rows.(*stdlib.Rows)
	if !ok {
		_ = errors.Join(rows.Close(), tx.Rollback())
		return nil, fmt.Errorf("the PostgreSQL driver's rows %T are not known", rows)
	}
	return &pgRows{Rows: inner, tx: tx}, nil
}

// PrepareContext implements driver.ConnPrepareContext: through a pooler, a statement of its own would be on another session than its use.
func (c *pgConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	if c.pooled {
		return nil, errors.New("prepare statement: not through a pooler: run it as it is")
	}
	return c.Conn.PrepareContext(ctx, query) //nolint:wrapcheck // transparent
}

// pgRows end the transaction that is theirs alone.
type pgRows struct {
	*stdlib.Rows
	tx driver.Tx // nil once it has ended
}

// Next implements driver.Rows. The last one commits, so that whoever reads all learns of a commit that failed.
func (r *pgRows) Next(dest []driver.Value) error {
	err := r.Rows.Next(dest)
	if errors.Is(err, io.EOF) {
		if closing := r.Close(); closing != nil {
			return closing
		}
	}
	return err //nolint:wrapcheck // transparent
}

// Close implements driver.Rows.
func (r *pgRows) Close() error {
	err := r.Rows.Close()
	tx := r.tx
	if r.tx = nil; tx == nil {
		return err //nolint:wrapcheck // transparent
	}
	if err != nil {
		_ = tx.Rollback()
		return err //nolint:wrapcheck // transparent
	}
	return tx.Commit() //nolint:wrapcheck // transparent
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
