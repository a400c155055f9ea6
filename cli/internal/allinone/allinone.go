// Package allinone runs the whole of Usher in one process: an embedded broker, the database, and
// the same services that run as processes of their own elsewhere. It is `usher dev`, `usher serve` and
// the end-to-end fixture, so the demo cannot rot.
package allinone

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/ingest"
	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/lag"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/reconciler"
	"github.com/usherhq/usher/worker"
)

// Config says what to run.
type Config struct {
	Settings *config.Settings
	Mode     string // dev or serve
	// Dir holds the embedded broker and, by default, the database; it lies within the data folder, where
	// usher.json is.
	Dir string
	// Ephemeral: Dir is emptied before the start and removed at the end.
	Ephemeral bool
	// SigningSecret is written to the state file, for `usher trigger`: only for a secret that dev made up.
	SigningSecret string
	// ClerkAPIURL and ClerkSecretKey are of an emulated Clerk, for the state file. The reconciler then does not sweep by itself: a story
	// that is being told is not drift, and the ledger counts what was sent.
	ClerkAPIURL    string
	ClerkSecretKey string
	// ChangeWorker changes how the worker works; nil: as the settings say.
	ChangeWorker func(*worker.Config)
	Log          *zap.Logger
}

// Instance is a running Usher.
type Instance struct {
	State    State
	DB       *gorm.DB
	JS       jetstream.JetStream
	Health   *observe.Health
	Registry *prometheus.Registry
	// TokenIsNew reports that State.AdminToken was made by this start, and is to be shown once.
	TokenIsNew bool

	cfg      Config
	starting atomic.Pointer[string] // what is waited for: readiness says no
	lag      *lag.Watch
	routes   map[string][]string // of every listener, by its URL
	services []lifecycle.Service
	closers  lifecycle.Closers
}

// New opens everything in the order of need: data folder, broker, streams, ingest, database, migrations, the rest. Ingest works from
// then on: for what comes while the database is waited for, the broker is enough. What was opened is closed again when
// a later step fails. Run does the work; Close must follow.
func New(ctx context.Context, cfg Config) (_ *Instance, err error) {
	i := &Instance{cfg: cfg, Registry: observe.NewRegistry(), Health: &observe.Health{}, routes: map[string][]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Close())
		}
	}()
	s, log := cfg.Settings, cfg.Log
	for _, warning := range s.Warnings() {
		log.Warn(warning)
	}
	if err := i.takeDataDir(); err != nil {
		return nil, err
	}
	b, err := i.broker()
	if err != nil {
		return nil, err
	}
	topology := stream.Topology{Replicas: s.StreamReplicas, MaxBytes: int64(s.StreamMaxBytes), Handlers: worker.Specs()}
	if i.JS, err = i.connect(b, "setup"); err != nil {
		return nil, err
	}
	if b.embedded {
		if err := i.setUpStreams(ctx, b, topology); err != nil {
			return nil, err
		}
		i.warnOfSpace(ctx, topology)
	}
	i.waitingFor("the broker")
	i.Health.Add("start", func() error {
		if what := i.starting.Load(); what != nil {
			return errors.New("waiting for " + *what)
		}
		return nil
	})
	if err := i.openFront(b); err != nil {
		return nil, err
	}
	if !b.embedded {
		if err := i.awaitBroker(ctx, topology); err != nil {
			return nil, err
		}
	}
	i.waitingFor("the database, or bringing it up to date")
	if cfg.Mode == "serve" { // for real: a machine that starts may have its database a minute later
		i.DB, err = database.Await(ctx, s.DatabaseURL, s.DatabaseSchema, log, func(err error) { i.waitingFor("the database: " + err.Error()) }, s.DatabaseSetting())
	} else {
		i.DB, err = database.Open(ctx, s.DatabaseURL, s.DatabaseSchema, s.DatabaseSetting())
	}
	if err != nil {
		return nil, err
	}
	i.closers.Add(func() error { return database.Close(i.DB) })
	i.waitingFor("the database, or bringing it up to date")
	if cfg.Mode == "dev" {
		if err := takeDatabase(ctx, i.DB, s.DatabaseSchema, s.SourceNames()); err != nil {
			return nil, err
		}
	}
	report, err := Setup(ctx, i.DB, i.JS, topology, i.mode(b))
	if err != nil {
		return nil, err
	}
	for _, d := range report.Streams.Differences {
		if b.embedded && d.Field == "max_bytes" { // see limits
			log.Info("the stream's limit is lowered as soon as there is room", zap.String("object", d.Object), zap.String("have", d.Have), zap.String("want", d.Want))
			continue
		}
		level := zap.WarnLevel
		if d.Fatal {
			level = zap.ErrorLevel
		}
		log.Log(level, "not as configured, and left as it is", zap.String("object", d.Object), zap.String("field", d.Field), zap.String("have", d.Have), zap.String("want", d.Want),
			zap.Bool("fatal", d.Fatal), zap.String("effect", d.Effect), zap.String("fix", d.Fix))
	}
	if err := i.warnOfSources(ctx); err != nil {
		return nil, err
	}
	if b.embedded {
		if err := i.takeBack(ctx, topology); err != nil {
			return nil, err
		}
	}
	if err := i.open(b); err != nil {
		return nil, err
	}
	i.State.PID, i.State.Mode, i.State.StartedAt = os.Getpid(), cfg.Mode, time.Now().UTC()
	i.State.EmbeddedBroker = b.embedded
	if !b.embedded {
		i.State.NATSCreds, i.State.NATSCA, i.State.NATSCert, i.State.NATSKey = absolute(s.NATSCreds), absolute(s.NATSCA), absolute(s.NATSCert), absolute(s.NATSKey)
	}
	i.State.NATSURL, i.State.DatabaseURL, i.State.DatabaseSchema = b.url, absoluteDatabase(s.DatabaseURL), s.DatabaseSchema
	i.State.SigningSecret, i.State.ClerkAPIURL, i.State.ClerkSecretKey = cfg.SigningSecret, cfg.ClerkAPIURL, cfg.ClerkSecretKey
	i.State.Instances = worker.ConfigFrom(s).Instances
	i.State.Settings = s.List()
	if err := i.State.write(s.DataDir); err != nil {
		return nil, err
	}
	i.closers.Add(func() error { return os.Remove(statePath(s.DataDir)) })
	i.lag.Look(ctx)
	i.starting.Store(nil)
	return i, nil
}

