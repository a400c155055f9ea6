// Package lag shows how far every handler is behind, as metrics of whichever process still lives: a worker that has stopped cannot
// say so itself. A process has one [Watch], however many services run in it.
//
// It guarantees that what is shown is known: it looks by itself every few seconds and never at a scrape, and what is older
// than 15 s (30 s where a look takes long) is not shown any more. It knows no list of handlers: a handler is a durable consumer of the event
// stream that acks ([stream.Holds]), so also one that users of Usher made. It changes nothing.
package lag

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/stream"
)

// every is between two looks. A look that takes long is followed by a pause of ten times as long, slowest at most. lookTime bounds a look.
const (
	every    = 5 * time.Second
	slowest  = 20 * time.Second
	lookTime = 10 * time.Second
)

var (
	pending = prometheus.NewDesc("usher_consumer_pending",
		"Events that a handler has not settled yet, those in flight included.", []string{"handler"}, nil)
	inFlight = prometheus.NewDesc("usher_consumer_in_flight",
		"Of the pending events, those that were delivered: in work, or waiting for their retry.", []string{"handler"}, nil)
	oldest = prometheus.NewDesc("usher_consumer_oldest_seconds",
		"Age of the oldest event that a handler has not settled, since it was stored, 0 for none.", []string{"handler"}, nil)
	retrying = prometheus.NewDesc("usher_consumer_retrying",
		"Events that a handler failed to apply and will try again.", []string{"handler"}, nil)
	deadLetters = prometheus.NewDesc("usher_dead_letters",
		"Dead letters that were neither replayed nor discarded.", []string{"handler"}, nil)
	streamBytes = prometheus.NewDesc("usher_stream_bytes",
		"Size of a stream.", []string{"stream"}, nil)
	streamMaxBytes = prometheus.NewDesc("usher_stream_max_bytes",
		"Size at which a stream is full, -1 for no limit.", []string{"stream"}, nil)
	lastSuccess = prometheus.NewDesc("usher_lag_last_success_timestamp_seconds",
		"When the lag was last read, from the broker and from the database, 0 for never.", []string{"from"}, nil)
)

// Watch keeps the metrics. It is a lifecycle.Service and a prometheus.Collector.
type Watch struct {
	js      jetstream.JetStream
	db      atomic.Pointer[gorm.DB]
	log     *zap.Logger
	sources []*source
	every   time.Duration

	handlers atomic.Pointer[[]string] // that the broker named last
}

// source is one of those that are asked. They are asked apart, so that one that hangs hides nothing of the other.
type source struct {
	name string
	look func(context.Context) ([]prometheus.Metric, error)

	mu     sync.Mutex
	at     time.Time // of the last success
	until  time.Time // when what was found is not shown any more
	found  []prometheus.Metric
	failed bool
}

// New registers the metrics. db may be nil: then what the database knows is not shown, unless UseDatabase gives one later.
func New(js jetstream.JetStream, db *gorm.DB, log *zap.Logger, registerer prometheus.Registerer) (*Watch, error) {
	w := &Watch{js: js, every: every, log: log.With(zap.String("service", "lag"))}
	w.db.Store(db)
	w.sources = []*source{{name: "broker", look: w.askBroker}, {name: "database", look: w.askDatabase}}
	if err := registerer.Register(w); err != nil {
		return nil, fmt.Errorf("register the metrics of the lag: %w", err)
	}
	return w, nil
}

// UseDatabase gives the database, or another one.
func (w *Watch) UseDatabase(db *gorm.DB) { w.db.Store(db) }

// Name implements lifecycle.Service.
func (w *Watch) Name() string { return "lag" }

// Run looks at once and then every few seconds until ctx is done. What cannot be read is logged, once until it can be read again.
func (w *Watch) Run(ctx context.Context) error {
	w.Look(ctx)
	var group sync.WaitGroup
	for _, s := range w.sources {
		group.Go(func() {
			for wait := w.every; ; wait = w.look(ctx, s) {
				select {
				case <-ctx.Done():
					return
				case <-time.After(wait):
				}
			}
		})
	}
	group.Wait()
	return nil
}

// Look looks once, at the broker first: it names the handlers of which the database may know nothing.
func (w *Watch) Look(ctx context.Context) {
	for _, s := range w.sources {
		w.look(ctx, s)
	}
}

