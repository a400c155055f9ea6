package reconciler

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/usherhq/usher/pkg/clerk"
)

// Metrics are what the reconciler tells of its work.
type Metrics struct {
	drift    *prometheus.CounterVec
	success  prometheus.Gauge
	requests *prometheus.CounterVec
	silence  prometheus.Gauge
}

// NewMetrics registers them; nil registers none.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		drift: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_reconcile_drift_total", Help: "Objects in which the mirror differed from Clerk, by table and class.",
		}, []string{"kind", "drift"}),
		success: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "usher_reconcile_last_success_timestamp_seconds", Help: "When the last sweep succeeded, in whatever process, 0 for never.",
		}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_reconcile_requests_total", Help: "Requests to Clerk's Backend API, retries included, by class of answer.",
		}, []string{"result"}),
		silence: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "usher_silence_seconds", Help: "How long Clerk has moved on without an event being received, 0 while events come.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.drift, m.success, m.requests, m.silence)
	}
	for _, table := range clerk.Resources() {
		for _, d := range Drifts() {
			m.drift.WithLabelValues(table, string(d))
		}
	}
	for _, result := range []string{"ok", "not_found", "unauthorized", "limited", "client_error", "server_error", "no_answer"} {
		m.requests.WithLabelValues(result)
	}
	return m
}

// Transport counts the requests that pass through it.
func (m *Metrics) Transport(next http.RoundTripper) http.RoundTripper {
	return counting{m.requests, next}
}

type counting struct {
	requests *prometheus.CounterVec
	next     http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (c counting) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := c.next.RoundTrip(req)
	result := "ok"
	switch {
	case err != nil:
		result = "no_answer"
	case resp.StatusCode == http.StatusNotFound:
		result = "not_found"
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		result = "unauthorized"
	case resp.StatusCode == http.StatusTooManyRequests:
		result = "limited"
	case resp.StatusCode >= http.StatusInternalServerError:
		result = "server_error"
	case resp.StatusCode >= http.StatusBadRequest:
		result = "client_error"
	}
	c.requests.WithLabelValues(result).Inc()
	return resp, err //nolint:wrapcheck // a transport passes on what it got
}
