package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/replay"
	"github.com/usherhq/usher/worker"
)

// demoFlaky is how many events of the demo fail twice and then pass.
const demoFlaky = 3

// faultStory is what the demo's faults came to.
type faultStory struct {
	RetriedThenApplied int      `json:"retried_then_applied"` // events that failed twice and passed at their third attempt
	DeadLettered       []string `json:"dead_lettered"`        // events that never passed, until the repair
	Replayed           int      `json:"replayed"`             // of these, applied by a replay after the repair
}

// demoFaults makes some events fail: the first few user.updated twice each, the first organization.updated always, until
// it is repaired.
type demoFaults struct {
	worker.Teller
	mu       sync.Mutex
	flaky    map[string]bool // ids of the events that fail twice
	broken   string          // the event that never passes
	repaired bool
}

// change puts the faults into the mirror's handler, and takes a schedule of retries that fits a demo.
func (f *demoFaults) change(c *worker.Config) {
	c.Attempts, c.RetryInitial, c.RetryMax = 5, 100*time.Millisecond, 400*time.Millisecond
	c.Handlers = worker.Handlers()
	for i, r := range c.Handlers {
		if teller, tells := r.Handler.(worker.Teller); tells && teller.Name() == "mirror" {
			f.Teller, c.Handlers[i].Handler = teller, f
		}
	}
}

// Handle implements worker.Handler.
func (f *demoFaults) Handle(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
	_, err := f.HandleAndTell(ctx, tx, batch)
	return err
}

// HandleAndTell implements worker.Teller: the delivery log of a demo says what events changed, as everywhere.
func (f *demoFaults) HandleAndTell(ctx context.Context, tx *gorm.DB, batch []event.Event) ([]event.Effect, error) {
	if err := f.strike(tx, batch); err != nil {
		return nil, err
	}
	return f.Teller.HandleAndTell(ctx, tx, batch)
}

func (f *demoFaults) strike(tx *gorm.DB, batch []event.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range batch {
		switch e.Type {
		case "user.updated":
			if !f.flaky[e.ID] && len(f.flaky) >= demoFlaky {
				continue
			}
			f.flaky[e.ID] = true
			// The log is asked, since a transaction may be repeated: not every call is an attempt.
			var attempts int
			if err := tx.Table("deliveries").Where("handler = ? AND source = ? AND event_id = ?", f.Name(), e.Source, e.ID).
				Select("attempts").Scan(&attempts).Error; err != nil {
				return fmt.Errorf("read attempts: %w", err)
			}
			if attempts < 2 {
				return errors.New("demo: this event fails twice")
			}
		case "organization.updated":
			if f.broken == "" {
				f.broken = e.ID
			}
			if f.broken == e.ID && !f.repaired {
				return errors.New("demo: this event fails until the handler is repaired")
			}
		}
	}
	return nil
}

// tell shows the dead letter, repairs the handler and replays it, as an operator would with `usher dlq`.
func (f *demoFaults) tell(ctx context.Context, i *allinone.Instance, start time.Time, info io.Writer) (faultStory, error) {
	story := faultStory{DeadLettered: []string{}}
	f.mu.Lock()
	flaky := slices.Collect(maps.Keys(f.flaky))
	f.mu.Unlock()
	var passed int64
	err := deliveriesSince(i.DB.WithContext(ctx), start).Where("event_id IN ? AND status = 'processed' AND attempts = 3", flaky).Count(&passed).Error
	if err != nil {
		return story, fmt.Errorf("count retried events: %w", err)
	}
	story.RetriedThenApplied = int(passed)
	filter := deadletter.Filter{Handler: "mirror", Since: start}
	letters, _, err := deadletter.List(ctx, i.DB, filter, "", 100)
	if err != nil {
		return story, err
	}
	_, _ = fmt.Fprintf(info, "\nFaults: %d events failed twice and passed at their third attempt.\n", story.RetriedThenApplied)
	for _, l := range letters {
		story.DeadLettered = append(story.DeadLettered, l.EventID)
		_, _ = fmt.Fprintf(info, "Dead letter: %s %s, %d attempts, %s: %s\n", l.EventID, l.Type, l.Attempts, l.Reason, l.Error)
	}
	if len(letters) == 0 {
		return story, nil
	}
	f.mu.Lock()
	f.repaired = true
	f.mu.Unlock()
	result, err := deadletter.Replay(ctx, i.JS, i.DB, filter, replay.Options{}, func(deadletter.Result) {})
	if err != nil {
		return story, err
	}
	story.Replayed = result.Applied
	slices.Sort(story.DeadLettered)
	_, _ = fmt.Fprintf(info, "The handler is repaired (usher dlq replay): %d of %d replayed and applied.\n\n", story.Replayed, len(letters))
	return story, nil
}
