// Package console is the service that shows what Usher does: pages under /admin, JSON under /api.
//
// It guarantees that nobody reads it without the admin token, and that without a token it is open to
// this machine only: it binds to a loopback address and refuses requests that name another host, so
// that a web page cannot reach it through a name that points to 127.0.0.1. It reads and never writes:
// what changes the world goes through events, such as that of a user who is asked for before the webhook came.
package console

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// Name is the service's name in logs, health checks and the broker's connection list.
const Name = "console"

// Limits of the HTTP server.
const (
	readTimeout  = 10 * time.Second
	writeTimeout = 20 * time.Second
	maxHeader    = 16 << 10        // bytes
	askTimeout   = 3 * time.Second // for one question to the broker or the database
	stopGrace    = 5 * time.Second // for requests in flight when the service stops
)

// Config is what the console needs to know.
type Config struct {
	Addr       string // listener, host:port; port 0 takes a free one
	AdminToken string // empty: Addr must be a loopback address
	Source     string // that a user is looked for in where the request names none
	Sources    []clerk.Source
}

// ConfigFrom takes the console's part of the settings.
func ConfigFrom(s *config.Settings) Config {
	return Config{Addr: s.ConsoleAddr, AdminToken: s.AdminToken, Source: s.Source, Sources: clerk.SourcesFrom(s)}
}

// Validate names every setting that is missing or wrong. The error is config.Problems.
func (c Config) Validate() error {
	if c.AdminToken == "" && !config.IsLoopback(c.Addr) {
		return config.Problems{fmt.Sprintf("USHER_CONSOLE_ADDR: %q is not a loopback address and USHER_ADMIN_TOKEN is not set", c.Addr)}
	}
	return nil
}

// Deps are what the console takes from its process, which closes them.
type Deps struct {
	JetStream  jetstream.JetStream
	DB         *gorm.DB // nil: what is in the database is not shown
	Log        *zap.Logger
	Health     *observe.Health
	Registerer prometheus.Registerer // nil for none
}

// Console implements lifecycle.Service.
type Console struct {
	cfg      Config
	js       jetstream.JetStream
	db       *gorm.DB // may be nil
	log      *zap.Logger
	listener net.Listener
	server   *http.Server
	presence *stream.Presence
	database *database.Watch // nil without a database
	ensurer  *ensurer
}

// New listens at once, so that a taken port is an error here. The broker may be away: the check "console" in health
// says so until it is there. Run closes the listener; Close does where Run is never called.
func New(cfg Config, deps Deps) (*Console, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	log := deps.Log.With(zap.String("service", Name))
	ensurer, err := newEnsurer(cfg.Sources, deps, log)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", Name, err)
	}
	listener, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		ensurer.Close()
		return nil, fmt.Errorf("start %s: listen: %w", Name, err)
	}
	c := &Console{
		cfg: cfg, js: deps.JetStream, db: deps.DB, log: log, listener: listener, ensurer: ensurer,
		presence: stream.NewPresence(deps.JetStream.Conn(), deps.JetStream, log, stream.Events, stream.DeadLetters),
	}
	c.server = &http.Server{
		Handler: c.guard(c.routes()), ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader,
		ErrorLog: zap.NewStdLog(log),
	}
	deps.Health.Add(Name, c.presence.Check)
	if c.db != nil {
		c.database = database.NewWatch(c.db)
		deps.Health.Add(Name+" database", c.database.Check)
	}
	return c, nil
}

// Name implements lifecycle.Service.
func (c *Console) Name() string { return Name }

// Addr is where the console listens.
func (c *Console) Addr() string { return c.listener.Addr().String() }

// Close gives back what New opened. It may be called after Run, and more than once.
func (c *Console) Close() {
	_ = c.listener.Close()
	c.ensurer.Close()
}

// Run serves until ctx is done, then lets requests in flight finish for five seconds.
func (c *Console) Run(ctx context.Context) error {
	defer c.Close()
	watch, stop := context.WithCancel(ctx)
	var watched sync.WaitGroup
	watched.Go(func() { c.presence.Run(watch) })
	if c.database != nil {
		watched.Go(func() { c.database.Run(watch) })
	}
	c.log.Info("started", zap.String("addr", c.Addr()))
	err := observe.Serve(ctx, c.server, c.listener, stopGrace)
	stop()
	watched.Wait()
	if err != nil {
		return fmt.Errorf("run %s: %w", Name, err)
	}
	c.log.Info("stopped")
	return nil
}

// guard lets in whom the settings allow, and tells browsers to keep everything to themselves.
func (c *Console) guard(next http.Handler) http.Handler {
	want := sha256.Sum256([]byte(c.cfg.AdminToken))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if c.cfg.AdminToken == "" {
			if !loopbackHost(r.Host) {
				writeError(w, http.StatusForbidden, "forbidden_host", "without USHER_ADMIN_TOKEN the console answers only to localhost")
				return
			}
			next.ServeHTTP(w, r)
			return
		}
		scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		// Hashed first: the comparison then takes the same time for a token of any length.
		have := sha256.Sum256([]byte(token))
		if !strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(have[:], want[:]) != 1 {
			h.Set("WWW-Authenticate", `Bearer realm="usher"`)
			writeError(w, http.StatusUnauthorized, "unauthorized", "send the admin token as Authorization: Bearer …")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// loopbackHost tells whether a Host header, with or without a port, names this machine.
func loopbackHost(host string) bool {
	if config.IsLoopback(host) {
		return true
	}
	return config.IsLoopback(net.JoinHostPort(strings.Trim(host, "[]"), "0"))
}

// ask bounds one question to the broker or the database by time.
func ask(r *http.Request) (context.Context, context.CancelFunc) {
	return context.WithTimeout(r.Context(), askTimeout)
}

// unavailable says in one code and sentence why something could not be read.
func unavailable(err error) (code, message string) {
	if errors.Is(err, stream.ErrSetup) {
		return "setup_missing", stream.ErrSetup.Error()
	}
	if err = stream.Explain(err); errors.Is(err, stream.ErrUnavailable) {
		return "broker_unavailable", stream.Words(err).Error()
	}
	return "broker_unavailable", "the broker does not answer"
}
