package reconciler

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/outbox"
	"github.com/usherhq/usher/pkg/stream"
)

// Kinds of the alerts in the outbox.
const (
	kindSilence     = "silence"
	kindSilenceOver = "silence_over"
)

const (
	// disabledAfter is when Svix disables an endpoint that has only failed (docs.svix.com/retries).
	disabledAfter = 5 * 24 * time.Hour
	// listenPage is how many events are asked for at once.
	listenPage = 500
	// maxMissing bounds the users that are read to count what is missing.
	maxMissing = 10_000
)

// listenMost bounds the events that one look goes through: after a sweep there may be many that are not webhooks. A test needs it small.
var listenMost = 10_000

// detector compares, for one source, what changed at Clerk with what was received. It knows no clock but its own: a change
// counts from when it was first seen, not from when Clerk says it was. It is kept in the broker, so that a restart
// neither forgets a silence nor tells of it twice.
type detector struct {
	Known    bool   `json:"known"`
	Newest   int64  `json:"newest"`   // ms, of the newest change at Clerk, and
	Count    int64  `json:"count"`    // how many users there were, when events still came
	Since    int64  `json:"since"`    // ms, when the first change without an event was seen; 0 while events come
	Alerts   int64  `json:"alerts"`   // of this silence, that were raised
	Position uint64 `json:"position"` // in the stream, up to which was listened
}

// observe takes one look and tells whether there is silence. An event ends it, whatever it is about; what Clerk
// changes without an event coming begins it.
func (d *detector) observe(now time.Time, newest, count int64, heard bool) bool {
	moved := d.Known && (newest != d.Newest || count != d.Count)
	switch {
	case heard || !d.Known:
		d.Newest, d.Count, d.Known, d.Since = newest, count, true, 0
	case moved && d.Since == 0:
		d.Since = now.UnixMilli()
	}
	return d.Since != 0
}

