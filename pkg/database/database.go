// Package database opens Usher's database and keeps its schema: PostgreSQL by postgres://…, SQLite by sqlite:PATH.
//
// It guarantees, also through a pooler, that a commit that returned is on disk, that times are UTC in and out, that every error of
// opening says what to do and never holds the password, and that [IsInfrastructure] tells an outage from an
// error of the data. It refuses to create or change tables other than by its numbered SQL, and it knows nothing of events.
package database

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v4"
	"go.uber.org/zap"
	"gorm.io/gorm"
	"gorm.io/gorm/logger"
)

// What keeps a database from being used. Every error of [Open], [CheckMigrated] and [Migrate] that has one of
// these causes wraps it; the text says what to do.
var (
	ErrUnreachable = errors.New("database is unreachable")
	ErrAuth        = errors.New("database refuses the user")
	ErrNoDatabase  = errors.New("database does not exist")
	ErrPending     = errors.New("migrations are pending")
	ErrNewer       = errors.New("database is newer than this program")
	ErrUnusable    = errors.New("database or its URL cannot be used as it is") // waiting is no cure
)

// How long Open waits for an answer. A file answers at once, unless somebody writes to it or the disk is busy.
const (
	connectTimeout = 5 * time.Second
	fileTimeout    = 30 * time.Second
)

// Open connects to the database that url names and asks it for a sign of life, at most 5 s long (SQLite: 30 s). schema is the
// PostgreSQL schema of all tables (the search_path of every connection; it need not exist yet); SQLite ignores it. setting is what errors
// call the setting that the URL comes from, USHER_DATABASE_URL where it is not given.
// The result is safe for concurrent use and is closed by [Close].
func Open(ctx context.Context, url, schema string, setting ...string) (*gorm.DB, error) {
	name := cmp.Or(append(setting, defaultSetting)...)
	path, isFile := strings.CutPrefix(url, "sqlite:")
	limit := connectTimeout
	if isFile {
		limit = fileTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	switch {
	case isFile:
		return openSQLite(ctx, path, name)
	case postgresRE.MatchString(url):
		return openPostgres(ctx, url, schema, name)
	case url == "":
		return nil, unusable("%s is empty; use postgres://… or sqlite:PATH", name)
	default: // not echoed: what is not understood may hold a password anywhere
		return nil, unusable("%s is neither postgres://… nor sqlite:PATH", name)
	}
}

// Await is [Open] for a service: it waits until a PostgreSQL that does not answer, or takes no connection yet, does. What waiting
// does not cure (a wrong password, a database that does not exist, [ErrUnusable]) is an error at once, and so is ctx's end. What
// [Warnings] names is logged. waits, which may be nil, is told at every try why it waits.
func Await(ctx context.Context, url, schema string, log *zap.Logger, waits func(error), setting ...string) (*gorm.DB, error) {
	told := false
	db, err := backoff.RetryNotifyWithData(func() (*gorm.DB, error) {
		db, err := Open(ctx, url, schema, setting...)
		if err != nil && (!errors.Is(err, ErrUnreachable) || strings.HasPrefix(url, "sqlite:")) {
			err = backoff.Permanent(err)
		}
		return db, err //nolint:wrapcheck // ours, or marked
	}, backoff.WithContext(pauses(), ctx), func(err error, _ time.Duration) {
		if !told {
			log.Warn("database does not answer, waiting for it", zap.Error(err))
		}
		told = true
		if waits != nil {
			waits(err)
		}
	})
	if err != nil {
		return nil, err //nolint:wrapcheck // says what it did
	}
	if told {
		log.Info("database answers")
	}
	warnings, err := Warnings(ctx, db)
	if err != nil { // it has just answered, and will be asked for more than this
		log.Warn("settings of the database not looked at", zap.Error(err))
	}
	for _, warning := range warnings {
		log.Warn(warning)
	}
	return db, nil
}

// AwaitMigrated waits until the schema is what this program needs, which `usher setup` sees to, and while the database does not answer. A
// database that is newer than the program is an error at once, and so is ctx's end. waits is as for [Await].
func AwaitMigrated(ctx context.Context, db *gorm.DB, log *zap.Logger, waits func(error)) error {
	told := ""
	err := backoff.RetryNotify(func() error {
		err := CheckMigrated(ctx, db)
		if errors.Is(err, ErrNewer) {
			return backoff.Permanent(err)
		}
		return err
	}, backoff.WithContext(pauses(), ctx), func(err error, _ time.Duration) {
		if told != err.Error() {
			log.Warn("database is not set up, waiting for it", zap.Error(err))
		}
		told = err.Error()
		if waits != nil {
			waits(err)
		}
	})
	if err == nil && told != "" {
		log.Info("database is set up")
	}
	return err //nolint:wrapcheck // ours
}

// pauses are those between two tries of what may take for ever.
func pauses() backoff.BackOff {
	return backoff.NewExponentialBackOff(backoff.WithInitialInterval(100*time.Millisecond), backoff.WithMaxInterval(5*time.Second), backoff.WithMaxElapsedTime(0))
}

// gormConfig: every caller opens its own transactions, and errors are logged where the decision falls. Statements
// are not kept by GORM: pgx keeps them a connection, and so do the connections to SQLite.
func gormConfig() *gorm.Config {
	return &gorm.Config{
		Logger:                 logger.Discard,
		SkipDefaultTransaction: true,
		DisableAutomaticPing:   true,
		NowFunc:                func() time.Time { return time.Now().UTC().Truncate(time.Millisecond) },
	}
}

// Close closes all connections. Transactions in flight fail.
func Close(db *gorm.DB) error {
	pool, err := db.DB()
	if err != nil {
		return fmt.Errorf("close database: %w", err)
	}
	if err := pool.Close(); err != nil {
		return fmt.Errorf("close database: %w", err)
	}
	return nil
}

// Ping asks the database for a sign of life over a connection of the pool, which is replaced where it is dead.
func Ping(ctx context.Context, db *gorm.DB) error {
	pool, err := db.DB()
	if err != nil {
		return fmt.Errorf("ping database: %w", err)
	}
	if err := pool.PingContext(ctx); err != nil {
		var open *OpenError
		if errors.As(err, &open) { // says it all
			return err //nolint:wrapcheck // ours
		}
		return fmt.Errorf("ping database: %w", err)
	}
	return nil
}

// InTx runs fn in one transaction: committed where fn returns nil, rolled back where it returns an error or panics.
// nil means that the commit is on disk. fn must use tx only, never the db that it came from. On SQLite the
// transaction waits for its turn as the only writer.
func InTx(ctx context.Context, db *gorm.DB, fn func(tx *gorm.DB) error) error {
	return db.WithContext(ctx).Transaction(fn) //nolint:wrapcheck // fn's error is the caller's own, commit's says what it is
}

// InReadTx runs fn in a transaction that sees one state of the database from its first query on. On SQLite it does not wait for
// the writer.
func InReadTx(ctx context.Context, db *gorm.DB, fn func(tx *gorm.DB) error) error {
	return db.WithContext(ctx).Transaction(fn, &sql.TxOptions{ReadOnly: true, Isolation: sql.LevelRepeatableRead}) //nolint:wrapcheck // as InTx
}

// IsPostgres tells PostgreSQL from SQLite.
func IsPostgres(db *gorm.DB) bool { return db.Name() == "postgres" }
