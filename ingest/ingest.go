// Package ingest is the way in for Clerk's webhooks: it verifies a delivery, stores it in the event
// stream and answers.
//
// It guarantees that a 2xx means "on disk" (where the broker syncs always), that the bytes stored are the
// bytes that were signed, but for the texts and codes of mails and text messages, which are not kept, and that a request that was taken is answered, also while the service
// stops. It refuses whatever is not signed by a known secret within the last five minutes. It knows no
// database and no Clerk API, and it never creates a stream: a missing one makes it not ready.
package ingest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/listen"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// Config says how ingest listens and what it takes. Zero means the default in the comment.
type Config struct {
	Addr string // ":8080"
	// Sources that may deliver, the default one first. Those without secrets are not served; one must have some.
	Sources []Source
	// AllowUnsynced takes a broker that is known not to sync to disk before it confirms.
	AllowUnsynced bool
	// KeepMessages stores mails and text messages with their texts, codes and links.
	KeepMessages bool
	// TrustedProxies are believed who their senders are, which only the log says.
	TrustedProxies []netip.Prefix

	MaxBody              int64         // 1 MiB; less where the broker takes less
	MaxInFlight          int           // 1024 verified events being stored at once; 503 beyond
	MaxBodyBytesInFlight int64         // 64 MiB of bodies in memory; 503 beyond
	roomWait             time.Duration // 2 s; how long a body waits for the room of others
	bodyPatience         time.Duration // 3 s; how long a body may be slower than 16 KiB/s
	HeaderTimeout        time.Duration // 5 s to send the headers
	BodyTimeout          time.Duration // 10 s to send the whole request
	IdleTimeout          time.Duration // 2 min between two requests of one connection
	PublishTimeout       time.Duration // 4 s ([stream.PublishTimeout]) for the broker to store an event
	Grace                time.Duration // 10 s to answer what was taken when the service stops; must exceed PublishTimeout
}

// Source is one Clerk instance that delivers here.
type Source struct {
	Name    string
	Secrets config.Secrets
}

const maxHeaderBytes = 16 << 10

func (c Config) withDefaults() Config {
	c.Addr = cmp.Or(c.Addr, ":8080")
	c.MaxBody = cmp.Or(c.MaxBody, 1<<20)
	c.MaxInFlight = cmp.Or(c.MaxInFlight, 1024)
	c.MaxBodyBytesInFlight = cmp.Or(c.MaxBodyBytesInFlight, 64<<20)
	c.roomWait = cmp.Or(c.roomWait, roomWait)
	c.bodyPatience = cmp.Or(c.bodyPatience, bodyPatience)
	c.HeaderTimeout = cmp.Or(c.HeaderTimeout, 5*time.Second)
	c.BodyTimeout = cmp.Or(c.BodyTimeout, 10*time.Second)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, 2*time.Minute)
	c.PublishTimeout = cmp.Or(c.PublishTimeout, stream.PublishTimeout)
	c.Grace = cmp.Or(c.Grace, 10*time.Second)
	return c
}

// Validate names every field that cannot work. The error is [config.Problems] and holds no secret.
func (c Config) Validate() error {
	c = c.withDefaults()
	var problems config.Problems
	seen, served := map[string]bool{}, false
	for _, src := range c.Sources {
		switch {
		case src.Name == "" || strings.ContainsAny(src.Name, "/ ") || !printable(src.Name):
			problems = append(problems, fmt.Sprintf("Sources: %q is not a name", src.Name))
		case seen[src.Name]:
			problems = append(problems, fmt.Sprintf("Sources: %s stands there twice", src.Name))
		}
		seen[src.Name] = true
		for _, secret := range src.Secrets {
			served = true
			if err := new(config.Secrets).EnvDecode(context.Background(), secret); err != nil {
				problems = append(problems, fmt.Sprintf("Sources: %s: %v", src.Name, err))
			}
		}
	}
	if !served {
		problems = append(problems, "CLERK_WEBHOOK_SIGNING_SECRET: no source has a signing secret: copy it (whsec_…) from Clerk's dashboard, Webhooks, your endpoint")
	}
	for name, v := range map[string]int64{
		"MaxBody": c.MaxBody, "MaxInFlight": int64(c.MaxInFlight), "MaxBodyBytesInFlight": c.MaxBodyBytesInFlight,
		"HeaderTimeout": int64(c.HeaderTimeout), "BodyTimeout": int64(c.BodyTimeout), "IdleTimeout": int64(c.IdleTimeout),
		"PublishTimeout": int64(c.PublishTimeout), "Grace": int64(c.Grace - c.PublishTimeout),
	} {
		if v <= 0 {
			problems = append(problems, name+": too small")
		}
	}
	if len(problems) > 0 {
		slices.Sort(problems)
		return problems
	}
	return nil
}

