package emulator

import (
	"bytes"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidwall/gjson"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/usherhq/usher/pkg/fixture"
)

// Schedule are Svix's waits before each attempt, each from the failure of the one before.
var Schedule = []time.Duration{0, 5 * time.Second, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour, 5 * time.Hour, 10 * time.Hour, 10 * time.Hour}

const (
	// disableAfter is how long an endpoint must only fail until Svix disables it.
	disableAfter = 5 * 24 * time.Hour
	// answerLimit is how much of an answer Svix keeps.
	answerLimit = 20_000
	// reorderBy is the most answers of following events that a reordered one waits for.
	reorderBy = 8
)

// SenderConfig describes an endpoint and how it is delivered to.
type SenderConfig struct {
	URL    string
	Secret string // whsec_…
	// Client makes the requests; redirects are never followed. Default: one that keeps a connection for
	// each of Concurrency.
	Client      *http.Client
	Concurrency int     // requests at a time, default 16
	Rate        float64 // new events a second, 0 is no limit
	// Compress divides Svix's times (schedule, five days, MaxDelay): at 1000 the five seconds are five
	// milliseconds. Default 1. The time-out of an attempt is never compressed.
	Compress   float64
	Timeout    time.Duration // of an attempt, default 15 s
	Faults     Faults
	Seed       uint64        // of the faults
	MaxDelay   time.Duration // of the fault delay, default 1 min
	MaxPending int           // events that wait for a retry before no new one is taken, default 50,000
	Logger     *zap.Logger   // default none; sees ids, types and statuses
}

// Sender delivers events to one endpoint as Svix does: at least once, in no order, each attempt with a
// timestamp and signature of its own and the id of the event.
type Sender struct {
	cfg      SenderConfig
	signer   *fixture.Signer
	ledger   *Ledger
	disabled atomic.Bool
	running  atomic.Bool
}

// NewSender checks the configuration and reports everything that is wrong with it.
func NewSender(cfg SenderConfig) (*Sender, error) {
	_, urlErr := parseURL(cfg.URL)
	signer, secretErr := fixture.NewSigner(cfg.Secret)
	var compressErr error
	if cfg.Compress < 0 {
		compressErr = fmt.Errorf("compress %v: below 0", cfg.Compress)
	}
	if err := errors.Join(urlErr, secretErr, compressErr, cfg.Faults.validate()); err != nil {
		return nil, fmt.Errorf("configure sender: %w", err)
	}
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = 16
	}
	if cfg.Compress == 0 {
		cfg.Compress = 1
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 15 * time.Second
	}
	if cfg.MaxDelay <= 0 {
		cfg.MaxDelay = time.Minute
	}
	if cfg.MaxPending <= 0 {
		cfg.MaxPending = 50_000
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	return &Sender{cfg: cfg, signer: signer, ledger: newLedger()}, nil
}

func parseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("endpoint: %w", err)
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("endpoint %q: want http://… or https://…", text)
	}
	return u, nil
}

// Ledger counts over all calls of Deliver. It can be read at any time.
func (s *Sender) Ledger() *Ledger { return s.ledger }

// Disabled tells whether the endpoint is disabled: nothing is delivered, and nothing tells its owner.
func (s *Sender) Disabled() bool { return s.disabled.Load() }

// Disable disables the endpoint, as its owner or Svix may do.
func (s *Sender) Disable() { s.disabled.Store(true) }

// Enable enables it again. What was given up meanwhile stays so until it is sent again.
func (s *Sender) Enable() { s.disabled.Store(false) }

// parcel is one copy of an event on its way.
type parcel struct {
	Event
	entry   int32
	attempt int // how many were made
	repeat  bool
	again   bool      // send a second copy once this one is accepted
	due     time.Time // of the next attempt
	seq     int       // among the events taken
	behind  int       // answers of following events to wait for
}

type parcels []*parcel

func (p parcels) Len() int           { return len(p) }
func (p parcels) Less(i, j int) bool { return p[i].due.Before(p[j].due) }
func (p parcels) Swap(i, j int)      { p[i], p[j] = p[j], p[i] }
func (p *parcels) Push(x any)        { *p = append(*p, x.(*parcel)) }
func (p *parcels) Pop() any {
	last := len(*p) - 1
	x := (*p)[last]
	(*p)[last] = nil
	*p = (*p)[:last]
	return x
}

type answer struct {
	*parcel
	ok bool
}

