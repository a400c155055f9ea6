package command

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/schollz/progressbar/v3"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/worker"
)

// The demo's faults, as shares of all events.
const (
	demoDuplicate = 0.05
	demoReorder   = 0.10
)

// demoPatience is how long the demo waits for the handlers without seeing any of them move.
const demoPatience = 30 * time.Second

// demoReport is the ledger of a demo: what was sent, and what became of it.
type demoReport struct {
	Seed            uint64                `json:"seed"`
	Sent            int64                 `json:"sent"`       // events
	Accepted        int64                 `json:"accepted"`   // events answered 2xx
	Duplicates      int64                 `json:"duplicates"` // 202 answers that said "duplicate": true
	Handlers        map[string]handlerSum `json:"handlers"`
	Types           map[string]typeSum    `json:"types"`
	Rows            map[string]int64      `json:"rows"`
	MirrorEqual     bool                  `json:"mirror_equal"`
	Differences     []string              `json:"differences"`
	EventsPerSecond float64               `json:"events_per_second"`
	Latency         latencySum            `json:"latency_ms"` // receipt to row
	Balanced        bool                  `json:"balanced"`
	Faults          faultStory            `json:"faults"`
}

type handlerSum struct {
	Applied      int64 `json:"applied"`
	DeadLettered int64 `json:"dead_lettered"`
}

type typeSum struct {
	Sent         int64 `json:"sent"`
	Accepted     int64 `json:"accepted"`
	Applied      int64 `json:"applied"`       // by the mirror
	DeadLettered int64 `json:"dead_lettered"` // by the mirror
}

type latencySum struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// demo tells a story with faults and prints the ledger. The error is errNo where the ledger does not balance.
func (c *cli) demo(ctx context.Context, i *allinone.Instance, settings *config.Settings, faults *demoFaults, o devOptions, clerk *emulator.Clerk, info io.Writer) error {
	report := demoReport{Seed: o.seed}
	sender, err := emulator.NewSender(emulator.SenderConfig{
		URL: i.State.IngestURL, Secret: settings.WebhookSigningSecret[0], Seed: report.Seed, Compress: 1000, Concurrency: 64,
		Faults: emulator.Faults{Duplicate: demoDuplicate, Reorder: demoReorder},
	})
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	_, _ = fmt.Fprintf(info, "A story of %d users (seed %d), %.0f%% of it delivered twice, %.0f%% out of order:\n\n", o.users, report.Seed, 100*demoDuplicate, 100*demoReorder)
	start := time.Now()
	progress := c.newProgress("delivered")
	delivered := make(chan error, 1)
	go func() { delivered <- sender.Deliver(ctx, clerk.Story(o.users)) }()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for waiting := true; waiting; {
		select {
		case err = <-delivered:
			waiting = false
		case <-ticker.C:
		}
		progress.set(sender.Ledger().Totals().Accepted, -1)
	}
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	progress.done()

	progress = c.newProgress("applied")
	if err := waitSettled(ctx, i.DB, start, sender.Ledger().Totals().Accepted, progress); err != nil {
		return err
	}
	progress.done()
	if report.Faults, err = faults.tell(ctx, i, start, info); err != nil {
		return err
	}
	if err := report.fill(ctx, i.DB, start, sender.Ledger(), clerk); err != nil {
		return err
	}
	if o.output == outputTable {
		report.print(c.env.Stdout)
	} else if err := printJSON(c.env.Stdout, report); err != nil {
		return err
	}
	if !report.Balanced || !report.MirrorEqual || report.Faults.Replayed != len(report.Faults.DeadLettered) {
		return errNo
	}
	return nil
}

// deliveriesSince are the rows of the demo's own events.
func deliveriesSince(db *gorm.DB, start time.Time) *gorm.DB {
	return db.Table("deliveries").Where("received_at >= ?", start.UTC())
}

