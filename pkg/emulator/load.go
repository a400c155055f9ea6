package emulator

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/pkg/fixture"
)

// LoadConfig describes a load on one endpoint.
type LoadConfig struct {
	URL         string
	Secret      string
	Connections int // kept open, one request at a time on each; default 16
	// Rate is the events a second that become due, whatever the answers do; latencies then count from when an event
	// was due. 0 is a closed loop: each connection sends as soon as it was answered.
	Rate float64
	// Presign takes and signs the whole sequence before the first request, so that the sender costs as
	// little as it can while it is measured. Its bodies are then in memory at once.
	Presign bool
	Timeout time.Duration // of an attempt, default 15 s
	// Pause is between two attempts of one event, which go on after refused connections, 429 and 5xx; default 20 ms.
	Pause time.Duration
	// GiveUp is how long one event is tried, default 1 min. Other answers than these are final at once.
	GiveUp time.Duration
}

// Load sends events as fast as it can over raw connections. Unlike [Sender] it has no faults and no schedule.
type Load struct {
	cfg    LoadConfig
	url    *url.URL
	head   string // of every request
	signer *fixture.Signer
	ledger *Ledger
}

// LoadReport is the result of a load. The ledger tells of each id whether it was answered 2xx.
type LoadReport struct {
	Count
	Elapsed   time.Duration `json:"elapsed"`
	PerSecond float64       `json:"per_second"` // accepted events
	Latency   Latency       `json:"latency"`
	Ledger    *Ledger       `json:"-"`
}

// NewLoad checks the configuration and reports everything that is wrong with it.
func NewLoad(cfg LoadConfig) (*Load, error) {
	u, urlErr := parseURL(cfg.URL)
	signer, secretErr := fixture.NewSigner(cfg.Secret)
	if err := errors.Join(urlErr, secretErr); err != nil {
		return nil, fmt.Errorf("configure load: %w", err)
	}
	if cfg.Connections <= 0 {
		cfg.Connections = 16
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 15 * time.Second
	}
	if cfg.Pause <= 0 {
		cfg.Pause = 20 * time.Millisecond
	}
	if cfg.GiveUp <= 0 {
		cfg.GiveUp = time.Minute
	}
	return &Load{
		cfg: cfg, url: u, signer: signer, ledger: newLedger(),
		head: "POST " + u.RequestURI() + " HTTP/1.1\r\nHost: " + u.Host + "\r\nUser-Agent: " + userAgent + "\r\nContent-Type: application/json\r\n",
	}, nil
}

// Ledger counts over all calls of Run. It can be read at any time.
func (l *Load) Ledger() *Ledger { return l.ledger }

// Copies repeats events in a circle until there are n, each with a fresh id; below 0 without end. The bodies
// are shared, so that a million of them cost little memory.
func Copies(n int, events []Event) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		for i := 0; len(events) > 0 && i != n; i++ {
			e := events[i%len(events)]
			e.ID = fixture.NewID()
			if !yield(e) {
				return
			}
		}
	}
}

// resign is how old a signature may get: well below the tolerance of five minutes.
const resign = 4 * time.Minute

type request struct {
	Event
	entry  int32
	head   []byte
	signed time.Time
	due    time.Time // zero in a closed loop
}

func (l *Load) sign(r *request) error {
	r.signed = time.Now()
	header, err := l.signer.Sign(r.ID, r.signed, r.Body)
	if err != nil {
		return err
	}
	r.head = make([]byte, 0, len(l.head)+200)
	r.head = append(r.head, l.head...)
	for _, name := range []string{"Svix-Id", "Svix-Timestamp", "Svix-Signature"} {
		r.head = append(append(append(append(r.head, name...), ": "...), header.Get(name)...), "\r\n"...)
	}
	r.head = strconv.AppendInt(append(r.head, "Content-Length: "...), int64(len(r.Body)), 10)
	r.head = append(r.head, "\r\n\r\n"...)
	return nil
}

