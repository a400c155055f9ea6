package database

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
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

func openPostgres(ctx context.Context, url, schema string) (*gorm.DB, error) {
	cfg, err := pgx.ParseConfig(url)
	if err != nil { // pgx hides a password that it understood; what it did not understand is not repeated
		return nil, errors.New("open database: the URL is not valid; it looks like postgres://user:password@host:5432/name (special characters of the password as %XX)")
	}
	if schema == "" {
		return nil, errors.New("open database: the schema is empty; set USHER_DATABASE_SCHEMA")
	}
	cfg.ConnectTimeout = connectTimeout
	cfg.RuntimeParams["search_path"] = pgx.Identifier{schema}.Sanitize()
	cfg.RuntimeParams["timezone"] = "UTC"
	// A connection lives while tables grow from nothing to millions of rows. A generic plan that was made for the empty table
	// stays until the next ANALYZE (measured: 88 ms instead of 2 for a batch's look into the inbox); a new plan costs some 0.1 ms.
	setDefault(cfg.RuntimeParams, "plan_cache_mode", "force_custom_plan")
	setDefault(cfg.RuntimeParams, "application_name", "usher")
	pool := stdlib.OpenDB(*cfg, stdlib.OptionAfterConnect(func(_ context.Context, conn *pgx.Conn) error {
		conn.TypeMap().RegisterType(&pgtype.Type{Name: "timestamptz", OID: pgtype.TimestamptzOID, Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC}})
		return nil
	}))
	pool.SetMaxOpenConns(maxConns)
	pool.SetMaxIdleConns(maxConns)
	pool.SetConnMaxLifetime(connMaxLifetime)
	pool.SetConnMaxIdleTime(connMaxIdleTime)

	var version int
	if err := pool.QueryRowContext(ctx, "SELECT current_setting('server_version_num')::int").Scan(&version); err != nil {
		_ = pool.Close()
		return nil, openError(err, cfg)
	}
	if version < minPostgres {
		_ = pool.Close()
		return nil, fmt.Errorf("open database: PostgreSQL %d is too old; Usher needs %d or newer", version/10000, minPostgres/10000)
	}
	db, err := gorm.Open(postgres.New(postgres.Config{Conn: pool}), gormConfig())
	if err != nil {
		_ = pool.Close()
		return nil, openError(err, cfg)
	}
	return db, nil
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
func (e *OpenError) Unwrap() []error { return []error{e.kind, e.err} }

func openError(err error, cfg *pgx.ConnConfig) error {
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
