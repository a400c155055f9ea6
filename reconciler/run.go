package reconciler

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"
	"go.uber.org/zap"
	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/stream"
)

// Kind is what a run does.
type Kind string

// The kinds of runs.
const (
	Full         Kind = "full"        // every object and every row
	Incremental  Kind = "incremental" // what changed since the last run
	Backfill     Kind = "backfill"    // Full, for a mirror that is empty or nearly: nothing may happen because of it
	verification Kind = "verify"
)

// SweepConfig says how a sweep works. Zero is the default.
type SweepConfig struct {
	Source     string
	InstanceID string // of the source, for the envelopes; may be empty

	ExtraShare float64 // of a table's rows that may be deleted unasked (0.05)
	ExtraMax   int     // rows of a table that may be deleted unasked (100)
	ExtraMin   int     // rows that may be deleted whatever their share, up to half of the table (3), or a table of ten could never lose one

	Pause      time.Duration // before what differs is looked at again (2 s)
	Rechecks   int           // how often a verification looks (3)
	Checkpoint time.Duration // between two checkpoints (2 s)
	LeaseTTL   time.Duration // after which a dead sweep's lease is free (8 s)

	// MaxPending is how many events the mirror may have before it; above that a sweep publishes no more until the worker has
	// come down to half of it (50,000).
	MaxPending int
}

// publisher stores events durably.
type publisher interface {
	Publish(ctx context.Context, e *event.Event) (stream.Ack, error)
}

// SweepDeps are what sweeps work with. Publisher may be nil where only [Sweeper.Verify] is called.
type SweepDeps struct {
	API       API
	DB        *gorm.DB
	JS        jetstream.JetStream
	Publisher publisher
	Log       *zap.Logger
	Metrics   *Metrics // nil for none
}

// Sweeper compares one source with the mirror. It may be used by several goroutines; one sweep runs at a time, in all processes.
type Sweeper struct {
	cfg       SweepConfig
	api       API
	books     books
	db        *gorm.DB
	js        jetstream.JetStream
	publisher publisher
	log       *zap.Logger
	metrics   *Metrics
}

// NewSweeper neither dials nor reads.
func NewSweeper(cfg SweepConfig, deps SweepDeps) *Sweeper {
	if deps.Metrics == nil {
		deps.Metrics = NewMetrics(nil)
	}
	return &Sweeper{
		cfg: cfg.withDefaults(), api: deps.API, books: books{deps.DB, cfg.Source}, db: deps.DB, js: deps.JS,
		publisher: deps.Publisher, log: deps.Log, metrics: deps.Metrics,
	}
}

// Options are what a caller wants of one run.
type Options struct {
	Kind      Kind     // default Full
	Resources []string // tables; default all of [clerk.Resources]
	DryRun    bool     // look and write it down, but publish nothing
	Force     bool     // delete whatever Clerk says is gone, however much
	// Wait is how long to wait for another process's sweep to end.
	Wait     time.Duration
	Progress func(Progress) // called now and then, by one goroutine, also while the run waits for the worker

	origin event.Origin
	// service is set by the service: where its run is cut off, whoever has the lease next goes on with it by himself. A run of a
	// person that was interrupted is over until somebody says it again.
	service bool
}

// Progress is how far a run is with one table.
type Progress struct {
	Resource string
	Done     int64
	Total    int64 // as Clerk counts; 0 where it is not known
	Waiting  int64 // events that are not applied yet, while the run waits for the worker; else 0
}

// Report is what a run found and did.
type Report struct {
	Checked map[string]int64  `json:"checked"`
	Absent  []string          `json:"not_enabled,omitempty"` // tables whose feature the instance does without: not compared
	Failed  map[string]string `json:"failed,omitempty"`      // tables that could not be compared, and why
	// NotCompared are the mirrored tables that the run did not compare, and why.
	NotCompared map[string]string `json:"not_compared,omitempty"`

	Drift     Counts     `json:"drift"`
	Published int64      `json:"published"`
	HeldBack  HeldCounts `json:"held_back,omitzero"` // of Drift, what no event can end
	Stopped   string     `json:"stopped"`
	Items     []Item     `json:"items"` // the first 10,000
}

// HeldBack is why drift stays: the event would change nothing.
type HeldBack string

// What holds drift back. It ends with the object's next change at Clerk that is newer than the row; where the row belongs to another
// source, when an operator gives it to this one.
const (
	HeldByDelete  HeldBack = "by a newer delete here"
	HeldByVersion HeldBack = "by a newer version here"
	HeldBySource  HeldBack = "by another source's row"
)

