package reconciler

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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
	held          bool
	foreign       bool
	mirrorVersion int64
	clerkVersion  int64
	event         event.Event
	identity      []byte // what the event's id is made of
	generation    int    // of the id: how many events of this identity the stream may have had before
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
	d := drift{id: c.object.ID, drift: c.verdict.drift, fields: c.verdict.fields, defeated: c.verdict.defeated, held: c.verdict.held, foreign: c.verdict.foreign, clerkVersion: c.object.version()}
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
		name := gjson.Get(c.row.raw, "object").Str
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

// heldBack is why no event is published.
func (d *drift) heldBack() HeldBack {
	switch {
	case d.defeated:
		return HeldByDelete
	case d.foreign:
		return HeldBySource
	case d.held:
		return HeldByVersion
	default:
		return ""
	}
}

// maxLost bounds how many lost events of one drift are passed over. Each was lost with a database of its own.
const maxLost = 20

// publish stores the events of drifts and returns once all are on disk.
func (w *sweep) publish(ctx context.Context, drifts []drift) error {
	open := make([]*drift, 0, len(drifts))
	for i := range drifts {
		if drifts[i].heldBack() == "" {
			open = append(open, &drifts[i])
		}
	}
	if err := w.makeRoom(ctx, len(open)); err != nil {
		return err
	}
	for range maxLost {
		if len(open) == 0 {
			return nil
		}
		if err := w.name(ctx, open); err != nil {
			return err
		}
		known, err := w.store(ctx, open)
		if err != nil {
			return err
		}
		if open, err = w.lost(ctx, known); err != nil {
			return err
		}
		for _, d := range open {
			d.generation, d.eventID = d.generation+1, ""
		}
	}
	for _, d := range open {
		w.log.Error("event not published: the stream has all that were tried, and the mirror none of them", zap.String("event_id", d.event.ID), zap.String("object_id", d.id))
	}
	return nil
}

// store stores events and returns those that the stream had already. One that is too large is logged, and left.
func (w *sweep) store(ctx context.Context, drifts []*drift) ([]*drift, error) {
	acks := make([]stream.Ack, len(drifts))
	errs := make([]error, len(drifts))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(256)
	for i, d := range drifts {
		group.Go(func() error {
			e := d.event // the publisher may look at it a little longer, and d may get another name
			acks[i], errs[i] = w.publishOne(gctx, &e)
			if errors.Is(errs[i], stream.ErrTooLarge) {
				return nil
			}
			return errs[i]
		})
	}
	err := group.Wait()
	var known []*drift
	for i, d := range drifts {
		if errs[i] != nil && ctx.Err() != nil {
			continue // cut off, which is no failure
		}
		if errs[i] != nil {
			w.log.Error("event not published", zap.String("event_id", d.event.ID), zap.String("object_id", d.id), zap.Error(errs[i]))
			continue
		}
		if d.eventID = d.event.ID; acks[i].Duplicate {
			known = append(known, d)
		} else {
			w.report.Published++
		}
	}
	return known, err //nolint:wrapcheck // publishOne says what it was
}

// lost are those events of the stream that the mirror neither has before it nor has in its books: the consumer is past them, but what
// it did with them is gone, since the database is new or was taken back to a backup. They will not come again by themselves.
func (w *sweep) lost(ctx context.Context, known []*drift) ([]*drift, error) {
	if len(known) == 0 {
		return nil, nil
	}
	// The consumer is asked before the books: what it acknowledges in between is on its way by this answer.
	coming := make([]bool, len(known))
	err := patiently(ctx, func() error {
		pending, floor, err := w.backlog(ctx)
		if err != nil || pending == 0 && floor > 0 {
			clear(coming)
			return err
		}
		events, err := w.js.Stream(ctx, stream.Events)
		if err != nil {
			return fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
		}
		group, gctx := errgroup.WithContext(ctx)
		group.SetLimit(64)
		for i, d := range known {
			group.Go(func() error {
				var err error
				coming[i], err = holds(gctx, events, floor+1, &d.event)
				return err
			})
		}
		return group.Wait()
	})
	if err != nil {
		return nil, err
	}
	var gone []*drift
	var ids []string
	for i, d := range known {
		if !coming[i] {
			gone, ids = append(gone, d), append(ids, d.event.ID)
		}
	}
	settled, err := w.books.settled(ctx, ids, "processed", "dead", "discarded")
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(gone, func(d *drift) bool { return settled[d.event.ID] }), nil
}

// holds tells whether the stream has an event from seq on.
func holds(ctx context.Context, events jetstream.Stream, seq uint64, e *event.Event) (bool, error) {
	subject := stream.Subject(e)
	for {
		msg, err := events.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(subject))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look for event %s: %w", e.ID, stream.Explain(err))
		}
		if msg.Header.Get(stream.HeaderEventID) == e.ID {
			return true, nil
		}
		seq = msg.Sequence + 1
	}
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

// name gives events their ids. An event that the mirror has applied, and whose drift is there again (a row that was changed by hand),
// gets the next id; else the inbox would drop it.
func (w *sweep) name(ctx context.Context, open []*drift) error {
	for len(open) > 0 {
		ids := make([]string, len(open))
		for i, d := range open {
			ids[i] = event.ReconciledID(d.identity, d.generation)
			d.event.ID = ids[i]
		}
		applied, err := w.books.settled(ctx, ids, "processed")
		if err != nil {
			return err
		}
		var next []*drift
		for i, d := range open {
			if applied[ids[i]] {
				d.generation++
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
		return 0, 0, fmt.Errorf("look up consumer %s: %w", mirrorHandler, stream.Explain(err))
	}
	info := consumer.CachedInfo()
	return int(info.NumPending) + info.NumAckPending, info.AckFloor.Stream, nil
}

// newcomer is how long ago an object was made at most whose first event may be on its way.
const newcomer = time.Hour

// landed takes out the candidates for which an event is still on its way.
func (w *sweep) landed(ctx context.Context, candidates []*candidate) ([]*candidate, error) {
	if len(candidates) == 0 {
		return nil, nil
	}
	pending, floor, err := w.backlog(ctx)
	if err != nil || pending == 0 {
		return candidates, err
	}
	events, err := w.js.Stream(ctx, stream.Events)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	var left []*candidate
	for _, c := range candidates {
		if w.filling() && c.verdict.drift == Missing && c.object.readAt.UnixMilli()-event.Millis(c.object.CreatedAt) > newcomer.Milliseconds() {
			left = append(left, c) // there may be a hundred thousand of them
			continue
		}
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
			return false, fmt.Errorf("look for events of %s: %w", filter, stream.Explain(err))
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
