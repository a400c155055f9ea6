package worker_test

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/faults"
)

// TestFloodOfFailingEventsLeavesHealthyOnesAlone: 20,000 events (fewer under the race detector) fail at every attempt and come again and again, while a
// healthy event comes now and then, some of them within the flood. The flood ends when its cause does, and nothing of it is lost.
func TestFloodOfFailingEventsLeavesHealthyOnesAlone(t *testing.T) {
	// One at a time and parallel with nobody, since it measures time; only the waiting at the end is done together.
	var measuring sync.Mutex
	const within = 20 // healthy ones in the midst of the flood
	for name, open := range map[string]func(testing.TB) *gorm.DB{"postgres": dbtest.Postgres, "sqlite": dbtest.SQLite} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var healed atomic.Bool
			var failures atomic.Int64
			cfg := worker.Config{Attempts: 1000, RetryInitial: time.Second, RetryMax: 8 * time.Second}
			r := newRig(t, open(t), cfg, func(h worker.Handler) worker.Handler {
				return faults.Fail(h, faults.Always, func(e *event.Event) bool {
					bad := strings.HasPrefix(e.ID, "bad") && !healed.Load()
					if bad {
						failures.Add(1)
					}
					return bad
				}, faults.ErrFault)
			})
			r.work()
			r.send("warm_0")
			r.ledger(30 * time.Second)
			measuring.Lock()
			done := sync.OnceFunc(measuring.Unlock)
			defer done()
			started := time.Now()
			burst := ids("bad", flood)
			for i := range within {
				burst[(2*i+1)*flood/(2*within)] = fmt.Sprintf("within_%d", i)
			}
			r.send(burst...)
			arrived := time.Since(started)
			tail := r.latency("tail")
			require.Eventually(t, func() bool { // all are in the worker's hands or wait for another try
				c, err := r.js.Consumer(t.Context(), stream.Events, "effects")
				return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending >= flood-within
			}, 60*time.Second, 20*time.Millisecond)
			taken := time.Since(started)
			var worst time.Duration
			cpu, measured := processorTime(t), time.Now()
			for i := range 25 { // over several rounds of the schedule
				before := failures.Load()
				took := r.latency(fmt.Sprintf("healthy_%d", i))
				worst = max(worst, took)
				assert.Less(t, failures.Load()-before, int64(flood), "a healthy event does not wait for a round of the flood")
				time.Sleep(max(0, 250*time.Millisecond-took))
			}
			busy := float64(processorTime(t)-cpu) / float64(time.Since(measured))
			t.Logf("%d events in %s, all taken after %s; a healthy event behind them took %s, while they were retried at most %s; %.2f processors",
				flood, arrived.Round(time.Millisecond), taken.Round(time.Millisecond), tail.Round(time.Millisecond), worst.Round(time.Millisecond), busy)
			var midst []struct{ ReceivedAt, ProcessedAt time.Time }
			require.NoError(t, r.db.Table("deliveries").Where("event_id LIKE 'within%' AND status = 'processed'").Find(&midst).Error)
			assert.Len(t, midst, within, "a healthy event is not put off with those around it")
			slowest := time.Duration(0)
			for _, m := range midst {
				slowest = max(slowest, m.ProcessedAt.Sub(m.ReceivedAt))
			}
			t.Logf("the slowest of %d healthy events within the flood took %s", within, slowest.Round(time.Millisecond))
			healed.Store(true)
			done()
			healing := time.Now()
			_, dead := r.ledger(90 * time.Second)
			t.Logf("all applied %s after the cause was gone", time.Since(healing).Round(100*time.Millisecond))
			assert.Empty(t, dead)
		})
	}
}

// latency sends one event and returns how long it took to be applied.
func (r *rig) latency(id string) time.Duration {
	r.t.Helper()
	start := time.Now()
	r.send(id)
	require.Eventually(r.t, func() bool {
		var n int64
		return r.db.Table("deliveries").Where("handler = 'effects' AND event_id = ? AND status = 'processed'", id).Count(&n).Error == nil && n == 1
	}, 60*time.Second, 5*time.Millisecond)
	return time.Since(start)
}

// processorTime is what this process used so far: worker, broker and test.
func processorTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	require.NoError(t, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
