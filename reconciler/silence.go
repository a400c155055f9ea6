package reconciler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
)

// Silence says that Clerk moved on and nothing was heard of it.
type Silence struct {
	Source string
	Since  time.Time // when the first change was seen of which no event came
	Missed int64     // users by which Clerk's count and the mirror's differ
}

// detector compares, for one source, what changed at Clerk with what was received. It knows no clock but its own: a change
// counts from when it was first seen, not from when Clerk says it was.
type detector struct {
	newest   int64 // ms, of the newest change at Clerk
	count    int64
	known    bool
	since    time.Time // of the first change without an event; zero while events come
	alerted  time.Time
	position uint64 // in the stream, up to which was listened
}

// observe takes one look and says since when there is silence, zero for none. An event ends it, whatever it is about; what Clerk
// changes without an event coming begins it.
func (d *detector) observe(now time.Time, newest, count int64, heard bool) time.Time {
	moved := d.known && (newest != d.newest || count != d.count)
	d.newest, d.count, d.known = newest, count, true
	switch {
	case heard:
		d.since = time.Time{}
	case moved && d.since.IsZero():
		d.since = now
	}
	return d.since
}

// repeatAlert is how often an alert comes again. Svix disables an endpoint after five days of failures.
const repeatAlert = 12 * time.Hour

// watch looks for silence while it holds the lease for that, so that one process asks Clerk.
func (r *Reconciler) watch(ctx context.Context) {
	for sleep(ctx, r.cfg.Poll) == nil {
		if r.presence.Check() != nil {
			continue
		}
		held, leased, err := acquire(ctx, r.js, "silence", holderName(), r.cfg.Sweep.withDefaults().LeaseTTL)
		if err != nil {
			continue // another watches, or the broker is away
		}
		detectors := make([]detector, len(r.sources))
		for leased.Err() == nil {
			longest := time.Duration(0)
			for i, s := range r.sources {
				silence, err := r.listen(leased, s, &detectors[i])
				if err != nil && leased.Err() == nil {
					r.log.Warn("could not look for silence", zap.String("source", s.Name), zap.Error(err))
				}
				longest = max(longest, silence)
			}
			r.metrics.silence.Set(longest.Seconds())
			_ = sleep(leased, r.cfg.SilenceEvery)
		}
		r.metrics.silence.Set(0)
		held.release()
	}
}

// listen takes one look at one source, with two small requests, and says how long it has been silent.
func (r *Reconciler) listen(ctx context.Context, s *source, d *detector) (time.Duration, error) {
	o, _, err := s.client.Latest(ctx, "users")
	if err != nil {
		return 0, err
	}
	count, err := s.client.Count(ctx, "users")
	if err != nil {
		return 0, err
	}
	heard, err := r.heard(ctx, s.Name, d)
	if err != nil {
		return 0, err
	}
	now := time.Now()
	since := d.observe(now, event.Millis(o.UpdatedAt), count, heard)
	silence := time.Duration(0)
	if !since.IsZero() {
		silence = now.Sub(since)
	}
	switch {
	case silence >= r.cfg.SilenceAfter && now.Sub(d.alerted) >= repeatAlert:
		rows, err := s.sweeper.books.count(ctx, "users")
		if err != nil {
			return silence, err
		}
		alert := &Silence{Source: s.Name, Since: since, Missed: max(count-rows, rows-count)}
		r.silent.Store(alert)
		d.alerted = now
		r.log.Error("Clerk moves on and no webhook comes: the endpoint is probably disabled or cannot be reached. Look at it in Clerk's dashboard (Webhooks), "+
			"enable it, and choose \"replay missing\" there; until then sweeps catch up every interval",
			zap.String("source", s.Name), zap.Time("since", since), zap.Duration("duration", silence), zap.Int64("users_missing", alert.Missed))
	case since.IsZero() && !d.alerted.IsZero():
		d.alerted = time.Time{}
		r.silent.Store(nil)
		r.log.Warn("webhooks come again: the silence has ended", zap.String("source", s.Name))
	}
	return silence, nil
}

// Silence is what the detector of this process raised last, nil while webhooks come. It does not make the process unready: what is broken
// lies elsewhere.
func (r *Reconciler) Silence() *Silence { return r.silent.Load() }

// maxListen bounds the events that one look goes through: after a sweep there may be many that are not webhooks.
const maxListen = 5000

// heard tells whether a webhook of the source came since the last look, the first of which hears none. Events that sweeps published do
// not count, nor do replays.
func (r *Reconciler) heard(ctx context.Context, name string, d *detector) (bool, error) {
	events, err := r.js.Stream(ctx, stream.Events)
	if err != nil {
		return false, fmt.Errorf("look up stream %s: %w", stream.Events, err)
	}
	last := events.CachedInfo().State.LastSeq
	if d.position == 0 || d.position > last {
		d.position = max(last, 1)
		return false, nil
	}
	filter := "clerk.evt." + stream.Token(name) + ".>"
	for range maxListen {
		msg, err := events.GetMsg(ctx, d.position+1, jetstream.WithGetMsgSubject(filter))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			d.position = max(last, d.position)
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look for events: %w", err)
		}
		d.position = msg.Sequence
		if origin := event.Origin(msg.Header.Get(stream.HeaderOrigin)); origin == event.OriginWebhook || origin == "" {
			d.position = max(last, d.position) // one is enough
			return true, nil
		}
	}
	return false, nil
}
