package worker

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
)

// outcomes of one delivery, as the metric counts them.
var outcomes = []string{"processed", "duplicate", "retried", "dead_lettered", "put_off", "given_back"}

type metrics struct {
	deliveries *prometheus.CounterVec
	failures   *prometheus.CounterVec
	duration   *prometheus.HistogramVec
	age        *prometheus.HistogramVec
	effects    *prometheus.CounterVec
	purged     prometheus.Counter
	wal        prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, handlers []Registration, check func(handler string) error, missing func(handler string) float64) *metrics {
	m := &metrics{
		deliveries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_worker_deliveries_total", Help: "Deliveries by handler and what became of them.",
		}, []string{"handler", "outcome"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_worker_failures_total", Help: "Failed attempts of events by handler and reason.",
		}, []string{"handler", "reason"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "usher_worker_handle_duration_seconds", Help: "Time of one batch's transaction.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
		}, []string{"handler"}),
		age: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "usher_event_age_seconds", Help: "Time from a change at Clerk until it is applied.",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 15, 60, 300, 1800, 7200, 86400},
		}, []string{"handler"}),
		effects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_worker_effects_total", Help: "Processed events by handler and what they changed.",
		}, []string{"handler", "effect"}),
		purged: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "usher_stream_purged_total", Help: "Settled events that this process removed from the stream, past their retention or to make room.",
		}),
		wal: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "usher_sqlite_wal_bytes", Help: "Size of SQLite's write-ahead log; 0 with PostgreSQL.",
		}),
	}
	reg.MustRegister(m.deliveries, m.failures, m.duration, m.age, m.effects, m.purged, m.wal)
	for _, r := range handlers {
		name := r.Handler.Name()
		for _, outcome := range outcomes {
			m.deliveries.WithLabelValues(name, outcome)
		}
		for _, reason := range deadletter.Reasons() {
			m.failures.WithLabelValues(name, string(reason))
		}
		if _, tells := r.Handler.(Teller); tells {
			for _, effect := range event.Effects() {
				m.effects.WithLabelValues(name, string(effect))
			}
		}
		m.duration.WithLabelValues(name)
		m.age.WithLabelValues(name)
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "usher_worker_stream_gap", Help: "Events that broker or database have lost, as far as is known, until they are replayed or swept.",
			ConstLabels: prometheus.Labels{"handler": name},
		}, func() float64 { return missing(name) }))
		// Asked at each scrape, so that it says the same as readiness.
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "usher_worker_paused", Help: "1 while a handler waits for the database or the broker.",
			ConstLabels: prometheus.Labels{"handler": name},
		}, func() float64 {
			if check(name) != nil {
				return 1
			}
			return 0
		}))
	}
	return m
}
