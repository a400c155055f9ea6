package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/outbox"
	"github.com/usherhq/usher/pkg/stream"
)

// Config says how a worker works. A zero field means its default.
type Config struct {
	// Instances maps a source to the only Clerk instance that it may carry; absent or empty: not checked.
	Instances map[string]string
	// Handlers to run; default: all of [Handlers].
	Handlers []Registration
	// BatchSize bounds the events of one transaction (500).
	BatchSize int
	// Concurrency is how many batches of one handler are worked on at once (2 on PostgreSQL; 1 on SQLite, which has one writer).
	Concurrency int
	// Attempts is how often an event's own error is tried before it is dead-lettered (10).
	Attempts int
	// RetryInitial, RetryMax and RetryFactor make the schedule of retries (1 s, 10 min, 4), with jitter.
	RetryInitial, RetryMax time.Duration
	RetryFactor            float64
	// HandleTimeout bounds one transaction (30 s). It must stay below [stream.AckWait].
	HandleTimeout time.Duration
	// Retention is how long a settled event stays in the stream (720 h), by the broker's clock. What is not settled stays for ever.
	Retention time.Duration
	// MaxBytes is how large the stream may grow, where that is less than its own limit, which then follows; 0: the stream's own.
	MaxBytes int64
	// PurgeInterval is about how often the stream and the delivery log are cleaned (5 min).
	PurgeInterval time.Duration
	// Alerts says where alerts go.
	Alerts outbox.Alerts
}

// ConfigFrom takes what the worker needs from the settings.
func ConfigFrom(s *config.Settings) Config {
	c := Config{
		Instances: map[string]string{}, Retention: s.Retention, Attempts: s.RetryAttempts, RetryInitial: s.RetryInitial, RetryMax: s.RetryMax,
		Alerts: outbox.AlertsFrom(s),
	}
	for _, src := range s.Sources {
		c.Instances[src.Name] = src.InstanceID
	}
	return c
}

