// Package reconciler compares Clerk's own API with the mirror and publishes an event for what was missed: a webhook that never
// came, a delete that nobody announced, a row that was changed by hand.
//
// It writes no row of the mirror: it publishes events, with the time of its read, and handlers change state by the version
// rule; so it may be behind, run twice or be killed, and no newer state is lost. Its own books are reconcile_runs and drifts. It
// refuses to take absence for deletion: a row goes only when Clerk says of that one object that there is none, when few go at once, and when
// Clerk's count agrees with its pages.
//
// [Sweeper] is one comparison, as the commands use it; [Reconciler] is the service that runs it on a schedule, in
// one process at a time.
package reconciler

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/outbox"
	"github.com/usherhq/usher/pkg/stream"
)

// Name is the service's name in logs, health checks and the broker's connection list.
const Name = "reconciler"

// Config is what the reconciler needs to know.
type Config struct {
	Replicas int // of the event stream (1)

	Sources      []clerk.Source // without a key nothing is swept
	Interval     time.Duration  // between incremental sweeps (10 min)
	FullInterval time.Duration  // between full sweeps (24 h)
	SilenceAfter time.Duration  // Clerk moving on without an event for so long is an alert (15 min)
	SilenceEvery time.Duration  // between two looks for it (1 min, or a fifth of SilenceAfter where that is less)
	// SilenceRepeat is between two alerts of one silence (24 h: four before Svix gives up on an endpoint).
	SilenceRepeat time.Duration
	Alerts        outbox.Alerts // where alerts go
	Poll          time.Duration // between two looks at what is due (1 s)

	Sweep SweepConfig // but for its source
}

// ConfigFrom takes the reconciler's part of the settings.
func ConfigFrom(s *config.Settings) Config {
	return Config{
		Replicas: s.StreamReplicas, Sources: clerk.SourcesFrom(s),
		Interval: s.ReconcileInterval, FullInterval: s.ReconcileFullInterval, SilenceAfter: s.SilenceAfter,
		Alerts: outbox.AlertsFrom(s),
	}
}

// Client opens the API of a source, whose metrics (usher_clerk_…) stand beside the given ones.
func Client(s clerk.Source, log *zap.Logger, metrics *Metrics) (*clerk.Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = getters * 2
	return s.Client(clerk.Config{Log: log, HTTPClient: &http.Client{Transport: transport, Timeout: requestTimeout}, Registerer: metrics.registerer})
}

const requestTimeout = 20 * time.Second

// Deps are what the reconciler takes from its process, which closes them.
type Deps struct {
	JetStream  jetstream.JetStream
	DB         *gorm.DB // required where a source has a key
	Log        *zap.Logger
	Registerer prometheus.Registerer // nil for none
	Health     *observe.Health
}

// Reconciler implements lifecycle.Service.
type Reconciler struct {
	cfg       Config
	js        jetstream.JetStream
	presence  *stream.Presence
	publisher *stream.Publisher
	log       *zap.Logger
	db        *gorm.DB
	database  *database.Watch // nil where nothing is reconciled
	metrics   *Metrics
	sources   []*source
	once      sync.Once
}

type source struct {
	clerk.Source
	client  *clerk.Client
	sweeper *Sweeper
	retry   time.Time // no run before, after one that failed

	asked time.Time // when the database was last asked what is due
	next  time.Time // when it said that the next run is; not after now where one is
}

// askEvery is how often the database is asked what is due. The runs of other processes change that; one of them that is cut off is
// noticed so late at most, and its lease is free in less.
const askEvery = 10 * time.Second

