package reconciler_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/reconciler"
)

// pending is what the mirror has before it.
func (w *world) pending() int {
	w.t.Helper()
	consumer, err := w.js.Consumer(w.t.Context(), stream.Events, "mirror")
	require.NoError(w.t, err)
	info := consumer.CachedInfo()
	return int(info.NumPending) + info.NumAckPending
}

func TestABackfillWaitsForAWorkerThatStandsStill(t *testing.T) {
	t.Parallel()
	const users, most = 250, 70
	w := newWorld(t, dbtest.SQLite(t), emulator.APIConfig{Crowd: emulator.NewCrowd(users)})
	core, logs := observer.New(zap.InfoLevel)
	slow := func(c *reconciler.SweepConfig) { c.MaxPending = most }
	waiting := make(chan int64)
	opts := reconciler.Options{Kind: reconciler.Backfill, Resources: []string{"users"}, Progress: func(p reconciler.Progress) {
		if p.Waiting > 0 {
			waiting <- p.Waiting
		}
	}}
	sweeper := w.loggingSweeper(zap.New(core), slow)
	begin := func(ctx context.Context) <-chan error {
		done := make(chan error, 1)
		go func() {
			_, err := sweeper.Reconcile(ctx, opts)
			done <- err
		}()
		return done
	}

	// The worker stands still: the sweep stops at once, and reads no further.
	ctx, cancel := context.WithCancel(t.Context())
	done := begin(ctx)
	for range 4 {
		n := <-waiting
		assert.Greater(t, n, int64(most))
		assert.LessOrEqual(t, n, int64(most+page))
	}
	requests := w.api.RequestsTo("/v1/users")
	for range 4 {
		<-waiting
	}
	assert.Equal(t, requests, w.api.RequestsTo("/v1/users"), "it reads on, and holds what it read in memory")
	assert.LessOrEqual(t, w.pending(), most+page)
	assert.Equal(t, 1, logs.FilterMessageSnippet("waiting for the worker").Len(), "said once a minute, not at every look")

	// It gives way, and another goes on.
	cancel()
	for ended := false; !ended; {
		select {
		case <-waiting:
		case err := <-done:
			require.ErrorIs(t, err, context.Canceled)
			ended = true
		case <-time.After(time.Minute):
			t.Fatal("a sweep that waits does not give way")
		}
	}
	stood := w.pending()
	done = begin(t.Context())
	<-waiting
	assert.LessOrEqual(t, w.pending(), stood+page)

	// The worker goes on, a little slower than the sweep.
	applied, deepest := 0, 0
	for ended := false; !ended; {
		select {
		case n := <-waiting:
			deepest = max(deepest, int(n))
			events := w.settle()
			for i := range events {
				require.Equal(t, event.OriginBackfill, events[i].Origin)
			}
			applied += len(events)
		case err := <-done:
			require.NoError(t, err)
			ended = true
		case <-time.After(time.Minute):
			t.Fatal("the sweep does not go on with the worker")
		}
	}
	assert.LessOrEqual(t, deepest, most+page)
	applied += len(w.settle())
	assert.Equal(t, users, applied)
	assert.Len(t, w.living("users"), users)
	assert.Positive(t, logs.FilterMessageSnippet("caught up").Len())
}
