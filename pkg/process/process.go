// Package process is what the main of every service does the same: signals become a context, the environment becomes
// settings, what a service takes is made and handed to it, it runs beside the operations listener until it is told to
// stop, and everything is closed in reverse order.
//
// It guarantees that everything wrong with the settings is printed at once, with the service's name in front, and that the exit
// code tells a supervisor what to do: 0 stopped on request, 1 failed (try again), 2 wrong settings (trying again does
// not help). It opens no database, so that a service which needs none links none.
package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/redact"
	"github.com/usherhq/usher/pkg/stream"
)

// Exit codes.
const (
	Stopped       = 0 // on request
	Failed        = 1
	WrongSettings = 2
)

// Program is what a service's process does of its own.
type Program struct {
	// Name is the service's, in messages, in the log and in the broker's connection list.
	Name string
	// Short is one sentence on what it does, for --help.
	Short string
	// OpsAddr is where operations listen where USHER_OPS_ADDR is not set: each service has a port of its own, so that all of them run on
	// one machine. "" is the setting's default.
	OpsAddr string
	// Database says that the service uses one: the log of the start then names it, and where it comes from.
	Database bool
	// Check looks for what is wrong with the service's own settings and opens nothing; nil: they have no rules of their
	// own. Of a config.Problems every line is reported. It is asked also where other settings are wrong, which
	// then have their defaults.
	Check func(*config.Settings) error
	// Start makes the service and adds to the process's closers what it opens. An error after ctx is done counts as
	// stopped on request: it only did not get to the end of what it waited for.
	Start func(ctx context.Context, p *Process) (lifecycle.Service, error)
}

// Process is what every service takes from its process.
type Process struct {
	Settings *config.Settings
	Log      *zap.Logger
	Registry *prometheus.Registry
	Health   *observe.Health
	// Closers are closed in reverse order once the service has stopped, or could not start.
	Closers lifecycle.Closers
	// Beside are services that run with the one that Start returns: guards of what the process cannot do without, watchers.
	Beside []lifecycle.Service

	name    string
	waiting atomic.Pointer[string] // what the start waits for, nil once it has ended
}