// errNothingToAsk is no failure: this process has no database.
var errNothingToAsk = errors.New("nothing to ask")

// look asks one source and returns how long to wait before the next time.
func (w *Watch) look(stop context.Context, s *source) time.Duration {
	ctx, cancel := context.WithTimeout(stop, lookTime)
	defer cancel()
	start := time.Now()
	found, err := s.look(ctx)
	wait := min(max(w.every, 10*time.Since(start)), slowest)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case stop.Err() != nil, errors.Is(err, errNothingToAsk):
	case err != nil:
		if !s.failed {
			w.log.Warn("lag cannot be read, and is not shown until it can", zap.String("from", s.name), zap.Error(err))
		}
		s.failed = true
		wait = w.every
	default:
		if s.failed {
			w.log.Info("lag can be read again", zap.String("from", s.name))
		}
		s.failed = false
		s.at, s.found = time.Now(), found
		s.until = s.at.Add(wait + lookTime)
	}
	return wait
}

// Describe implements prometheus.Collector.
func (w *Watch) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{pending, inFlight, oldest, retrying, deadLetters, streamBytes, streamMaxBytes, lastSuccess} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. It asks nobody.
func (w *Watch) Collect(ch chan<- prometheus.Metric) {
	for _, s := range w.sources {
		s.mu.Lock()
		found, last := s.found, 0.0
		if !s.at.IsZero() {
			last = float64(s.at.UnixMilli()) / 1000
		}
		if time.Now().After(s.until) {
			found = nil
		}
		s.mu.Unlock()
		ch <- prometheus.MustNewConstMetric(lastSuccess, prometheus.GaugeValue, last, s.name)
		for _, m := range found {
			ch <- m
		}
	}
}

func gauge(desc *prometheus.Desc, value float64, label string) prometheus.Metric {
	return prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, label)
}

func (w *Watch) askBroker(ctx context.Context) ([]prometheus.Metric, error) {
	consumers, err := stream.Holders(ctx, w.js)
	if err != nil {
		return nil, fmt.Errorf("read the consumers: %w", err)
	}
	var found []prometheus.Metric
	var handlers []string
	for _, c := range consumers {
		handlers = append(handlers, c.Handler)
		found = append(found, gauge(pending, float64(c.Pending)+float64(c.AckPending), c.Handler),
			gauge(inFlight, float64(c.AckPending), c.Handler), gauge(oldest, c.LagSeconds, c.Handler))
	}
	w.handlers.Store(&handlers)
	for _, name := range []string{stream.Events, stream.DeadLetters} {
		s, err := w.js.Stream(ctx, name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			continue // which must not hide the rest
		}
		if err != nil {
			return nil, fmt.Errorf("look up stream %s: %w", name, stream.Explain(err))
		}
		info := s.CachedInfo()
		found = append(found, gauge(streamBytes, float64(info.State.Bytes), name), gauge(streamMaxBytes, float64(info.Config.MaxBytes), name))
	}
	return found, nil
}

func (w *Watch) askDatabase(ctx context.Context) ([]prometheus.Metric, error) {
	db := w.db.Load()
	if db == nil {
		return nil, errNothingToAsk
	}
	var rows []struct {
		Handler, Status string
		Count           int64
	}
	// The second condition says to both databases that the partial index of what is not processed will do.
	err := db.WithContext(ctx).Table("deliveries").Select("handler, status, count(*) AS count").
		Where("status IN ('retrying', 'dead') AND status <> 'processed'").Group("handler, status").Scan(&rows).Error
	if err != nil {
		return nil, fmt.Errorf("count what is retried and dead: %w", err)
	}
	counts := map[string]map[string]int64{}
	if handlers := w.handlers.Load(); handlers != nil { // one of which nothing is kept has a zero
		for _, name := range *handlers {
			counts[name] = map[string]int64{}
		}
	}
	for _, r := range rows {
		if counts[r.Handler] == nil {
			counts[r.Handler] = map[string]int64{}
		}
		counts[r.Handler][r.Status] = r.Count
	}
	var found []prometheus.Metric
	for handler, c := range counts {
		found = append(found, gauge(retrying, float64(c["retrying"]), handler), gauge(deadLetters, float64(c["dead"]), handler))
	}
	return found, nil
}
