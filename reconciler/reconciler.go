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
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/config"
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
		Alerts: outbox.Alerts{Email: s.AlertEmail, Mail: s.SMTPURL != "", Slack: s.SlackWebhookURL != ""},
	}
}

// Client opens the API of a source, whose requests metrics count.
func Client(s clerk.Source, log *zap.Logger, metrics *Metrics) (*clerk.Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = getters * 2
	return s.Client(clerk.Config{Log: log, HTTPClient: &http.Client{Transport: metrics.Transport(transport), Timeout: requestTimeout}})
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
	metrics   *Metrics
	sources   []*source
	once      sync.Once
}

type source struct {
	clerk.Source
	client  *clerk.Client
	sweeper *Sweeper
	retry   time.Time // no run before, after one that failed
}

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
	opts, err := s.sweeper.due(ctx, r.cfg)
	if err == nil && opts.Kind == "" {
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
	opts, err := s.sweeper.due(ctx, r.cfg)
	if err != nil || opts.Kind == "" {
		return err
	}
	opts.service = true
	_, err = s.sweeper.reconcile(ctx, opts, holder, held.fence)
	return err
}

// due says what is to be run now: a run that was cut off, a full sweep, an incremental one, or nothing (Kind empty). The first sweep
// of a source is a backfill in effect, so its events say so: nobody may be welcomed because Usher was installed.
func (s *Sweeper) due(ctx context.Context, cfg Config) (Options, error) {
	now := time.Now()
	var runs, incremental []runRow
	query := func(where string, limit int, into *[]runRow) error {
		err := s.db.WithContext(ctx).Where("source = ? AND dry_run = ? AND "+where, s.cfg.Source, false).Order("started_at DESC").Limit(limit).Find(into).Error
		if err != nil {
			return fmt.Errorf("read runs: %w", err)
		}
		return nil
	}
	if err := errors.Join(query("kind <> 'incremental'", 10, &runs), query("kind = 'incremental'", 3, &incremental)); err != nil {
		return Options{}, err
	}
	runs = append(runs, incremental...)
	var lastFull, lastAny time.Time
	var success time.Time
	first := true
	for i := range runs {
		r := runs[i]
		st, whole := stateOf(r)
		if r.Status == succeeded && r.FinishedAt != nil {
			success = later(success, *r.FinishedAt)
		}
		// A forced one is a person's, and only a person goes on with it.
		if r.Status == running && now.Sub(r.StartedAt) < resumable && st.Tries < maxTries && !st.Force {
			return Options{Kind: r.Kind, Resources: st.Resources, origin: st.Origin}, nil
		}
		if !whole || r.Status == running || r.Status == failed || r.Stopped == interrupted {
			continue
		}
		if lastAny = later(lastAny, r.StartedAt); r.Kind != Incremental {
			lastFull = later(lastFull, r.StartedAt)
			first = first && r.Status != succeeded
		}
	}
	if !success.IsZero() { // also of another process, or of this one before it was started anew
		s.metrics.success.Set(float64(success.Unix()))
	}
	switch {
	case now.Sub(lastFull) >= cfg.FullInterval:
		opts := Options{Kind: Full}
		if first {
			opts.origin = event.OriginBackfill
		}
		return opts, nil
	case now.Sub(lastAny) >= cfg.Interval:
		return Options{Kind: Incremental}, nil
	}
	return Options{}, nil
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// stateOf reads a run's checkpoint, and whether the run is of all tables.
func stateOf(r runRow) (state, bool) {
	var st state
	if json.Unmarshal([]byte(r.State), &st) != nil {
		return state{}, false
	}
	return st, slices.Equal(st.Resources, clerk.Resources())
}