// waitSettled waits until every handler has settled every event, or nothing moves any more.
func waitSettled(ctx context.Context, db *gorm.DB, start time.Time, accepted int64, progress *progress) error {
	var last int64
	moved := time.Now()
	want := accepted * int64(len(worker.Specs()))
	for {
		var settled int64
		err := deliveriesSince(db.WithContext(ctx), start).Where("status IN ('processed', 'dead', 'discarded')").Count(&settled).Error
		if err != nil {
			return fmt.Errorf("count deliveries: %w", err)
		}
		progress.set(settled, want)
		if settled != last {
			last, moved = settled, time.Now()
		}
		if settled >= want || time.Since(moved) > demoPatience {
			return nil // the ledger tells what is missing
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // interrupted
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (r *demoReport) fill(ctx context.Context, db *gorm.DB, start time.Time, ledger *emulator.Ledger, clerk *emulator.Clerk) error {
	db = db.WithContext(ctx)
	totals := ledger.Totals()
	r.Sent, r.Accepted, r.Duplicates = totals.Sent, totals.Accepted, totals.Duplicates
	r.Handlers, r.Types, r.Rows = map[string]handlerSum{}, map[string]typeSum{}, map[string]int64{}
	for _, h := range worker.Specs() {
		r.Handlers[h.Name] = handlerSum{}
	}
	for typ, n := range ledger.Types() {
		r.Types[typ] = typeSum{Sent: n.Sent, Accepted: n.Accepted}
	}
	var counts []struct {
		Handler, Type, Status string
		N                     int64
	}
	err := deliveriesSince(db, start).Select("handler, type, status, count(*) AS n").Group("handler, type, status").Find(&counts).Error
	if err != nil {
		return fmt.Errorf("sum up deliveries: %w", err)
	}
	for _, n := range counts {
		h, t := r.Handlers[n.Handler], r.Types[n.Type]
		switch n.Status {
		case "processed":
			h.Applied += n.N
			t.Applied += n.N
		case "dead", "discarded":
			h.DeadLettered += n.N
			t.DeadLettered += n.N
		}
		r.Handlers[n.Handler] = h
		if n.Handler == "mirror" {
			r.Types[n.Type] = t
		}
	}
	r.Balanced = true
	for _, h := range r.Handlers {
		r.Balanced = r.Balanced && h.Applied+h.DeadLettered == r.Accepted
	}
	for _, table := range mirror.Tables() {
		var n int64
		if err := db.Table(table.Name).Count(&n).Error; err != nil {
			return fmt.Errorf("count %s: %w", table.Name, err)
		}
		r.Rows[table.Name] = n
	}
	if r.Differences, err = allinone.Compare(ctx, db, clerk, 20); err != nil {
		return err
	}
	r.MirrorEqual = len(r.Differences) == 0
	return r.measure(db, start)
}

// measure takes latency and throughput from the delivery log of the mirror.
func (r *demoReport) measure(db *gorm.DB, start time.Time) error {
	var times []struct{ ReceivedAt, ProcessedAt time.Time }
	err := deliveriesSince(db, start).Where("handler = 'mirror' AND status = 'processed'").Select("received_at, processed_at").Find(&times).Error
	if err != nil {
		return fmt.Errorf("measure latency: %w", err)
	}
	if len(times) == 0 {
		return nil
	}
	latencies := make([]float64, len(times))
	first, last := times[0].ReceivedAt, times[0].ProcessedAt
	for i, t := range times {
		latencies[i] = float64(t.ProcessedAt.Sub(t.ReceivedAt).Microseconds()) / 1000
		if t.ReceivedAt.Before(first) {
			first = t.ReceivedAt
		}
		if t.ProcessedAt.After(last) {
			last = t.ProcessedAt
		}
	}
	slices.Sort(latencies)
	r.Latency = latencySum{P50: latencies[len(latencies)/2], P99: latencies[(len(latencies)*99)/100]}
	if took := last.Sub(first).Seconds(); took > 0 {
		r.EventsPerSecond = float64(int64(float64(len(times))/took*10)) / 10
	}
	return nil
}

func (r *demoReport) print(w io.Writer) {
	number := func(n int64) string { return strconv.FormatInt(n, 10) }
	t := newTable(w, "type", "sent", "accepted", "applied", "dead")
	types := make([]string, 0, len(r.Types))
	for typ := range r.Types {
		types = append(types, typ)
	}
	slices.Sort(types)
	for _, typ := range types {
		n := r.Types[typ]
		t.row(typ, number(n.Sent), number(n.Accepted), number(n.Applied), number(n.DeadLettered))
	}
	_ = t.Flush()
	_, _ = fmt.Fprintln(w)
	t = newTable(w, "table", "rows")
	for _, table := range mirror.Tables() {
		t.row(table.Name, number(r.Rows[table.Name]))
	}
	_ = t.Flush()
	_, _ = fmt.Fprintln(w)
	t = newTable(w)
	t.row("sent", number(r.Sent))
	t.row("accepted", number(r.Accepted))
	t.row("duplicates", number(r.Duplicates)+" recognised at the door")
	for name, h := range r.Handlers {
		t.row("handler "+name, fmt.Sprintf("%d applied, %d dead-lettered", h.Applied, h.DeadLettered))
	}
	t.row("throughput", fmt.Sprintf("%.0f events/s, receipt to row", r.EventsPerSecond))
	t.row("latency", fmt.Sprintf("p50 %.1f ms, p99 %.1f ms, receipt to row, under this load", r.Latency.P50, r.Latency.P99))
	_ = t.Flush()
	for _, d := range r.Differences {
		_, _ = fmt.Fprintln(w, "  "+d)
	}
	verdict := "The ledger balances: accepted = applied + dead-lettered, and the tables equal Clerk's own state."
	if !r.Balanced {
		verdict = "The ledger does NOT balance: accepted and applied + dead-lettered differ."
	} else if !r.MirrorEqual {
		verdict = "The tables do NOT equal Clerk's own state."
	}
	_, _ = fmt.Fprintf(w, "\n%s\n\n", verdict)
}

// progress is a bar on a terminal, and a line now and then elsewhere. Both go to stderr.
type progress struct {
	bar   *progressbar.ProgressBar
	w     io.Writer
	what  string
	last  time.Time
	value int64
}

func (c *cli) newProgress(what string) *progress {
	p := &progress{w: c.env.Stderr, what: what, last: time.Now()}
	if isTerminal(c.env.Stderr) {
		p.bar = progressbar.NewOptions64(-1, progressbar.OptionSetWriter(c.env.Stderr), progressbar.OptionSetDescription(what),
			progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("events"), progressbar.OptionThrottle(50*time.Millisecond))
	}
	return p
}

// set shows how far it is; total below 0 is not known.
func (p *progress) set(value, total int64) {
	p.value = value
	switch {
	case p.bar != nil:
		if total >= 0 && p.bar.GetMax64() != total {
			p.bar.ChangeMax64(total)
		}
		_ = p.bar.Set64(value)
	case time.Since(p.last) > 2*time.Second:
		p.last = time.Now()
		p.line()
	}
}

func (p *progress) done() {
	if p.bar != nil {
		_ = p.bar.Finish()
		_, _ = fmt.Fprintln(p.w)
		return
	}
	p.line()
}

func (p *progress) line() { _, _ = fmt.Fprintf(p.w, "%s: %d events\n", p.what, p.value) }