// Run sends the events until the sequence has ended and all are answered or given up, or the context ends, which is no
// error: what was under way is then pending in the ledger, and may have been stored or not. The report sums up over
// all calls. A sequence that blocks must end with the context.
func (l *Load) Run(ctx context.Context, events iter.Seq[Event]) (LoadReport, error) {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	source := l.requests(events)
	if l.cfg.Presign {
		var all []*request
		for r, err := range source {
			if err != nil {
				return LoadReport{}, fmt.Errorf("load: %w", err)
			}
			if all = append(all, r); ctx.Err() != nil {
				break
			}
		}
		source = func(yield func(*request, error) bool) {
			for r := range slices.Values(all) {
				if !yield(r, nil) {
					return
				}
			}
		}
	}
	before := l.ledger.Totals()
	begin := time.Now()
	requests := make(chan *request, 4*l.cfg.Connections)
	var group sync.WaitGroup
	group.Go(func() {
		defer close(requests)
		n := 0
		for r, err := range source {
			if err != nil {
				cancel(err)
				return
			}
			if l.cfg.Rate > 0 {
				r.due = begin.Add(time.Duration(float64(n) / l.cfg.Rate * float64(time.Second)))
			}
			n++
			r.entry = l.ledger.sent(r.ID, r.Type)
			select {
			case requests <- r:
			case <-inner.Done():
				return
			}
		}
	})
	for range l.cfg.Connections {
		group.Go(func() {
			line := &line{Load: l}
			defer line.close()
			for r := range requests {
				line.send(inner, r)
			}
		})
	}
	group.Wait()
	elapsed := time.Since(begin)
	report := LoadReport{Count: l.ledger.Totals(), Elapsed: elapsed, Latency: l.ledger.Latency(), Ledger: l.ledger}
	report.PerSecond = float64(report.Accepted-before.Accepted) / elapsed.Seconds()
	if cause := context.Cause(inner); cause != nil && ctx.Err() == nil {
		return report, fmt.Errorf("load: %w", cause)
	}
	return report, nil
}

func (l *Load) requests(events iter.Seq[Event]) iter.Seq2[*request, error] {
	return func(yield func(*request, error) bool) {
		for e := range events {
			r := &request{Event: e}
			if err := l.sign(r); !yield(r, err) || err != nil {
				return
			}
		}
	}
}

// line is one kept connection. It is used by one goroutine.
type line struct {
	*Load
	conn   net.Conn
	reader *bufio.Reader
	writer *bufio.Writer
	hangUp func() bool // stops waiting for the context's end
}

func (n *line) close() {
	if n.conn != nil {
		n.hangUp()
		_ = n.conn.Close()
		n.conn = nil
	}
}

// send sends one event until it is answered for good, given up, or the context ends.
func (n *line) send(ctx context.Context, r *request) {
	begin := time.Now()
	if !r.due.IsZero() {
		sleep(ctx, time.Until(r.due))
		begin = r.due
	}
	for tries := 0; ctx.Err() == nil; tries++ {
		at := time.Now()
		if tries == 0 && !r.due.IsZero() {
			at = r.due
		}
		status, duplicate, err := n.attempt(ctx, r)
		if ctx.Err() != nil && err != nil {
			return // pending: we hung up
		}
		n.ledger.answered(r.entry, status, duplicate, time.Since(at))
		switch {
		case status >= 200 && status < 300:
			return
		case err == nil && status != http.StatusTooManyRequests && status < 500, time.Since(begin) > n.cfg.GiveUp:
			n.ledger.giveUp(r.entry, Failed)
			return
		}
		sleep(ctx, n.cfg.Pause)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func (n *line) dial(ctx context.Context) error {
	dialCtx, cancel := context.WithTimeout(ctx, n.cfg.Timeout)
	defer cancel()
	address := n.url.Host
	if n.url.Port() == "" {
		address = net.JoinHostPort(n.url.Hostname(), n.url.Scheme) // "http" and "https" are names of ports
	}
	var conn net.Conn
	var err error
	if n.url.Scheme == "https" {
		conn, err = (&tls.Dialer{}).DialContext(dialCtx, "tcp", address)
	} else {
		conn, err = (&net.Dialer{}).DialContext(dialCtx, "tcp", address)
	}
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	n.conn, n.reader, n.writer = conn, bufio.NewReaderSize(conn, 4096), bufio.NewWriterSize(conn, 16<<10)
	n.hangUp = context.AfterFunc(ctx, func() { _ = conn.Close() })
	return nil
}

// attempt makes one request. A status of 0 means that no answer came; err then says why.
func (n *line) attempt(ctx context.Context, r *request) (status int, duplicate bool, err error) {
	if n.conn == nil {
		if err := n.dial(ctx); err != nil {
			return 0, false, err
		}
	}
	if time.Since(r.signed) > resign {
		if err := n.sign(r); err != nil {
			return 0, false, err
		}
	}
	keep := false
	defer func() {
		if !keep {
			n.close()
		}
	}()
	if err := n.conn.SetDeadline(time.Now().Add(n.cfg.Timeout)); err != nil {
		return 0, false, fmt.Errorf("set deadline: %w", err)
	}
	_, _ = n.writer.Write(r.head) // an error stays until Flush
	_, _ = n.writer.Write(r.Body)
	if err := n.writer.Flush(); err != nil {
		return 0, false, fmt.Errorf("write: %w", err)
	}
	resp, err := http.ReadResponse(n.reader, nil)
	if err != nil {
		return 0, false, fmt.Errorf("read: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, answerLimit))
	if err != nil {
		return 0, false, fmt.Errorf("read: %w", err)
	}
	keep = !resp.Close && len(body) < answerLimit
	return resp.StatusCode, gjson.GetBytes(body, "duplicate").Bool(), nil
}