// HeldCounts are numbers of objects by what holds them back.
type HeldCounts struct {
	ByDelete  int64 `json:"by_delete"`
	ByVersion int64 `json:"by_version"`
	BySource  int64 `json:"by_source"`
}

// Sum is all that is held back.
func (c HeldCounts) Sum() int64 { return c.ByDelete + c.ByVersion + c.BySource }

// Counts are numbers of objects by class of drift.
type Counts struct {
	Missing   int64 `json:"missing"`
	Stale     int64 `json:"stale"`
	Different int64 `json:"different"`
	Extra     int64 `json:"extra"`
}

func (c *Counts) add(d Drift) {
	switch d {
	case Missing:
		c.Missing++
	case Stale:
		c.Stale++
	case Different:
		c.Different++
	case Extra:
		c.Extra++
	}
}

// Sum is all drift.
func (c Counts) Sum() int64 { return c.Missing + c.Stale + c.Different + c.Extra }

// Item is one object that differs.
type Item struct {
	Resource  string   `json:"resource"`
	ID        string   `json:"id"`
	Drift     Drift    `json:"drift"`
	EventType string   `json:"event_type"`          // of the event that was missed
	EventID   string   `json:"event_id,omitempty"`  // of the one that was published in its place
	HeldBack  HeldBack `json:"held_back,omitempty"` // why none was
	Fields    []Field  `json:"fields,omitempty"`
}

// state is a run's checkpoint.
type state struct {
	Resources []string             `json:"resources"`
	Force     bool                 `json:"force,omitempty"`
	Origin    event.Origin         `json:"origin"`
	Tables    map[string]*progress `json:"tables"`
	Tries     int                  `json:"tries"` // resumptions since the last checkpoint that was further
}

// progress is how far a run is with one table, and what it noted for the next.
type progress struct {
	Done      bool     `json:"done,omitempty"`
	Cursor    string   `json:"cursor,omitempty"`
	Created   int64    `json:"created,omitempty"` // ms: the rows from here on are not compared yet
	Checked   int64    `json:"checked"`
	Matched   int64    `json:"matched"`
	Total     int64    `json:"total,omitempty"`
	Unmatched []string `json:"unmatched,omitempty"`
	Gone      []gone   `json:"gone,omitempty"`        // rows that are to be deleted once all tables are compared
	Unlisted  int64    `json:"unlisted,omitempty"`    // objects that live and are in no page
	Defeated  int64    `json:"defeated,omitempty"`    // objects that live behind a tombstone that is newer
	Absent    bool     `json:"not_enabled,omitempty"` // the instance does without the feature: nothing was compared
	Watermark int64    `json:"watermark,omitempty"`   // ms: the newest change before the run
	Count     int64    `json:"count"`                 // of Clerk's objects
	Rows      int64    `json:"rows"`                  // of the mirror's
	Apart     int64    `json:"apart,omitempty"`       // rows that an incremental run found too many, below 0 too few; nobody looked why yet
}

// gone is a row of whose object Clerk said at that time (ms) that there is none.
type gone struct {
	ID string `json:"id"`
	At int64  `json:"at"`
}

func (s *state) of(table string) *progress {
	if s.Tables[table] == nil {
		s.Tables[table] = &progress{}
	}
	return s.Tables[table]
}

// runRow is a row of reconcile_runs.
type runRow struct {
	ID         string `gorm:"primaryKey"`
	Source     string
	Kind       Kind
	DryRun     bool
	Status     string
	Stopped    string
	Error      string
	Holder     string
	LeaseRev   uint64
	StartedAt  time.Time
	UpdatedAt  time.Time `gorm:"autoUpdateTime:false"`
	FinishedAt *time.Time
	State      string
	Checked    string
	Missing    int64
	Stale      int64
	Different  int64
	Extra      int64
	Published  int64
}

// TableName implements gorm's Tabler.
func (runRow) TableName() string { return "reconcile_runs" }

type driftRow struct {
	RunID         string
	Resource      string
	ObjectID      string
	Drift         Drift
	Fields        string
	EventType     string
	EventID       string
	MirrorVersion int64
	ClerkVersion  int64
	FoundAt       time.Time
}

// TableName implements gorm's Tabler.
func (driftRow) TableName() string { return "drifts" }

// The states of a run.
const (
	running   = "running"
	succeeded = "succeeded"
	stopped   = "stopped"
	failed    = "failed"
)

