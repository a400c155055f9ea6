package database

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
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

func openPostgres(ctx context.Context, address, schema, setting string) (*gorm.DB, error) {
	if schema == "" {
		return nil, unusable("the schema is empty; set USHER_DATABASE_SCHEMA")
	}
	u, err := parsePostgres(address, setting)
	if err != nil {
		return nil, err
	}
	session(u.cfg.RuntimeParams, schema)
	connector := newConnector(u)
	pool := sql.OpenDB(connector)
	pool.SetMaxOpenConns(maxConns)
	pool.SetMaxIdleConns(maxConns)
	pool.SetConnMaxLifetime(connMaxLifetime)
	pool.SetConnMaxIdleTime(connMaxIdleTime)

	db, err := gorm.Open(pgDialector{Dialector: postgres.New(postgres.Config{Conn: pool}), schema: schema, connector: connector}, gormConfig())
	if err == nil {
		err = connector.look(ctx, pool)
	}
	if err != nil {
		_ = pool.Close()
		return nil, u.openError(err)
	}
	return db, nil
}

// pgDialector remembers how the database was opened.
type pgDialector struct {
	gorm.Dialector
	schema    string
	connector *pgConnector
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
// role. Where a pooler drops or refuses them, they are in the begin of every transaction (pooler.go).
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

// prepare sees every new connection first. The server tells its encodings unasked.
func (c *pgConnector) prepare(_ context.Context, conn *pgx.Conn) error {
	for _, name := range []string{"server_encoding", "client_encoding"} {
		if encoding := conn.PgConn().ParameterStatus(name); encoding != "" && encoding != "UTF8" {
			return c.url.badEncoding(name, encoding)
		}
	}
	conn.TypeMap().RegisterType(&pgtype.Type{Name: "timestamptz", OID: pgtype.TimestamptzOID, Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC}})
	return nil
}

func (u *pgURL) badEncoding(name, encoding string) error {
	if name == "client_encoding" {
		return unusable("the connection's client_encoding is %s, although UTF8 was asked for: have the pooler in between pass client_encoding on", encoding)
	}
	return unusable("the encoding of database %q is %s, which cannot hold what Clerk sends; Usher needs UTF8: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0, and name that one in %s", u.cfg.Database, encoding, u.setting)
}

// look asks a server whether it can be used.
func (c *pgConnector) look(ctx context.Context, pool *sql.DB) error {
	var version int
	var server, client string
	err := pool.QueryRowContext(ctx, "SELECT current_setting('server_version_num')::int, current_setting('server_encoding'), current_setting('client_encoding')").
		Scan(&version, &server, &client)
	switch {
	case err != nil:
		return err //nolint:wrapcheck // the caller says what it was for
	case version < minPostgres:
		return unusable("PostgreSQL %d is too old; Usher needs %d or newer", version/10000, minPostgres/10000)
	case server != "UTF8": // a pooler may not have told
		return c.url.badEncoding("server_encoding", server)
	case client != "UTF8":
		return c.url.badEncoding("client_encoding", client)
	}
	return nil
}

