package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/ingest"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/process"
	"github.com/usherhq/usher/pkg/redact"
)

func (c *cli) serve() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run everything in one process, for one real machine",
		Long: "serve runs ingest, worker, reconciler and console in one process. Without USHER_NATS_URL it brings its own\n" +
			"broker, which syncs every event to disk before Clerk gets its answer; without USHER_DATABASE_URL it uses SQLite\n" +
			"in the data folder. It runs the migrations and creates what is missing (as `usher setup` does).",
		Example: "  CLERK_WEBHOOK_SIGNING_SECRET=whsec_… usher serve\n" +
			"  CLERK_WEBHOOK_SIGNING_SECRET=whsec_… USHER_DATABASE_URL=postgres://… usher serve --data-dir /var/lib/usher",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			settings, err := config.Load(c.env.Environ, c.flags)
			if err == nil {
				_, err = ingest.ConfigFrom(settings)
			}
			if err != nil {
				_, _ = c.settings() // which says what is misspelt: the cause, perhaps
				return err
			}
			log, err := c.logger(settings)
			if err != nil {
				return err
			}
			for _, warning := range config.Environ(c.env.Environ).UnknownNames() {
				log.Warn(warning)
			}
			log.Info("starting", uses(settings)...)
			limitMemory()
			return c.run(cmd.Context(), allinone.Config{
				Settings: settings, Mode: "serve", Dir: settings.DataDir, Log: log,
			}, func(ctx context.Context, i *allinone.Instance) error {
				log.Info("ready", zap.String("ingest", i.State.IngestURL), zap.String("console", i.State.ConsoleURL), zap.String("ops", i.State.OpsURL))
				<-ctx.Done()
				return nil
			})
		},
	}
	c.settingFlags(cmd, allSettings()...)
	return cmd
}

// uses says which database and which broker serve takes, without their secrets.
func uses(s *config.Settings) []zap.Field {
	dir := s.DataDir
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	broker := "embedded, in " + filepath.Join(dir, "nats")
	if s.NATSURL != "" {
		broker = redact.URL(s.NATSURL)
	}
	return append(process.DatabaseFields(s), zap.String("broker", broker), zap.String("data_dir", dir), zap.String("version", Version()))
}

// memoryTarget is what the process keeps its own memory below, where it can: it then collects garbage more often, and not only when
// what it holds has doubled. What is in flight is bounded to much less.
const memoryTarget = 256 << 20

// limitMemory sets the target, unless GOMEMLIMIT sets one.
func limitMemory() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryTarget)
	}
}

// errDone ends an instance whose work is done.
var errDone = errors.New("done")

// run starts an instance, calls work once it is ready, and stops everything when work returns or a service
// fails. An interrupt is the usual end: no error.
func (c *cli) run(ctx context.Context, cfg allinone.Config, work func(context.Context, *allinone.Instance) error) (err error) {
	instance, err := allinone.New(ctx, cfg)
	if err != nil && ctx.Err() != nil { // on request, while it waited: no failure
		cfg.Log.Info("stopped while starting", zap.Error(err))
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, instance.Close()) }()
	if cfg.Mode == "serve" && instance.TokenIsNew { // dev shows it with the rest
		_, _ = fmt.Fprintf(c.env.Stdout, "Log in at the console, a link that is shown this once: %s\nThe token is kept in %s.\n",
			console.LoginURL(instance.State.ConsoleURL, instance.State.AdminToken), filepath.Join(cfg.Dir, console.TokenFile))
	}
	runCtx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	worked := make(chan error, 1)
	go func() {
		err := instance.WaitReady(runCtx)
		if err == nil {
			err = work(runCtx, instance)
		}
		stop(errDone)
		worked <- err
	}()
	if err = instance.Run(runCtx); err != nil && !lifecycle.IsWrongSettings(err) {
		err = failed{err}
	}
	stop(errDone)
	if workErr := <-worked; err == nil && ctx.Err() == nil {
		err = workErr
	}
	return err
}

// failed is an error of services that had begun their work, which a new process may be spared.
type failed struct{ error }

func (f failed) Unwrap() error { return f.error }

// devLogLevel is dev's where nobody asks for another.
const devLogLevel = "warn"