// ConfigFrom takes ingest's part of the settings. The error is [config.Problems].
func ConfigFrom(s *config.Settings) (Config, error) {
	c := Config{Addr: s.IngestAddr, AllowUnsynced: s.AllowUnsynced, KeepMessages: s.KeepMessageBodies, TrustedProxies: s.TrustedProxies}
	for _, src := range s.Sources {
		c.Sources = append(c.Sources, Source{Name: src.Name, Secrets: src.SigningSecrets})
	}
	if err := c.Validate(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// Publisher stores events. It is safe for concurrent use. A nil error means that the event is on disk; after any
// other the event may be stored all the same, and storing it again with the same id is safe.
type Publisher interface {
	Publish(ctx context.Context, e *event.Event) (stream.Ack, error)
}

// Deps are what ingest works with. Publisher is required.
type Deps struct {
	Publisher  Publisher
	JetStream  jetstream.JetStream // for readiness and max_payload; nil: neither is looked at
	Logger     *zap.Logger         // nil: none
	Registerer prometheus.Registerer
	Health     *observe.Health
	Now        func() time.Time // nil: time.Now
	// Durability asks whether the broker syncs to disk before it confirms; it is called whenever the connection is made, and may take
	// some seconds. Nil: nobody asks, and it counts as unknown.
	Durability func(context.Context) stream.Durability
}

// Service is the webhook listener. It implements lifecycle.Service and http.Handler.
type Service struct {
	cfg      Config
	deps     Deps
	log      *zap.Logger
	sources  map[string]verifier
	listener *listen.Listener
	broker   broker
	metrics  metrics

	slots    chan struct{}
	bodies   bodies
	stopping atomic.Bool
	verified atomic.Bool // the broker is not one that must be refused
}

// New opens the listener; it serves once Run is called. Run, or else Close, closes it.
func New(cfg Config, deps Deps) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s, err := newService(cfg, deps)
	if err != nil {
		return nil, err
	}
	if s.listener, err = listen.Open(s.cfg.Addr, listen.Options{
		Name: s.Name(), Share: 3, Most: 4096, Trusted: s.cfg.TrustedProxies, Log: s.deps.Logger.With(zap.String("service", s.Name())), Registerer: deps.Registerer,
	}); err != nil {
		return nil, fmt.Errorf("listen for webhooks: %w", err)
	}
	if deps.Health != nil {
		deps.Health.Add("broker", s.broker.check)
		deps.Health.Add("ingest", s.check)
	}
	return s, nil
}

// newService makes a Service that does not listen.
func newService(cfg Config, deps Deps) (*Service, error) {
	s := &Service{cfg: cfg.withDefaults(), deps: deps, sources: map[string]verifier{}}
	if s.deps.Now == nil {
		s.deps.Now = time.Now
	}
	if s.deps.Logger == nil {
		s.deps.Logger = zap.NewNop()
	}
	// Whoever floods the service must not flood its log; the metrics count everything.
	s.log = s.deps.Logger.With(zap.String("service", s.Name())).WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Second, 20, 1000)
	}))
	for _, src := range s.cfg.Sources {
		if len(src.Secrets) == 0 {
			continue
		}
		v, err := newVerifier(src.Secrets)
		if err != nil {
			return nil, fmt.Errorf("source %s: %w", src.Name, err)
		}
		s.sources[src.Name] = v
	}
	s.verified.Store(deps.Durability == nil || deps.JetStream == nil)
	s.slots = make(chan struct{}, s.cfg.MaxInFlight)
	s.bodies = bodies{
		limit: s.cfg.MaxBodyBytesInFlight, places: int(max(1, s.cfg.MaxBodyBytesInFlight/2/(s.cfg.MaxBody+perRequest))),
		wait: s.cfg.roomWait, patience: s.cfg.bodyPatience,
	}
	s.broker.js, s.broker.log, s.broker.source = deps.JetStream, s.log, s.cfg.Sources[0].Name
	var err error
	s.metrics, err = newMetrics(deps.Registerer)
	return s, err
}

