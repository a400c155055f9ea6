package ingest

import (
	"context"
	"math"
	"net/http"
	"sync"
	"time"
)

const (
	// perRequest is what a request is taken to cost besides its body: its goroutine and its connection's buffers.
	perRequest = 16 << 10
	// firstRead is the buffer with which a body begins; it grows as the body arrives, whatever was announced.
	firstRead = 8 << 10
	// small is the size up to which a body needs no place among the large ones.
	small = 64 << 10
	// leastRate is what a body must bring in bytes a second, once it had [Config.bodyPatience].
	leastRate = 16 << 10
	// placeRate is what a large body must bring in bytes a second to keep its place while others wait for one.
	placeRate = 128 << 10
	// young is the age under which a body is not called slow: what was sent with its headers may still be on its way.
	young = 250 * time.Millisecond
	// look is how often rates are looked at.
	look = 100 * time.Millisecond
	// roomWait is how long a body waits for the memory or the place of others before it is refused.
	roomWait = 2 * time.Second
	// bodyPatience is how long a body may be slower than leastRate: two lost packets in a row are made good within it.
	bodyPatience = 3 * time.Second
)

// bodies are the bodies in memory. Without them, senders that know no secret could make the process hold any amount, or take the room of
// those that do. Memory counts as bytes arrive; where it is used up the slowest of those that are being read goes, not the
// newest. Large ones, which together take half of the memory, need a place: a burst of them waits where each has read little, and
// not half way, where each would hold what the others wait for.
type bodies struct {
	limit    int64 // bytes
	places   int
	wait     time.Duration
	patience time.Duration

	mu           sync.Mutex
	used         int64 // bytes
	leaving      int64 // of used: of bodies that were cut and are not gone yet
	large        int   // places that are taken
	largeLeaving int   // of large
	reading      map[*body]struct{}
	changed      chan struct{} // closed when there may be room for those that wait; nil where nobody waits
	stopping     bool
}

// body is one request's body, from when it is read until its request is answered.
type body struct {
	rc     *http.ResponseController
	start  time.Time // of its reading; of a large one since it has its place
	got    int64     // bytes since start
	held   int64     // bytes
	placed bool      // among the large ones
	waits  time.Time // since when it waits for memory or a place, and is not read; zero where it does not
	ended  result    // why it is not read any further; empty while it is
}

// begin takes the memory for the first bytes of a body. The result is empty, or why it could not. done must be called in any case.
func (s *bodies) begin(rc *http.ResponseController, size int64) (*body, result) {
	b := &body{rc: rc, start: time.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reading == nil {
		s.reading = map[*body]struct{}{}
	}
	s.reading[b] = struct{}{}
	if s.stopping {
		s.cut(b, shuttingDown)
	}
	return b, s.take(b, size)
}

// grow counts what has arrived and takes memory for size bytes in all. The result is empty, or why the body is not read any further.
func (s *bodies) grow(b *body, arrived, size int64) result {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.got += arrived
	return s.take(b, size)
}

// arrived counts what has arrived.
func (s *bodies) arrived(b *body, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.got += n
}

// read says that b is read: nobody takes its memory from here on.
func (s *bodies) read(b *body) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.reading, b)
}

// done gives back what b holds.
func (s *bodies) done(b *body) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.reading, b)
	s.used -= b.held
	if b.placed {
		s.large--
	}
	if b.ended != "" {
		s.leaving -= b.held
		if b.placed {
			s.largeLeaving--
		}
	}
	s.wake()
}

// why is the reason for which the reading of b was cut off; empty where it was not.
func (s *bodies) why(b *body) result {
	s.mu.Lock()
	defer s.mu.Unlock()
	return b.ended
}

// take makes b hold the memory for size bytes, and a place where that is much. It waits for both. The lock is held but while it waits.
func (s *bodies) take(b *body, size int64) result {
	defer func() { b.waits = time.Time{} }()
	for {
		if b.ended != "" {
			return b.ended
		}
		now := time.Now()
		place := size > small && !b.placed
		more := size + perRequest - b.held
		if s.used+more <= s.limit && (!place || s.large < s.places) {
			s.used += more
			b.held += more
			switch {
			case place:
				s.large++
				b.placed, b.start, b.got = true, now, 0
			case !b.waits.IsZero():
				b.start = b.start.Add(now.Sub(b.waits)) // the wait was not the sender's fault
			}
			return ""
		}
		if b.waits.IsZero() {
			b.waits = now
		}
		left := s.wait - now.Sub(b.waits)
		if left <= 0 {
			return overloaded
		}
		switch {
		case s.used-s.leaving+more > s.limit:
			s.cutSlowest(now, false)
		case place && s.large-s.largeLeaving >= s.places:
			s.cutSlowest(now, true)
		}
		if b.ended == "" {
			s.pause(min(look, left))
		}
	}
}

// cutSlowest ends the slowest body that is being read; inPlace: of those that have a place, and only if it is too slow for one. Nothing
// that is young goes. The lock is held.
func (s *bodies) cutSlowest(now time.Time, inPlace bool) {
	var slowest *body
	least := math.Inf(1)
	if inPlace {
		least = placeRate
	}
	for b := range s.reading {
		if b.ended != "" || b.held == 0 || inPlace && !b.placed {
			continue
		}
		if rate := b.rate(now); rate < least {
			slowest, least = b, rate
		}
	}
	if slowest != nil {
		s.cut(slowest, overloaded)
	}
}

// rate is in bytes a second that the body was read; that of a young body is infinite.
func (b *body) rate(now time.Time) float64 {
	if !b.waits.IsZero() {
		now = b.waits
	}
	age := now.Sub(b.start)
	if age < young {
		return math.Inf(1)
	}
	return float64(b.got) / age.Seconds()
}

// cut ends the reading of b with res as its answer. The lock is held.
func (s *bodies) cut(b *body, res result) {
	if b.ended != "" {
		return
	}
	b.ended = res
	s.leaving += b.held
	if b.placed {
		s.largeLeaving++
	}
	_ = b.rc.SetReadDeadline(time.Now())
	s.wake() // it may wait for room itself
}

// stop ends every reading of a body, now and later.
func (s *bodies) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = true
	for b := range s.reading {
		s.cut(b, shuttingDown)
	}
}

// watch cuts bodies that come too slowly, until ctx is done.
func (s *bodies) watch(ctx context.Context) {
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			s.cutSlow(now)
		}
	}
}

func (s *bodies) cutSlow(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := range s.reading {
		if late := now.Sub(b.start) - s.patience; b.waits.IsZero() && late.Seconds()*leastRate > float64(b.got) {
			s.cut(b, bodyTimeout)
		}
	}
}

// pause waits until there may be room, for d at most. The lock is held before and after.
func (s *bodies) pause(d time.Duration) {
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	changed, timer := s.changed, time.NewTimer(d)
	s.mu.Unlock()
	select {
	case <-changed:
	case <-timer.C:
	}
	timer.Stop()
	s.mu.Lock()
}

// wake lets those that wait look again. The lock is held.
func (s *bodies) wake() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}