func (c Config) withDefaults() Config {
	if c.Handlers == nil {
		c.Handlers = Handlers()
	}
	setDefault(&c.BatchSize, 500)
	setDefault(&c.Attempts, 10)
	setDefault(&c.RetryInitial, time.Second)
	setDefault(&c.RetryMax, 10*time.Minute)
	setDefault(&c.RetryFactor, 4)
	setDefault(&c.HandleTimeout, 30*time.Second)
	setDefault(&c.Retention, 720*time.Hour)
	setDefault(&c.PurgeInterval, 5*time.Minute)
	return c
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate names the field that is wrong and the rule.
func (c Config) Validate() error {
	c = c.withDefaults()
	switch {
	case c.BatchSize < 1:
		return errors.New("BatchSize must be at least 1")
	case c.Concurrency < 0:
		return errors.New("Concurrency must not be below 0")
	case c.Attempts < 1:
		return errors.New("Attempts must be at least 1")
	case c.HandleTimeout <= 0 || c.HandleTimeout >= stream.AckWait:
		return fmt.Errorf("HandleTimeout must be above 0 and below %s", stream.AckWait)
	case c.RetryInitial < 0 || c.RetryMax < c.RetryInitial || c.RetryFactor < 1:
		return errors.New("RetryInitial must be at least 0, RetryMax at least RetryInitial, RetryFactor at least 1")
	case c.Retention < 0 || c.PurgeInterval < 0:
		return errors.New("Retention and PurgeInterval must be above 0")
	}
	return nil
}

// Deps are what a worker needs from its process.
type Deps struct {
	JetStream  jetstream.JetStream
	DB         *gorm.DB
	Log        *zap.Logger
	Registerer prometheus.Registerer
	Health     *observe.Health
}

// Worker runs the handlers. It is a lifecycle.Service.
type Worker struct {
	cfg      Config
	deps     Deps
	metrics  *metrics
	loops    map[string][]*loop // by handler
	waiting  trouble            // before the first look at the database
	database *database.Watch    // also while there is nothing to do
	watches  map[string]*watch  // by handler
	letters  letters
	setups   setups
	fill     trouble // of the stream
	holding  holding // only clean uses it
}

// New checks the configuration; it neither dials nor reads.
func New(cfg Config, deps Deps) (*Worker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	w := &Worker{
		cfg: cfg.withDefaults(), deps: deps, loops: map[string][]*loop{}, setups: setups{consumers: map[string]*trouble{}},
		database: database.NewWatch(deps.DB, writes()...),
		watches:  map[string]*watch{},
	}
	if w.cfg.Concurrency == 0 {
		w.cfg.Concurrency = 1
		if database.IsPostgres(deps.DB) {
			w.cfg.Concurrency = 2
		}
	}
	process := processName()
	for _, r := range w.cfg.Handlers {
		w.watches[r.Handler.Name()] = newWatch(w, r, process)
	}
	w.metrics = newMetrics(deps.Registerer, w.cfg.Handlers, w.check, func(handler string) float64 { return w.watches[handler].lost() })
	for _, r := range w.cfg.Handlers {
		p := &proof{}
		w.setups.consumers[r.Handler.Name()] = &trouble{}
		for range w.cfg.Concurrency {
			w.loops[r.Handler.Name()] = append(w.loops[r.Handler.Name()], newLoop(w, r.Handler, p))
		}
	}
	return w, nil
}

// writes are the tables that Usher's own handlers and the delivery log need.
func writes() []string {
	tables := []string{"deliveries"}
	for _, t := range mirror.Tables() {
		tables = append(tables, t.Name)
	}
	return tables
}

// Name implements lifecycle.Service.
func (w *Worker) Name() string { return "worker" }

// Run applies events until ctx is done; what it holds by then is finished or given back at once. It
// waits for a database or a broker that is away, and for streams that are not set up yet, and says so in
// the health checks; the error is about a database that is newer than this program only.
func (w *Worker) Run(ctx context.Context) error {
	for name := range w.loops {
		w.deps.Health.Add("worker "+name, func() error { return w.check(name) })
	}
	for name, one := range w.watches {
		w.deps.Health.Add("stream of "+name, one.check)
	}
	w.deps.Health.AddDetail("stream", w.fill.check)
	w.deps.Health.AddDetail("foreign keys", w.database.Foreign)
	w.deps.Health.Add("dead letters", func() error { return cmp.Or(w.letters.check(), w.setups.letters.check()) })
	if err := w.waitForDatabase(ctx); err != nil {
		return err
	}
	group, groupCtx := errgroup.WithContext(ctx)
	for _, loops := range w.loops {
		for _, l := range loops {
			group.Go(func() error { return l.run(groupCtx) })
		}
	}
	for _, one := range w.watches {
		group.Go(func() error {
			one.run(groupCtx)
			return nil
		})
	}
	for _, watch := range []func(context.Context){w.database.Run, w.watchSetup, w.watchFill, w.watchWAL, w.clean, w.sweepLetters} {
		group.Go(func() error {
			watch(groupCtx)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("run handlers: %w", err)
	}
	if err := w.flush(context.WithoutCancel(ctx)); err != nil {
		w.deps.Log.Warn("last acks may be lost: their events are redelivered and recognised", zap.Error(err))
	}
	return nil
}

// flush waits for the acks, which are sent without waiting: none may be lost to the closing of the connection. A broker that
// did not answer any loop a moment ago is not asked again.
func (w *Worker) flush(ctx context.Context) (err error) {
	answered := false
	for _, loops := range w.loops {
		for _, l := range loops {
			if trouble := l.broker.check(); trouble != nil {
				err = trouble
			} else {
				answered = true
			}
		}
	}
	if !answered {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, drainWait)
	defer cancel()
	return stream.Explain(w.deps.JetStream.Conn().FlushWithContext(ctx))
}

// check is the readiness of a handler.
func (w *Worker) check(handler string) error {
	for _, l := range w.loops[handler] {
		if err := l.check(); err != nil {
			return err
		}
	}
	if err := w.watches[handler].paused(); err != nil {
		return err
	}
	if err := w.setups.check(handler); err != nil {
		return err
	}
	if err := w.waiting.check(); err != nil {
		return err
	}
	return w.database.Check()
}

// waitForDatabase returns once the database answers and `usher setup` has run, or ctx is done.
func (w *Worker) waitForDatabase(ctx context.Context) error {
	err := database.AwaitMigrated(ctx, w.deps.DB, w.deps.Log.With(zap.String("service", "worker")), w.waiting.setTrouble)
	w.waiting.setTrouble(err)
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("check migrations: %w", err)
	}
	return nil
}

// watchInterval is how often the database is looked at where nothing else shows how it is.
const watchInterval = 5 * time.Second

// watchWAL notices a write-ahead log of SQLite that does not stop growing.
func (w *Worker) watchWAL(ctx context.Context) {
	if database.IsPostgres(w.deps.DB) {
		return
	}
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	large := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		lookCtx, cancel := context.WithTimeout(ctx, watchInterval)
		size, err := database.WALSize(lookCtx, w.deps.DB)
		cancel()
		if err != nil { // whoever needs the database says so
			continue
		}
		w.metrics.wal.Set(float64(size))
		if before := large; size > database.LargeWAL {
			if large = true; !before {
				w.deps.Log.Warn("SQLite's write-ahead log is above 256 MiB, since something reads the file without a pause: end transactions that stay open "+
					"(a sqlite3 shell, a backup, a report), then it shrinks by itself; where it does not, restart, or move to PostgreSQL",
					zap.String("service", "worker"), zap.Int64("bytes", size))
			}
		} else if large = before && size > database.LargeWAL/2; before && !large {
			w.deps.Log.Info("SQLite's write-ahead log has shrunk", zap.String("service", "worker"), zap.Int64("bytes", size))
		}
	}
}

// sweepEvery is how often the dead letters are compared with their index.
const sweepEvery = time.Minute

// sweepLetters makes the dead letters and their index agree again after a crash between the two.
func (w *Worker) sweepLetters(ctx context.Context) {
	sweeper := deadletter.NewSweeper(w.deps.JetStream, w.deps.DB)
	sweeper.Refuses = func(err error) bool { return database.IsRefusal(err) && !database.IsInfrastructure(err) }
	log := w.deps.Log.With(zap.String("service", "worker"))
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		var swept deadletter.Swept
		err := w.admitted(ctx) // another broker's letters say nothing of these rows
		if err == nil {
			swept, err = sweeper.Sweep(ctx)
		}
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errForeign): // the watch has said it
		case err != nil:
			log.Warn("dead letters not compared with their index", zap.Error(err))
		case swept.Indexed+swept.Deleted > 0:
			log.Info("dead letters and their index agree again", zap.Int("indexed", swept.Indexed), zap.Int("deleted", swept.Deleted))
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