// Name implements lifecycle.Service.
func (s *Service) Name() string { return "ingest" }

// Addr is where the service listens.
func (s *Service) Addr() string { return s.listener.Addr().String() }

// Close frees the listener of a service that was never run.
func (s *Service) Close() error {
	if err := s.listener.Close(); err != nil {
		return fmt.Errorf("close listener for webhooks: %w", err)
	}
	return nil
}

func (s *Service) check() error {
	if s.stopping.Load() {
		return errors.New("stopping")
	}
	if !s.verified.Load() {
		return s.unverified()
	}
	return nil
}

// maxBody is the largest body that the broker takes right now, in bytes.
func (s *Service) maxBody() int64 {
	if s.deps.JetStream != nil {
		if most := s.deps.JetStream.Conn().MaxPayload(); most > 0 { // 0 before the first connect
			return max(min(s.cfg.MaxBody, most-stream.HeaderRoom), 0)
		}
	}
	return s.cfg.MaxBody
}

// Run serves until ctx is done, then refuses what is new and answers what it has. The publisher must
// stay open until Run returned.
func (s *Service) Run(ctx context.Context) error {
	server := &http.Server{
		Handler:                      s,
		ReadHeaderTimeout:            s.cfg.HeaderTimeout,
		ReadTimeout:                  s.cfg.BodyTimeout,
		WriteTimeout:                 s.cfg.BodyTimeout + s.cfg.PublishTimeout + 5*time.Second,
		IdleTimeout:                  s.cfg.IdleTimeout,
		MaxHeaderBytes:               maxHeaderBytes - 4096, // net/http adds 4096
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     zap.NewStdLog(zap.NewNop()),
	}
	s.listener.Attach(server)
	probing, stopProbing := context.WithCancel(context.WithoutCancel(ctx))
	probed := make(chan struct{})
	ctx, refuse := context.WithCancelCause(ctx)
	defer refuse(nil)
	go func() {
		defer close(probed)
		var both sync.WaitGroup
		both.Go(func() { s.watchDurability(probing, refuse) })
		both.Go(func() { s.bodies.watch(probing) })
		s.broker.watch(probing)
		both.Wait()
	}()
	defer func() {
		stopProbing()
		<-probed
	}()
	s.log.Info("listening for webhooks", zap.String("addr", s.Addr()))

	// Not ready comes first; bodies that are still on their way then have until PublishTimeout before the
	// end of the grace period, so that their senders get an answer too.
	served := make(chan struct{})
	defer close(served)
	defer context.AfterFunc(ctx, func() {
		s.stopping.Store(true)
		select {
		case <-served:
		case <-time.After(s.cfg.Grace - s.cfg.PublishTimeout):
			s.bodies.stop()
		}
	})()
	err := observe.Serve(ctx, server, s.listener, s.cfg.Grace)
	if cause := context.Cause(ctx); errors.Is(cause, stream.ErrUnsynced) {
		return fmt.Errorf("listen for webhooks: %w", cause)
	}
	if err != nil {
		return err
	}
	s.log.Info("stopped listening for webhooks")
	return nil
}
