package worker

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"

	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
)

func TestDecide(t *testing.T) {
	t.Parallel()
	own := errors.New("the event's own")
	outage := fmt.Errorf("connect: %w", &pgconn.PgError{Code: "57P01"})
	constraint := &pgconn.PgError{Code: "23505"}
	for _, tt := range []struct {
		name     string
		err      error
		attempt  int
		stopping bool
		want     action
	}{
		{"success", nil, 1, false, ack},
		{"success while stopping", nil, 1, true, ack},
		{"first failure", own, 1, false, retry},
		{"last but one", own, 9, false, retry},
		{"last attempt", own, 10, false, deadLetter},
		{"beyond the last", own, 11, false, deadLetter},
		{"failure while stopping", own, 10, true, giveBack},
		{"permanent", Permanent(own), 1, false, deadLetter},
		{"permanent, wrapped", fmt.Errorf("x: %w", Permanent(own)), 1, false, deadLetter},
		{"permanent while stopping", Permanent(own), 1, true, giveBack},
		{"outage", outage, 1, false, pause},
		{"outage at the last attempt", outage, 10, false, pause},
		{"outage while stopping", outage, 1, true, giveBack},
		{"read-only", &pgconn.PgError{Code: "25006"}, 10, false, pause},
		{"rights taken away", &pgconn.PgError{Code: "42501"}, 10, false, pause},
		{"table away", &pgconn.PgError{Code: "42P01"}, 10, false, pause},
		{"lock held by somebody", &pgconn.PgError{Code: "55P03"}, 10, false, pause},
		{"deadlock", &pgconn.PgError{Code: "40P01"}, 10, false, pause},
		{"disk full", &pgconn.PgError{Code: "53100"}, 10, false, pause},
		{"database too slow", fmt.Errorf("%w: %w", errSlow, context.DeadlineExceeded), 10, false, pause},
		{"broker away", fmt.Errorf("%w: x", errBroker), 10, false, pause},
		{"permanent, says a handler of an outage", Permanent(outage), 1, false, pause},
		{"the handler's own time-out while the database answers", &ownError{context.DeadlineExceeded}, 1, false, retry},
		{"constraint", constraint, 1, false, retry},
		{"constraint at the last attempt", constraint, 10, false, deadLetter},
		{"panic", fmt.Errorf("%w: boom", errPanic), 1, false, retry},
		{"panic at the last attempt", fmt.Errorf("%w: boom", errPanic), 10, false, deadLetter},
		{"handler's time-out", fmt.Errorf("%w: %w", errTimeout, context.DeadlineExceeded), 1, false, retry},
		{"retry after", RetryAfter(own, time.Hour), 1, false, retry},
		{"retry after at the last attempt", RetryAfter(own, time.Hour), 10, false, deadLetter},
	} {
		assert.Equal(t, tt.want, decide(tt.err, tt.attempt, 10, tt.stopping), tt.name)
	}
}

func TestReasonsAreOfTheClosedSet(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]deadletter.Reason{
		Permanent(fmt.Errorf("%w: x", event.ErrMalformed)): deadletter.Undecodable,
		Permanent(fmt.Errorf("%w: x", errWrongInstance)):   deadletter.WrongInstance,
		Permanent(errors.New("x")):                         deadletter.Rejected,
		fmt.Errorf("%w: x", errPanic):                      deadletter.Panic,
		fmt.Errorf("%w: x", errTimeout):                    deadletter.Timeout,
		&pgconn.PgError{Code: "23514"}:                     deadletter.Constraint,
		errors.New("x"):                                    deadletter.HandlerError,
	} {
		assert.Equal(t, want, reasonOf(err), err.Error())
		assert.Contains(t, deadletter.Reasons(), want)
	}
}

func TestScheduleGrowsToItsCap(t *testing.T) {
	t.Parallel()
	l := &loop{cfg: Config{}.withDefaults()}
	for attempt, want := range map[int]time.Duration{1: time.Second, 2: 4 * time.Second, 3: 16 * time.Second, 4: 64 * time.Second, 6: 10 * time.Minute, 9: 10 * time.Minute} {
		assert.InDelta(t, want.Seconds(), l.schedule(attempt).Seconds(), 0.21*want.Seconds(), "attempt %d", attempt)
	}
	assert.Equal(t, time.Hour, delayOf(fmt.Errorf("x: %w", RetryAfter(errors.New("y"), time.Hour)), time.Second))
	assert.Equal(t, time.Second, delayOf(errors.New("y"), time.Second))
}
