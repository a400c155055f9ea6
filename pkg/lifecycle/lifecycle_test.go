package lifecycle_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/lifecycle"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBroken = errors.New("broken")

type service struct {
	name    string
	runFunc func(ctx context.Context) error
}

func (s service) Name() string                  { return s.name }
func (s service) Run(ctx context.Context) error { return s.runFunc(ctx) }

// untilDone is a service that takes so long to settle what it holds.
func untilDone(name string, settle time.Duration, settled chan<- string) service {
	return service{name, func(ctx context.Context) error {
		<-ctx.Done()
		time.Sleep(settle)
		settled <- name
		return nil
	}}
}

func TestRunWaitsUntilEveryServiceHasSettled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		settled := make(chan string, 2)
		started := time.Now()
		require.NoError(t, lifecycle.Run(ctx, untilDone("slow", 2*time.Second, settled), untilDone("fast", time.Second, settled)))
		assert.Equal(t, "fast", <-settled)
		assert.Equal(t, "slow", <-settled)
		assert.Equal(t, time.Minute+2*time.Second, time.Since(started))
	})
}

func TestAFailureStopsTheOthersAndIsReturned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		settled := make(chan string, 2)
		failing := service{"failing", func(context.Context) error { return errBroken }}
		err := lifecycle.Run(t.Context(), untilDone("other", time.Second, settled), failing)
		require.ErrorIs(t, err, errBroken)
		assert.EqualError(t, err, "run services: failing: broken")
		assert.Len(t, settled, 1, "the other has settled before Run returns")
	})
}

func TestAServiceThatStopsByItselfIsAFailure(t *testing.T) {
	t.Parallel()
	quitter := service{"quitter", func(context.Context) error { return nil }}
	assert.EqualError(t, lifecycle.Run(t.Context(), quitter), "run services: quitter: stopped by itself")
}

func TestAFailureWhileStoppingIsReturned(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	failing := service{"failing", func(ctx context.Context) error { <-ctx.Done(); return errBroken }}
	assert.ErrorIs(t, lifecycle.Run(ctx, failing), errBroken)
}

func TestClosersCloseInReverseOnce(t *testing.T) {
	t.Parallel()
	var closers lifecycle.Closers
	var closed []string
	for _, name := range []string{"broker", "database", "listener"} {
		closers.Add(func() error {
			closed = append(closed, name)
			if name == "listener" {
				return nil
			}
			return fmt.Errorf("close %s: %w", name, errBroken)
		})
	}
	err := closers.Close()
	require.ErrorIs(t, err, errBroken)
	assert.EqualError(t, err, "close database: broken\nclose broker: broken")
	assert.Equal(t, []string{"listener", "database", "broker"}, closed)
	assert.NoError(t, closers.Close())
	assert.Len(t, closed, 3)
}

func TestClosersTakeConcurrentAdds(t *testing.T) {
	t.Parallel()
	var closers lifecycle.Closers
	var mu sync.Mutex
	var closed []int
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			closers.Add(func() error {
				mu.Lock()
				defer mu.Unlock()
				closed = append(closed, i)
				return nil
			})
		})
	}
	wg.Wait()
	require.NoError(t, closers.Close())
	slices.Sort(closed)
	assert.Len(t, slices.Compact(closed), 50)
}
