// Package worker applies events to the database: one durable consumer a handler, small batches,
// effect and delivery log in one transaction, acks after the commit.
//
// It guarantees that an event which ingest accepted ends, for each handler, either applied (once
// in effect) or as a dead letter. It is the only writer of the mirror and of the delivery log. It
// never calls Clerk.
package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/stream"
)

// Handler applies events to one concern, inside the caller's transaction, which also records that
// they were applied. Events come in no order; the same one may come again after a failure. An error
// rolls all of the batch back: the caller then finds the event that caused it and calls again
// without it. Handle may be called by several workers at once, and must end when ctx does: after 5 s first; an event
// that takes longer is then tried alone, with the whole of [Config.HandleTimeout].
type Handler interface {
	Name() string
	Handle(ctx context.Context, tx *gorm.DB, batch []event.Event) error
}

// Teller is a [Handler] that also says what each event of a batch changed, for the delivery log. It is called instead of Handle, by the
// same rules.
type Teller interface {
	Handler
	HandleAndTell(ctx context.Context, tx *gorm.DB, batch []event.Event) ([]event.Effect, error)
}

// Registration is a handler with the events that it wants: subjects without the "clerk.evt.<source>."
// prefix, such as "user.>"; none means every event.
type Registration struct {
	Handler Handler
	Filters []string
}

// Handlers are all handlers of Usher.
func Handlers() []Registration {
	return []Registration{{Handler: mirrorHandler{}}}
}

// Specs is what [stream.Topology] needs to know of all handlers.
func Specs() []stream.HandlerSpec {
	var specs []stream.HandlerSpec
	for _, r := range Handlers() {
		specs = append(specs, stream.HandlerSpec{Name: r.Handler.Name(), Filters: r.Filters})
	}
	return specs
}

// mirrorHandler keeps the tables that mirror Clerk's objects.
type mirrorHandler struct{}

func (mirrorHandler) Name() string { return "mirror" }

func (h mirrorHandler) Handle(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
	_, err := h.HandleAndTell(ctx, tx, batch)
	return err
}

// HandleAndTell implements [Teller].
func (mirrorHandler) HandleAndTell(ctx context.Context, tx *gorm.DB, batch []event.Event) ([]event.Effect, error) {
	effects, err := mirror.Apply(ctx, tx, batch)
	if errors.Is(err, mirror.ErrNoID) || errors.Is(err, mirror.ErrWrongSource) {
		return nil, Permanent(err)
	}
	return effects, err
}

// permanentError marks an error that no further attempt can mend.
type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// Permanent tells the worker that err will come again at every attempt: the event is dead-lettered at once.
func Permanent(err error) error { return &permanentError{err} }

// retryAfterError asks for a certain delay before the next attempt.
type retryAfterError struct {
	err   error
	after time.Duration
}

func (e *retryAfterError) Error() string { return fmt.Sprintf("%v (again in %s)", e.err, e.after) }
func (e *retryAfterError) Unwrap() error { return e.err }

// RetryAfter tells the worker to try again after d instead of after the schedule's delay. It counts as an attempt.
func RetryAfter(err error, d time.Duration) error { return &retryAfterError{err, d} }
