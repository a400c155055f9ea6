// Command worker runs Usher's handlers as a process of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	settings, err := config.Load(os.Environ(), nil)
	if err == nil && settings.NATSURL == "" {
		err = config.Problems{"USHER_NATS_URL: the worker needs the broker's URL"}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	log, err := observe.NewLogger(settings.LogLevel, settings.LogFormat)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if err := serve(ctx, settings, log); err != nil {
		log.Error("worker failed", zap.Error(err))
		return 1
	}
	return 0
}

func serve(ctx context.Context, settings *config.Settings, log *zap.Logger) (err error) {
	var closers lifecycle.Closers
	defer func() { err = errors.Join(err, closers.Close()) }()
	registry, health := observe.NewRegistry(), &observe.Health{}
	ops, err := observe.NewOps(settings.OpsAddr, health, registry)
	if err != nil {
		return err
	}
	db, err := database.Open(ctx, settings.DatabaseURL, settings.DatabaseSchema)
	if err != nil {
		return err
	}
	closers.Add(func() error { return database.Close(db) })
	nc, err := stream.Connect(settings.NATSURL, settings.NATSCreds, "worker", log)
	if err != nil {
		return err
	}
	closers.Add(func() error { nc.Close(); return nil })
	js, err := stream.JetStream(nc)
	if err != nil {
		return err
	}
	w, err := worker.New(worker.ConfigFrom(settings), worker.Deps{JetStream: js, DB: db, Log: log, Registerer: registry, Health: health})
	if err != nil {
		return err
	}
	return lifecycle.Run(ctx, ops, w)
}
