// Package console is the service that shows what Usher does: pages under /admin, JSON under /api.
//
// It guarantees that nobody reads it without the admin token, and that without a token it is open to
// this machine only: it binds to a loopback address and refuses requests that name another host, so
// that a web page cannot reach it through a name that points to 127.0.0.1. It reads and never writes:
// what changes the world goes through events.
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
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// Name is the service's name in logs, health checks and the broker's connection list.
const Name = "console"

// Limits of the HTTP server.
const (
	readTimeout  = 10 * time.Second
	writeTimeout = 15 * time.Second
	maxHeader    = 16 << 10        // bytes
	askTimeout   = 3 * time.Second // for one question to the broker or the database
	stopGrace    = 5 * time.Second // for requests in flight when the service stops
)

// Config is what the console needs to know.
type Config struct {
	Addr        string        // listener, host:port; port 0 takes a free one
	AdminToken  string        // empty: Addr must be a loopback address
	NATSURL     string        // the broker; required
	NATSCreds   string        // credentials file for it, empty for none
	NATSOptions []nats.Option // come last and may override, as for a broker in the same process
	DB          *gorm.DB      // read only, the caller closes it; nil: what is in the database is not shown
}

// ConfigFrom takes the console's part of the settings. DB is the caller's to open.
func ConfigFrom(s *config.Settings) Config {
	return Config{Addr: s.ConsoleAddr, AdminToken: s.AdminToken, NATSURL: s.NATSURL, NATSCreds: s.NATSCreds}
}

// Validate names every setting that is missing or wrong. The error is config.Problems.
func (c Config) Validate() error {
	var problems config.Problems
	if c.NATSURL == "" {
		problems = append(problems, "USHER_NATS_URL: not set: the console needs the broker (`usher serve` brings its own)")
	}
	if c.AdminToken == "" && !config.IsLoopback(c.Addr) {
		problems = append(problems, fmt.Sprintf("USHER_CONSOLE_ADDR: %q is not a loopback address and USHER_ADMIN_TOKEN is not set", c.Addr))
	}
	if len(problems) > 0 {
		return problems
	}
	return nil
}

// Console implements lifecycle.Service.
type Console struct {
	cfg      Config
	log      *zap.Logger
	listener net.Listener
	server   *http.Server
	nc       *nats.Conn
	js       jetstream.JetStream
	presence *stream.Presence
}

// New listens at once, so that a taken port is an error here, and connects to the broker, which may be
// away: the check "console" in health says so until it is there. Run closes both; Close does where Run
// is never called.
func New(cfg Config, log *zap.Logger, health *observe.Health) (*Console, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	log = log.With(zap.String("service", Name))
	nc, err := stream.Connect(cfg.NATSURL, cfg.NATSCreds, Name, log, cfg.NATSOptions...)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", Name, err)
	}
	js, err := stream.JetStream(nc)
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("start %s: %w", Name, err)
	}
	listener, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("start %s: listen: %w", Name, err)
	}
	c := &Console{
		cfg: cfg, log: log, listener: listener, nc: nc, js: js,
		presence: stream.NewPresence(nc, js, log, stream.Events, stream.DeadLetters),
	}
	c.server = &http.Server{
		Handler: c.guard(c.routes()), ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader,
		ErrorLog: zap.NewStdLog(log),
	}
	health.Add(Name, c.presence.Check)
	return c, nil
}

// Name implements lifecycle.Service.
func (c *Console) Name() string { return Name }

// Addr is where the console listens.
func (c *Console) Addr() string { return c.listener.Addr().String() }

// Close gives back what New opened. It may be called after Run, and more than once.
func (c *Console) Close() {
	_ = c.listener.Close()
	c.nc.Close()
}

// Run serves until ctx is done, then lets requests in flight finish for five seconds.
func (c *Console) Run(ctx context.Context) error {
	defer c.Close()
	watch, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		c.presence.Run(watch)
	}()
	c.log.Info("started", zap.String("addr", c.Addr()))
	err := observe.Serve(ctx, c.server, c.listener, stopGrace)
	stop()
	<-watched
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
	return "broker_unavailable", "the broker does not answer"
}
