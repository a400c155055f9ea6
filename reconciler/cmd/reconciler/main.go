// Command reconciler runs the service that compares Clerk with the mirror. It takes its settings from the environment
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
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/reconciler"
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
	cfg := reconciler.ConfigFrom(settings)
	if err := cfg.Validate(); err != nil {
		return fail(stderr, err)
	}
	if err := serve(ctx, settings, cfg, log); err != nil {
		log.Error("process failed", zap.Error(err))
		return 1
	}
	return 0
}

func serve(ctx context.Context, settings *config.Settings, cfg reconciler.Config, log *zap.Logger) (err error) {
	var closers lifecycle.Closers
	defer func() { err = errors.Join(err, closers.Close()) }()
	health, registry := &observe.Health{}, observe.NewRegistry()
	ops, err := observe.NewOps(settings.OpsAddr, health, registry)
	if err != nil {
		return err
	}
	closers.Add(func() error { ops.Close(); return nil })
	var db *gorm.DB
	if len(cfg.Sources) > 0 { // without a key there is nothing to compare
		if db, err = database.Open(ctx, settings.DatabaseURL, settings.DatabaseSchema); err != nil {
			return err
		}
		closers.Add(func() error { return database.Close(db) })
		if err := database.CheckMigrated(ctx, db); err != nil {
			return err
		}
	}
	service, err := reconciler.New(cfg, reconciler.Deps{DB: db, Log: log, Registerer: registry, Health: health})
	if err != nil {
		return err
	}
	closers.Add(func() error { service.Close(); return nil })
	log.Info("operations listen", zap.String("addr", ops.Addr()))
	return lifecycle.Run(ctx, ops, service)
}

func fail(stderr io.Writer, err error) int {
	fmt.Fprintln(stderr, "reconciler:", err)
	if errors.As(err, new(config.Problems)) {
		return 2
	}
	return 1
}
