package clerk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests *prometheus.CounterVec
	duration prometheus.Histogram
	waited   prometheus.Counter
}

// results are the closed set of what can become of a request, with the error of each.
var results = map[string]error{
	"not_found": ErrNotFound, "unauthorized": ErrUnauthorized, "not_enabled": ErrNotEnabled, "limited": ErrLimited, "unavailable": ErrUnavailable, "unreadable": ErrUnreadable,
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_clerk_requests_total", Help: "Requests to Clerk's Backend API, retries included, by what became of them.",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "usher_clerk_request_duration_seconds", Help: "How long Clerk's Backend API took to answer.",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20},
		}),
		waited: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "usher_clerk_wait_seconds_total", Help: "Time that requests to Clerk's Backend API waited for the share of the quota or because Clerk asked to.",
		}),
	}
	for result := range results {
		m.requests.WithLabelValues(result)
	}
	m.requests.WithLabelValues("ok")
	m.requests.WithLabelValues("canceled")
	if reg == nil {
		return m, nil
	}
	var err error
	m.requests = register(reg, m.requests, &err)
	m.duration = register(reg, m.duration, &err)
	m.waited = register(reg, m.waited, &err)
	return m, err
}

// register registers a collector or takes the one that another client registered.
func register[C prometheus.Collector](reg prometheus.Registerer, collector C, problem *error) C {
	err := reg.Register(collector)
	var there prometheus.AlreadyRegisteredError
	if errors.As(err, &there) {
		if existing, ok := there.ExistingCollector.(C); ok {
			return existing
		}
	}
	if err != nil {
		*problem = errors.Join(*problem, fmt.Errorf("register metric: %w", err))
	}
	return collector
}

func (m *metrics) observe(took time.Duration, err error) {
	m.duration.Observe(took.Seconds())
	result := "ok"
	if err != nil {
		result = "canceled"
		for name, kind := range results {
			if errors.Is(err, kind) && !errors.Is(err, context.Canceled) {
				result = name
			}
		}
	}
	m.requests.WithLabelValues(result).Inc()
}
