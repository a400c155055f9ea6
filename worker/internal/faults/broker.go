package faults

import (
	"context"
	"strings"
	"sync/atomic"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Broker is a JetStream that loses what a crash would have kept from being sent. Only what a worker does is caught.
type Broker struct {
	jetstream.JetStream
	// LoseAcks and LoseTerms are how many of the next acks and terms never leave: the worker crashed before.
	LoseAcks, LoseTerms atomic.Int64
	// AfterLetter is called once a dead letter is durable, before the worker knows; nil: nothing.
	AfterLetter func()
	// Pull are options of the worker's subscriptions that override its own.
	Pull []jetstream.PullMessagesOpt
}

// NewBroker wraps js.
func NewBroker(js jetstream.JetStream) *Broker { return &Broker{JetStream: js} }

// PublishMsg implements jetstream.JetStream.
func (b *Broker) PublishMsg(ctx context.Context, msg *nats.Msg, opts ...jetstream.PublishOpt) (*jetstream.PubAck, error) {
	ack, err := b.JetStream.PublishMsg(ctx, msg, opts...)
	if err == nil && b.AfterLetter != nil && strings.HasPrefix(msg.Subject, "clerk.dlq.") {
		b.AfterLetter()
	}
	return ack, err //nolint:wrapcheck // transparent
}

// Consumer implements jetstream.JetStream.
func (b *Broker) Consumer(ctx context.Context, stream, name string) (jetstream.Consumer, error) {
	c, err := b.JetStream.Consumer(ctx, stream, name)
	return consumer{c, b}, err //nolint:wrapcheck // transparent
}

type consumer struct {
	jetstream.Consumer
	broker *Broker
}

func (c consumer) Messages(opts ...jetstream.PullMessagesOpt) (jetstream.MessagesContext, error) {
	m, err := c.Consumer.Messages(append(opts, c.broker.Pull...)...)
	return messages{m, c.broker}, err //nolint:wrapcheck // transparent
}

type messages struct {
	jetstream.MessagesContext
	broker *Broker
}

func (m messages) Next(opts ...jetstream.NextOpt) (jetstream.Msg, error) {
	msg, err := m.MessagesContext.Next(opts...)
	if err != nil {
		return nil, err //nolint:wrapcheck // transparent
	}
	return message{msg, m.broker}, nil
}

type message struct {
	jetstream.Msg
	broker *Broker
}

func (m message) Ack() error {
	if m.broker.LoseAcks.Add(-1) >= 0 {
		return nil
	}
	return m.Msg.Ack() //nolint:wrapcheck // transparent
}

func (m message) TermWithReason(reason string) error {
	if m.broker.LoseTerms.Add(-1) >= 0 {
		return nil
	}
	return m.Msg.TermWithReason(reason) //nolint:wrapcheck // transparent
}
