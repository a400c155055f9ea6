package ingest

import (
	"fmt"
	"maps"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/usherhq/usher/pkg/stream"
)

type metrics struct {
	requests map[result]prometheus.Counter // filled once, then only read
	duration prometheus.Histogram
	inFlight prometheus.Gauge
	durable  map[string]prometheus.Gauge
}

// newMetrics registers the metrics, every series at zero. reg may be nil.
func newMetrics(reg prometheus.Registerer) (metrics, error) {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "usher_ingest_requests_total", Help: "Requests by how they ended.",
	}, []string{"result"})
	m := metrics{
		requests: map[result]prometheus.Counter{},
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "usher_ingest_duration_seconds", Help: "Time from a request's headers to its answer.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "usher_ingest_in_flight", Help: "Requests whose headers were accepted and that are not answered yet.",
		}),
	}
	durable := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "usher_broker_durability", Help: "1 for what is known of whether the broker syncs to disk before it confirms: synced, unsynced or unknown.",
	}, []string{"state"})
	m.durable = map[string]prometheus.Gauge{}
	for _, state := range stream.DurabilityStates {
		m.durable[state] = durable.WithLabelValues(state)
	}
	m.durable[stream.Unknown].Set(1)
	for _, res := range append(slices.Collect(maps.Keys(refusals)), accepted, duplicate, undecodable) {
		m.requests[res] = requests.WithLabelValues(string(res))
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{requests, m.duration, m.inFlight, durable} {
		if err := reg.Register(c); err != nil {
			return m, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}
