package stream

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
)

// Presence follows whether streams exist, for the readiness of a service that needs them. It creates
// nothing: it says [ErrSetup] until somebody ran `usher setup`, and notices by itself when that was done.
type Presence struct {
	nc      *nats.Conn
	js      jetstream.JetStream
	log     *zap.Logger
	streams []string
	every   time.Duration
	state   atomic.Pointer[error]
}

// errUnknown is the state before the first look.
var errUnknown = errors.New("the broker was not asked yet")

// NewPresence makes a Presence of the streams so named; Run keeps it up to date.
func NewPresence(nc *nats.Conn, js jetstream.JetStream, log *zap.Logger, streams ...string) *Presence {
	p := &Presence{nc: nc, js: js, log: log, streams: streams, every: 2 * time.Second}
	p.state.Store(&errUnknown)
	return p
}

// Check implements observe.Check: it answers from memory.
func (p *Presence) Check() error {
	if !p.nc.IsConnected() {
		return nats.ErrDisconnected
	}
	return *p.state.Load()
}

// Run looks at once and then every two seconds, until ctx is done. It logs changes only.
func (p *Presence) Run(ctx context.Context) {
	ticker := time.NewTicker(p.every)
	defer ticker.Stop()
	for {
		err := p.look(ctx)
		if ctx.Err() != nil {
			return
		}
		if last := *p.state.Swap(&err); fmt.Sprint(last) != fmt.Sprint(err) {
			if err != nil {
				p.log.Warn("streams are not there", zap.Error(err))
			} else {
				p.log.Info("streams are there")
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (p *Presence) look(ctx context.Context) error {
	for _, name := range p.streams {
		_, err := p.js.Stream(ctx, name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return ErrSetup
		}
		if err != nil {
			return fmt.Errorf("look up stream %s: %w", name, err)
		}
	}
	return nil
}