// interrupted is why a run is stopped that a person began and ended. A command of the same kind goes on with it, the service does not.
const interrupted = "interrupted"

const (
	// resumable is how old a run may be that is taken up again.
	resumable = 24 * time.Hour
	// keepRuns is how long runs and their drifts are kept.
	keepRuns = 90 * 24 * time.Hour
	// maxTries is how often a run is taken up again without getting any further.
	maxTries = 3
	// maxDrifts bounds the rows of drifts that one run writes.
	maxDrifts = 10_000
)

// leaseKey is one for all sources: sweeps share the database and the machine.
const leaseKey = "sweep"

// Verify compares and changes nothing, not even its own books. The report's Stopped says why it could not judge.
func (s *Sweeper) Verify(ctx context.Context, opts Options) (*Report, error) {
	opts.Kind = verification
	st := &state{Resources: cmpResources(opts.Resources), Tables: map[string]*progress{}}
	report := newReport(st.Resources)
	w := &sweep{Sweeper: s, opts: opts, origin: event.OriginReconcile, report: report, state: st}
	return report, stoppedBy(report, w.run(ctx))
}

func newReport(compared []string) *Report {
	return &Report{Checked: map[string]int64{}, Items: []Item{}, NotCompared: notCompared(compared)}
}

// unlisted is why tables of the mirror cannot be compared.
var unlisted = map[string]string{
	"sessions":           "Clerk's API lists the sessions of one user only, and forgets old ones",
	"subscriptions":      "Clerk's API does not list them",
	"subscription_items": "Clerk's API does not list them",
	"payment_attempts":   "Clerk's API does not list them",
}

// notCompared are the tables of the mirror that are not among the compared ones.
func notCompared(compared []string) map[string]string {
	tables := map[string]string{}
	for _, t := range mirror.Tables() {
		if !slices.Contains(compared, t.Name) {
			tables[t.Name] = cmp.Or(unlisted[t.Name], "not asked for")
		}
	}
	return tables
}

func cmpResources(given []string) []string {
	if len(given) == 0 {
		return clerk.Resources()
	}
	return given
}

// stoppedBy moves a stop into the report.
func stoppedBy(report *Report, err error) error {
	var stop stopError
	if errors.As(err, &stop) {
		report.Stopped = string(stop)
		return nil
	}
	return err
}

// Reconcile runs a sweep under the lease, from where the last one of its kind was cut off. The error is errBusy's where
// another process sweeps. When ctx ends the run is over, until Reconcile is called for the same again. What it found and published until an error is in the report, which is nil only where it never began.
func (s *Sweeper) Reconcile(ctx context.Context, opts Options) (*Report, error) {
	opts.Kind = cmp.Or(opts.Kind, Full)
	holder := holderName()
	held, ctx, err := s.lease(ctx, holder, opts.Wait)
	if err != nil {
		return nil, err
	}
	defer held.release()
	return s.reconcile(ctx, opts, holder, held.fence)
}

func holderName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return host + "/" + strconv.Itoa(os.Getpid()) + "/" + ksuid.New().String()
}

func (s *Sweeper) lease(ctx context.Context, holder string, wait time.Duration) (*lease, context.Context, error) {
	deadline := time.Now().Add(wait)
	for {
		held, leased, err := acquire(ctx, s.js, leaseKey, holder, s.cfg.LeaseTTL)
		if !errors.Is(err, errBusy) || time.Now().After(deadline) {
			return held, leased, err
		}
		if err := sleep(ctx, 250*time.Millisecond); err != nil {
			return nil, nil, err
		}
	}
}

