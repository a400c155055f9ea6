package ingest

import (
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// perRequest is what a request is taken to cost besides its body: its goroutine and its connection's buffers.
const perRequest = 16 << 10

// reservation is one request's share of the memory for bodies. Without it, senders that know no
// secret could make the process hold any amount.
type reservation struct {
	budget *atomic.Int64
	limit  int64
	held   int64
	large  largeBodies
	wait   time.Duration // for a place among the large bodies
	placed bool          // among the large bodies
}

// grow reserves a body of size bytes; false means that there is no room, also after the wait where the body is large.
func (r *reservation) grow(size int64) bool {
	if size > announced && !r.placed {
		if r.placed = r.large.enter(r.wait); !r.placed {
			return false
		}
	}
	more := size + perRequest - r.held
	if r.budget.Add(more) > r.limit {
		r.budget.Add(-more)
		return false
	}
	r.held += more
	return true
}

func (r *reservation) release() {
	r.budget.Add(-r.held)
	if r.placed {
		r.large.leave()
	}
}

// roomWait is how long a large body waits for others to be stored before it is refused.
const roomWait = 2 * time.Second

// largeBodies are places for bodies of more than [announced] bytes, which together take half of the memory for bodies: a burst of them
// waits here, where each has read little, and not half way, where each would hold what the others wait for. What is small never waits.
type largeBodies chan struct{}

// enter waits for a place; false means that no place is free yet. Whoever has one leaves it.
func (l largeBodies) enter(wait time.Duration) bool {
	select {
	case l <- struct{}{}:
		return true
	case <-time.After(wait):
		return false
	}
}

func (l largeBodies) leave() { <-l }

// slowBodies are the requests whose body is being read.
type slowBodies struct {
	mu      sync.Mutex
	reading map[*http.ResponseController]struct{}
	cutoff  bool
}

// add registers a request until the returned function is called.
func (b *slowBodies) add(rc *http.ResponseController) func() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.reading == nil {
		b.reading = map[*http.ResponseController]struct{}{}
	}
	b.reading[rc] = struct{}{}
	if b.cutoff {
		_ = rc.SetReadDeadline(time.Now())
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.reading, rc)
	}
}

// cut ends every read of a body, now and later.
func (b *slowBodies) cut() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cutoff = true
	for rc := range b.reading {
		_ = rc.SetReadDeadline(time.Now())
	}
}