// Warnings names what of the URL is ignored, that others can read the connection or the file, that a pooler is in front of the server,
// settings of the server under which rows of acknowledged events can be lost or look other than expected, and [ForeignKeys], none of which
// are Usher's to change: in words that say what to do.
func Warnings(ctx context.Context, db *gorm.DB) ([]string, error) {
	d, ok := db.Dialector.(pgDialector)
	if !ok {
		return exposed(db), nil
	}
	var warnings []string
	for _, notice := range []string{d.connector.url.ignoredNotice(d.schema), d.connector.url.clearText()} {
		if notice != "" {
			warnings = append(warnings, notice)
		}
	}
	var fsync, pages, role string
	err := db.WithContext(ctx).Raw("SELECT current_setting('fsync'), current_setting('full_page_writes'), current_setting('session_replication_role')").
		Row().Scan(&fsync, &pages, &role)
	if err != nil {
		return warnings, fmt.Errorf("read the server's settings: %w", err)
	}
	if fsync != "on" {
		warnings = append(warnings, "PostgreSQL runs with fsync = off: a crash of its machine loses rows of acknowledged events, or the whole database; set fsync = on and reload it")
	}
	if pages != "on" {
		warnings = append(warnings, "PostgreSQL runs with full_page_writes = off: a crash of its machine can corrupt tables; set full_page_writes = on and reload it, unless its filesystem writes pages whole")
	}
	if role != "origin" {
		warnings = append(warnings, "session_replication_role = "+role+" is a default of this database or role: triggers on Usher's tables do not fire; ALTER DATABASE or ALTER ROLE … RESET session_replication_role")
	}
	if d.connector.pooled.Load() {
		warnings = append(warnings, "a pooler in front of PostgreSQL keeps no settings of a connection: Usher sets its own in every transaction and uses no prepared statements; "+
			"naming the server itself in "+d.connector.url.setting+" saves round trips")
	}
	keys, err := ForeignKeys(ctx, db)
	if err != nil {
		return warnings, err
	}
	for _, k := range keys {
		warnings = append(warnings, k.String())
	}
	return warnings, nil
}

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
func (e *OpenError) WrongSettings() bool { return !errors.Is(e.kind, ErrUnreachable) }

func unusable(format string, args ...any) error {
	return &OpenError{kind: ErrUnusable, text: fmt.Sprintf(format, args...)}
}

// openError says what keeps a server from being used. [ErrUnreachable] is what waiting may cure: nobody answers, or "not now".
func (u *pgURL) openError(err error) error {
	var open *OpenError
	if errors.As(err, &open) { // of our own making
		return open
	}
	where := net.JoinHostPort(u.cfg.Host, strconv.Itoa(int(u.cfg.Port)))
	if strings.HasPrefix(u.cfg.Host, "/") {
		where = u.cfg.Host
	}
	e := &OpenError{kind: ErrUnreachable, err: err}
	pg, refusal := u.decisive(err)
	switch {
	case pg == nil && refusal == nil:
		e.text = fmt.Sprintf("no PostgreSQL answers at %s: check that it runs and that %s is right (%s)", where, u.setting, reason(err))
	case pg == nil && u.requiresTLS():
		e.kind, e.text = ErrUnusable, fmt.Sprintf("no connection to PostgreSQL at %s as %s in %s wants it: correct that, or what the server offers (%s)", where, u.tls, u.setting, reason(refusal))
	case pg == nil:
		e.kind, e.text = ErrUnusable, fmt.Sprintf("what answers at %s does not do what %s asks for: check that it is PostgreSQL, and how it is spoken to (%s)", where, u.setting, reason(refusal))
	case strings.HasPrefix(pg.Code, "28"), isAbout(pg, "no such user", "auth failed", "authentication failed"), isAbout(pg, "role ", "user ") && isAbout(pg, "does not exist"):
		e.kind, e.text = ErrAuth, fmt.Sprintf("PostgreSQL at %s refuses user %q: check user and password in %s and pg_hba.conf (%s)", where, u.cfg.User, u.setting, pg.Message)
	case pg.Code == "3D000", isAbout(pg, "no such database"), isAbout(pg, "database ") && isAbout(pg, "does not exist"):
		e.kind, e.text = ErrNoDatabase, fmt.Sprintf("PostgreSQL at %s has no database %q: create it (createdb %s) or correct %s", where, u.cfg.Database, u.cfg.Database, u.setting)
	// an unknown parameter, an invalid value for one, one that cannot be set (now), by this user; a pooler's word for all of them
	case pg.Code == "42704", pg.Code == "22023", pg.Code == "55P02", pg.Code == "42501" && strings.Contains(pg.Message, "parameter"), isAbout(pg, startupParameter):
		e.kind, e.text = ErrUnusable, fmt.Sprintf("PostgreSQL at %s does not take a parameter of %s: remove or correct it (%s)", where, u.setting, pg.Message)
	case pg.Code == "42501":
		e.kind, e.text = ErrAuth, fmt.Sprintf("user %q of %s may not use database %q at %s: GRANT CONNECT ON DATABASE (%s)", u.cfg.User, u.setting, u.cfg.Database, where, pg.Message)
	case isNotNow(pg):
		e.text = fmt.Sprintf("PostgreSQL at %s answers, but takes no connection now (%s, SQLSTATE %s)", where, pg.Message, pg.Code)
	default:
		e.kind, e.text = ErrUnusable, fmt.Sprintf("PostgreSQL at %s refuses what %s asks for: correct that or the server (%s, SQLSTATE %s)", where, u.setting, pg.Message, pg.Code)
	}
	return e
}