// devSettings are the settings with what dev makes up: a signing secret, a throw-away database, and ports that are free. What the
// environment says of a database or a broker is an application's, or production's: dev invents users, and takes those by flag only.
// notes tell the user what differs from what was set or usual.
func (c *cli) devSettings(ctx context.Context, secret string) (settings *config.Settings, dir, made string, notes []string, err error) {
	var ignored []string
	if c.env.Environ, ignored = devEnvironment(c.env.Environ, c.flags); len(ignored) > 0 {
		notes = append(notes, isAre(ignored)+" not used: dev has a database and a broker of its own; others by flag (--database-url, --nats-url)")
	}
	settings, err = c.settings()
	if err != nil {
		return nil, "", "", nil, err
	}
	dir = filepath.Join(settings.DataDir, "dev")
	if len(settings.WebhookSigningSecret) == 0 {
		c.flags["CLERK_WEBHOOK_SIGNING_SECRET"], made = secret, secret
	}
	if settings.Origin("USHER_DATABASE_URL") == "default" {
		c.flags["USHER_DATABASE_URL"] = "sqlite:" + filepath.Join(dir, "usher.db")
	} else if settings.Origin("USHER_DATABASE_SCHEMA") == "default" {
		c.flags["USHER_DATABASE_SCHEMA"] = allinone.DevSchema
	}
	if settings.Origin("USHER_LOG_LEVEL") == "default" {
		c.flags["USHER_LOG_LEVEL"] = devLogLevel
	}
	addresses := []struct{ name, addr string }{
		{"USHER_INGEST_ADDR", settings.IngestAddr}, {"USHER_CONSOLE_ADDR", settings.ConsoleAddr}, {"USHER_OPS_ADDR", settings.OpsAddr},
	}
	var ports []string // of which the others stay clear
	for _, a := range addresses {
		_, port, _ := net.SplitHostPort(a.addr)
		ports = append(ports, port)
	}
	for _, a := range addresses {
		if settings.Origin(a.name) != "default" {
			continue
		}
		if free := freeAddr(ctx, a.addr, ports); free != a.addr {
			_, port, _ := net.SplitHostPort(free)
			ports, c.flags[a.name] = append(ports, port), free
			notes = append(notes, fmt.Sprintf("%s is taken: %s is %s", a.addr, a.name, free))
		}
	}
	settings, err = c.settings()
	return settings, dir, made, notes, err
}

// devEnvironment is an environment without a database and without a broker, and the names of those that were set. What belongs to one that
// is given by flag stays.
func devEnvironment(environ []string, flags map[string]string) (own, ignored []string) {
	for _, entry := range environ {
		key, value, _ := strings.Cut(entry, "=")
		isDatabase := key == "DATABASE_URL" || key == "DATABASE_URL_FILE" || strings.HasPrefix(key, "USHER_DATABASE_")
		isBroker := strings.HasPrefix(key, "USHER_NATS_")
		given := flags[strings.TrimSuffix(key, "_FILE")] != ""
		switch {
		case !isDatabase && !isBroker, isBroker && flags["USHER_NATS_URL"] != "" && !given:
			own = append(own, entry)
		case value != "" && !given && !slices.Contains(ignored, key):
			ignored = append(ignored, key)
		}
	}
	return own, ignored
}

// freeAddr is addr where nobody listens there, else the same with the next port that is free and not among others.
func freeAddr(ctx context.Context, addr string, others []string) string {
	host, port, err := net.SplitHostPort(addr)
	first, convErr := strconv.Atoi(port)
	if err != nil || convErr != nil {
		return addr
	}
	for n := first; n < min(first+100, 65536); n++ {
		next := net.JoinHostPort(host, strconv.Itoa(n))
		if n != first && slices.Contains(others, strconv.Itoa(n)) {
			continue
		}
		if l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", next); err == nil {
			_ = l.Close()
			return next
		}
	}
	return addr // the service says why it cannot listen
}

// banner tells a person where everything is.
func banner(w io.Writer, i *allinone.Instance, settings *config.Settings, secret string) {
	t := newTable(w)
	t.row("webhooks", i.State.IngestURL)
	if secret != "" {
		t.row("signing secret", secret)
	}
	if i.State.AdminToken != "" {
		t.row("console", console.LoginURL(i.State.ConsoleURL, i.State.AdminToken))
	} else {
		t.row("console", i.State.ConsoleURL+"/admin")
	}
	t.row("health, metrics", i.State.OpsURL+"/readyz, /metrics")
	t.row("database", redact.URL(settings.DatabaseURL))
	if settings.NATSURL == "" {
		t.row("broker", "embedded, "+redact.URL(i.State.NATSURL))
	} else {
		t.row("broker", redact.URL(settings.NATSURL))
	}
	_ = t.Flush()
	_, _ = fmt.Fprintln(w)
}
