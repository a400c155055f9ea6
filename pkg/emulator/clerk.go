// Package emulator is an offline Clerk and Svix for tests, demonstrations and development.
//
// [Clerk] tells seeded stories of people and organizations: the same [Config] gives the same events
// to the byte, each with the full object as it then is, and at any time Clerk's own state can be
// compared with a mirror of it. [Sender] delivers the events as Svix does: signed, retried on its
// schedule (in time that can be compressed), with faults by name and a [Ledger] of what was sent and
// answered. [Load] sends as fast as it can, for benchmarks and kill tests.
//
// Where Clerk's behaviour is not known, the emulator rather announces too much: every change of an object has
// an event of its own, also what follows from a deletion, so its state never differs from what was announced.
// The package writes no database and never calls Clerk or Svix.
package emulator

import (
	"bytes"
	"container/heap"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"iter"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/usherhq/usher/pkg/event"
)

// DefaultInstanceID is the instance of the canonical payloads.
const DefaultInstanceID = "ins_34BmB94uIlt047ABzRee2dqZJKY"

// DefaultStart is when stories begin unless told otherwise.
var DefaultStart = time.Date(2026, 1, 15, 10, 0, 0, 0, time.UTC)

// Config shapes an emulated Clerk instance. The zero value is a good one.
type Config struct {
	Seed       uint64
	InstanceID string    // default DefaultInstanceID
	Start      time.Time // when the story begins, by the emulated clock; default DefaultStart
	// Arrival is the mean time between two sign-ups, by the emulated clock; default 40 s.
	Arrival time.Duration
	// Forget keeps no state, for load tests of millions of events: only unfinished lives take memory.
	Forget bool
	// NULs puts the character U+0000 into the metadata of some users, which PostgreSQL's jsonb refuses.
	NULs bool
}

// Event is one webhook message before its delivery.
type Event struct {
	ID       string // svix-id
	Type     string
	ObjectID string
	UserID   string // the person whose life it belongs to, empty for roles and permissions
	At       time.Time
	Body     []byte // the envelope, compact; read-only
}

// Clerk is an emulated instance. All methods are safe for concurrent use; the order of events is that
// of the calls that took them.
type Clerk struct {
	cfg Config

	mu     sync.Mutex
	rng    *rand.Rand
	now    int64 // the emulated clock, in ms
	steps  steps
	seq    uint64
	queue  []Event // of the step that ran last, not yet taken
	state  map[string]*table
	people map[string]*life // those who have an account, by user id; empty where state is forgotten
	buffer bytes.Buffer

	arriving int // sign-ups that are still to come
	lives    int // begun so far
	recent   []*life
	orgs     int
	opened   bool

	triggered int64 // ms, when the last event was triggered
	persons   int   // who were triggered, from a random number on
}

// New returns an instance in which nothing has happened yet.
func New(cfg Config) *Clerk {
	if cfg.InstanceID == "" {
		cfg.InstanceID = DefaultInstanceID
	}
	if cfg.Start.IsZero() {
		cfg.Start = DefaultStart
	}
	if cfg.Arrival <= 0 {
		cfg.Arrival = 40 * time.Second
	}
	return &Clerk{
		cfg: cfg, now: cfg.Start.UnixMilli(), state: map[string]*table{}, people: map[string]*life{},
		rng: rand.New(rand.NewPCG(cfg.Seed, 0x75736865)),
	}
}

// InstanceID is the id in every envelope.
func (c *Clerk) InstanceID() string { return c.cfg.InstanceID }

// Now is the emulated clock: the time of the newest event.
func (c *Clerk) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.UnixMilli(c.now).UTC()
}

// Story lets so many more people sign up and tells their lives to the end, interleaved in time. The
// first twenty people of an instance live so that every event type occurs. A range that is
// left early leaves the rest of the story to the next one (Story(0) is only that rest).
func (c *Clerk) Story(users int) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		c.invite(users)
		users = 0 // a second range over the same Seq goes on, it does not begin again
		for {
			e, ok := c.Next()
			if !ok || !yield(e) {
				return
			}
		}
	}
}

// Next returns the next event, false where the story has ended.
func (c *Clerk) Next() (Event, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) == 0 {
		if len(c.steps) == 0 {
			return Event{}, false
		}
		s := heap.Pop(&c.steps).(step)
		c.now = max(c.now, s.at)
		s.do()
	}
	e := c.queue[0]
	c.queue[0] = Event{}
	if c.queue = c.queue[1:]; len(c.queue) == 0 {
		c.queue = nil
	}
	return e, true
}

func (c *Clerk) invite(users int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.opened {
		c.opened = true
		c.openInstance()
	}
	if users <= 0 {
		return
	}
	if c.arriving == 0 {
		c.after(c.about(c.cfg.Arrival), c.arrive)
	}
	c.arriving += users
}

