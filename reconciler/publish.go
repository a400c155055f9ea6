package reconciler

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/tidwall/gjson"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/stream"
)

// drift is one difference, and the event that ends it.
type drift struct {
	id            string
	drift         Drift
	fields        []Field
	defeated      bool
	mirrorVersion int64
	clerkVersion  int64
	event         event.Event
	identity      []byte // what the event's id is made of
	eventID       string // once it was published
}

// resources are the parts of event types before the dot, by table.
var resources = func() map[string]string {
	m := map[string]string{}
	for _, t := range mirror.Tables() {
		m[t.Name] = t.Resource
	}
	return m
}()

// objectNames are what Clerk calls the objects of a table in their "object" field.
var objectNames = map[string]string{
	"users": "user", "organizations": "organization", "organization_memberships": "organization_membership", "organization_invitations": "organization_invitation",
	"organization_domains": "organization_domain", "roles": "role", "permissions": "permission", "waitlist_entries": "waitlist_entry",
}

// driftOf makes the event of a candidate: what Clerk would have sent, with the time of the read as its timestamp. Its id is the same
// for every run that finds the same.
func (w *sweep) driftOf(c *candidate) drift {
	d := drift{id: c.object.ID, drift: c.verdict.drift, fields: c.verdict.fields, defeated: c.verdict.defeated, clerkVersion: c.object.version()}
	if c.row != nil && !c.row.deleted {
		d.mirrorVersion = c.row.version
	}
	verb, data, at, version := "updated", []byte(c.object.Raw), c.object.readAt.UnixMilli(), d.clerkVersion
	var content []byte
	switch d.drift {
	case Missing:
		verb, content = "created", essence(w.table, data)
	case Extra:
		// The row was there before Clerk said that the object is not: the delete is newer, whatever the clocks say.
		verb, version, at = "deleted", d.mirrorVersion, max(at, c.row.version+1)
		name := gjson.GetBytes(c.row.raw, "object").Str
		if name == "" {
			name = objectNames[w.table]
		}
		data, _ = json.Marshal(map[string]any{"id": d.id, "object": name, "deleted": true}) // cannot fail
	default:
		content = essence(w.table, data)
	}
	typ := resources[w.table] + "." + verb
	sum := sha256.Sum256(content)
	d.identity = fmt.Appendf(nil, "%s\x00%s\x00%s\x00%d\x00%s\x00%x", w.cfg.Source, w.table, d.id, version, d.drift, sum)

	e := event.Compose(event.Type(typ), data, w.cfg.InstanceID, time.UnixMilli(at))
	e.Source, e.Origin, e.ReceivedAt = w.cfg.Source, w.origin, time.Now().UTC()
	d.event = e
	return d
}

// publish stores the events of drifts and returns once all are on disk.
func (w *sweep) publish(ctx context.Context, drifts []drift) error {
	if err := w.name(ctx, drifts); err != nil {
		return err
	}
	if err := w.makeRoom(ctx, len(drifts)); err != nil {
		return err
	}
	acks := make([]stream.Ack, len(drifts))
	errs := make([]error, len(drifts))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(256)
	for i := range drifts {
		if drifts[i].defeated {
			continue
		}
		group.Go(func() error {
			acks[i], errs[i] = w.publishOne(gctx, &drifts[i].event)
			if errors.Is(errs[i], stream.ErrTooLarge) {
				return nil
			}
			return errs[i]
		})
	}
	err := group.Wait()
	for i := range drifts {
		switch {
		case drifts[i].defeated:
		case errs[i] != nil:
			w.log.Error("event not published", zap.String("event_id", drifts[i].event.ID), zap.String("object_id", drifts[i].id), zap.Error(errs[i]))
		default:
			drifts[i].eventID = drifts[i].event.ID
			if !acks[i].Duplicate {
				w.report.Published++
			}
		}
	}
	return err //nolint:wrapcheck // publishOne says what it was
}

// room is how many more events a sweep may publish before it looks at the mirror's backlog again.
type room struct {
	left   int
	looked time.Time
	said   time.Time // when the log was last told that the sweep waits
}

const (
	// lookEvery is how old a look at the backlog may be: webhooks come meanwhile.
	lookEvery = time.Second
	// lookWaiting is how often a sweep looks that waits for the worker.
	lookWaiting = 250 * time.Millisecond
	// sayWaiting is how often the log is told of it.
	sayWaiting = time.Minute
)

