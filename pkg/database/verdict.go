package database

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"
	"modernc.org/sqlite"
)

// infrastructure are SQLSTATEs, or their classes, that say nothing about the data.
var infrastructure = []string{
	"08",             // connection exceptions
	"25P03", "25P04", // idle_in_transaction_session_timeout, transaction_timeout
	"25006",          // read-only: a standby, or a disk that an operator protects
	"26000", "42P05", // a prepared statement is gone, or there already: a pooler that was not recognized
	"28",                      // the password was changed under us
	"3D000", "3F000", "42P01", // database, schema or table gone: a restore in progress. Services check them before they begin
	"40001", "40P01", // serialization failure, deadlock
	"42703", "42704", "42804", "42809", "42883", "428C9", "42P10", "55000", // a column, its type or the key altered by hand, a view in place of the table
	"42501",                                              // rights were taken away
	"53",                                                 // too many connections, disk full, out of memory
	"55P03",                                              // lock_timeout
	"57014", "57P01", "57P02", "57P03", "57P04", "57P05", // cancelled, shutting down, crashed, starting up
	"58",             // I/O errors
	"XX001", "XX002", // corrupted data, corrupted index
}

// SQLite's primary result codes of the same kind.
var sqliteInfrastructure = map[int]bool{
	5: true, 6: true, // BUSY, LOCKED
	7: true, 8: true, 9: true, // NOMEM, READONLY, INTERRUPT
	10: true, 11: true, 13: true, 14: true, 15: true, // IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL
	23: true, 26: true, // AUTH, NOTADB
}

// IsInfrastructure tells whether err is the database's trouble (or the caller's context) rather than the data's: the
// same work may succeed later as it is. A nil error is not.
func IsInfrastructure(err error) bool {
	if err == nil {
		return false
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		for _, code := range infrastructure {
			if strings.HasPrefix(pg.Code, code) {
				return true
			}
		}
		return false
	}
	var lite *sqlite.Error
	if errors.As(err, &lite) {
		return sqliteInfrastructure[lite.Code()&0xff] || isMissingTable(err) || isMissingColumn(err)
	}
	for _, target := range []error{
		context.Canceled, context.DeadlineExceeded, driver.ErrBadConn, sql.ErrConnDone, sql.ErrTxDone, pgconn.ErrConnClosed,
		io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, os.ErrDeadlineExceeded,
		ErrUnreachable, ErrAuth, ErrNoDatabase, ErrPending, ErrNewer, ErrUnusable,
		syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, syscall.ENOSPC, syscall.EIO, syscall.EROFS, syscall.EMFILE,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	var connect *pgconn.ConnectError
	var network net.Error
	var retry interface{ SafeToRetry() bool } // pgconn: nothing was sent, the connection was closed already
	return errors.As(err, &connect) || errors.As(err, &network) || errors.As(err, &retry) && retry.SafeToRetry() ||
		err.Error() == "sql: database is closed"
}

// IsStatement tells whether err is what the database said of one statement while the connection goes on: the next statement,
// after a rollback to a savepoint, may succeed.
func IsStatement(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.SeverityUnlocalized == "ERROR" // a FATAL one ends the connection
	}
	return isMissingTable(err) || isMissingColumn(err)
}

// IsRefusal reports whether the database answered one statement with an error of any kind, infrastructure or data, and continues.
func IsRefusal(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.SeverityUnlocalized == "ERROR"
	}
	var lite *sqlite.Error
	return errors.As(err, &lite) && !sqliteInfrastructure[lite.Code()&0xff]
}

// IsConstraint tells whether the database refused the data by a rule of the schema (NOT NULL, CHECK, a key).
func IsConstraint(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return strings.HasPrefix(pg.Code, "23")
	}
	var lite *sqlite.Error
	return errors.As(err, &lite) && lite.Code()&0xff == 19
}

// sqliteConstraintRE finds what SQLite says of a refusal by a rule of the schema; it has no field for that.
var sqliteConstraintRE = regexp.MustCompile(`(UNIQUE|NOT NULL|CHECK) constraint failed: ([^()]+?)(?: \(\d+\))?$|FOREIGN KEY constraint failed`)

// Constraint names the rule of the schema by which the database refused the data, as far as it says: a constraint, or a column; empty where
// err is no such refusal.
func Constraint(err error) string {
	var pg *pgconn.PgError
	var lite *sqlite.Error
	switch {
	case !IsConstraint(err):
		return ""
	case errors.As(err, &pg) && pg.ConstraintName != "":
		return "constraint " + pg.ConstraintName + ofTable(pg.TableName)
	case errors.As(err, &pg) && pg.ColumnName != "":
		return "column " + pg.ColumnName + ofTable(pg.TableName)
	case errors.As(err, &lite):
		m := sqliteConstraintRE.FindStringSubmatch(lite.Error())
		switch {
		case m == nil:
			return ""
		case m[1] == "CHECK":
			return "constraint " + m[2]
		case m[1] == "":
			return "a foreign key"
		default:
			return strings.ToLower(m[1]) + " " + m[2]
		}
	}
	return ""
}

func ofTable(name string) string {
	if name == "" {
		return ""
	}
	return " of table " + name
}

// isMissingTable tells whether a query named a table that does not exist. SQLite has no code for that, only its words.
func isMissingTable(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code == "42P01" || pg.Code == "3F000"
	}
	var lite *sqlite.Error
	return errors.As(err, &lite) && lite.Code()&0xff == 1 && strings.Contains(lite.Error(), "no such table: ")
}

// isMissingColumn reports whether a query of SQLite named a column, or a key of ON CONFLICT, that does not exist.
func isMissingColumn(err error) bool {
	var lite *sqlite.Error
	if !errors.As(err, &lite) || lite.Code()&0xff != 1 {
		return false
	}
	text := lite.Error()
	return strings.Contains(text, "no such column: ") || strings.Contains(text, " has no column named ") ||
		strings.Contains(text, "ON CONFLICT clause does not match any ")
}
