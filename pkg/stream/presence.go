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

// Presence follows whether streams exist and can be used, for the readiness of a service that needs them. It creates
// nothing: it says [ErrSetup] until `usher setup` has run, and notices by itself when that was done.
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
	if err := Connected(p.nc); err != nil {
		return err
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
				p.log.Warn("streams are unavailable", zap.Error(err))
			} else {
				p.log.Info("streams are available")
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
	if err := Connected(p.nc); err != nil {
		return err
	}
	for _, name := range p.streams {
		ctx, cancel := context.WithTimeout(ctx, PublishTimeout)
		s, err := Lookup(ctx, p.js, name)
		cancel()
		if err != nil {
			return err
		}
		if err := CheckStream(s.CachedInfo().Config); err != nil {
			return err
		}
	}
	return nil
}
