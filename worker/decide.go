package worker

import (
	"context"
	"errors"
	"time"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/deadletter"
)

// action is what becomes of an event after an attempt to apply it.
type action int

const (
	ack        action = iota // applied
	retry                    // its own error: again after a delay
	deadLetter               // its own error, and no attempt is left or would help
	giveBack                 // the worker stops: somebody else's now
	pause                    // an outage: nobody's error, wait until it is over
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
	return errors.Is(err, errBroker) || !errors.Is(err, errTimeout) && !errors.Is(err, errPanic) && database.IsInfrastructure(err)
}

func isPermanent(err error) bool {
	var permanent *permanentError
	return errors.As(err, &permanent)
}

// Errors of an attempt that are not the handler's own words.
var (
	errPanic         = errors.New("handler panicked")
	errTimeout       = errors.New("handler did not finish in time")
	errWrongInstance = errors.New("event is of another Clerk instance")
)

// reasonOf names the error of an event in the closed set.
func reasonOf(err error) deadletter.Reason {
	switch {
	case errors.Is(err, errUndecodable):
		return deadletter.Undecodable
	case errors.Is(err, errWrongInstance):
		return deadletter.WrongInstance
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
