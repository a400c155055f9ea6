package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/stream"
)

// The broker skips a record that it cannot read, without a word and without counting it among the deleted ones: the consumer's next event is
// simply the one behind it. So the loop compares the sequences of neighbouring deliveries, and what was skipped between them is looked up by
// the watch.

// position is the last event that the broker delivered for the first time, as far as this process knows.
type position struct {
	jetstream.SequencePair
	again uint64 // redeliveries since, each of which has raised the consumer's sequence
}

// opened begins at what the consumer has delivered to anybody, unless that is behind what was seen here.
func (p *position) opened(c *jetstream.ConsumerInfo) {
	d := c.Delivered
	if p.SequencePair == (jetstream.SequencePair{}) || d.Consumer < p.Consumer || d.Stream < p.Stream {
		*p = position{SequencePair: jetstream.SequencePair{Consumer: d.Consumer, Stream: d.Stream}}
	}
}

// passed notes a delivery. It returns the events between it and the one before, where the broker has delivered fewer events to anybody than lie
// between the two; else an empty span. Deliveries of other workers hide what was skipped only by their redeliveries.
func (p *position) passed(meta *jetstream.MsgMetadata) span {
	if meta.NumDelivered > 1 {
		p.again++
		return span{}
	}
	before, now := *p, meta.Sequence
	*p = position{SequencePair: now}
	if now.Consumer <= before.Consumer || now.Stream <= before.Stream { // the consumer or the stream was recreated, or has another leader
		return span{}
	}
	if now.Stream-before.Stream+before.again <= now.Consumer-before.Consumer {
		return span{}
	}
	return span{before.Stream + 1, now.Stream - 1}
}

// span is sequences, both ends included. It is empty where to is below from.
type span struct{ from, to uint64 }

func (s span) empty() bool { return s.from == 0 || s.to < s.from }

// skips is what a watch knows of skipped events, under its lock.
type skips struct {
	spans     []span  // to be looked up
	suspects  []span  // of one event each, which the look before has missed
	told      []span  // likewise, of which an operator was told
	opened    *uint64 // the last event that the broker had delivered to anybody when the loop first opened the consumer, nil before
	begun     bool    // what was skipped before that is noted
	tail      uint64  // what was skipped behind the last delivered event is noted up to here
	held      uint64  // the consumer's ack floor, where it stands still
	heldSince time.Time
}

// skippedSpans is how many spans wait to be looked up, and skippedALook how many events are looked up at a time: a handler that takes few types
// skips most events, and a replay for one handler is skipped by all others.
const skippedSpans, skippedALook = 1000, 500

// opens tells the watch up to which event others have consumed: what comes behind it the loop sees itself.
func (w *watch) opens(delivered uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.opened = cmp.Or(w.opened, &delivered)
}

// skipped notes events that the broker did not deliver to the loop, for the next look.
func (w *watch) skipped(s span) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.note(span{max(s.from, w.tail+1), s.to})
}

// note notes events for the next look, under the lock. What exceeds its room is not looked up.
func (w *watch) note(s span) {
	if !s.empty() && len(w.spans) < skippedSpans {
		w.spans = append(w.spans, s)
	}
}

// compareSkipped looks up events that the broker has skipped. Lost is one that the broker cannot read, though it counts it among the stored
// ones, or that it did not deliver, though it is the handler's; and that has no row. What a look finds is looked up alone at the next one.
func (w *watch) compareSkipped(ctx context.Context, s jetstream.Stream, info *jetstream.StreamInfo, c *jetstream.ConsumerInfo, row, next *watchRow) (*finding, error) {
	w.noteSkipped(info, c, row, next)
	w.mu.Lock()
	todo := w.suspects
	if w.suspects = nil; len(todo) == 0 {
		todo, w.spans = w.spans, nil
	}
	w.mu.Unlock()
	floor := c.Delivered.Stream
	if c.NumAckPending > 0 {
		floor = c.AckFloor.Stream
	}
	got, err := w.lookUp(ctx, s, todo, info.State.FirstSeq, floor)
	w.mu.Lock()
	w.spans = slices.Concat(got.rest, w.spans, got.later)
	w.mu.Unlock()
	unread, passed := got.unread, got.passed
	if err == nil {
		unread, err = w.unreadable(ctx, s, unread)
	}
	suspects := slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(unread), passed...)))) // spans overlap
	w.mu.Lock()
	for _, seq := range suspects {
		w.suspects = append(w.suspects, span{seq, seq})
	}
	w.mu.Unlock()
	if err != nil || len(suspects) == 0 {
		return nil, err
	}
	first, last := suspects[0], suspects[len(suspects)-1]
	f := &finding{kind: skipped, events: int64(len(suspects)), text: fmt.Sprintf(
		"%d events between the sequences %d and %d were skipped by the broker and had not been settled: its file is damaged", len(suspects), first, last)}
	if len(unread) == 0 {
		f.from, f.to = first, last
	}
	if info.Config.Replicas <= 1 && c.NumAckPending > 0 { // another replica may have it still
		f.held = slices.DeleteFunc(unread, func(seq uint64) bool { return seq <= c.AckFloor.Stream || seq > c.Delivered.Stream })
	}
	return f, nil
}

