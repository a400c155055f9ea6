package worker_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zapcore"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/faults"
)

// TestALongErrorIsCutInTheLog: an error may quote a whole event, and a flood of such lines fills a disk.
func TestALongErrorIsCutInTheLog(t *testing.T) {
	t.Parallel()
	long := "the rule é refused " + strings.Repeat("é", 200_000)
	r := newRig(t, dbtest.SQLite(t), worker.Config{Attempts: 2, RetryInitial: time.Millisecond, RetryMax: time.Millisecond}, func(h worker.Handler) worker.Handler {
		h = faults.Fail(h, faults.Always, faults.IDs("fails"), errors.New(long))
		return faults.New(h.Name(), func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
			if slices.ContainsFunc(batch, func(e event.Event) bool { return e.ID == "panics" }) {
				panic(long)
			}
			return h.Handle(ctx, tx, batch)
		})
	})
	r.send("fails", "panics")
	r.work()
	_, dead := r.ledger(30 * time.Second)
	assert.Len(t, dead, 2)
	for _, message := range []string{"event failed, will retry", "event dead-lettered", "handler panicked"} {
		entries := r.logs.FilterMessage(message).All()
		assert.NotEmpty(t, entries, message)
		for _, e := range entries {
			line, err := zapcore.NewJSONEncoder(zapcore.EncoderConfig{}).EncodeEntry(e.Entry, e.Context)
			require.NoError(t, err)
			assert.Less(t, line.Len(), 16<<10, message) // a panic's stack is in its line
			assert.Contains(t, line.String(), "the rule é refused éé")
			if text, ok := e.ContextMap()["error"].(string); assert.True(t, ok || message == "handler panicked", message) {
				assert.LessOrEqual(t, len(text), 1<<10+len("…"))
			}
		}
	}
}
