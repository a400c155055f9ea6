// Package lifecycle runs services together and stops them in the order that loses nothing.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Service runs until ctx is done. Run returns nil once everything in flight is settled; any other
// return is a failure and stops the process. It is called once.
type Service interface {
	Name() string
	Run(ctx context.Context) error
}

// Run runs all services until ctx is done or one of them fails, then stops the others. It returns
// the first failure.
func Run(ctx context.Context, services ...Service) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, s := range services {
		group.Go(func() error {
			err := s.Run(ctx)
			if err == nil && ctx.Err() == nil {
				err = errors.New("stopped by itself")
			}
			if err != nil {
				return fmt.Errorf("%s: %w", s.Name(), err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("run services: %w", err)
	}
	return nil
}

// IsWrongSettings reports whether an error says, by a method WrongSettings() bool, that a new start fails like it until the
// settings, or what they name, are changed: the exit code tells supervisors. False for other errors and for nil.
func IsWrongSettings(err error) bool {
	var wrong interface{ WrongSettings() bool }
	return errors.As(err, &wrong) && wrong.WrongSettings()
}

// Closers closes what was opened, in reverse order: what opens first closes last, also when opening
// failed half way. The zero value is ready; it is safe for concurrent use.
type Closers struct {
	mu    sync.Mutex
	funcs []func() error
}

// Add registers something to close.
func (c *Closers) Add(closeFunc func() error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.funcs = append(c.funcs, closeFunc)
}

// Close closes everything once, the last first, and joins the errors.
func (c *Closers) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for i := len(c.funcs) - 1; i >= 0; i-- {
		errs = append(errs, c.funcs[i]())
	}
	c.funcs = nil
	return errors.Join(errs...)
}