func (s *Sweeper) reconcile(ctx context.Context, opts Options, holder string, fence uint64) (*Report, error) {
	r, st, err := s.begin(ctx, opts, holder, fence)
	if err != nil {
		return nil, err
	}
	report := newReport(st.Resources)
	report.Drift = Counts{r.Missing, r.Stale, r.Different, r.Extra}
	report.Published = r.Published
	for table, p := range st.Tables {
		if p.Done {
			report.Checked[table] = p.Checked
		}
	}
	w := &sweep{Sweeper: s, opts: opts, origin: st.Origin, report: report, state: st}
	w.save = func(ctx context.Context) error {
		st.Tries = 0
		return s.write(ctx, r, st, report)
	}
	recorded := 0
	w.record = func(ctx context.Context, drifts []drift) error {
		if recorded >= maxDrifts || w.filling() {
			return nil
		}
		recorded += len(drifts)
		return s.recordDrifts(ctx, r.ID, w.table, drifts)
	}
	began := time.Now()
	if w.last, err = s.noted(ctx); err == nil {
		err = w.run(ctx)
	}
	if errors.Is(context.Cause(ctx), errLeaseLost) {
		return report, errLeaseLost // the row is another's
	}
	saving, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	now := time.Now().UTC()
	if ctx.Err() != nil && err != nil { // cut off; the service's stays running
		if !opts.service {
			r.FinishedAt, r.Status, r.Stopped = &now, stopped, interrupted
		}
		if err := s.write(saving, r, st, report); err != nil {
			s.log.Warn("checkpoint not saved", zap.Error(err))
		}
		return report, fmt.Errorf("run %s: %w", r.ID, context.Cause(ctx))
	}
	err = stoppedBy(report, err)
	r.FinishedAt, r.Stopped, r.Status = &now, report.Stopped, succeeded
	switch {
	case err != nil:
		r.Status, r.Error = failed, err.Error()
	case report.Stopped != "":
		r.Status = stopped
	}
	if werr := s.write(saving, r, st, report); werr != nil {
		return report, errors.Join(err, werr)
	}
	fields := []zap.Field{
		zap.String("run", r.ID), zap.String("kind", string(r.Kind)), zap.Int64("missing", report.Drift.Missing), zap.Int64("stale", report.Drift.Stale),
		zap.Int64("different", report.Drift.Different), zap.Int64("extra", report.Drift.Extra), zap.Int64("published", report.Published), zap.Duration("duration", time.Since(began)),
	}
	switch r.Status {
	case succeeded:
		s.forget(ctx)
		if !opts.DryRun {
			s.metrics.success.SetToCurrentTime()
		}
		s.log.Info("sweep done", fields...)
	case stopped:
		s.log.Error("sweep stopped, nothing was deleted", append(fields, zap.String("reason", report.Stopped))...)
	default:
		s.log.Error("sweep failed", append(fields, zap.Error(err))...)
	}
	return report, err
}

// forget removes the books of long ago, but for those that say that the mirror is not new.
func (s *Sweeper) forget(ctx context.Context) {
	last, err := s.lastWholeSuccess(ctx)
	if err == nil {
		err = s.db.WithContext(ctx).Where("source = ? AND started_at < ? AND id <> ?", s.cfg.Source, time.Now().UTC().Add(-keepRuns), last.ID).Delete(&runRow{}).Error
	}
	if err != nil {
		s.log.Warn("old runs not removed", zap.Error(err))
	}
}

// begin takes up a run that was cut off, interrupted or failed, or starts a new one.
func (s *Sweeper) begin(ctx context.Context, opts Options, holder string, fence uint64) (*runRow, *state, error) {
	now := time.Now().UTC()
	fresh := &state{Resources: cmpResources(opts.Resources), Force: opts.Force, Tables: map[string]*progress{}, Origin: opts.origin}
	if fresh.Origin == "" {
		fresh.Origin = event.OriginReconcile
		if opts.Kind == Backfill {
			fresh.Origin = event.OriginBackfill
		}
	}
	var before []runRow
	err := s.db.WithContext(ctx).Where("source = ? AND kind = ? AND dry_run = ?", s.cfg.Source, opts.Kind, opts.DryRun).Order("started_at DESC").Limit(1).Find(&before).Error
	if err != nil {
		return nil, nil, fmt.Errorf("read runs: %w", err)
	}
	if len(before) == 1 {
		r, st := &before[0], &state{}
		open := r.Status == running || r.Status == failed || !opts.service && r.Status == stopped && r.Stopped == interrupted
		if open && now.Sub(r.StartedAt) < resumable && json.Unmarshal([]byte(r.State), st) == nil && st.Tables != nil && st.Tries < maxTries &&
			slices.Equal(st.Resources, fresh.Resources) && st.Force == fresh.Force && st.Origin == fresh.Origin {
			if err := s.takeOver(ctx, r, st, holder, fence); err != nil {
				return nil, nil, err
			}
			s.log.Info("sweep resumed", zap.String("run", r.ID), zap.String("kind", string(r.Kind)))
			return r, st, nil
		}
	}
	err = s.db.WithContext(ctx).Table("reconcile_runs").Where("source = ? AND status = ?", s.cfg.Source, running).
		Updates(map[string]any{"status": failed, "error": "cut off, and not taken up again", "finished_at": now, "lease_rev": fence}).Error
	if err != nil {
		return nil, nil, fmt.Errorf("close cut off runs: %w", err)
	}
	body, err := json.Marshal(fresh)
	if err != nil {
		return nil, nil, fmt.Errorf("start run: %w", err)
	}
	r := &runRow{
		ID: "run_" + ksuid.New().String(), Source: s.cfg.Source, Kind: opts.Kind, DryRun: opts.DryRun, Status: running, Holder: holder, LeaseRev: fence,
		StartedAt: now, UpdatedAt: now, State: string(body), Checked: "{}",
	}
	if err := s.db.WithContext(ctx).Create(r).Error; err != nil {
		return nil, nil, fmt.Errorf("start run: %w", err)
	}
	return r, fresh, nil
}

