package reconciler

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/usherhq/usher/pkg/clerk"
)

// Metrics are what the reconciler tells of its work.
type Metrics struct {
	drift   *prometheus.CounterVec
	success prometheus.Gauge
	silence prometheus.Gauge

	registerer prometheus.Registerer // where those of Clerk's API go too
}

// NewMetrics registers them; nil registers none.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		registerer: reg,
		drift: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_reconcile_drift_total", Help: "Objects in which the mirror differed from Clerk, by table and class.",
		}, []string{"kind", "drift"}),
		success: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "usher_reconcile_last_success_timestamp_seconds", Help: "When the last sweep succeeded, in whatever process, 0 for never.",
		}),
		silence: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "usher_silence_seconds", Help: "How long Clerk has moved on without an event being received, 0 while events come.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.drift, m.success, m.silence)
	}
	for _, table := range clerk.Resources() {
		for _, d := range Drifts() {
			m.drift.WithLabelValues(table, string(d))
		}
	}
	return m
}
