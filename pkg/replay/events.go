package replay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
)

// Selection is a part of [stream.Events] for one handler.
type Selection struct {
	Handler     string
	Subjects    []string // of the events, as consumers filter them; they must not overlap
	From, Last  uint64   // sequences, both inclusive
	RunID       string   // names the run: a repetition with the same id publishes nothing twice
	WithEffects bool
	// Again makes the run go on where it was broken off: what has failed since it was published, and waits or is dead, is published once
	// more at once, under an id that has this word added (new for each time that a run goes on). Empty for a run that begins.
	Again string
	// Discarded says to take also events that were discarded as dead letters of the handler.
	Discarded bool
}

// Subjects are the events that both a handler and a filter such as "clerk.evt.*.user.*.*" want; none where there are none.
func Subjects(h stream.HandlerSpec, filter string) []string {
	wanted := []string{"clerk.evt.>"}
	if len(h.Filters) > 0 {
		wanted = nil
		for _, f := range h.Filters {
			wanted = append(wanted, "clerk.evt.*."+f)
		}
	}
	var both []string
	for _, w := range wanted {
		if s, ok := intersect(w, filter); ok {
			both = append(both, s)
		}
	}
	return both
}

// intersect is the filter of subjects that match both filters.
func intersect(a, b string) (string, bool) {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	var both []string
	for i := 0; ; i++ {
		switch {
		case i == len(as) && i == len(bs):
			return strings.Join(both, "."), true
		case i < len(as) && as[i] == ">" && i < len(bs):
			return strings.Join(append(both, bs[i:]...), "."), true
		case i < len(bs) && bs[i] == ">" && i < len(as):
			return strings.Join(append(both, as[i:]...), "."), true
		case i == len(as) || i == len(bs):
			return "", false
		case as[i] == "*":
			both = append(both, bs[i])
		case bs[i] == "*" || as[i] == bs[i]:
			both = append(both, as[i])
		default:
			return "", false
		}
	}
}

// FirstAt is the sequence of the first event that was stored at or after a time; one past the last where there is none.
func FirstAt(ctx context.Context, s jetstream.Stream, at time.Time) (uint64, error) {
	info, err := s.Info(ctx)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", stream.Events, Explain(err))
	}
	first, last := info.State.FirstSeq, info.State.LastSeq
	if info.State.Msgs == 0 {
		return last + 1, nil
	}
	// Times only grow, so halving finds it in some twenty reads.
	n := sort.Search(int(last-first+1), func(i int) bool {
		if err != nil {
			return true
		}
		var msg *jetstream.RawStreamMsg
		msg, err = s.GetMsg(ctx, first+uint64(i), jetstream.WithGetMsgSubject(">"))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			err = nil
			return true
		}
		return err != nil || !msg.Time.Before(at)
	})
	if err != nil {
		return 0, fmt.Errorf("find the first event after %s: %w", at.Format(time.RFC3339), Explain(err))
	}
	return first + uint64(n), nil
}

// Count is how many events a selection has. It asks the broker, which knows without reading them.
func Count(ctx context.Context, js jetstream.JetStream, sel Selection) (int, error) {
	if len(sel.Subjects) == 0 || sel.From > sel.Last {
		return 0, nil
	}
	// The broker knows how many there are from a sequence on. Those behind the last are taken off, and counted on both sides, since more may
	// come while it is asked.
	for tries := 1; ; tries++ {
		before, err := countFrom(ctx, js, sel.Subjects, sel.Last+1)
		if err != nil {
			return 0, err
		}
		all, err := countFrom(ctx, js, sel.Subjects, sel.From)
		if err != nil {
			return 0, err
		}
		after, err := countFrom(ctx, js, sel.Subjects, sel.Last+1)
		if err != nil {
			return 0, err
		}
		if before == after || tries == 5 {
			return max(0, all-after), nil
		}
	}
}

func countFrom(ctx context.Context, js jetstream.JetStream, subjects []string, seq uint64) (int, error) {
	consumer, err := js.CreateConsumer(ctx, stream.Events, jetstream.ConsumerConfig{
		FilterSubjects: subjects, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: max(seq, 1),
		AckPolicy: jetstream.AckNonePolicy, InactiveThreshold: 10 * time.Second, MemoryStorage: true, Replicas: 1,
	})
	if err != nil {
		return 0, fmt.Errorf("count events: %w", Explain(err))
	}
	info := consumer.CachedInfo()
	_ = js.DeleteConsumer(ctx, stream.Events, info.Name) // or it goes by itself
	return int(info.NumPending), nil
}

// id names the replay of one event, which is told from others by its sequence or its own name.
func (s Selection) id(event any) string {
	return fmt.Sprintf("run:%s:%s:%v", s.RunID, s.Handler, event)
}