func (s *Sweeper) takeOver(ctx context.Context, r *runRow, st *state, holder string, fence uint64) error {
	st.Tries++
	body, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("resume run %s: %w", r.ID, err)
	}
	result := s.db.WithContext(ctx).Table("reconcile_runs").Where("id = ? AND lease_rev = ?", r.ID, r.LeaseRev).
		Updates(map[string]any{"status": running, "stopped": "", "error": "", "finished_at": nil, "holder": holder, "lease_rev": fence, "updated_at": time.Now().UTC(), "state": string(body)})
	if result.Error != nil {
		return fmt.Errorf("resume run %s: %w", r.ID, result.Error)
	}
	if result.RowsAffected == 0 {
		return errLeaseLost
	}
	r.Status, r.Stopped, r.Error, r.FinishedAt, r.Holder, r.LeaseRev = running, "", "", nil, holder, fence
	return nil
}

// write saves a run as it is now, unless another holder has taken it.
func (s *Sweeper) write(ctx context.Context, r *runRow, st *state, report *Report) error {
	body, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("write run %s: %w", r.ID, err)
	}
	checked, err := json.Marshal(report.Checked)
	if err != nil {
		return fmt.Errorf("write run %s: %w", r.ID, err)
	}
	result := s.db.WithContext(ctx).Table("reconcile_runs").Where("id = ? AND lease_rev = ?", r.ID, r.LeaseRev).Updates(map[string]any{
		"status": r.Status, "stopped": r.Stopped, "error": r.Error, "updated_at": time.Now().UTC(), "finished_at": r.FinishedAt, "state": string(body), "checked": string(checked),
		"missing": report.Drift.Missing, "stale": report.Drift.Stale, "different": report.Drift.Different, "extra": report.Drift.Extra, "published": report.Published,
	})
	if result.Error != nil {
		return fmt.Errorf("write run %s: %w", r.ID, result.Error)
	}
	if result.RowsAffected == 0 {
		return errLeaseLost
	}
	return nil
}

func (s *Sweeper) recordDrifts(ctx context.Context, runID, table string, drifts []drift) error {
	rows := make([]driftRow, len(drifts))
	now := time.Now().UTC()
	for i, d := range drifts {
		names := []string{}
		for _, f := range d.fields {
			names = append(names, f.Field)
		}
		fields, err := json.Marshal(names)
		if err != nil {
			return fmt.Errorf("write drifts: %w", err)
		}
		rows[i] = driftRow{runID, table, d.id, d.drift, string(fields), string(d.event.Type), d.eventID, d.mirrorVersion, d.clerkVersion, now}
	}
	if err := s.db.WithContext(ctx).Clauses(clause.OnConflict{DoNothing: true}).CreateInBatches(rows, 200).Error; err != nil {
		return fmt.Errorf("write drifts: %w", err)
	}
	return nil
}

// noted is what the newest successful run knew of each table.
func (s *Sweeper) noted(ctx context.Context) (map[string]*progress, error) {
	var runs []runRow
	err := s.db.WithContext(ctx).Where("source = ? AND status = ? AND dry_run = ?", s.cfg.Source, succeeded, false).Order("started_at DESC").Limit(20).Find(&runs).Error
	if err != nil {
		return nil, fmt.Errorf("read runs: %w", err)
	}
	noted := map[string]*progress{}
	for _, r := range runs {
		var st state
		if json.Unmarshal([]byte(r.State), &st) != nil {
			continue
		}
		for table, p := range st.Tables {
			if noted[table] == nil && p.Done {
				noted[table] = p
			}
		}
	}
	for _, table := range clerk.Resources() {
		if noted[table] == nil {
			noted[table] = &progress{}
		}
	}
	return noted, nil
}
