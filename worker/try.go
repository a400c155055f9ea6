package worker

import (
	"context"
	"errors"
	"fmt"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
)

// ErrNoHandler tells that this version of Usher has no handler of that name.
var ErrNoHandler = errors.New("no such handler")

// errRollback ends a try that went well.
var errRollback = errors.New("only a try")

// Try runs a handler of [Handlers] on one event and takes everything back: nil means that the event would be applied now. The error is
// the handler's own (a panic is one), ErrNoHandler, or an outage, which [IsOutage] tells apart. Effects that a handler leaves to the
// outbox are taken back with the rest. On SQLite it waits for its turn as the writer.
func Try(ctx context.Context, db *gorm.DB, handler string, e event.Event) error {
	for _, r := range Handlers() {
		if r.Handler.Name() == handler {
			return try(ctx, db, r.Handler, e)
		}
	}
	return fmt.Errorf("%w: %s", ErrNoHandler, handler)
}

func try(ctx context.Context, db *gorm.DB, h Handler, e event.Event) error {
	ctx, cancel := context.WithTimeout(ctx, Config{}.withDefaults().HandleTimeout)
	defer cancel()
	err := database.InTx(ctx, db, func(tx *gorm.DB) (err error) {
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("%w: %v", errPanic, r)
			}
		}()
		if err := h.Handle(ctx, tx, []event.Event{e}); err != nil {
			return err
		}
		return errRollback
	})
	if errors.Is(err, errRollback) {
		return nil
	}
	return err
}

// Reason names an error of [Try] in the closed set.
func Reason(err error) deadletter.Reason { return reasonOf(err) }

// ErrorText is what the worker writes of an error of an event into the delivery log and the dead letter, before it is made one line.
func ErrorText(err error) string { return errorText(err) }

// IsOutage tells whether an error of [Try] is the infrastructure's and says nothing about the event.
func IsOutage(err error) bool { return isOutage(err) }

// WrongInstance is the error of an event of another Clerk instance than the configured one.
func WrongInstance(have, want string) error {
	return fmt.Errorf("%w: %s, want %s", errWrongInstance, have, want)
}