// Deliver delivers events until the sequence has ended and each event is settled: accepted, failed after its last
// attempt, dropped, or undelivered because the endpoint is disabled. It returns nil then, and the context's
// error where that ends first; what was under way is then pending in the ledger. A sequence that blocks must
// end with the context. Events with an id that was delivered before are sent again, as a manual resend.
// One call at a time.
func (s *Sender) Deliver(ctx context.Context, events iter.Seq[Event]) error {
	if !s.running.CompareAndSwap(false, true) {
		return errors.New("deliver: already delivering")
	}
	defer s.running.Store(false)

	client := s.client()
	if s.cfg.Client == nil {
		defer client.CloseIdleConnections()
	}
	d := &dispatch{
		Sender: s, taken: make(chan Event), jobs: make(chan *parcel), answers: make(chan answer, s.cfg.Concurrency),
		alarm: time.NewTimer(time.Hour),
	}
	defer d.alarm.Stop()

	// Everything below ends when this context does, also where the loop ends by itself.
	inner, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	group.Go(func() { d.feed(inner, events) })
	for range s.cfg.Concurrency {
		group.Go(func() {
			for p := range d.jobs {
				select {
				case d.answers <- answer{p, s.attempt(inner, client, p)}:
				case <-inner.Done(): // nobody listens any more
				}
			}
		})
	}
	err := d.loop(ctx)
	cancel()
	close(d.jobs)
	group.Wait()
	return err
}

// client is the configured client without redirects, which Svix takes for failures.
func (s *Sender) client() *http.Client {
	var client http.Client
	if s.cfg.Client != nil {
		client = *s.cfg.Client
	} else {
		client.Transport = &http.Transport{
			MaxIdleConns: s.cfg.Concurrency, MaxIdleConnsPerHost: s.cfg.Concurrency, IdleConnTimeout: time.Minute,
			DisableCompression: true,
		}
	}
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &client
}

// attempt makes one request and books it. It says whether the answer was a 2xx.
func (s *Sender) attempt(ctx context.Context, client *http.Client, p *parcel) bool {
	begin := time.Now()
	status, duplicate, err := s.post(ctx, client, p, begin)
	ok := err == nil && status >= 200 && status < 300
	if !ok && ctx.Err() != nil {
		return false // we hung up: nobody's failure
	}
	if err != nil {
		status = 0
	}
	s.ledger.answered(p.entry, status, duplicate && ok, time.Since(begin))
	if !ok {
		s.cfg.Logger.Debug("attempt failed", zap.String("event_id", p.ID), zap.String("event_type", p.Type),
			zap.Int("attempt", p.attempt+1), zap.Int("status", status), zap.Error(err))
	}
	return ok
}

