package worker

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/observe"
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
	// Concurrency is how many batches of one handler are worked on at once (1).
	Concurrency int
	// Attempts is how often an event's own error is tried before it is dead-lettered (10).
	Attempts int
	// RetryInitial, RetryMax and RetryFactor make the schedule of retries (1 s, 10 min, 4), with jitter.
	RetryInitial, RetryMax time.Duration
	RetryFactor            float64
	// HandleTimeout bounds one transaction (30 s). It must stay below [stream.AckWait].
	HandleTimeout time.Duration
}

// ConfigFrom takes what the worker needs from the settings.
func ConfigFrom(s *config.Settings) Config {
	c := Config{Instances: map[string]string{}}
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
	setDefault(&c.Concurrency, 1)
	setDefault(&c.Attempts, 10)
	setDefault(&c.RetryInitial, time.Second)
	setDefault(&c.RetryMax, 10*time.Minute)
	setDefault(&c.RetryFactor, 4)
	setDefault(&c.HandleTimeout, 30*time.Second)
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
	case c.Concurrency < 1:
		return errors.New("Concurrency must be at least 1")
	case c.Attempts < 1:
		return errors.New("Attempts must be at least 1")
	case c.HandleTimeout >= stream.AckWait:
		return fmt.Errorf("HandleTimeout must be below %s", stream.AckWait)
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
	cfg     Config
	deps    Deps
	metrics *metrics
	loops   []*loop
}

// New checks the configuration; it neither dials nor reads.
func New(cfg Config, deps Deps) (*Worker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	w := &Worker{cfg: cfg.withDefaults(), deps: deps}
	w.metrics = newMetrics(deps.Registerer, w.cfg.Handlers)
	for _, r := range w.cfg.Handlers {
		for range w.cfg.Concurrency {
			w.loops = append(w.loops, newLoop(w, r.Handler))
		}
	}
	return w, nil
}

// Name implements lifecycle.Service.
func (w *Worker) Name() string { return "worker" }

// Run applies events until ctx is done; what it holds by then is finished or given back at once. It
// waits for a database or a broker that is away, and for streams that are not set up yet, and says so in
// the health checks; the error is about pending migrations only.
func (w *Worker) Run(ctx context.Context) error {
	for _, l := range w.loops {
		w.deps.Health.Add("worker "+l.handler.Name(), l.check)
	}
	if err := w.waitForDatabase(ctx); err != nil {
		return err
	}
	group, groupCtx := errgroup.WithContext(ctx)
	for _, l := range w.loops {
		group.Go(func() error { return l.run(groupCtx) })
	}
	group.Go(func() error {
		w.watchLag(groupCtx)
		return nil
	})
	if err := group.Wait(); err != nil {
		return fmt.Errorf("run handlers: %w", err)
	}
	// Acks are sent without waiting; none may be lost to the closing of the connection.
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := w.deps.JetStream.Conn().FlushWithContext(flush); err != nil {
		w.deps.Log.Warn("last acks may be lost: their events come again and are recognised", zap.Error(err))
	}
	return nil
}

// waitForDatabase returns once the database answers and its migrations are done, or ctx is.
func (w *Worker) waitForDatabase(ctx context.Context) error {
	policy := outageBackoff()
	for ctx.Err() == nil {
		err := database.CheckMigrated(ctx, w.deps.DB)
		for _, l := range w.loops {
			l.database.setTrouble(err)
		}
		if err == nil {
			return nil
		}
		if errors.Is(err, database.ErrPending) || errors.Is(err, database.ErrNewer) {
			return fmt.Errorf("check migrations: %w", err)
		}
		delay := policy.NextBackOff()
		w.deps.Log.Warn("waiting for the database", zap.Error(err), zap.Duration("delay", delay))
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
	}
	return nil
}

// watchLag keeps the lag metrics of every handler.
func (w *Worker) watchLag(ctx context.Context) {
	ticker := time.NewTicker(5 * time.Second)
	defer ticker.Stop()
	for {
		for _, l := range w.loops {
			w.metrics.paused.WithLabelValues(l.handler.Name()).Set(0)
			if l.check() != nil {
				w.metrics.paused.WithLabelValues(l.handler.Name()).Set(1)
			}
		}
		for _, r := range w.cfg.Handlers {
			name := r.Handler.Name()
			consumer, err := w.deps.JetStream.Consumer(ctx, stream.Events, name)
			if err == nil {
				info := consumer.CachedInfo()
				w.metrics.pending.WithLabelValues(name).Set(float64(info.NumPending) + float64(info.NumAckPending))
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// trouble is the last known reason why a loop cannot work; nil while it can.
type trouble struct{ p atomic.Pointer[error] }

func (t *trouble) setTrouble(err error) {
	if err == nil {
		t.p.Store(nil)
		return
	}
	t.p.Store(&err)
}

func (t *trouble) check() error {
	if p := t.p.Load(); p != nil {
		return *p
	}
	return nil
}
