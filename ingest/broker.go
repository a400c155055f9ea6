package ingest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/stream"
)

const (
	probeEvery = time.Second
	probeTime  = 2 * time.Second
	// probeRarely is the pace of the question where the broker does not let ingest ask: each try costs a line in its log.
	probeRarely = time.Minute
	// believed is how long a failed publish counts against readiness without a newer one.
	believed = 5 * time.Second
	// fullBelow is the room in bytes under which a stream counts as full.
	fullBelow = 16 << 10
)

// broker watches the way to the stream, so that readiness answers from memory.
type broker struct {
	js     jetstream.JetStream // nil in tests without one: always fine
	log    *zap.Logger
	source string    // the default one
	mute   time.Time // until when the stream is not asked for: only the watch uses it
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
	if err := stream.Connected(b.js.Conn()); err != nil {
		return err
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
		b.last.Store(&verdict{fmt.Errorf("stream %s: %w", stream.Events, stream.Words(err)), time.Now()})
	case errors.Is(err, stream.ErrTooLarge), errors.Is(err, stream.ErrClosed):
	default:
		words := stream.Words(err)
		if words == stream.ErrUnavailable || errors.Is(err, context.DeadlineExceeded) { //nolint:errorlint // this very one: it says nothing
			words = errNotConfirmed
		}
		b.last.Store(&verdict{words, time.Now()})
	}
}

// errNotConfirmed: a stream one of whose writes failed takes no write any more, and tells a publisher nothing.
var errNotConfirmed = errors.New("the broker did not confirm the last event: it is slow, its cluster has no majority (which returns with its servers), or a write to its " +
	"disk failed, after which the stream takes no event until the broker is restarted: its log and its own /healthz say which")

var errFull = fmt.Errorf("stream %s is full: %w", stream.Events, stream.ErrFull)

// watch probes until ctx is done.
func (b *broker) watch(ctx context.Context) {
	if b.js == nil {
		return
	}
	var last, told string
	for {
		b.probed.Store(&verdict{b.probe(ctx), time.Now()})
		last, told = b.tell(last, told)
		changed := b.js.Conn().StatusChanged()
		wait := time.NewTimer(probeEvery)
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

// tell logs, once a cause, that events cannot be stored, and that they can again. What is over by the next look, as the first dialling, is not
// told. It takes and returns the cause at the last look and the one that was told, "" for none.
func (b *broker) tell(last, told string) (now, tells string) {
	err := b.check()
	if err != nil {
		now = err.Error()
	}
	switch {
	case now == told || now != last:
		return now, told
	case err != nil:
		b.log.Warn("events cannot be stored: webhooks are answered 503, and their senders try again", zap.Error(err))
	default:
		b.log.Info("events can be stored again")
	}
	return now, now
}

// probe asks for the stream. Where nobody answers, the broker may not allow the question (ingest needs no more than to publish): then an
// event that the stream must refuse shows whether it takes any.
func (b *broker) probe(ctx context.Context) error {
	if stream.Connected(b.js.Conn()) != nil {
		return nil // check sees it by itself
	}
	if time.Now().Before(b.mute) {
		return b.knock(ctx)
	}
	ask, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	s, err := stream.Lookup(ask, b.js, stream.Events)
	if stream.Words(err) == stream.ErrUnavailable { //nolint:errorlint // this very one: no answer
		if err = b.knock(ctx); err == nil {
			b.mute = time.Now().Add(probeRarely)
		}
		return err
	}
	if err != nil {
		return err
	}
	info := s.CachedInfo()
	if err := stream.CheckStream(info.Config); err != nil {
		return err
	}
	if c := info.Config; c.MaxBytes > 0 && c.Discard == jetstream.DiscardNew &&
		info.State.Bytes+fullBelow > uint64(c.MaxBytes) {
		return errFull
	}
	return nil
}

func (b *broker) knock(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	if err := stream.Knock(ctx, b.js, b.source); err != nil {
		return fmt.Errorf("stream %s: %w", stream.Events, err)
	}
	return nil
}
