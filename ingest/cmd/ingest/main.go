// Command ingest receives Clerk's webhooks and stores them in the event stream. It takes its settings from the
// environment (see docs/reference.md) and no arguments.
package main

import (
	"context"

	"github.com/usherhq/usher/ingest"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/process"
	"github.com/usherhq/usher/pkg/stream"
)

var program = process.Program{
	Name:    "ingest",
	Short:   "ingest receives Clerk's webhooks and stores them in the event stream before it answers.",
	OpsAddr: "127.0.0.1:8082",
	Check: func(s *config.Settings) error {
		_, err := ingest.ConfigFrom(s)
		return err
	},
	Start: start,
}

func main() { process.Main(program) }

// start opens in the order of need: the connection closes after the publisher, the publisher after the service.
func start(_ context.Context, p *process.Process) (lifecycle.Service, error) {
	cfg, err := ingest.ConfigFrom(p.Settings)
	if err != nil {
		return nil, err
	}
	js, err := p.Connect()
	if err != nil {
		return nil, err
	}
	publisher := stream.NewPublisher(js, p.Settings.StreamReplicas)
	p.Closers.Add(func() error {
		publisher.Close()
		return nil
	})
	return ingest.New(cfg, ingest.Deps{
		Publisher: publisher, JetStream: js, Logger: p.Log, Registerer: p.Registry, Health: p.Health,
		Durability: func(ctx context.Context) stream.Durability {
			return stream.AskDurability(ctx, js, p.Settings.NATSMonitorURL, p.Settings.StreamReplicas)
		},
	})
}
