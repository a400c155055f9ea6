package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/stream"
)

// action is what becomes of an event after an attempt to apply it.
type action int

const (
	ack        action = iota // applied
	retry                    // its own error: again after a delay
	deadLetter               // its own error, and no attempt is left or would help
	giveBack                 // the worker stops: somebody else's now
	pause                    // an outage: nobody's error, wait until it is over; where the database takes other events, this one alone
)

// decide gives the verdict on one event after attempt number attempt (from 1) of at most limit. It is pure, so
// that its truth table is a test. Every kind of failure is told apart here and nowhere else.
func decide(err error, attempt, limit int, stopping bool) action {
	switch {
	case err == nil:
		return ack
	case stopping: // a deploy is nobody's failure
		return giveBack
	case isOutage(err):
		return pause
	case isPermanent(err), attempt >= limit:
		return deadLetter
	default:
		return retry
	}
}

// isOutage tells whether err is the infrastructure's and not the event's.
func isOutage(err error) bool {
	var own *ownError
	var refused *logError
	switch {
	case errors.Is(err, errBroker), errors.Is(err, errSlow), errors.Is(err, errForeign), errors.Is(err, errNotLooked):
		return true
	case errors.Is(err, errTimeout), errors.Is(err, errPanic), errors.As(err, &own):
		return false
	case errors.As(err, &refused): // whatever keeps the log from being written is no attempt of the event
		return true
	default:
		return database.IsInfrastructure(err)
	}
}

// isStatement tells whether an outage is what the database said of one statement, on a connection that goes on: it may be
// that of one event. Two transactions in each other's way are everybody's.
func isStatement(err error) bool {
	var refused *logError
	if errors.As(err, &refused) {
		return !refused.all && !errors.Is(err, errBroker)
	}
	return isOutage(err) && database.IsStatement(err) && !isConflict(err)
}

// isConflict tells whether err is that of two transactions in each other's way.
func isConflict(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (pg.Code == "40P01" || pg.Code == "40001")
}

// isForeign tells whether an error that looks like an outage of the database may as well be that of something else that a
// handler talks to: it carries no word of the database's.
func isForeign(err error) bool {
	var pg *pgconn.PgError
	var network net.Error
	return !errors.As(err, &pg) && (errors.As(err, &network) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded))
}

// ownError is an error that looks like an outage and is the handler's own: the database answers.
type ownError struct{ err error }

func (e *ownError) Error() string { return e.err.Error() }
func (e *ownError) Unwrap() error { return e.err }

// logError is the database's refusal of a statement of the delivery log's own. A handler's work is done then, and no row can say so.
type logError struct {
	err error
	all bool // a plain row is refused too: the table is not as Usher made it
}

func (e *logError) Error() string {
	if !e.all {
		return e.err.Error()
	}
	return what(e.err) + " keeps the delivery log from being written; undo what was changed there: " + e.err.Error()
}

func (e *logError) Unwrap() error { return e.err }

// what names the part of the table deliveries that a refusal is about, as far as the database tells.
func what(err error) string {
	var pg *pgconn.PgError
	switch {
	case !errors.As(err, &pg):
	case pg.ConstraintName != "":
		return "constraint " + pg.ConstraintName + " of table deliveries"
	case pg.ColumnName != "":
		return "column " + pg.ColumnName + " of table deliveries"
	case pg.Code == "P0001": // raised by hand
		return "a trigger of table deliveries"
	}
	return "table deliveries"
}

// logFailed wraps an error of the delivery log's own statement.
func logFailed(operation string, err error) error {
	err = fmt.Errorf("%s: %w", operation, err)
	if database.IsRefusal(err) && !isConflict(err) {
		return &logError{err: err}
	}
	return err
}

// codeSealed is an error code of the broker that the client library has no name for (nats-server server/errors.json).
const codeSealed jetstream.ErrorCode = 10109

// isRefused reports whether the broker answered that it does not store a message, or that no stream takes it. A cluster without a leader is
// an outage.
func isRefused(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && !errors.Is(stream.Explain(err), stream.ErrUnavailable) || isTooLarge(err) || isMissingStream(err)
}

func isMissingStream(err error) bool {
	return errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, nats.ErrNoResponders)
}

// isFull reports whether the broker has no room for a message.
func isFull(err error) bool { return errors.Is(stream.Explain(err), stream.ErrFull) }

// advise says what is to be done about a dead letter that the broker does not store.
func advise(err error) string {
	var api *jetstream.APIError
	switch {
	case isFull(err):
		return "stream " + stream.DeadLetters + " has no room: replay or discard dead letters, or give it more"
	case isTooLarge(err):
		return "an event is larger than the broker takes now: raise its max_payload, or max_msg_size of stream " + stream.DeadLetters
	case isMissingStream(err):
		return "no stream takes dead letters: run `usher setup` if stream " + stream.DeadLetters + " is missing; in a cluster an election passes by itself"
	case errors.As(err, &api) && api.ErrorCode == codeSealed:
		return "stream " + stream.DeadLetters + " is sealed: delete it once its letters are saved, and run `usher setup`"
	default:
		return "stream " + stream.DeadLetters + " does not take letters"
	}
}

func isTooLarge(err error) bool { return errors.Is(stream.Explain(err), stream.ErrTooLarge) }

func isPermanent(err error) bool {
	var permanent *permanentError
	return errors.As(err, &permanent)
}

// Errors of an attempt that are not the handler's own words.
var (
	errPanic         = errors.New("handler panicked")
	errTimeout       = errors.New("handler did not finish in time")
	errWrongInstance = errors.New("event is of another Clerk instance")
	errUndecodable   = event.ErrMalformed
)

// Outages that are not an error of the database's own.
var (
	errBroker = errors.New("broker")
	errSlow   = errors.New("database did not finish")
)

// reasonOf names the error of an event in the closed set.
func reasonOf(err error) deadletter.Reason {
	switch {
	case errors.Is(err, errUndecodable):
		return deadletter.Undecodable
	case errors.Is(err, errWrongInstance):
		return deadletter.WrongInstance
	case errors.Is(err, mirror.ErrWrongSource):
		return deadletter.WrongSource
	case isPermanent(err):
		return deadletter.Rejected
	case errors.Is(err, errPanic):
		return deadletter.Panic
	case errors.Is(err, errTimeout), errors.Is(err, context.DeadlineExceeded):
		return deadletter.Timeout
	case database.IsConstraint(err):
		return deadletter.Constraint
	default:
		return deadletter.HandlerError
	}
}

// delayOf is how long to wait before the next attempt.
func delayOf(err error, schedule time.Duration) time.Duration {
	var after *retryAfterError
	if errors.As(err, &after) {
		return after.after
	}
	return schedule
}