// New asks nobody anything. The broker may be away: the check "reconciler" in health says so until it is there. Run closes what
// New opened; Close does where Run is never called.
func New(cfg Config, deps Deps) (*Reconciler, error) {
	cfg.Replicas = cmp.Or(cfg.Replicas, 1)
	cfg.Interval = cmp.Or(cfg.Interval, 10*time.Minute)
	cfg.FullInterval = cmp.Or(cfg.FullInterval, 24*time.Hour)
	cfg.SilenceAfter = cmp.Or(cfg.SilenceAfter, 15*time.Minute)
	cfg.SilenceEvery = cmp.Or(cfg.SilenceEvery, min(time.Minute, cfg.SilenceAfter/5))
	cfg.SilenceRepeat = cmp.Or(cfg.SilenceRepeat, 24*time.Hour)
	cfg.Poll = cmp.Or(cfg.Poll, time.Second)
	log := deps.Log.With(zap.String("service", Name))
	js := deps.JetStream
	r := &Reconciler{
		cfg: cfg, js: js, log: log, db: deps.DB, metrics: NewMetrics(deps.Registerer),
		presence: stream.NewPresence(js.Conn(), js, log, stream.Events, "KV_"+stream.Leases),
	}
	for _, s := range cfg.Sources {
		client, err := Client(s, log, r.metrics)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", Name, err)
		}
		r.sources = append(r.sources, &source{Source: s, client: client})
	}
	r.publisher = stream.NewPublisher(js, cfg.Replicas)
	for _, s := range r.sources {
		sweep := cfg.Sweep
		sweep.Source, sweep.InstanceID = s.Name, s.InstanceID
		s.sweeper = NewSweeper(sweep, SweepDeps{API: s.client, DB: deps.DB, JS: js, Publisher: r.publisher, Log: log.With(zap.String("source", s.Name)), Metrics: r.metrics})
	}
	deps.Health.Add(Name, r.presence.Check)
	if len(r.sources) > 0 {
		r.database = database.NewWatch(r.db, "reconcile_runs", "drifts", "notifications")
		deps.Health.Add(Name+" database", r.database.Check)
	}
	return r, nil
}

// Name implements lifecycle.Service.
func (r *Reconciler) Name() string { return Name }

// Close gives back what New opened. It may be called after Run, and more than once.
func (r *Reconciler) Close() {
	r.once.Do(func() {
		r.publisher.Close()
		for _, s := range r.sources {
			s.client.Close()
		}
	})
}

// Run sweeps when it is time and looks for silence, until ctx is done. A sweep that is cut off by that goes on where it was.
func (r *Reconciler) Run(ctx context.Context) error {
	defer r.Close()
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { r.presence.Run(ctx) })
	if len(r.sources) == 0 {
		r.log.Info("no key of Clerk's API (CLERK_SECRET_KEY): nothing is reconciled, and silence is not noticed")
		<-ctx.Done()
		return nil
	}
	group.Go(func() { r.database.Run(ctx) })
	group.Go(func() { r.watch(ctx) })
	r.log.Info("started", zap.Int("sources", len(r.sources)))
	for sleep(ctx, r.cfg.Poll) == nil {
		for _, s := range r.sources {
			r.turn(ctx, s)
		}
	}
	r.log.Info("stopped")
	return nil
}

// turn runs what is due of one source, unless another process sweeps.
func (r *Reconciler) turn(ctx context.Context, s *source) {
	if time.Now().Before(s.retry) || r.presence.Check() != nil {
		return
	}
	var err error
	if now := time.Now(); now.Sub(s.asked) >= askEvery {
		s.asked = now
		_, s.next, err = s.sweeper.due(ctx, r.cfg)
	}
	if err == nil && time.Now().Before(s.next) {
		return
	}
	if err == nil {
		err = r.sweep(ctx, s)
	}
	switch {
	case err == nil || ctx.Err() != nil || errors.Is(err, errBusy):
	case errors.Is(err, errLeaseLost):
		r.log.Warn("sweep given up, another process may have the lease", zap.String("source", s.Name))
	default:
		s.retry = time.Now().Add(min(time.Minute, r.cfg.Interval))
		r.log.Error("sweep did not end", zap.String("source", s.Name), zap.Duration("delay", time.Until(s.retry)), zap.Error(err))
	}
}

// sweep takes the lease, and looks only then at what is due: another process may just have done it.
func (r *Reconciler) sweep(ctx context.Context, s *source) error {
	holder := holderName()
	held, ctx, err := s.sweeper.lease(ctx, holder, 0)
	if err != nil {
		return err
	}
	defer held.release()
	opts, next, err := s.sweeper.due(ctx, r.cfg)
	if s.next = next; err != nil || opts.Kind == "" {
		return err
	}
	defer func() { s.asked = time.Time{} }()
	opts.service = true
	_, err = s.sweeper.reconcile(ctx, opts, holder, held.fence)
	return err
}