// warnOfSources logs whose rows are nobody's.
func (i *Instance) warnOfSources(ctx context.Context) error {
	unknown, err := mirror.UnknownSources(ctx, i.DB, i.cfg.Settings.SourceNames())
	if err != nil {
		return err
	}
	for _, warning := range unknown {
		i.cfg.Log.Warn(warning)
	}
	return nil
}

func (i *Instance) waitingFor(what string) { i.starting.Store(&what) }

// mode is how much of the broker's streams may be changed: what this process owns follows its settings.
func (i *Instance) mode(b brokerAccess) Mode {
	if b.embedded {
		return Apply
	}
	return Create
}

// setUpStreams creates and, at the embedded broker, changes what is not as the settings say.
func (i *Instance) setUpStreams(ctx context.Context, b brokerAccess, topology stream.Topology) error {
	made, err := ensureStreams(ctx, i.JS, topology, i.mode(b))
	for _, d := range made.Changed {
		i.cfg.Log.Info("changed as configured", zap.String("object", d.Object), zap.String("field", d.Field), zap.String("was", d.Have), zap.String("is", d.Want))
	}
	return err
}

// takeDataDir makes the data folder, which only its owner can read, and locks it.
func (i *Instance) takeDataDir() error {
	dir := i.cfg.Settings.DataDir
	_, statErr := os.Stat(dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	held, err := lock(dir)
	if err != nil {
		return err
	}
	i.closers.Add(func() error {
		err := errors.Join(os.Remove(held.Path()), held.Unlock())
		if statErr != nil && i.cfg.Mode == "dev" { // dev leaves nothing behind that it made, if nothing is in it
			_ = os.Remove(dir)
		}
		return err
	})
	if i.cfg.Ephemeral { // also what a killed one left
		if err := os.RemoveAll(i.cfg.Dir); err != nil {
			return fmt.Errorf("empty data folder: %w", err)
		}
		i.closers.Add(func() error { return os.RemoveAll(i.cfg.Dir) })
	}
	// What the broker makes lies in a folder that is closed to others, whatever it thinks of modes.
	if err := os.MkdirAll(filepath.Join(i.cfg.Dir, brokerFolder), 0o700); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	return protect(dir, i.cfg.Log)
}

// brokerAccess is how the services of this process reach the broker.
type brokerAccess struct {
	url, creds string
	embedded   bool // it is this process's own
	options    []nats.Option
}

// broker starts the embedded broker, unless the settings name one.
func (i *Instance) broker() (brokerAccess, error) {
	s := i.cfg.Settings
	if s.NATSURL != "" {
		return brokerAccess{url: s.NATSURL, creds: s.NATSCreds, options: []nats.Option{stream.TLS(s.NATSCA, s.NATSCert, s.NATSKey)}}, nil
	}
	password := rand.Text()
	srv, err := startBroker(brokerConfig{
		dir: filepath.Join(i.cfg.Dir, brokerFolder), password: password,
	}, i.cfg.Log)
	if err != nil {
		return brokerAccess{}, err
	}
	i.closers.Add(func() error {
		srv.Shutdown()
		srv.WaitForShutdown()
		return nil
	})
	check := storageCheck(srv, i.cfg.Dir)
	i.Health.Add("broker storage", check)
	i.services = append(i.services, frozen{check: check, dir: filepath.Join(i.cfg.Dir, brokerFolder), after: frozenAfter, every: frozenEvery})
	url, err := brokerURL(srv, password)
	return brokerAccess{url: url, embedded: true, options: inProcess(srv, password)}, err
}

// connect opens a connection of its own for a service, as it would have as a process of its own.
func (i *Instance) connect(b brokerAccess, service string) (jetstream.JetStream, error) {
	nc, err := stream.Connect(b.url, b.creds, service, i.cfg.Log.With(zap.String("service", service)), b.options...)
	if err != nil {
		return nil, err
	}
	i.closers.Add(func() error { nc.Close(); return nil })
	i.services = append(i.services, stream.Guard{Conn: nc})
	return stream.JetStream(nc)
}

// durability is what is known about whether the broker syncs; of the embedded one it is known.
func (i *Instance) durability(ctx context.Context, b brokerAccess, js jetstream.JetStream) stream.Durability {
	if b.embedded {
		return EmbeddedDurability
	}
	return stream.AskDurability(ctx, js, i.cfg.Settings.NATSMonitorURL, i.cfg.Settings.StreamReplicas)
}

// devWait is how long dev waits for a broker that is not its own.
const devWait = 10 * time.Second

// awaitBroker creates what is missing at an external broker, which serve waits for as for a database: a machine that starts may have
// it a minute later. A broker that must be refused, and what waiting cannot cure, is an error at once.
func (i *Instance) awaitBroker(ctx context.Context, topology stream.Topology) error {
	var limit time.Duration // none
	if i.cfg.Mode != "serve" {
		limit = devWait
	}
	pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(100*time.Millisecond), backoff.WithMaxInterval(2*time.Second), backoff.WithMaxElapsedTime(limit))
	told := ""
	err := backoff.RetryNotify(func() error {
		err := stream.Connected(i.JS.Conn())
		if err == nil && !i.cfg.Settings.AllowUnsynced {
			err = i.durability(ctx, brokerAccess{}, i.JS).Refuse()
		}
		if err == nil {
			err = i.setUpStreams(ctx, brokerAccess{}, topology)
		}
		if err != nil && !errors.Is(err, stream.ErrUnavailable) {
			return backoff.Permanent(err)
		}
		return err
	}, backoff.WithContext(pauses, ctx), func(err error, _ time.Duration) {
		i.waitingFor("the broker: " + err.Error())
		if told != err.Error() {
			i.cfg.Log.Warn("broker is unavailable, waiting for it", zap.Error(err))
		}
		told = err.Error()
	})
	if err == nil && told != "" {
		i.cfg.Log.Info("broker is available")
	}
	return err //nolint:wrapcheck // ours, in words
}

