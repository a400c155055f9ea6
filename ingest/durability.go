package ingest

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/stream"
)

// errUnverified holds the first events back until it is known that the broker is not one that must be refused.
var errUnverified = errors.New("the broker was not asked yet whether it syncs to disk")

// unverified says why the broker's durability is not known yet.
func (s *Service) unverified() error {
	if err := stream.Connected(s.deps.JetStream.Conn()); err != nil {
		return err
	}
	return errUnverified
}

// askAgain is the pace of the questions while the answer is unknown: a monitoring port may have been down.
const askAgain = time.Minute

// watchDurability asks whenever the connection was opened again, since other servers may answer then, and refuses the service a broker
// that is known not to sync.
func (s *Service) watchDurability(ctx context.Context, refuse context.CancelCauseFunc) {
	if s.deps.Durability == nil || s.deps.JetStream == nil {
		return
	}
	nc := s.deps.JetStream.Conn()
	changed := nc.StatusChanged(nats.CONNECTED)
	defer nc.RemoveStatusListener(changed)
	var told stream.Durability
	for {
		wait := time.NewTimer(askAgain)
		if nc.IsConnected() {
			d := s.deps.Durability(ctx)
			if ctx.Err() != nil {
				return
			}
			for state, gauge := range s.metrics.durable {
				gauge.Set(0)
				if state == d.State {
					gauge.Set(1)
				}
			}
			if d != told {
				s.tell(d)
			}
			told = d
			if err := d.Refuse(); err != nil && !s.cfg.AllowUnsynced {
				refuse(err)
				return
			}
			s.verified.Store(true)
			if d.State != stream.Unknown {
				wait.Stop()
			}
		}
		select {
		case <-ctx.Done():
			wait.Stop()
			return
		case <-changed:
		case <-wait.C:
		}
		wait.Stop()
	}
}

func (s *Service) tell(d stream.Durability) {
	detail := zap.String("detail", d.Detail)
	switch d.State {
	case stream.Synced:
		s.log.Info("the broker syncs to disk before it confirms an event", detail)
	case stream.Unsynced:
		s.log.Error("THE BROKER DOES NOT SYNC: a power cut loses events that were answered 202, and maybe the stream", detail,
			zap.Bool("allowed", s.cfg.AllowUnsynced), zap.String("fix", stream.SyncAdvice))
	default:
		s.log.Warn("DURABILITY IS NOT VERIFIED: if the broker does not sync, a power cut loses events that were answered 202", detail,
			zap.String("verify", stream.SyncVerify), zap.String("fix", stream.SyncAdvice))
	}
}
