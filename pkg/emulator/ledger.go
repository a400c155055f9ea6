package emulator

import (
	"iter"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Count sums up what was sent and what was answered. Once a delivery has ended without being cancelled,
// Sent = Accepted + Failed + Dropped + Undelivered.
type Count struct {
	Sent        int64 `json:"sent"`        // events taken from the story
	Attempts    int64 `json:"attempts"`    // requests made, repeats included
	Accepted    int64 `json:"accepted"`    // events of which at least one attempt was answered 2xx
	Duplicates  int64 `json:"duplicates"`  // 2xx answers that said "duplicate": true
	Errors      int64 `json:"errors"`      // attempts that were not answered 2xx in time
	Failed      int64 `json:"failed"`      // events given up after the last attempt
	Dropped     int64 `json:"dropped"`     // events never sent, by the fault drop
	Undelivered int64 `json:"undelivered"` // events given up because the endpoint is disabled
	Repeated    int64 `json:"repeated"`    // events sent twice, by the fault duplicate
	Reordered   int64 `json:"reordered"`   // events held back behind following ones, by the fault reorder
	Delayed     int64 `json:"delayed"`     // events sent later, by the fault delay
}

// Pending is how many events are neither accepted nor given up.
func (c Count) Pending() int64 { return c.Sent - c.Accepted - c.Failed - c.Dropped - c.Undelivered }

// Outcome is what became of an event.
type Outcome uint8

// The outcomes of an event.
const (
	Pending Outcome = iota
	Accepted
	Failed
	Dropped
	Undelivered
)

func (o Outcome) String() string {
	return [...]string{"pending", "accepted", "failed", "dropped", "undelivered"}[o]
}

// Entry is what the ledger knows of one event.
type Entry struct {
	Type     string
	Attempts int
	Status   int // of the last answer, 0 where there was none
	Outcome  Outcome
}

// Latency is the distribution of the time from a request (at a fixed rate: from when it was due) to its answer.
type Latency struct {
	Count int64         `json:"count"`
	Mean  time.Duration `json:"mean"`
	P50   time.Duration `json:"p50"`
	P90   time.Duration `json:"p90"`
	P99   time.Duration `json:"p99"`
	P999  time.Duration `json:"p999"`
	Max   time.Duration `json:"max"`
}

// Ledger counts while events are delivered. It is safe for concurrent use and takes about a hundred bytes an event.
type Ledger struct {
	mu      sync.Mutex
	index   map[string]int32
	ids     []string
	entries []entry
	names   []string
	types   map[string]int
	counts  []Count // by type
	total   Count
	latency *hdrhistogram.Histogram // µs
}

type entry struct {
	typ      uint16
	attempts uint16
	status   int16
	outcome  Outcome
}

func newLedger() *Ledger {
	return &Ledger{
		index: map[string]int32{}, types: map[string]int{},
		latency: hdrhistogram.New(1, time.Minute.Microseconds(), 3),
	}
}

// sent opens the entry of an event; an event that comes again goes on with its entry.
func (l *Ledger) sent(id, typ string) int32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i, ok := l.index[id]; ok {
		return i
	}
	t, ok := l.types[typ]
	if !ok {
		t = len(l.names)
		l.types[typ] = t
		l.names = append(l.names, typ)
		l.counts = append(l.counts, Count{})
	}
	i := int32(len(l.entries))
	l.index[id] = i
	l.ids = append(l.ids, id)
	l.entries = append(l.entries, entry{typ: uint16(t)})
	l.add(i, func(c *Count) { c.Sent++ })
	return i
}

func (l *Ledger) add(i int32, change func(*Count)) {
	change(&l.total)
	change(&l.counts[l.entries[i].typ])
}

func (l *Ledger) note(i int32, change func(*Count)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(i, change)
}

// answered books one attempt. status is 0 where no answer came.
func (l *Ledger) answered(i int32, status int, duplicate bool, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := &l.entries[i]
	e.attempts++
	e.status = int16(status)
	ok := status >= 200 && status < 300
	first := ok && e.outcome != Accepted
	if first {
		l.settle(i, Accepted)
	}
	l.add(i, func(c *Count) {
		c.Attempts++
		if !ok {
			c.Errors++
		} else if duplicate {
			c.Duplicates++
		}
	})
	if status != 0 {
		_ = l.latency.RecordValue(min(max(took.Microseconds(), 1), l.latency.HighestTrackableValue()))
	}
}

// giveUp settles an event that was not accepted.
func (l *Ledger) giveUp(i int32, outcome Outcome) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.entries[i].outcome != Accepted {
		l.settle(i, outcome)
	}
}

// settle moves the event from one outcome to another: one that failed may be accepted when it is sent again.
func (l *Ledger) settle(i int32, outcome Outcome) {
	e := &l.entries[i]
	step := func(o Outcome, by int64) {
		l.add(i, func(c *Count) {
			switch o {
			case Accepted:
				c.Accepted += by
			case Failed:
				c.Failed += by
			case Dropped:
				c.Dropped += by
			case Undelivered:
				c.Undelivered += by
			case Pending:
			}
		})
	}
	step(e.outcome, -1)
	step(outcome, 1)
	e.outcome = outcome
}

// Totals sums over all types.
func (l *Ledger) Totals() Count {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

// Types returns the sums of each type of which an event was sent.
func (l *Ledger) Types() map[string]Count {
	l.mu.Lock()
	defer l.mu.Unlock()
	types := make(map[string]Count, len(l.names))
	for i, name := range l.names {
		types[name] = l.counts[i]
	}
	return types
}

// Latency returns the distribution of all answers so far.
func (l *Ledger) Latency() Latency {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := func(q float64) time.Duration { return time.Duration(l.latency.ValueAtQuantile(q)) * time.Microsecond }
	return Latency{
		Count: l.latency.TotalCount(), Mean: time.Duration(l.latency.Mean() * float64(time.Microsecond)),
		P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), Max: time.Duration(l.latency.Max()) * time.Microsecond,
	}
}

// Lookup returns what became of one event, false for one that was never sent.
func (l *Ledger) Lookup(id string) (Entry, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i, ok := l.index[id]
	if !ok {
		return Entry{}, false
	}
	return l.entry(int(i)), true
}

func (l *Ledger) entry(i int) Entry {
	e := l.entries[i]
	return Entry{Type: l.names[e.typ], Attempts: int(e.attempts), Status: int(e.status), Outcome: e.outcome}
}

// All ranges over the events in the order in which they were first taken, each as it is at that moment.
func (l *Ledger) All() iter.Seq2[string, Entry] {
	return func(yield func(string, Entry) bool) {
		for i := 0; ; i++ {
			l.mu.Lock()
			if i >= len(l.entries) {
				l.mu.Unlock()
				return
			}
			id, e := l.ids[i], l.entry(i)
			l.mu.Unlock()
			if !yield(id, e) {
				return
			}
		}
	}
}

// AcceptedIDs ranges over the ids that were answered 2xx: each must be found later.
func (l *Ledger) AcceptedIDs() iter.Seq[string] {
	return func(yield func(string) bool) {
		for id, e := range l.All() {
			if e.Outcome == Accepted && !yield(id) {
				return
			}
		}
	}
}