// Main runs a program until SIGINT or SIGTERM and exits. It takes no arguments but --help.
func Main(program Program) {
	if len(os.Args) > 1 {
		os.Exit(help(os.Args[1:], os.Stdout, os.Stderr, program))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := Run(ctx, os.Environ(), os.Stderr, program)
	stop()
	os.Exit(code)
}

// help prints what the program is and its settings, or that it does not know the arguments.
func help(args []string, stdout, stderr io.Writer, program Program) int {
	if len(args) != 1 || !slices.Contains([]string{"-h", "-help", "--help", "help"}, args[0]) {
		fmt.Fprintf(stderr, "%s: unknown arguments %q: it takes its settings from the environment; see %s --help\n", program.Name, args, program.Name)
		return WrongSettings
	}
	fmt.Fprintf(stdout, "%s\n\nIt runs until SIGINT or SIGTERM, and takes its settings from the environment:\n\n", program.Short)
	table := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	for _, s := range config.Describe() {
		text := s.Doc
		if s.Name == opsAddr && program.OpsAddr != "" {
			s.Default = program.OpsAddr
		}
		if s.Default != "" {
			text += " (default " + s.Default + ")"
		}
		fmt.Fprintf(table, "  %s\t%s\n", s.Name, text)
	}
	_ = table.Flush()
	fmt.Fprintf(stdout, "\nExample:\n  USHER_NATS_URL=nats://127.0.0.1:4222 %s\n\nExit codes: 0 stopped on request, 1 failed, 2 wrong settings.\n", program.Name)
	return Stopped
}

// Run runs a program until ctx is done and returns its exit code. stderr takes what is wrong with the settings; the log
// goes to the process's own.
func Run(ctx context.Context, environ config.Environ, stderr io.Writer, program Program) int {
	settings, problems := load(environ, program)
	unknown := environ.UnknownNames() // the cause of what is missing, perhaps
	if len(problems) > 0 {
		for _, warning := range unknown {
			fmt.Fprintf(stderr, "%s: warning: %s\n", program.Name, warning)
		}
		fmt.Fprintf(stderr, "%s: %v\n", program.Name, problems)
		return WrongSettings
	}
	log, err := observe.NewLogger(settings.LogLevel, settings.LogFormat)
	if err != nil { // the settings were looked at, so this is the machine's
		fmt.Fprintf(stderr, "%s: %v\n", program.Name, err)
		return Failed
	}
	defer func() { _ = log.Sync() }() // a terminal refuses it, and nothing could be done
	for _, warning := range append(unknown, settings.Warnings()...) {
		log.Warn(warning, zap.String("service", program.Name))
	}
	p := &Process{Settings: settings, Log: log, Registry: observe.NewRegistry(), Health: &observe.Health{}, name: program.Name}
	log.Info("starting", p.parts(program.Database)...)
	if err := p.run(ctx, program.Start); err != nil {
		log.Error(program.Name+" failed", zap.String("service", program.Name), zap.Error(err))
		if lifecycle.IsWrongSettings(err) { // as a database that cannot be used as it is
			return WrongSettings
		}
		return Failed
	}
	return Stopped
}

// parts are what the process works with, for the log. A database that was not set is SQLite in the data folder, and would else be noticed late.
func (p *Process) parts(withDatabase bool) []zap.Field {
	fields := []zap.Field{zap.String("service", p.name), zap.String("broker", redact.URL(p.Settings.NATSURL))}
	if withDatabase {
		fields = append(fields, DatabaseFields(p.Settings)...)
	}
	return fields
}

// DatabaseFields say to a log which database the settings name, without its secrets, and by which of them.
func DatabaseFields(s *config.Settings) []zap.Field {
	fields := []zap.Field{zap.String("database", redact.URL(s.DatabaseURL)), zap.String("database_setting", s.Origin("USHER_DATABASE_URL"))}
	if !strings.HasPrefix(s.DatabaseURL, "sqlite:") {
		fields = append(fields, zap.String("schema", s.DatabaseSchema))
	}
	return fields
}

func (p *Process) run(ctx context.Context, start func(context.Context, *Process) (lifecycle.Service, error)) (err error) {
	defer func() { err = errors.Join(err, p.Closers.Close()) }()
	ops, err := observe.NewOps(p.Settings.OpsAddr, p.Health, p.Registry, p.Log.With(zap.String("service", p.name)))
	if err != nil {
		return fmt.Errorf("%s: %w", opsAddr, err)
	}
	p.WaitingFor("its start")
	p.Health.Add("start", func() error {
		if what := p.waiting.Load(); what != nil {
			return errors.New("waiting for " + *what)
		}
		return nil
	})
	front := serve(ctx, ops)
	p.Closers.Add(front.close)
	p.Log.Info("operations listen", zap.String("service", p.name), zap.String("addr", ops.Addr()))
	service, err := start(ctx, p)
	if err != nil && ctx.Err() != nil {
		p.Log.Info("stopped while starting", zap.String("service", p.name), zap.Error(err))
		return nil
	}
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	p.waiting.Store(nil)
	return lifecycle.Run(ctx, append([]lifecycle.Service{front, service}, p.Beside...)...)
}

// WaitingFor says what the start waits for, in readiness. It is over when Start returns.
func (p *Process) WaitingFor(what string) { p.waiting.Store(&what) }

// WaitingForDatabase is WaitingFor of a database, with why it is not there yet.
func (p *Process) WaitingForDatabase(why error) { p.WaitingFor("the database: " + why.Error()) }

// operations answer from before the start, which may wait for long and says so, until everything else is closed. As a service they end
// with their failure.
type operations struct {
	stop context.CancelFunc
	done chan struct{}
	err  error // once done is closed
}

func serve(ctx context.Context, ops *observe.Ops) *operations {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	o := &operations{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(o.done)
		o.err = ops.Run(ctx)
	}()
	return o
}

// Name implements lifecycle.Service.
func (*operations) Name() string { return "ops" }

// Run implements lifecycle.Service.
func (o *operations) Run(ctx context.Context) error {
	select {
	case <-o.done:
		return o.err
	case <-ctx.Done():
		return nil
	}
}

func (o *operations) close() error {
	o.stop()
	<-o.done
	return o.err
}

// drainTime bounds the draining of the connection, which the services have flushed by then where it matters to them. A broker
// that hangs would else hold the stop for 15 s, and a supervisor gives a process 30 s or fewer in all.
const drainTime = 3 * time.Second

// Connect opens the process's connection to the broker, which may be unavailable, and the JetStream on it. A connection that is closed
// before the process stops ends the process. It is drained when
// the process's closers close: what was sent before has then reached the broker, if that answers within 3 s.
func (p *Process) Connect() (jetstream.JetStream, error) {
	closed := make(chan struct{})
	nc, err := stream.Connect(p.Settings.NATSURL, p.Settings.NATSCreds, p.name, p.Log.With(zap.String("service", p.name)),
		stream.TLS(p.Settings.NATSCA, p.Settings.NATSCert, p.Settings.NATSKey), nats.ClosedHandler(func(*nats.Conn) { close(closed) }))
	if err != nil {
		return nil, err
	}
	p.Closers.Add(func() error {
		if nc.Drain() != nil { // not connected: nothing to drain
			nc.Close()
		}
		select {
		case <-closed:
		case <-time.After(drainTime):
			nc.Close()
			<-closed
		}
		return nil
	})
	p.Beside = append(p.Beside, stream.Guard{Conn: nc})
	return stream.JetStream(nc)
}

const opsAddr = "USHER_OPS_ADDR"

// load reads the settings and looks for everything that is wrong with them. Where other packages have found something about a
// setting, nothing more is said of that setting.
func load(environ config.Environ, program Program) (*config.Settings, config.Problems) {
	settings, err := config.Load(environ, nil)
	problems := problemsOf(err)
	named := map[string]bool{}
	for _, line := range problems {
		named[setting(line)] = true
	}
	var more config.Problems
	if program.OpsAddr != "" && settings.Origin(opsAddr) == "default" {
		settings.OpsAddr = program.OpsAddr
	}
	if settings.NATSURL == "" {
		more = append(more, "USHER_NATS_URL: not set: a broker is needed, such as nats://127.0.0.1:4222 (`usher dev` and `usher serve` bring their own)")
	}
	if program.Check != nil {
		more = append(more, problemsOf(program.Check(settings))...)
	}
	for _, line := range more {
		if !named[setting(line)] && !slices.Contains(problems, line) {
			problems = append(problems, line)
		}
	}
	return settings, problems
}

func problemsOf(err error) config.Problems {
	if err == nil {
		return nil
	}
	var problems config.Problems
	if errors.As(err, &problems) {
		return problems
	}
	return config.Problems{err.Error()}
}

// setting is the name that a line of problems begins with.
func setting(line string) string {
	name, _, _ := strings.Cut(line, ":")
	return name
}
