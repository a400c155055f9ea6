// Package reconciler is the service that compares Clerk's own API with the mirror and publishes an
// event for what was missed.
//
// What it does now: it connects to the broker, is ready while the event stream exists, and stops
// when told to. It does not call Clerk and publishes nothing yet; sweeps come with a later version. It
// never writes a row: it publishes events, and handlers change state.
package reconciler

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// Name is the service's name in logs, health checks and the broker's connection list.
const Name = "reconciler"

// Config is what the reconciler needs to know.
type Config struct {
	NATSURL     string        // the broker; required
	NATSCreds   string        // credentials file for it, empty for none
	NATSOptions []nats.Option // come last and may override, as for a broker in the same process
}

// ConfigFrom takes the reconciler's part of the settings.
func ConfigFrom(s *config.Settings) Config {
	return Config{NATSURL: s.NATSURL, NATSCreds: s.NATSCreds}
}

// Validate names every setting that is missing or wrong. The error is config.Problems.
func (c Config) Validate() error {
	if c.NATSURL == "" {
		return config.Problems{"USHER_NATS_URL: not set: the reconciler needs the broker (`usher serve` brings its own)"}
	}
	return nil
}

// Reconciler implements lifecycle.Service.
type Reconciler struct {
	nc       *nats.Conn
	presence *stream.Presence
	log      *zap.Logger
}

// New connects to the broker, which may be away: the check "reconciler" in health says so until it is
// there. Run closes the connection; Close does where Run is never called.
func New(cfg Config, log *zap.Logger, health *observe.Health) (*Reconciler, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	log = log.With(zap.String("service", Name))
	nc, err := stream.Connect(cfg.NATSURL, cfg.NATSCreds, Name, log, cfg.NATSOptions...)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", Name, err)
	}
	js, err := stream.JetStream(nc)
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("start %s: %w", Name, err)
	}
	r := &Reconciler{nc: nc, presence: stream.NewPresence(nc, js, log, stream.Events), log: log}
	health.Add(Name, r.presence.Check)
	return r, nil
}

// Name implements lifecycle.Service.
func (r *Reconciler) Name() string { return Name }

// Close gives back what New opened. It may be called after Run, and more than once.
func (r *Reconciler) Close() { r.nc.Close() }

// Run watches the stream until ctx is done.
func (r *Reconciler) Run(ctx context.Context) error {
	defer r.Close()
	r.log.Info("started; this version does not sweep Clerk's API yet")
	r.presence.Run(ctx)
	r.log.Info("stopped")
	return nil
}