// takeBack makes the events that a killed process held available at once instead of after [stream.AckWait]. Only for
// a broker that nobody else works on: what was settled above the ack floor comes again, and the inbox knows it.
func (i *Instance) takeBack(ctx context.Context, topology stream.Topology) error {
	for _, h := range topology.Handlers {
		consumer, err := i.JS.Consumer(ctx, stream.Events, h.Name)
		if err == nil && consumer.CachedInfo().NumAckPending > 0 {
			_, err = i.JS.ResetConsumer(ctx, stream.Events, h.Name)
		}
		if err != nil {
			return fmt.Errorf("take back the events of handler %s: %w", h.Name, err)
		}
	}
	return nil
}

// front is what works from New on: the listeners of the process and of the webhooks. As a service it ends with them.
type front struct {
	stop context.CancelFunc
	done chan error // buffered; Run takes its one value
}

func (*front) Name() string { return "front" }

func (f *front) Run(ctx context.Context) error {
	select {
	case err := <-f.done:
		return err
	case <-ctx.Done():
		f.stop()
		return <-f.done
	}
}

// openFront makes the services that need no database, and lets them work.
func (i *Instance) openFront(b brokerAccess) error {
	s, log := i.cfg.Settings, i.cfg.Log
	ops, err := observe.NewOps(s.OpsAddr, i.Health, i.Registry, log)
	if err != nil {
		return err
	}
	i.closers.Add(func() error { ops.Close(); return nil })
	ingestJS, err := i.connect(b, "ingest")
	if err != nil {
		return err
	}
	publisher := stream.NewPublisher(ingestJS, s.StreamReplicas)
	i.closers.Add(func() error { publisher.Close(); return nil })
	ingestConfig, err := ingest.ConfigFrom(s)
	if err != nil {
		return err
	}
	in, err := ingest.New(ingestConfig, ingest.Deps{
		Publisher: publisher, JetStream: ingestJS, Logger: log, Registerer: i.Registry, Health: i.Health,
		Durability: func(ctx context.Context) stream.Durability { return i.durability(ctx, b, ingestJS) },
	})
	if err != nil {
		return err
	}
	i.closers.Add(func() error { _ = in.Close(); return nil }) // Run closes it too
	if i.lag, err = lag.New(i.JS, nil, log, i.Registry); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	f := &front{stop: stop, done: make(chan error, 1)}
	var ended sync.WaitGroup
	ended.Go(func() { f.done <- lifecycle.Run(ctx, ops, in, i.lag) })
	i.closers.Add(func() error {
		stop()
		ended.Wait()
		return nil
	})
	i.services = append(i.services, f)
	i.State.IngestURL = "http://" + reachable(in.Addr()) + "/webhooks/clerk"
	i.State.OpsURL = "http://" + reachable(ops.Addr())
	i.routes["http://"+reachable(in.Addr())] = []string{"POST " + ingest.Path, "POST " + ingest.Path + "/{source}"}
	i.routes[i.State.OpsURL] = ops.Routes()
	return nil
}