// requiresTLS: there is no way without it.
func (u *pgURL) requiresTLS() bool {
	return u.tls != "" && u.cfg.TLSConfig != nil && !slices.ContainsFunc(u.cfg.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.TLSConfig == nil })
}

// decisive is the part of an error that decides: the last answer of a server, else what is not the network's trouble. A name may
// stand for several addresses, and each may be tried with and without TLS.
func (u *pgURL) decisive(err error) (pg *pgconn.PgError, refusal error) {
	withoutTLS := u.cfg.TLSConfig == nil || slices.ContainsFunc(u.cfg.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.TLSConfig == nil })
	for _, cause := range causes(err) {
		var answer *pgconn.PgError
		switch {
		case errors.As(cause, &answer):
			pg = answer
		case isNetwork(cause), withoutTLS && strings.Contains(cause.Error(), "tls error"):
		default:
			refusal = cause
		}
	}
	return pg, refusal
}

// causes are the parts of a joined error.
func causes(err error) []error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if joined, ok := e.(interface{ Unwrap() []error }); ok {
			var all []error
			for _, part := range joined.Unwrap() {
				all = append(all, causes(part)...)
			}
			return all
		}
	}
	return []error{err}
}

// isNetwork reports whether waiting may cure what is no server's answer.
func isNetwork(err error) bool {
	var op *net.OpError
	if errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error") { // crypto/tls: a certificate, say, is refused
		return false
	}
	var network net.Error
	var errno syscall.Errno
	var notPreferred *pgconn.NotPreferredError
	if errors.As(err, &network) || errors.As(err, &errno) || errors.As(err, &notPreferred) {
		return true
	}
	return slices.ContainsFunc([]error{
		io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, driver.ErrBadConn, context.Canceled, context.DeadlineExceeded,
		pgconn.ErrReadOnlyConnection, pgconn.ErrReadWriteConnection, pgconn.ErrPrimaryConnection, pgconn.ErrStandbyConnection, // target_session_attrs: a failover
	}, func(target error) bool { return errors.Is(err, target) })
}

// notNow are the SQLSTATEs, or their classes, of a server that may take a connection later: too many of them, starting up, shutting down,
// a disk's trouble.
var notNow = []string{"40", "53", "55006", "55P03", "57", "58"}

// isNotNow tells a "not now" from a "never". Poolers have one code for everything (PgBouncer 08P01, Supavisor and Neon's proxy XX000).
func isNotNow(pg *pgconn.PgError) bool {
	return slices.ContainsFunc(notNow, func(code string) bool { return strings.HasPrefix(pg.Code, code) }) ||
		isPoolers(pg) && !isAbout(pg, "not found", "does not exist", "not supported", "unsupported", "endpoint id", "disabled", "not allowed", "ssl required", "tls required", "insecure")
}

func isPoolers(pg *pgconn.PgError) bool {
	return strings.HasPrefix(pg.Code, "08") || strings.HasPrefix(pg.Code, "XX") || pg.Code == ""
}

// isAbout reports whether a pooler says one of words.
func isAbout(pg *pgconn.PgError, words ...string) bool {
	text := strings.ToLower(pg.Message)
	return isPoolers(pg) && slices.ContainsFunc(words, func(word string) bool { return strings.Contains(text, word) })
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
