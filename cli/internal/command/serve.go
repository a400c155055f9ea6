package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/ingest"
	"github.com/usherhq/usher/pkg/config"
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
			settings, err := c.settings()
			if err != nil {
				return err
			}
			if _, err := ingest.ConfigFrom(settings); err != nil {
				return err
			}
			log, err := c.logger(settings)
			if err != nil {
				return err
			}
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
	c.settingFlags(cmd, false)
	return cmd
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
	err = instance.Run(runCtx)
	stop(errDone)
	if workErr := <-worked; err == nil && ctx.Err() == nil {
		err = workErr
	}
	return err
}

// devLogLevel is dev's where nobody asks for another.
const devLogLevel = "warn"

// devSettings are the settings with what dev makes up: a signing secret and a throw-away database.
func (c *cli) devSettings(secret string) (settings *config.Settings, dir, made string, err error) {
	settings, err = c.settings()
	if err != nil {
		return nil, "", "", err
	}
	dir = filepath.Join(settings.DataDir, "dev")
	if len(settings.WebhookSigningSecret) == 0 {
		c.flags["CLERK_WEBHOOK_SIGNING_SECRET"], made = secret, secret
	}
	if strings.HasPrefix(settings.DatabaseURL, "sqlite:") && settings.Origin("USHER_DATABASE_URL") == "default" {
		c.flags["USHER_DATABASE_URL"] = "sqlite:" + filepath.Join(dir, "usher.db")
	}
	if settings.Origin("USHER_LOG_LEVEL") == "default" {
		c.flags["USHER_LOG_LEVEL"] = devLogLevel
	}
	settings, err = c.settings()
	return settings, dir, made, err
}

// banner tells a person where everything is.
func banner(w io.Writer, i *allinone.Instance, settings *config.Settings, secret string) {
	t := newTable(w)
	t.row("webhooks", i.State.IngestURL)
	if secret != "" {
		t.row("signing secret", secret)
	}
	t.row("console", i.State.ConsoleURL+"/admin")
	t.row("health, metrics", i.State.OpsURL+"/readyz, /metrics")
	for _, s := range settings.List() {
		if s.Name == "USHER_DATABASE_URL" {
			t.row("database", s.Value)
		}
	}
	_ = t.Flush()
	_, _ = fmt.Fprintln(w)
}
