package mirror

import (
	"time"

	"github.com/usherhq/usher/pkg/event"
)

// Read makes the rows of a batch and writes none.
func Read(batch []event.Event) error {
	newest := map[*Table]map[string]*row{}
	for i := range batch {
		if err := collect(newest, &batch[i], time.Time{}); err != nil {
			return err
		}
	}
	return nil
}