// open makes the other services. Their listener opens here, so a taken port is an error of New.
func (i *Instance) open(b brokerAccess) error {
	s, log := i.cfg.Settings, i.cfg.Log
	workerJS, err := i.connect(b, "worker")
	if err != nil {
		return err
	}
	workerConfig := worker.ConfigFrom(s)
	if b.embedded { // the worker makes the room for a lower limit
		workerConfig.MaxBytes = int64(s.StreamMaxBytes)
		i.services = append(i.services, limits{i.JS, stream.Topology{Replicas: s.StreamReplicas, MaxBytes: int64(s.StreamMaxBytes), Handlers: worker.Specs()}, log})
	}
	if i.cfg.ChangeWorker != nil {
		i.cfg.ChangeWorker(&workerConfig)
	}
	w, err := worker.New(workerConfig, worker.Deps{JetStream: workerJS, DB: i.DB, Log: log, Registerer: i.Registry, Health: i.Health})
	if err != nil {
		return err
	}
	recJS, err := i.connect(b, reconciler.Name)
	if err != nil {
		return err
	}
	recConfig := reconciler.ConfigFrom(s)
	if i.cfg.ClerkSecretKey != "" {
		recConfig.Sources = nil
	}
	rec, err := reconciler.New(recConfig, reconciler.Deps{JetStream: recJS, DB: i.DB, Log: log, Registerer: i.Registry, Health: i.Health})
	if err != nil {
		return err
	}
	i.closers.Add(func() error { rec.Close(); return nil })
	conJS, err := i.connect(b, console.Name)
	if err != nil {
		return err
	}
	conConfig := console.ConfigFrom(s)
	conConfig.DataDir = i.cfg.Dir
	if i.cfg.ClerkSecretKey != "" { // the emulated one, which has no limits
		conConfig.Sources = []clerk.Source{{Name: s.Source, APIURL: i.cfg.ClerkAPIURL, SecretKey: i.cfg.ClerkSecretKey, Quota: -1}}
	}
	con, err := console.New(conConfig, console.Deps{JetStream: conJS, DB: i.DB, Log: log, Registerer: i.Registry, Health: i.Health})
	if err != nil {
		return err
	}
	i.closers.Add(func() error { con.Close(); return nil })
	i.State.AdminToken, i.TokenIsNew = con.MadeToken()
	i.services = append(i.services, w, rec, con)
	i.lag.UseDatabase(i.DB)
	i.State.ConsoleURL = "http://" + reachable(con.Addr())
	i.routes[i.State.ConsoleURL] = con.Routes()
	return nil
}

// Run works until ctx is done or a service fails.
func (i *Instance) Run(ctx context.Context) error {
	return lifecycle.Run(ctx, i.services...)
}

// Close closes everything and takes the state file away. It may be called twice.
func (i *Instance) Close() error { return i.closers.Close() }

// WaitReady returns once every health check passes, or with what does not when ctx is done.
func (i *Instance) WaitReady(ctx context.Context) error {
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		problems := i.Health.Problems()
		if len(problems) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready: %v: %w", problems, ctx.Err())
		case <-ticker.C:
		}
	}
}

// reachable turns a listener's address into one that a client on this machine can dial.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// absoluteDatabase makes a SQLite path good for a command that is started elsewhere.
func absoluteDatabase(url string) string {
	path, ok := strings.CutPrefix(url, "sqlite:")
	if !ok {
		return url
	}
	return "sqlite:" + absolute(strings.TrimPrefix(path, "//")) // as pkg/database reads it
}

// absolute makes a path good for a command that is started elsewhere. Empty stays empty.
func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil && path != "" {
		return abs
	}
	return path
}
