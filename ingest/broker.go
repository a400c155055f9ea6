package ingest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/usherhq/usher/pkg/stream"
)

const (
	probeEvery = time.Second
	// probeRarely is the pace where the broker does not let ingest ask: each try costs a line in its log.
	probeRarely = time.Minute
	// believed is how long a failed publish counts against readiness without a newer one.
	believed = 5 * time.Second
	// fullBelow is the room in bytes under which a stream counts as full.
	fullBelow = 16 << 10
)

// broker watches the way to the stream, so that readiness answers from memory.
type broker struct {
	js     jetstream.JetStream // nil in tests without one: always fine
	probed atomic.Pointer[verdict]
	last   atomic.Pointer[verdict] // of a publish
}

type verdict struct {
	err error
	at  time.Time
}

// check is the readiness check.
func (b *broker) check() error {
	if b.js == nil {
		return nil
	}
	if !b.js.Conn().IsConnected() {
		return errors.New("not connected to the broker")
	}
	probed := b.probed.Load()
	if probed == nil {
		return errors.New("the stream was not looked at yet")
	}
	if probed.err != nil {
		return probed.err
	}
	if last := b.last.Load(); last != nil && last.err != nil && time.Since(last.at) < believed {
		return last.err
	}
	return nil
}

// published tells how a publish ended.
func (b *broker) published(err error) {
	switch {
	case err == nil:
		if last := b.last.Load(); last != nil { // the usual case writes nothing
			b.last.Store(nil)
		}
	case errors.Is(err, stream.ErrFull):
		b.last.Store(&verdict{errFull, time.Now()})
	case errors.Is(err, stream.ErrTooLarge), errors.Is(err, stream.ErrClosed):
	default:
		b.last.Store(&verdict{errNotStored, time.Now()})
	}
}

// errNotStored: a stream whose disk was full takes no write any more, even when there is room again.
var errNotStored = errors.New("the last event could not be stored; if this stays while the broker is connected, its disk is full or broken: free space, then restart the broker")

var errFull = fmt.Errorf("stream %s is full", stream.Events)

// watch probes until ctx is done.
func (b *broker) watch(ctx context.Context) {
	if b.js == nil {
		return
	}
	for {
		pace := probeEvery
		conclusive, err := b.probe(ctx)
		if !conclusive {
			pace = probeRarely
		}
		b.probed.Store(&verdict{err, time.Now()})
		changed := b.js.Conn().StatusChanged()
		wait := time.NewTimer(pace)
		select {
		case <-ctx.Done():
		case <-changed: // connected again or lost: look at once
		case <-wait.C:
		}
		wait.Stop()
		b.js.Conn().RemoveStatusListener(changed)
		if ctx.Err() != nil {
			return
		}
	}
}

// probe asks for the stream. It is not conclusive where nobody answers: the broker may not allow the question
// (ingest needs no more than to publish), and then connection and publishes decide.
func (b *broker) probe(ctx context.Context) (conclusive bool, err error) {
	if !b.js.Conn().IsConnected() {
		return true, nil // check sees it by itself
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	s, err := b.js.Stream(ctx, stream.Events)
	var api *jetstream.APIError
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return true, fmt.Errorf("stream %s is missing: run `usher setup`", stream.Events)
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return true, errors.New("JetStream is not enabled at the broker")
	case errors.As(err, &api):
		return true, fmt.Errorf("the broker cannot serve stream %s: %s", stream.Events, api.Description)
	case err != nil:
		return false, nil
	}
	info := s.CachedInfo()
	if err := stream.CheckStream(info.Config); err != nil {
		return true, err //nolint:wrapcheck // it names the stream and what to do
	}
	if c := info.Config; c.MaxBytes > 0 && c.Discard == jetstream.DiscardNew &&
		info.State.Bytes+fullBelow > uint64(c.MaxBytes) {
		return true, errFull
	}
	return true, nil
}