// due says what is to be run now: a run that was cut off, a full sweep, an incremental one, or nothing (Kind empty) until
// next, as far as is known now. The first sweep of a source is a backfill in effect, so its events say so: nobody may be welcomed because
// Usher was installed.
func (s *Sweeper) due(ctx context.Context, cfg Config) (opts Options, next time.Time, err error) {
	now := time.Now()
	succeededRuns, err := s.runs(ctx, 3, "status = ?", succeeded)
	if err != nil {
		return Options{}, next, err
	}
	var success time.Time
	for _, r := range succeededRuns {
		if r.FinishedAt != nil {
			success = later(success, *r.FinishedAt)
		}
	}
	if !success.IsZero() { // also of another process, or of this one before it was started anew
		s.metrics.success.Set(float64(success.Unix()))
	}
	cutOff, err := s.runs(ctx, 3, "status = ? AND started_at > ?", running, now.UTC().Add(-resumable))
	if err != nil {
		return Options{}, next, err
	}
	for _, r := range cutOff {
		// A forced one is a person's, and only a person goes on with it.
		var st state
		if json.Unmarshal([]byte(r.State), &st) == nil && st.Tries < maxTries && !st.Force {
			return Options{Kind: r.Kind, Resources: st.Resources, origin: st.Origin}, next, nil
		}
	}
	// What was stopped is not tried again before its time: it needs a person.
	lastFull, err := s.lastWhole(ctx, "kind <> ? AND (status = ? OR status = ? AND stopped <> ?)", Incremental, succeeded, stopped, interrupted)
	if err != nil {
		return Options{}, next, err
	}
	lastIncremental, err := s.lastWhole(ctx, "kind = ? AND (status = ? OR status = ? AND stopped <> ?)", Incremental, succeeded, stopped, interrupted)
	if err != nil {
		return Options{}, next, err
	}
	lastAny := later(lastFull.StartedAt, lastIncremental.StartedAt)
	switch {
	case now.Sub(lastFull.StartedAt) >= cfg.FullInterval:
		opts = Options{Kind: Full}
		before, err := s.lastWholeSuccess(ctx)
		if before.ID == "" {
			opts.origin = event.OriginBackfill
		}
		return opts, next, err
	case now.Sub(lastAny) >= cfg.Interval:
		return Options{Kind: Incremental}, next, nil
	}
	return Options{}, earlier(lastFull.StartedAt.Add(cfg.FullInterval), lastAny.Add(cfg.Interval)), nil
}

// runs are the newest of the source's runs for which where holds, dry ones left out.
func (s *Sweeper) runs(ctx context.Context, limit int, where string, args ...any) ([]runRow, error) {
	var runs []runRow
	err := s.db.WithContext(ctx).Where("source = ? AND dry_run = ?", s.cfg.Source, false).Where(where, args...).Order("started_at DESC").Limit(limit).Find(&runs).Error
	if err != nil {
		return nil, fmt.Errorf("read runs: %w", err)
	}
	return runs, nil
}

// lastWhole is the newest run of all tables for which where holds, however long ago it was; the zero row for none.
func (s *Sweeper) lastWhole(ctx context.Context, where string, args ...any) (runRow, error) {
	resources, err := json.Marshal(clerk.Resources())
	if err != nil {
		return runRow{}, fmt.Errorf("read runs: %w", err)
	}
	whole := "json_extract(state, '$.resources') = ?"
	if database.IsPostgres(s.db) {
		whole = "state -> 'resources' = CAST(? AS jsonb)"
	}
	runs, err := s.runs(ctx, 1, "("+where+") AND "+whole, append(args, string(resources))...)
	if err != nil || len(runs) == 0 {
		return runRow{}, err
	}
	return runs[0], nil
}

// lastWholeSuccess is the newest sweep of everything that succeeded. Without one the mirror is new.
func (s *Sweeper) lastWholeSuccess(ctx context.Context) (runRow, error) {
	return s.lastWhole(ctx, "kind <> ? AND status = ?", Incremental, succeeded)
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
