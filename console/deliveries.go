package console

import (
	"context"
	"errors"
	"fmt"
)

// openDeliveries counts what a handler did not process, by status.
type openDeliveries struct {
	Handler string
	Status  string // retrying, dead or discarded
	Count   int64
}

// openDeliveries reads only what an index holds: to count the processed ones too would read the whole log.
func (c *Console) openDeliveries(ctx context.Context) ([]openDeliveries, error) {
	if c.db == nil {
		return nil, errors.New("this console has no database")
	}
	var counts []openDeliveries
	err := c.db.WithContext(ctx).Table("deliveries").Select("handler, status, count(*) AS count").
		Where("status <> 'processed'").Group("handler, status").Order("handler, status").Scan(&counts).Error
	if err != nil {
		return nil, fmt.Errorf("count open deliveries: %w", err)
	}
	return counts, nil
}