func (s *Sender) post(ctx context.Context, client *http.Client, p *parcel, at time.Time) (status int, duplicate bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.cfg.URL, bytes.NewReader(p.Body))
	if err != nil {
		return 0, false, fmt.Errorf("make request: %w", err)
	}
	if req.Header, err = s.signer.Sign(p.ID, at, p.Body); err != nil {
		return 0, false, err
	}
	req.Header.Set("User-Agent", userAgent)
	resp, err := client.Do(req)
	if err != nil {
		return 0, false, fmt.Errorf("post: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, answerLimit))
	if err != nil {
		return 0, false, fmt.Errorf("read answer: %w", err)
	}
	return resp.StatusCode, gjson.GetBytes(body, "duplicate").Bool(), nil
}

const userAgent = "Svix-Webhooks/1.90.0 (sender-emulator)"

// dispatch is the state of one Deliver. All but feed runs in the goroutine of loop.
type dispatch struct {
	*Sender
	taken   chan Event
	jobs    chan *parcel
	answers chan answer
	alarm   *time.Timer

	ready    []*parcel
	held     []*parcel // reordered ones
	waiting  parcels   // by when they are due
	inFlight int
	seq      int
	failing  time.Time // since when the endpoint only fails
}

func (d *dispatch) feed(ctx context.Context, events iter.Seq[Event]) {
	defer close(d.taken)
	limit := rate.NewLimiter(rate.Inf, 0)
	if d.cfg.Rate > 0 {
		limit = rate.NewLimiter(rate.Limit(d.cfg.Rate), 1)
	}
	for e := range events {
		if limit.Wait(ctx) != nil {
			return
		}
		select {
		case d.taken <- e:
		case <-ctx.Done():
			return
		}
	}
}

func (d *dispatch) loop(ctx context.Context) error {
	taken := d.taken
	for {
		idle := len(d.ready) == 0 && d.inFlight == 0
		if taken == nil && idle {
			if len(d.waiting) == 0 && len(d.held) == 0 {
				return nil
			}
			d.release(func(*parcel) bool { return true }) // nothing follows any more
		}
		// A new event is taken only when a worker could have it, so that retries are not starved and memory stays flat.
		take := taken
		if len(d.ready)+d.inFlight >= d.cfg.Concurrency || len(d.waiting) >= d.cfg.MaxPending {
			take = nil
		}
		var jobs chan *parcel
		var next *parcel
		if len(d.ready) > 0 {
			if next = d.ready[0]; d.Disabled() {
				d.ready = d.ready[1:]
				d.ledger.giveUp(next.entry, Undelivered)
				continue
			}
			jobs = d.jobs
		}
		var alarm <-chan time.Time
		if len(d.waiting) > 0 {
			d.alarm.Reset(time.Until(d.waiting[0].due))
			alarm = d.alarm.C
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("deliver: %w", ctx.Err())
		case e, ok := <-take:
			if !ok {
				taken = nil
				continue
			}
			d.take(e)
		case jobs <- next:
			d.ready = d.ready[1:]
			d.inFlight++
		case a := <-d.answers:
			d.inFlight--
			d.answered(a)
		case <-alarm:
			for now := time.Now(); len(d.waiting) > 0 && !d.waiting[0].due.After(now); {
				d.ready = append(d.ready, heap.Pop(&d.waiting).(*parcel))
			}
		}
	}
}

func (d *dispatch) compress(t time.Duration) time.Duration {
	return time.Duration(float64(t) / d.cfg.Compress)
}

func (d *dispatch) wait(p *parcel, t time.Duration) {
	p.due = time.Now().Add(d.compress(t))
	heap.Push(&d.waiting, p)
}

// take lets the faults strike a new event.
func (d *dispatch) take(e Event) {
	f, seed := &d.cfg.Faults, d.cfg.Seed
	p := &parcel{Event: e, entry: d.ledger.sent(e.ID, e.Type), seq: d.seq}
	strikes := func(name string, rate float64) bool { return rate > 0 && lot(seed, p.seq, name) < rate }
	d.seq++
	if strikes("drop", f.Drop) {
		d.ledger.giveUp(p.entry, Dropped)
		return
	}
	reorder, delay := strikes("reorder", f.Reorder), strikes("delay", f.Delay)
	if strikes("duplicate", f.Duplicate) {
		d.ledger.note(p.entry, func(c *Count) { c.Repeated++ })
		if !reorder && !delay && lot(seed, p.seq, "at once") < .5 {
			d.ready = append(d.ready, p.copy())
		} else {
			p.again = true
		}
	}
	switch {
	case reorder:
		d.ledger.note(p.entry, func(c *Count) { c.Reordered++ })
		p.behind = 1 + int(lot(seed, p.seq, "behind")*reorderBy)
		d.held = append(d.held, p)
	case delay:
		d.ledger.note(p.entry, func(c *Count) { c.Delayed++ })
		d.wait(p, time.Duration(lot(seed, p.seq, "for")*float64(d.cfg.MaxDelay)))
	default:
		d.ready = append(d.ready, p)
	}
}

func (p *parcel) copy() *parcel {
	return &parcel{Event: p.Event, entry: p.entry, seq: p.seq, repeat: true}
}

func (d *dispatch) release(which func(*parcel) bool) {
	d.held = slices.DeleteFunc(d.held, func(p *parcel) bool {
		if which(p) {
			d.ready = append(d.ready, p)
			return true
		}
		return false
	})
}

func (d *dispatch) answered(a answer) {
	d.release(func(held *parcel) bool {
		if held.seq < a.seq {
			held.behind--
		}
		return held.behind <= 0
	})
	a.attempt++
	if a.ok {
		d.failing = time.Time{}
		if a.again {
			d.ready = append(d.ready, a.copy())
		}
		return
	}
	now := time.Now()
	if d.failing.IsZero() {
		d.failing = now
	}
	if f := d.cfg.Faults.Disable; f > 0 && now.Sub(d.failing) >= d.compress(disableAfter) && lot(d.cfg.Seed, a.seq, "disable") < f {
		if !d.disabled.Swap(true) {
			d.cfg.Logger.Warn("endpoint disabled", zap.Duration("duration", now.Sub(d.failing)))
		}
	}
	switch {
	case a.repeat: // the other copy is the one that must arrive
	case d.Disabled():
		d.ledger.giveUp(a.entry, Undelivered)
	case a.attempt < len(Schedule):
		d.wait(a.parcel, Schedule[a.attempt])
	default:
		d.ledger.giveUp(a.entry, Failed)
	}
}