// giveUp settles events of which the operator was told, and that hold up the ack floor, and so the retention, for ever. The broker, which cannot
// read them, gives nobody the reply subject that an ack needs: the sequence in it is what counts.
func (w *watch) giveUp(seqs []uint64) {
	for _, seq := range seqs {
		subject := fmt.Sprintf("$JS.ACK.%s.%s.1.%d.0.0.0", stream.Events, w.handler, seq)
		if err := w.js.Conn().Publish(subject, []byte("+TERM its record is damaged")); err != nil {
			w.log.Debug("settle a damaged event", zap.Uint64("stream_seq", seq), zap.Error(err))
		}
	}
}

// noteSkipped notes what may have been skipped while no loop saw it: before this process, behind the last event, and above the ack floor
// where that stands still.
func (w *watch) noteSkipped(info *jetstream.StreamInfo, c *jetstream.ConsumerInfo, row, next *watchRow) {
	known := row != nil && row.StreamID == next.StreamID
	floor, last := int64(c.AckFloor.Stream), info.State.LastSeq
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.begun {
		from := floor
		if known {
			from = min(from, row.FloorSeq)
		}
		w.begun = true
		delivered := c.Delivered.Stream
		if w.opened != nil {
			delivered = min(delivered, *w.opened)
		}
		w.note(span{uint64(from) + 1, delivered})
	}
	if w.tail > last {
		w.tail = 0
	}
	if c.NumPending == 0 && c.NumAckPending == 0 && last > w.tail {
		w.note(span{max(c.Delivered.Stream, w.tail) + 1, last})
		w.tail = last
	}
	// Of an event that it cannot read, and that waits to be redelivered, the broker says that it is in flight, for ever.
	if held := c.NumAckPending > 0 && c.AckFloor.Stream == w.held; !held || w.heldSince.IsZero() {
		w.held, w.heldSince = c.AckFloor.Stream, time.Now()
	} else if time.Since(w.heldSince) > c.Config.AckWait {
		w.heldSince = time.Now()
		w.note(span{w.held + 1, min(w.held+skippedALook, c.Delivered.Stream)})
	}
}

// lookedUp is what was found out about skipped events.
type lookedUp struct {
	unread []uint64 // the broker does not find them
	passed []uint64 // they are the handler's, and have no row, though the broker has settled them
	later  []span   // they are the handler's, and on their way to it
	rest   []span   // they were not looked up
}

// lookUp reads the events of spans, no more than is bearable at a time.
func (w *watch) lookUp(ctx context.Context, s jetstream.Stream, spans []span, first, floor uint64) (lookedUp, error) {
	var got lookedUp
	begun, n := time.Now(), 0
	for i, one := range spans {
		for seq := max(one.from, first); seq <= one.to; seq++ {
			if slices.Contains(w.told, span{seq, seq}) {
				continue
			}
			rest := func() []span { return append([]span{{seq, one.to}}, spans[i+1:]...) }
			if n++; n > skippedALook || time.Since(begun) > watchInterval/2 {
				got.rest = rest()
				return got, nil
			}
			missed, found, err := w.missed(ctx, s, seq)
			switch {
			case err != nil:
				got.rest = rest()
				return got, err
			case !found:
				got.unread = append(got.unread, seq)
			case missed && seq <= floor:
				got.passed = append(got.passed, seq)
			case missed:
				got.later = append(got.later, span{seq, seq})
			}
		}
	}
	return got, nil
}

// missed reports whether the broker finds an event, and whether it is the handler's and has no row.
func (w *watch) missed(ctx context.Context, s jetstream.Stream, seq uint64) (missed, found bool, err error) {
	msg, err := s.GetMsg(ctx, seq)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return false, false, nil
	case err != nil:
		return false, false, fmt.Errorf("read event %d: %w", seq, stream.Explain(err))
	case time.Since(msg.Time) > rememberFor-24*time.Hour, !slices.ContainsFunc(w.filters, func(f string) bool { return stream.Covers(f, msg.Subject) }):
		return false, true, nil
	}
	has, err := w.hasRow(ctx, refOf(msg))
	return !has, true, err
}

// unreadable leaves, of events that the broker does not find, those that it counts among the stored ones all the same and that the log has no
// settled row of. What was deleted or purged is looked after by compareStream.
func (w *watch) unreadable(ctx context.Context, s jetstream.Stream, seqs []uint64) ([]uint64, error) {
	if len(seqs) == 0 {
		return nil, nil
	}
	info, err := s.Info(ctx, jetstream.WithDeletedDetails(true))
	if err != nil {
		return nil, fmt.Errorf("look up the holes of stream %s: %w", stream.Events, stream.Explain(err))
	}
	deleted := make(map[uint64]bool, len(info.State.Deleted))
	for _, seq := range info.State.Deleted {
		deleted[seq] = true
	}
	seqs = slices.DeleteFunc(seqs, func(seq uint64) bool {
		return deleted[seq] || seq < info.State.FirstSeq || seq > info.State.LastSeq
	})
	if len(seqs) == 0 {
		return nil, nil
	}
	settled, err := w.rowsOf(ctx, int64(slices.Min(seqs)), int64(slices.Max(seqs)))
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(seqs, func(seq uint64) bool { return settled[int64(seq)] }), nil
}