// Events publishes a selection, in the order of the stream. It holds a window of events in memory, at most [PageBytes] and one event for each
// subject of the selection. It may be broken off and repeated with the same selection.
func (r *Run) Events(ctx context.Context, s jetstream.Stream, sel Selection) error {
	next := make([]*jetstream.RawStreamMsg, len(sel.Subjects)) // of each subject, the first that was not taken
	at := make([]uint64, len(sel.Subjects))                    // where each goes on
	for i := range at {
		at[i] = max(sel.From, 1)
	}
	for {
		if err := r.Wait(ctx); err != nil {
			return err
		}
		window := r.Window()
		items := make([]Item, 0, window)
		for held := 0; len(items) < window && held <= PageBytes-EventBytes; {
			var msg *jetstream.RawStreamMsg
			err := r.Try(ctx, func(ctx context.Context) (err error) {
				msg, err = take(ctx, s, sel, next, at)
				return err
			})
			if err != nil {
				return err
			}
			if msg == nil {
				break
			}
			items, held = append(items, sel.item(msg)), held+len(msg.Data)
		}
		if len(items) == 0 {
			return nil
		}
		if err := r.give(ctx, sel, items); err != nil {
			return err
		}
	}
}

// give publishes what is to be published of a window of a selection.
func (r *Run) give(ctx context.Context, sel Selection, items []Item) error {
	err := r.Try(ctx, func(ctx context.Context) error { return r.compare(ctx, sel, items) })
	if err != nil {
		return err
	}
	items = slices.DeleteFunc(items, func(i Item) bool {
		switch i.what {
		case leaveOut:
			r.progress.LeftOut++
		case settled:
			r.progress.Earlier++
			r.progress.Applied++
		case publish:
			return false
		}
		return true
	})
	stored, err := r.Publish(ctx, items)
	for _, item := range stored {
		if item.known {
			r.watch(item)
		}
	}
	return err
}

// compare looks the items up in the log and notes what is to be done with each.
func (r *Run) compare(ctx context.Context, sel Selection, items []Item) error {
	at := make(map[event.Ref]int, len(items))
	events := make([]event.Ref, len(items))
	for i, item := range items {
		at[item.Event], events[i] = i, item.Event
	}
	rows, err := r.rows(ctx, sel.Handler, events)
	if err != nil {
		return err
	}
	for _, row := range rows {
		item := &items[at[row.ref()]]
		item.seen = row.writtenAt()
		switch {
		case row.Status == "discarded" && !sel.Discarded:
			item.what = leaveOut
		case sel.Again == "":
		case row.Status != "processed":
			item.again(sel.Again)
		case row.replayID() == item.ID || strings.HasPrefix(row.replayID(), item.ID+":"):
			item.what = settled
		}
	}
	return nil
}

func (s Selection) item(msg *jetstream.RawStreamMsg) Item {
	item := NewItem(s.Handler, s.id(msg.Sequence), msg)
	item.Message.Header.Del(stream.HeaderReplayEffects) // this run's wish counts, not that of the message
	if s.WithEffects {
		item = item.WithEffects()
	}
	return item
}

// take returns the next event of a selection, nil at its end.
func take(ctx context.Context, s jetstream.Stream, sel Selection, next []*jetstream.RawStreamMsg, at []uint64) (*jetstream.RawStreamMsg, error) {
	first := -1
	for i, subject := range sel.Subjects {
		if next[i] == nil && at[i] <= sel.Last {
			msg, err := s.GetMsg(ctx, at[i], jetstream.WithGetMsgSubject(subject))
			switch {
			case errors.Is(err, jetstream.ErrMsgNotFound):
				at[i] = sel.Last + 1
			case err != nil:
				return nil, fmt.Errorf("read event %d: %w", at[i], Explain(err))
			default:
				next[i], at[i] = msg, msg.Sequence+1
			}
		}
		if next[i] != nil && next[i].Sequence <= sel.Last && (first < 0 || next[i].Sequence < next[first].Sequence) {
			first = i
		}
	}
	if first < 0 {
		return nil, nil //nolint:nilnil // the end
	}
	msg := next[first]
	next[first] = nil
	return msg, nil
}

// Place is where an event lies in the stream.
type Place struct {
	Source, EventID string
	Seq             uint64
}

// Each publishes single events, with a window of at most [PageBytes] in memory; those that are not kept any more are counted.
func (r *Run) Each(ctx context.Context, s jetstream.Stream, sel Selection, places []Place) (gone int, err error) {
	for len(places) > 0 {
		if err := r.Wait(ctx); err != nil {
			return gone, err
		}
		window := min(r.Window(), len(places))
		items := make([]Item, 0, window)
		n := 0
		for held := 0; n < window && held <= PageBytes-EventBytes; n++ {
			place := places[n]
			var msg *jetstream.RawStreamMsg
			err := r.Try(ctx, func(ctx context.Context) (err error) {
				msg, err = s.GetMsg(ctx, place.Seq)
				return Explain(err)
			})
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				gone++
				continue
			}
			if err != nil {
				return gone, fmt.Errorf("read event %s: %w", place.EventID, err)
			}
			item := sel.item(msg)
			if item.Event != (event.Ref{Source: place.Source, ID: place.EventID}) { // a stream that was recreated
				gone++
				continue
			}
			item.name(sel.id(item.Event)) // what lies there may be a replay, and another one later
			items, held = append(items, item), held+len(msg.Data)
		}
		if err := r.give(ctx, sel, items); err != nil {
			return gone, err
		}
		places = places[n:]
	}
	return gone, nil
}