// makeRoom waits while the mirror has too much before it. A sweep reads faster than a worker applies, and without it a large
// one would fill the stream, so that ingest had to refuse webhooks. Nothing is read meanwhile but the page that was asked for ahead.
func (w *sweep) makeRoom(ctx context.Context, events int) error {
	if w.room.left >= events && time.Since(w.room.looked) < lookEvery {
		w.room.left -= events
		return nil
	}
	most, began, waited := w.cfg.MaxPending, time.Now(), false
	for {
		pending, err := w.pending(ctx)
		if err != nil {
			return err
		}
		w.room.looked = time.Now()
		if pending <= most {
			w.room.left = w.cfg.MaxPending - pending - events
			if waited {
				w.progress(0)
				w.log.Info("the worker has caught up, publishing again", zap.Int("pending", pending), zap.Duration("duration", time.Since(began)))
			}
			return nil
		}
		most, waited = w.cfg.MaxPending/2, true // else it would wait again after the next page
		w.progress(int64(pending))
		if time.Since(w.room.said) >= sayWaiting {
			w.room.said = time.Now()
			w.log.Warn("waiting for the worker: too many events are not applied yet", zap.String("resource", w.table), zap.Int("pending", pending), zap.Int("limit", w.cfg.MaxPending))
		}
		if err := sleep(ctx, lookWaiting); err != nil {
			return err
		}
	}
}

// pending is how many events the mirror has before it.
func (w *sweep) pending(ctx context.Context) (int, error) {
	n := 0
	err := patiently(ctx, func() error {
		try, cancel := context.WithTimeout(ctx, stream.PublishTimeout)
		defer cancel()
		var err error
		n, _, err = w.backlog(try)
		return err
	})
	return n, err
}

// patiently tries for a minute: a broker that is full or away for a moment costs no sweep.
func patiently(ctx context.Context, do func() error) error {
	return backoff.Retry(do, backoff.WithContext(backoff.NewExponentialBackOff( //nolint:wrapcheck // do says what it was
		backoff.WithInitialInterval(100*time.Millisecond), backoff.WithMaxInterval(5*time.Second), backoff.WithMaxElapsedTime(time.Minute)), ctx))
}

func (w *sweep) publishOne(ctx context.Context, e *event.Event) (stream.Ack, error) {
	var ack stream.Ack
	err := patiently(ctx, func() error {
		try, cancel := context.WithTimeout(ctx, 2*stream.PublishTimeout)
		defer cancel()
		var err error
		ack, err = w.publisher.Publish(try, e)
		if errors.Is(err, stream.ErrTooLarge) || errors.Is(err, stream.ErrClosed) || ctx.Err() != nil && err != nil {
			return backoff.Permanent(err)
		}
		return err
	})
	return ack, err
}

// name gives events their ids. An event that the mirror has applied, and whose drift is there again (a row that was changed by hand,
// a database taken back to a backup), gets the next id; else the inbox would drop it.
func (w *sweep) name(ctx context.Context, drifts []drift) error {
	open := make([]*drift, 0, len(drifts))
	for i := range drifts {
		open = append(open, &drifts[i])
	}
	for generation := 0; len(open) > 0; generation++ {
		ids := make([]string, len(open))
		for i, d := range open {
			ids[i] = event.ReconciledID(d.identity, generation)
			d.event.ID = ids[i]
		}
		applied, err := w.books.settled(ctx, ids, "processed")
		if err != nil {
			return err
		}
		var next []*drift
		for i, d := range open {
			if applied[ids[i]] {
				next = append(next, d)
			}
		}
		open = next
	}
	return nil
}

// mirrorHandler is the consumer that applies events to the mirror.
const mirrorHandler = "mirror"

// backlog tells how many events the mirror has before it, and from which one on. Without a mirror there are none.
func (w *sweep) backlog(ctx context.Context) (pending int, floor uint64, err error) {
	consumer, err := w.js.Consumer(ctx, stream.Events, mirrorHandler)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("look up consumer %s: %w", mirrorHandler, err)
	}
	info := consumer.CachedInfo()
	return int(info.NumPending) + info.NumAckPending, info.AckFloor.Stream, nil
}

// landed takes out the candidates for which an event is still on its way.
func (w *sweep) landed(ctx context.Context, candidates []*candidate) ([]*candidate, error) {
	if len(candidates) == 0 || w.opts.Kind == Backfill {
		return candidates, nil
	}
	pending, floor, err := w.backlog(ctx)
	if err != nil || pending == 0 {
		return candidates, err
	}
	events, err := w.js.Stream(ctx, stream.Events)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", stream.Events, err)
	}
	var left []*candidate
	for _, c := range candidates {
		d := w.driftOf(c)
		filter := "clerk.evt." + stream.Token(w.cfg.Source) + "." + stream.Token(resources[w.table]) + ".*." + stream.Token(d.event.Key())
		on, err := w.onItsWay(ctx, events, floor+1, filter)
		if err != nil {
			return nil, err
		}
		if !on {
			left = append(left, c)
		}
	}
	return left, nil
}

// onItsWay looks for an event from seq on that the mirror has not settled.
func (w *sweep) onItsWay(ctx context.Context, events jetstream.Stream, seq uint64, filter string) (bool, error) {
	for {
		msg, err := events.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(filter))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look for events of %s: %w", filter, err)
		}
		id := msg.Header.Get(stream.HeaderEventID)
		settled, err := w.books.settled(ctx, []string{id}, "processed", "dead", "discarded")
		if err != nil {
			return false, err
		}
		if !settled[id] {
			return true, nil
		}
		seq = msg.Sequence + 1
	}
}
