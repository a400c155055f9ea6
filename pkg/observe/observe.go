// Package observe makes what an operator sees of a process: its log, its metrics and its health.
// One process has one Ops server, however many services run in it.
package observe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/usherhq/usher/pkg/listen"
)

// NewLogger makes the process's logger, which writes to stderr. level is debug, info, warn or error; format is
// json or console, and empty means console on a terminal, else json.
func NewLogger(level, format string) (*zap.Logger, error) {
	lvl, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, fmt.Errorf("log level: %w", err)
	}
	if format == "" {
		format = "json"
		if info, err := os.Stderr.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			format = "console"
		}
	}
	cfg := zap.NewProductionConfig()
	cfg.Level = zap.NewAtomicLevelAt(lvl)
	cfg.Encoding = format
	cfg.Sampling = nil
	cfg.DisableCaller = true
	cfg.EncoderConfig.TimeKey = "time"
	cfg.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	cfg.EncoderConfig.EncodeDuration = zapcore.StringDurationEncoder
	if format == "console" {
		cfg.EncoderConfig.EncodeLevel = zapcore.CapitalLevelEncoder
	}
	log, err := cfg.Build(zap.AddStacktrace(zapcore.DPanicLevel))
	if err != nil {
		return nil, fmt.Errorf("build logger: %w", err)
	}
	return log, nil
}

// NewRegistry makes the process's metrics registry with the collectors that every Go process has.
func NewRegistry() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

// Check tells whether something can do its work now; the error says what is wrong and what to do.
// It should answer quickly and from memory: an orchestrator asks every few seconds. Of one check no more than one call runs at a
// time.
type Check func() error

// checkTime bounds an answer about the health: less than the second that an orchestrator waits where nobody has told it otherwise.
const checkTime = 800 * time.Millisecond

// Health collects the checks of a process. The zero value is ready and healthy; it is safe for
// concurrent use.
type Health struct {
	mu      sync.Mutex
	names   []string
	checks  map[string]*question
	details map[string]Check
}

// question is a check and its last call.
type question struct {
	check Check
	last  *answer
}

type answer struct {
	done chan struct{} // closed when err is there
	err  error
}

// Add registers a check; a second one of the same name replaces the first.
func (h *Health) Add(name string, check Check) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.checks == nil {
		h.checks = map[string]*question{}
	}
	if _, known := h.checks[name]; !known {
		h.names = append(h.names, name)
	}
	h.checks[name] = &question{check: check}
}

// AddDetail registers what /readyz says without making the process not ready: something that works still, and will not for long.
// It must answer at once.
func (h *Health) AddDetail(name string, detail Check) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.details == nil {
		h.details = map[string]Check{}
	}
	h.details[name] = detail
}

// Details returns what there is to say, by name.
func (h *Health) Details() map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	details := map[string]string{}
	for name, detail := range h.details {
		if err := detail(); err != nil {
			details[name] = err.Error()
		}
	}
	return details
}

// Problems runs the checks and returns what fails, by name. None means ready. It returns within 800 ms; a check that has not
// answered by then fails, and is not called again before it has.
func (h *Health) Problems() map[string]string {
	h.mu.Lock()
	names := slices.Clone(h.names)
	answers := make([]*answer, len(names))
	for i, name := range names {
		answers[i] = h.checks[name].ask()
	}
	h.mu.Unlock()
	late := time.NewTimer(checkTime)
	defer late.Stop()
	over := false
	problems := map[string]string{}
	for i, a := range answers {
		if !over {
			select {
			case <-a.done:
			case <-late.C:
				over = true
			}
		}
		select {
		case <-a.done:
			if a.err != nil {
				problems[names[i]] = a.err.Error()
			}
		default:
			problems[names[i]] = fmt.Sprintf("no answer within %s", checkTime)
		}
	}
	return problems
}

// ask calls the check, unless a call of it still runs: then its answer is awaited. Health's lock is held.
func (q *question) ask() *answer {
	if q.last != nil {
		select {
		case <-q.last.done:
		default:
			return q.last
		}
	}
	a := &answer{done: make(chan struct{})}
	q.last = a
	go func() {
		defer close(a.done)
		defer func() {
			if r := recover(); r != nil {
				a.err = fmt.Errorf("check panicked: %v", r)
			}
		}()
		a.err = q.check()
	}()
	return a
}

// Ops serves /healthz (the process lives), /readyz (it can do its work) and /metrics.
type Ops struct {
	listener *listen.Listener
	server   *http.Server
	routes   []string
}

// maxScrapes bounds what gathers all metrics at a time: more are answered 503.
const maxScrapes = 4

// NewOps listens at once, so that a taken port is an error here.
func NewOps(addr string, health *Health, reg *prometheus.Registry, log *zap.Logger) (*Ops, error) {
	listener, err := listen.Open(addr, listen.Options{Name: "ops", Share: 16, Most: 64, Log: log, Registerer: reg})
	if err != nil {
		return nil, fmt.Errorf("listen for operations: %w", err)
	}
	mux, ops := http.NewServeMux(), &Ops{listener: listener}
	handle := func(pattern string, handler http.HandlerFunc) {
		mux.HandleFunc(pattern, handler)
		ops.routes = append(ops.routes, pattern)
	}
	// Who asks here has no token: an orchestrator, a metrics collector. So nothing in the answers may be secret or personal.
	handle("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]any{"status": "ok"})
	})
	handle("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		status, answer := http.StatusOK, map[string]any{"status": "ready"}
		if problems := health.Problems(); len(problems) > 0 {
			status, answer = http.StatusServiceUnavailable, map[string]any{"status": "not ready", "problems": problems}
		}
		if details := health.Details(); len(details) > 0 {
			answer["details"] = details
		}
		writeJSON(w, status, answer)
	})
	handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes}).ServeHTTP)
	ops.server = &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10, DisableGeneralOptionsHandler: true, ErrorLog: zap.NewStdLog(zap.NewNop()),
	}
	listener.Attach(ops.server)
	return ops, nil
}

// Name implements lifecycle.Service.
func (o *Ops) Name() string { return "ops" }

// Addr is where the server listens.
func (o *Ops) Addr() string { return o.listener.Addr().String() }

// Routes are the patterns that the server answers, as [http.ServeMux] has them.
func (o *Ops) Routes() []string { return o.routes }

// Close gives the listener back where Run is never called. It may be called after Run, and more than once.
func (o *Ops) Close() { _ = o.listener.Close() }

// Run serves until ctx is done.
func (o *Ops) Run(ctx context.Context) error { return Serve(ctx, o.server, o.listener, 2*time.Second) }

// Serve serves until ctx is done, then lets requests finish for at most grace.
func Serve(ctx context.Context, server *http.Server, listener net.Listener, grace time.Duration) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", listener.Addr(), err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	err := server.Shutdown(stop)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close()
	}
	if served := <-failed; err == nil && !errors.Is(served, http.ErrServerClosed) {
		err = served
	}
	if err != nil {
		return fmt.Errorf("stop serving %s: %w", listener.Addr(), err)
	}
	return nil
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}
