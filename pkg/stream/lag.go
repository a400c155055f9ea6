package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Consumer tells how far a handler's consumer has come. What the handler still has to do is Pending plus
// AckPending.
type Consumer struct {
	Handler     string  `json:"handler"`
	Pending     uint64  `json:"pending"`        // events that were not delivered yet
	AckPending  int     `json:"in_flight"`      // delivered and not settled: in work, or waiting for their retry
	Redelivered int     `json:"redelivered"`    // of AckPending, those that were delivered more than once
	LagSeconds  float64 `json:"oldest_seconds"` // age of the oldest unsettled event by the broker's clock, 0 where there are no such events
}

// Consumers lists every durable consumer of [Events] by name; what follows the stream for a while, as `usher events tail` does, is not
// among them. It asks the broker twice for the list and once more
// for each filter of each consumer. The error is [ErrSetup] where the stream does not exist.
func Consumers(ctx context.Context, js jetstream.JetStream) ([]Consumer, error) {
	return consumersOf(ctx, js, func(c *jetstream.ConsumerInfo) bool { return c.Config.Durable != "" })
}

// Holders is [Consumers] of those only that keep events in the stream until they have settled them ([Holds]): the handlers.
func Holders(ctx context.Context, js jetstream.JetStream) ([]Consumer, error) {
	return consumersOf(ctx, js, Holds)
}

func consumersOf(ctx context.Context, js jetstream.JetStream, wanted func(*jetstream.ConsumerInfo) bool) ([]Consumer, error) {
	s, err := js.Stream(ctx, Events)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, ErrSetup
	}
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", Events, Explain(err))
	}
	infos, err := ConsumerInfos(ctx, s)
	if err != nil {
		return nil, err
	}
	consumers := []Consumer{}
	for _, info := range infos {
		if !wanted(info) {
			continue
		}
		_, at, err := FirstUnsettled(ctx, s, info)
		if err != nil {
			return nil, err
		}
		c := Consumer{Handler: info.Name, Pending: info.NumPending, AckPending: info.NumAckPending, Redelivered: info.NumRedelivered}
		if !at.IsZero() {
			c.LagSeconds = max(now(info).Sub(at).Seconds(), 0)
		}
		consumers = append(consumers, c)
	}
	slices.SortFunc(consumers, func(a, b Consumer) int { return strings.Compare(a.Handler, b.Handler) })
	return consumers, nil
}

// now is the broker's clock, which stamped the events too.
func now(info *jetstream.ConsumerInfo) time.Time {
	if info.TimeStamp.IsZero() { // a broker before 2.10 does not say
		return time.Now()
	}
	return info.TimeStamp
}

// ConsumerInfos are all consumers of a stream by name. It is an error where one of them does not answer: nobody knows what
// that one needs.
func ConsumerInfos(ctx context.Context, s jetstream.Stream) (map[string]*jetstream.ConsumerInfo, error) {
	infos := map[string]*jetstream.ConsumerInfo{}
	list := s.ListConsumers(ctx)
	for info := range list.Info() {
		infos[info.Name] = info
	}
	if err := list.Err(); err != nil {
		return nil, fmt.Errorf("list consumers of %s: %w", s.CachedInfo().Config.Name, Explain(err))
	}
	// A cluster leaves out of the list whoever does not answer, but it has their names.
	names, missing := s.ConsumerNames(ctx), []string(nil)
	for name := range names.Name() {
		if infos[name] == nil {
			missing = append(missing, name)
		}
	}
	if err := names.Err(); err != nil {
		return nil, fmt.Errorf("list consumers of %s: %w", s.CachedInfo().Config.Name, Explain(err))
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("list consumers of %s: no answer from %s", s.CachedInfo().Config.Name, strings.Join(missing, ", "))
	}
	return infos, nil
}

// FirstUnsettled finds the first event that a consumer has not settled, and when it was stored, as of info: sequence 0 where
// all are settled. An event that was stored before info is never missed. It asks the broker once for each filter of the consumer.
func FirstUnsettled(ctx context.Context, s jetstream.Stream, info *jetstream.ConsumerInfo) (seq uint64, at time.Time, err error) {
	// Whether anything is pending is not asked: the broker counts an event a moment after it has confirmed it. The ack floor
	// alone says nothing: it stays below the events of other consumers, so the next event of this one is read; and below an event
	// that reached the consumer's own max_deliver, so it counts only while something is in flight.
	from := info.AckFloor.Stream + 1
	if info.NumAckPending == 0 {
		from = info.Delivered.Stream + 1
	}
	filters := info.Config.FilterSubjects
	if len(filters) == 0 {
		filters = []string{info.Config.FilterSubject}
	}
	for _, filter := range filters {
		if filter == "" {
			filter = ">"
		}
		msg, err := s.GetMsg(ctx, from, jetstream.WithGetMsgSubject(filter))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue // also where it was purged since info
		}
		if err != nil {
			return 0, at, fmt.Errorf("find the first event that consumer %s has not settled: %w", info.Name, Explain(err))
		}
		if seq == 0 || msg.Sequence < seq {
			seq, at = msg.Sequence, msg.Time
		}
	}
	return seq, at, nil
}
