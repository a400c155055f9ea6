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
	Pending     uint64  `json:"pending"`     // events that were not delivered yet
	AckPending  int     `json:"ack_pending"` // delivered and not settled: in work, or waiting for their retry
	Redelivered int     `json:"redelivered"` // of AckPending, those that were delivered more than once
	LagSeconds  float64 `json:"lag_seconds"` // age of the oldest unsettled event, 0 where there is none
}

// Consumers lists every consumer of [Events] by name. It asks the broker once for the list and once or
// twice more for each consumer that has work. The error is [ErrSetup] where the stream does not exist.
func Consumers(ctx context.Context, js jetstream.JetStream) ([]Consumer, error) {
	s, err := js.Stream(ctx, Events)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, ErrSetup
	}
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", Events, err)
	}
	list := s.ListConsumers(ctx)
	consumers := []Consumer{}
	for info := range list.Info() {
		lag, err := age(ctx, s, info)
		if err != nil {
			return nil, fmt.Errorf("find the oldest event of consumer %s: %w", info.Name, err)
		}
		consumers = append(consumers, Consumer{
			Handler: info.Name, Pending: info.NumPending, AckPending: info.NumAckPending,
			Redelivered: info.NumRedelivered, LagSeconds: lag.Seconds(),
		})
	}
	if err := list.Err(); err != nil {
		return nil, fmt.Errorf("list consumers of %s: %w", Events, err)
	}
	slices.SortFunc(consumers, func(a, b Consumer) int { return strings.Compare(a.Handler, b.Handler) })
	return consumers, nil
}

// age is how long ago the oldest event was stored that the consumer has not settled.
func age(ctx context.Context, s jetstream.Stream, info *jetstream.ConsumerInfo) (time.Duration, error) {
	// The ack floor alone says nothing: it stands still below the events of other consumers.
	if info.NumPending+uint64(max(info.NumAckPending, 0)) == 0 {
		return 0, nil
	}
	filters := info.Config.FilterSubjects
	if len(filters) == 0 {
		filters = []string{info.Config.FilterSubject}
	}
	var oldest time.Time
	for _, filter := range filters {
		if filter == "" {
			filter = ">"
		}
		msg, err := s.GetMsg(ctx, info.AckFloor.Stream+1, jetstream.WithGetMsgSubject(filter))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("read the first event of %s after %d: %w", filter, info.AckFloor.Stream, err)
		}
		if oldest.IsZero() || msg.Time.Before(oldest) {
			oldest = msg.Time
		}
	}
	if oldest.IsZero() { // purged in between
		return 0, nil
	}
	return max(time.Since(oldest), 0), nil
}
