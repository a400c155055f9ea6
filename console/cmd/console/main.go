// Command console runs the service that shows what Usher does. It takes its settings from the environment
// and no arguments.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"go.uber.org/zap"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/observe"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Environ(), os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit code: 0 after a stop that was asked for, 1 after a failure, 2 for wrong settings.
func run(ctx context.Context, environ config.Environ, stderr io.Writer) int {
	settings, err := config.Load(environ, nil)
	if err != nil {
		return fail(stderr, err)
	}
	log, err := observe.NewLogger(settings.LogLevel, settings.LogFormat)
	if err != nil {
		return fail(stderr, err)
	}
	defer func() { _ = log.Sync() }() // a terminal refuses it, and nothing could be done
	cfg := console.ConfigFrom(settings)
	if err := cfg.Validate(); err != nil { // before the database: wrong settings come first
		return fail(stderr, err)
	}
	if cfg.DB, err = database.Open(ctx, settings.DatabaseURL, settings.DatabaseSchema); err != nil {
		if ctx.Err() != nil { // told to stop while it waited
			return 0
		}
		return fail(stderr, err)
	}
	defer func() { _ = database.Close(cfg.DB) }()
	health := &observe.Health{}
	service, err := console.New(cfg, log, health)
	if err != nil {
		return fail(stderr, err)
	}
	defer service.Close()
	ops, err := observe.NewOps(settings.OpsAddr, health, observe.NewRegistry())
	if err != nil {
		return fail(stderr, err)
	}
	log.Info("operations listen", zap.String("addr", ops.Addr()))
	if err := lifecycle.Run(ctx, ops, service); err != nil {
		log.Error("process failed", zap.Error(err))
		return 1
	}
	return 0
}

func fail(stderr io.Writer, err error) int {
	fmt.Fprintln(stderr, "console:", err)
	if errors.As(err, new(config.Problems)) {
		return 2
	}
	return 1
}