// watch looks for silence while it holds the lease for that, so that one process asks Clerk.
func (r *Reconciler) watch(ctx context.Context) {
	for sleep(ctx, r.cfg.Poll) == nil {
		if r.presence.Check() != nil {
			continue
		}
		held, leased, err := acquire(ctx, r.js, "silence", holderName(), r.cfg.Sweep.withDefaults().LeaseTTL)
		if err != nil {
			if !errors.Is(err, errBusy) && ctx.Err() == nil { // another watches: as it should be
				r.log.Warn("could not look for silence", zap.Error(err))
			}
			continue
		}
		for leased.Err() == nil {
			longest := time.Duration(0)
			for _, s := range r.sources {
				silence, err := r.listen(leased, s)
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
func (r *Reconciler) listen(ctx context.Context, s *source) (time.Duration, error) {
	d, err := r.remember(ctx, s.Name)
	if err != nil {
		return 0, err
	}
	before := d
	silence, err := r.look(ctx, s, &d)
	if d != before { // also when no alert could be raised: the silence has begun all the same
		err = errors.Join(err, r.note(ctx, s.Name, d))
	}
	return silence, err
}

func (r *Reconciler) look(ctx context.Context, s *source, d *detector) (time.Duration, error) {
	// The stream's end is read before Clerk is: what was heard is then never newer than what Clerk shows, and a webhook that
	// comes in between is heard at the next look.
	events, err := r.js.Stream(ctx, stream.Events)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	o, _, err := s.client.Latest(ctx, "users")
	if err != nil {
		return 0, fmt.Errorf("look for silence: %w", err)
	}
	count, err := s.client.Count(ctx, "users")
	if err != nil {
		return 0, fmt.Errorf("look for silence: %w", err)
	}
	was := *d
	heard, whole, err := r.heard(ctx, events, s.Name, d)
	if err != nil {
		return 0, err
	}
	now := time.Now()
	if !whole { // behind, as after a large backfill: the next look goes on, and nothing follows from this one
		return lasted(d, now), nil
	}
	if !d.observe(now, event.Millis(o.UpdatedAt), count, heard) {
		if was.Alerts > 0 {
			if err := r.over(ctx, s, was, now); err != nil {
				*d = was // to be told at the next look
				return 0, err
			}
			d.Alerts = 0
		}
		return 0, nil
	}
	silence := lasted(d, now)
	// The first after the set time, then one a day: several before Svix gives up on the endpoint.
	due := int64(0)
	if silence >= r.cfg.SilenceAfter {
		due = 1 + int64((silence-r.cfg.SilenceAfter)/r.cfg.SilenceRepeat)
	}
	if d.Alerts < due {
		if err := r.alert(ctx, s, d, count, due); err != nil {
			return silence, err
		}
		d.Alerts = due
	}
	return silence, nil
}

// lasted is how long the silence is, 0 where there is none.
func lasted(d *detector, now time.Time) time.Duration {
	if d.Since == 0 {
		return 0
	}
	return now.Sub(time.UnixMilli(d.Since))
}

// alert raises the n-th alert of a silence.
func (r *Reconciler) alert(ctx context.Context, s *source, d *detector, count, n int64) error {
	missed, whole, err := r.missing(ctx, s, d, count)
	if err != nil {
		return err
	}
	since := time.UnixMilli(d.Since).UTC()
	atLeast := ""
	if !whole {
		atLeast = "at least "
	}
	var body strings.Builder
	fmt.Fprintf(&body, "Clerk (source %s) moves on, and no webhook has come since %s.\n", s.Name, since.Format(time.RFC3339))
	fmt.Fprintf(&body, "Users created, changed or deleted since then: %s%d.\n", atLeast, missed)
	body.WriteString("The endpoint is probably disabled, or cannot be reached.\n\nWhat to do:\n")
	// A link would be a credential, and this text is kept and sent.
	fmt.Fprintf(&body, "1. Run `usher portal --from %s` and open the link that it prints, or open Clerk's dashboard, Webhooks.\n", s.Name)
	body.WriteString("2. Look at the endpoint's last attempts: what did it answer? Mend that first.\n")
	body.WriteString("3. Enable the endpoint, if it is disabled.\n")
	body.WriteString("4. Choose \"replay missing\" there, from the time above.\n\n")
	fmt.Fprintf(&body, "Svix disables an endpoint that only fails for five days: here about %s. ", since.Add(disabledAfter).Format(time.RFC3339))
	fmt.Fprintf(&body, "Until webhooks come again, sweeps catch up every %s.\n", r.cfg.Interval)
	subject := fmt.Sprintf("Usher hears nothing from Clerk since %s", since.Format("2006-01-02 15:04 MST"))
	if n > 1 {
		subject += fmt.Sprintf(" (alert %d)", n)
	}
	err = r.enqueue(ctx, outbox.Notification{
		EffectKey: fmt.Sprintf("silence/%s/%d/%d", s.Name, d.Since, n), Kind: kindSilence, Source: s.Name, Subject: subject, Body: body.String(),
	})
	if err != nil {
		return err
	}
	r.log.Error("Clerk moves on and no webhook comes: the endpoint is probably disabled or cannot be reached. Look at it in Clerk's dashboard (Webhooks), "+
		"enable it, and choose \"replay missing\" there; until then sweeps catch up every interval",
		zap.String("source", s.Name), zap.Time("since", since), zap.Int64("users_missing", missed), zap.Int64("alert", n))
	return nil
}

// over tells that a silence has ended, once, and only of one that an alert was raised for.
func (r *Reconciler) over(ctx context.Context, s *source, d detector, now time.Time) error {
	since := time.UnixMilli(d.Since).UTC()
	took := now.Sub(since).Round(time.Second)
	err := r.enqueue(ctx, outbox.Notification{
		EffectKey: fmt.Sprintf("silence_over/%s/%d", s.Name, d.Since), Kind: kindSilenceOver, Source: s.Name,
		Subject: "Usher hears from Clerk again",
		Body: fmt.Sprintf("Webhooks of Clerk (source %s) come again. There was silence from %s to %s (%s).\n"+
			"If \"replay missing\" was not chosen in the webhook portal, the next sweep brings what is still missing; `usher reconcile` does at once.\n",
			s.Name, since.Format(time.RFC3339), now.UTC().Format(time.RFC3339), took),
	})
	if err != nil {
		return err
	}
	r.log.Warn("webhooks come again: the silence has ended", zap.String("source", s.Name), zap.Time("since", since), zap.Duration("duration", took))
	return nil
}

// enqueue puts an alert into the outbox. It does not go through the event stream: an alert that the pipeline is broken must not
// need the pipeline.
func (r *Reconciler) enqueue(ctx context.Context, n outbox.Notification) error {
	err := database.InTx(ctx, r.db, func(tx *gorm.DB) error {
		_, err := r.cfg.Alerts.Enqueue(tx, n)
		return err
	})
	if err != nil {
		return fmt.Errorf("alert of silence: %w", err)
	}
	return nil
}

// missing counts the users that were created, changed or deleted since events stopped; false where there are more. It costs a
// request for each page of them.
func (r *Reconciler) missing(ctx context.Context, s *source, d *detector, count int64) (n int64, whole bool, err error) {
	var changed, created int64
	whole = true
pages:
	for page, err := range s.client.Pages(ctx, "users", clerk.Updated, "") {
		if err != nil {
			return 0, false, fmt.Errorf("count what is missing: %w", err)
		}
		for _, o := range page.Objects {
			if event.Millis(o.UpdatedAt) <= d.Newest {
				break pages
			}
			if changed++; event.Millis(o.CreatedAt) > d.Newest {
				created++
			}
		}
		if whole = changed < maxMissing; !whole {
			break
		}
	}
	deleted := int64(0)
	if whole {
		deleted = max(0, d.Count+created-count)
	}
	return changed + deleted, whole, nil
}

// heard tells whether a webhook of the source was stored since the last look, the first of which hears none. Events that sweeps
// published do not count, nor do replays. whole is false where there was more to go through than one look may.
func (r *Reconciler) heard(ctx context.Context, events jetstream.Stream, name string, d *detector) (heard, whole bool, err error) {
	last := events.CachedInfo().State.LastSeq
	if !d.Known || d.Position > last { // the stream was made anew
		d.Position = last
		return false, true, nil
	}
	for range listenMost / listenPage {
		page, err := jetstreamext.GetBatch(ctx, r.js, stream.Events, listenPage, jetstreamext.GetBatchSeq(d.Position+1),
			jetstreamext.GetBatchSubject("clerk.evt."+stream.Token(name)+".>"), jetstreamext.GetBatchMaxBytes(8<<20))
		if err != nil {
			return false, false, fmt.Errorf("look for events: %w", stream.Explain(err))
		}
		got := 0
		for msg, err := range page {
			if errors.Is(err, jetstreamext.ErrNoMessages) || err == nil && msg.Sequence > last {
				d.Position = last
				return false, true, nil
			}
			if err != nil {
				return false, false, fmt.Errorf("look for events: %w", stream.Explain(err))
			}
			got++
			d.Position = msg.Sequence
			if origin := cmp.Or(event.Origin(msg.Header.Get(stream.HeaderOrigin)), event.OriginWebhook); origin == event.OriginWebhook {
				d.Position = last // one is enough
				return true, true, nil
			}
		}
		if got == 0 {
			return false, false, errors.New("look for events: the broker answered with nothing")
		}
	}
	return false, false, nil
}

// memoryKey is where a source's detector is kept, beside the lease that says who may use it.
func memoryKey(source string) string { return "silence." + stream.Token(source) }

func (r *Reconciler) remember(ctx context.Context, source string) (d detector, err error) {
	kv, err := r.js.KeyValue(ctx, stream.Leases)
	if err != nil {
		return d, fmt.Errorf("open bucket %s: %w", stream.Leases, stream.Explain(err))
	}
	entry, err := kv.Get(ctx, memoryKey(source))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return d, nil
	}
	if err != nil {
		return d, fmt.Errorf("read %s: %w", memoryKey(source), stream.Explain(err))
	}
	if json.Unmarshal(entry.Value(), &d) != nil { // of another version: begin anew
		d = detector{}
	}
	return d, nil
}

func (r *Reconciler) note(ctx context.Context, source string, d detector) error {
	text, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("note silence: %w", err)
	}
	kv, err := r.js.KeyValue(ctx, stream.Leases)
	if err == nil {
		_, err = kv.Put(ctx, memoryKey(source), text)
	}
	if err != nil {
		return fmt.Errorf("note silence: %w", stream.Explain(err))
	}
	return nil
}
