package clerk

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Tally is Clerk's count of a resource, and how many of those objects are so old that all who listen have heard of them.
type Tally struct {
	All int64
	Old int64 // of All, those that were created before Until; all of them where Until is zero
	// Until is by Clerk's clock; zero where the resource cannot be counted by time.
	Until time.Time
}

const (
	// settling is how old is old.
	settling = time.Minute
	// youngest is how many of the newest objects are looked at for those that are young.
	youngest = 100
)

// Tally counts a resource with its old objects apart: a minute older than the newest, or than the hundred newest where these are younger. Of users
// (whom it takes a request more to count by time) it is a minute older than newest, a recent time by Clerk's clock; where that is zero
// all are old, as they are of resources that come in no order.
func (c *Client) Tally(ctx context.Context, resource string, newest time.Time) (Tally, error) {
	r, err := lookup(resource)
	if err != nil {
		return Tally{}, fmt.Errorf("count %s: %w", resource, err)
	}
	if !r.array && r.created {
		return c.tallyOfList(ctx, r)
	}
	all, err := c.Count(ctx, resource)
	t := Tally{All: all, Old: all}
	if err != nil || !r.array || newest.IsZero() {
		return t, err
	}
	until := newest.Add(-settling)
	old, err := c.count(ctx, resource, url.Values{"created_at_before": {strconv.FormatInt(until.UnixMilli(), 10)}})
	var f *fault
	switch {
	case err == nil:
		t.Old, t.Until = old, until
	case errors.As(err, &f) && (f.status == http.StatusBadRequest || f.status == http.StatusUnprocessableEntity):
		return t, nil // an API that does not know the question
	}
	return t, err
}

func (c *Client) tallyOfList(ctx context.Context, r resource) (Tally, error) {
	page, err := c.list(ctx, r.path, url.Values{"order_by": {"-created_at"}}, -1, youngest)
	if err == nil && page.total < 0 {
		err = fmt.Errorf("no total_count: %w", ErrUnreadable)
	}
	t := Tally{All: page.total, Old: page.total}
	if err != nil || len(page.objects) == 0 {
		if err != nil {
			err = fmt.Errorf("count %s: %w", r.name, err)
		}
		return t, err
	}
	until := page.objects[0].CreatedAt - settling.Milliseconds()
	if last := page.objects[len(page.objects)-1]; int64(len(page.objects)) < page.total {
		until = max(until, last.CreatedAt)
	}
	for i := range page.objects {
		if page.objects[i].CreatedAt >= until {
			t.Old--
		}
	}
	t.Until = time.UnixMilli(until)
	return t, nil
}