func (c *Clerk) arrive() {
	c.arriving--
	if c.arriving > 0 {
		c.after(c.about(c.cfg.Arrival), c.arrive)
	}
	c.begin(c.lives)
	c.lives++
}

// step is something that will happen at a time of the emulated clock.
type step struct {
	at  int64
	seq uint64
	do  func()
}

type steps []step

func (s steps) Len() int { return len(s) }
func (s steps) Less(i, j int) bool {
	return s[i].at < s[j].at || s[i].at == s[j].at && s[i].seq < s[j].seq
}
func (s steps) Swap(i, j int) { s[i], s[j] = s[j], s[i] }
func (s *steps) Push(x any)   { *s = append(*s, x.(step)) }
func (s *steps) Pop() any {
	last := len(*s) - 1
	x := (*s)[last]
	(*s)[last] = step{}
	*s = (*s)[:last]
	return x
}

func (c *Clerk) after(d time.Duration, do func()) {
	c.seq++
	heap.Push(&c.steps, step{at: c.now + d.Milliseconds(), seq: c.seq, do: do})
}

// about is a random time around d: half of it to one and a half.
func (c *Clerk) about(d time.Duration) time.Duration {
	return d/2 + time.Duration(c.rng.Int64N(int64(d)+1))
}

func (c *Clerk) chance(p float64) bool { return c.rng.Float64() < p }

// tick moves the clock by some ms and returns it: no two changes share one.
func (c *Clerk) tick() int64 {
	c.now += 1 + c.rng.Int64N(12)
	return c.now
}

// id makes an id as Clerk and Svix do, of now.
func (c *Clerk) id(prefix string) string {
	var random [16]byte
	for i := 0; i < len(random); i += 8 {
		v := c.rng.Uint64()
		for j := range 8 {
			random[i+j] = byte(v >> (8 * j))
		}
	}
	k, err := ksuid.FromParts(time.UnixMilli(c.now), random[:])
	if err != nil {
		panic(err) // the payload has the right length
	}
	return prefix + "_" + k.String()
}

// avatar is the address of the picture that Clerk draws for an object without one.
func (c *Clerk) avatar(id string) string {
	return "https://img.clerk.com/" + base64.RawURLEncoding.EncodeToString(
		fmt.Appendf(nil, `{"type":"default","iid":"%s","rid":"%s"}`, c.cfg.InstanceID, id))
}

// render writes an object as Clerk does, without escaping what HTML would need.
func (c *Clerk) render(object any) []byte {
	c.buffer.Reset()
	enc := json.NewEncoder(&c.buffer)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(object); err != nil {
		panic(fmt.Errorf("render %T: %w", object, err)) // the shapes are ours and tested
	}
	return bytes.Clone(bytes.TrimRight(c.buffer.Bytes(), "\n"))
}

// client is who made the request that changed something.
type client struct {
	ip, agent, browser, version, device string
	mobile                              bool
	city, country                       string
}

// emit announces that an object is now data. updated is its updated_at, 0 for a delete and for what has none.
func (c *Clerk) emit(typ, id string, l *life, updated int64, data []byte) {
	by, userID := backend, ""
	if l != nil {
		by = l.client
		if l.user != nil {
			userID = l.user.ID
		}
	}
	at := c.tick()
	body := make([]byte, 0, len(data)+len(by.agent)+len(by.ip)+len(typ)+180)
	body = append(body, `{"data":`...)
	body = append(body, data...)
	body = append(body, `,"event_attributes":{"http_request":{"client_ip":"`...)
	body = append(body, by.ip...)
	body = append(body, `","user_agent":"`...)
	body = append(body, by.agent...)
	body = append(body, `"}},"instance_id":"`...)
	body = append(body, c.cfg.InstanceID...)
	body = append(body, `","object":"event","timestamp":`...)
	body = strconv.AppendInt(body, at, 10)
	body = append(body, `,"type":"`...)
	body = append(body, typ...)
	body = append(body, `"}`...)

	t := event.Type(typ)
	deletedAt := int64(0)
	if t.Deleted() {
		deletedAt = at
	}
	if l != nil && !c.cfg.Forget {
		switch typ {
		case "user.created":
			c.people[id] = l
		case "user.deleted":
			delete(c.people, id)
		}
	}
	c.keep(tables[t.Resource()], id, updated, deletedAt, data)
	c.queue = append(c.queue, Event{
		ID: c.id("msg"), Type: typ, ObjectID: id, UserID: userID, At: time.UnixMilli(at).UTC(), Body: body,
	})
}

func (c *Clerk) emitDeleted(typ, object, id string, l *life, externalID *string, slug string) {
	c.emit(typ, id, l, 0, c.render(deleted{Deleted: true, ExternalID: externalID, ID: id, Object: object, Slug: slug}))
}
