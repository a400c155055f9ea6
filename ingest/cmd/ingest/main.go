// Command ingest receives Clerk's webhooks and stores them in the event stream. Its settings are
// environment variables: see docs/reference.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/nats-io/nats.go"
	"go.uber.org/zap"

	"github.com/usherhq/usher/ingest"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Environ(), os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit code: 0 stopped on request, 1 failed, 2 wrong settings.
func run(ctx context.Context, environ []string, stderr io.Writer) int {
	settings, cfg, err := load(environ)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	log, err := observe.NewLogger(settings.LogLevel, settings.LogFormat)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	if err := serve(ctx, settings, cfg, log); err != nil {
		log.Error("ingest failed", zap.Error(err))
		return 1
	}
	return 0
}

func load(environ []string) (*config.Settings, ingest.Config, error) {
	settings, err := config.Load(environ, nil)
	if err != nil {
		return nil, ingest.Config{}, err
	}
	cfg, err := ingest.ConfigFrom(settings)
	if settings.NATSURL == "" {
		var problems config.Problems
		_ = errors.As(err, &problems)
		err = append(problems, "USHER_NATS_URL: ingest needs a broker, such as nats://127.0.0.1:4222 (`usher dev` and `usher serve` bring their own)")
	}
	return settings, cfg, err
}

func serve(ctx context.Context, settings *config.Settings, cfg ingest.Config, log *zap.Logger) (err error) {
	var closers lifecycle.Closers // the connection closes after the publisher, the publisher after the service
	defer func() { err = errors.Join(err, closers.Close()) }()

	closed := make(chan struct{})
	nc, err := stream.Connect(settings.NATSURL, settings.NATSCreds, "ingest", log,
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }))
	if err != nil {
		return err
	}
	closers.Add(func() error {
		if nc.Drain() != nil { // not connected: nothing to drain
			nc.Close()
		}
		<-closed
		return nil
	})
	js, err := stream.JetStream(nc)
	if err != nil {
		return err
	}
	publisher := stream.NewPublisher(js, settings.StreamReplicas)
	closers.Add(func() error {
		publisher.Close()
		return nil
	})

	registry, health := observe.NewRegistry(), &observe.Health{}
	service, err := ingest.New(cfg, ingest.Deps{
		Publisher: publisher, JetStream: js, Logger: log, Registerer: registry, Health: health,
	})
	if err != nil {
		return err
	}
	closers.Add(func() error {
		_ = service.Close() // open only where the ops server could not be made
		return nil
	})
	ops, err := observe.NewOps(settings.OpsAddr, health, registry)
	if err != nil {
		return err
	}
	return lifecycle.Run(ctx, service, ops)
}
