package allinone

import (
	"context"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/stream"
)

// limits lowers what the streams of the embedded broker may hold to what is configured, as soon as the worker has made the room: a limit
// below what is stored would refuse everything.
type limits struct {
	js       jetstream.JetStream
	topology stream.Topology
	log      *zap.Logger
}

func (limits) Name() string { return "limits" }

// limitsEvery is how often a limit that could not be lowered yet is tried again.
const limitsEvery = time.Second

func (l limits) Run(ctx context.Context) error {
	for l.pending(ctx) {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(limitsEvery):
		}
	}
	<-ctx.Done()
	return nil
}

// pending lowers what can be lowered and reports whether something is left.
func (l limits) pending(ctx context.Context) bool {
	plan, err := l.topology.Check(ctx, l.js)
	if err != nil {
		return true // the services tell of an outage
	}
	left := func(plan stream.Plan) bool {
		for _, d := range plan.Differences {
			if d.Field == "max_bytes" {
				return true
			}
		}
		return false
	}
	if !left(plan) {
		return false
	}
	if plan, err = l.topology.Apply(ctx, l.js); err != nil {
		return true
	}
	if !left(plan) {
		l.log.Info("streams have the limits that are configured", zap.Int64("max_bytes", l.topology.MaxBytes))
		return false
	}
	return true
}
