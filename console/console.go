// Package console is the service that shows what Usher does: pages under /admin, JSON under /api.
//
// It guarantees that nobody reads it without a token, from this machine neither: a proxy before it, or a web page in a browser
// here, comes from a loopback address too. Where no admin token is set it makes one, keeps it in the data folder and binds to a
// loopback address only. A browser exchanges the token for a session. The console reads and never writes: what changes
// the world goes through events, such as that of a user who is asked for before the webhook came.
package console

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/listen"
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
	AdminToken string // empty: one is made and kept in DataDir, and Addr must be a loopback address
	AppToken   string // of applications, for `ensure` only; empty: none
	DataDir    string // keeps the token that is made
	// TrustedProxies are believed who their senders are, which only the log says.
	TrustedProxies []netip.Prefix
	Source         string // that a user is looked for in where the request names none
	Sources        []clerk.Source
}

// ConfigFrom takes the console's part of the settings.
func ConfigFrom(s *config.Settings) Config {
	return Config{Addr: s.ConsoleAddr, AdminToken: s.AdminToken, AppToken: s.AppToken, DataDir: s.DataDir, TrustedProxies: s.TrustedProxies, Source: s.Source, Sources: clerk.SourcesFrom(s)}
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
	listener *listen.Listener
	server   *http.Server
	presence *stream.Presence
	database *database.Watch // nil without a database
	ensurer  *ensurer
	access   *access
	made     bool // the token, by this console or an earlier one
	fresh    bool // it was made now
}

// New listens at once, so that a taken port is an error here. The broker may be away: the check "console" in health
// says so until it is there. Run closes the listener; Close does where Run is never called.
func New(cfg Config, deps Deps) (*Console, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	log := deps.Log.With(zap.String("service", Name))
	made, fresh := cfg.AdminToken == "", false
	if made {
		var err error
		if cfg.AdminToken, fresh, err = madeToken(cfg.DataDir, log); err != nil {
			return nil, tokenError{fmt.Errorf("start %s: %w", Name, err)}
		}
	}
	ensurer, err := newEnsurer(cfg.Sources, deps, log)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", Name, err)
	}
	listener, err := listen.Open(cfg.Addr, listen.Options{Name: Name, Share: 8, Most: 256, Trusted: cfg.TrustedProxies, Log: log, Registerer: deps.Registerer})
	if err != nil {
		ensurer.Close()
		return nil, fmt.Errorf("start %s: %w", Name, err)
	}
	c := &Console{
		cfg: cfg, js: deps.JetStream, db: deps.DB, log: log, listener: listener, ensurer: ensurer,
		access: newAccess(cfg, listener.Addr(), deps, log), made: made, fresh: fresh,
		presence: stream.NewPresence(deps.JetStream.Conn(), deps.JetStream, log, stream.Events, stream.DeadLetters),
	}
	c.server = &http.Server{
		Handler: c.guard(c.routes()), ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader,
		DisableGeneralOptionsHandler: true, // which answers OPTIONS * before the guard
		ErrorLog:                     zap.NewStdLog(log),
	}
	listener.Attach(c.server)
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

// MadeToken is the admin token that the data folder keeps, "" where one is set. fresh reports whether this console made it: then it is to be
// shown, this once.
func (c *Console) MadeToken() (token string, fresh bool) {
	if !c.made {
		return "", false
	}
	return c.cfg.AdminToken, c.fresh
}

// LoginURL is a link that logs a browser in at a console; base is the console's address, such as http://127.0.0.1:8081.
func LoginURL(base, token string) string {
	return base + loginPath + "?token=" + url.QueryEscape(token)
}

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
	fields := []zap.Field{zap.String("addr", c.Addr())}
	if c.made {
		fields = append(fields, zap.String("admin_token_file", filepath.Join(c.cfg.DataDir, TokenFile)))
	}
	c.log.Info("started", fields...)
	err := observe.Serve(ctx, c.server, c.listener, stopGrace)
	stop()
	watched.Wait()
	if err != nil {
		return fmt.Errorf("run %s: %w", Name, err)
	}
	c.log.Info("stopped")
	return nil
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
