package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/stream"
)

// setups are what is wrong with the streams and with the consumer of each handler: they are there, and lose or withhold events.
type setups struct {
	events    trouble
	letters   trouble // which concern failing events only: no handler pauses
	consumers map[string]*trouble
}

// watchSetup follows them until ctx is done. `usher setup --apply`, or whoever changed them, ends it; nothing need be restarted.
func (w *Worker) watchSetup(ctx context.Context) {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		for name, known := range map[string]*trouble{stream.Events: &w.setups.events, stream.DeadLetters: &w.setups.letters} {
			w.noteSetup(ctx, known, func(ctx context.Context) error { return w.checkStream(ctx, name) })
		}
		for _, r := range w.cfg.Handlers {
			name := r.Handler.Name()
			w.noteSetup(ctx, w.setups.consumers[name], func(ctx context.Context) error {
				info, err := stream.LookUpConsumer(ctx, w.deps.JetStream, name)
				if err != nil {
					return errNotAsked
				}
				return stream.CheckConsumer(info.Config, stream.HandlerSpec{Name: name, Filters: r.Filters})
			})
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// errNotAsked tells that a look said nothing: what was known before still holds. The loops notice an outage by themselves.
var errNotAsked = errors.New("the broker did not answer")

// noteSetup looks, and logs what has changed since the last look.
func (w *Worker) noteSetup(ctx context.Context, known *trouble, look func(context.Context) error) {
	lookCtx, cancel := context.WithTimeout(ctx, watchInterval)
	defer cancel()
	err := look(lookCtx)
	if ctx.Err() != nil || errors.Is(err, errNotAsked) {
		return
	}
	before := known.check()
	known.setTrouble(err)
	log := w.deps.Log.With(zap.String("service", "worker"))
	switch {
	case err != nil && fmt.Sprint(before) != err.Error():
		log.Error("events would be lost or never delivered, worker is not ready", zap.Error(err))
	case err == nil && before != nil:
		log.Info("streams and consumers are as they must be again")
	}
}

func (w *Worker) checkStream(ctx context.Context, name string) error {
	s, err := w.deps.JetStream.Stream(ctx, name)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return fmt.Errorf("stream %s is missing: run `usher setup`", name)
	case err != nil:
		return errNotAsked
	}
	return stream.CheckStream(s.CachedInfo().Config)
}

// check is the readiness of a handler as far as the setup goes.
func (s *setups) check(handler string) error {
	if err := s.events.check(); err != nil {
		return err
	}
	return s.consumers[handler].check()
}
