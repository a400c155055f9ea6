package reconciler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/usherhq/usher/pkg/stream"
)

// errLeaseLost ends a sweep whose lease another process may have by now.
var errLeaseLost = errors.New("the lease was lost")

// errBusy tells that another process holds the lease.
var errBusy = errors.New("another sweep is running")

// lease says that this process may sweep, and no other. It is advisory (a process may sleep through its end), so its
// revision goes into the run's row, and what a sweep publishes is right whoever else publishes it.
type lease struct {
	js       jetstream.JetStream
	kv       jetstream.KeyValue
	key      string
	holder   string
	ttl      time.Duration
	rev      uint64 // of the newest renewal; keep's until stopped is closed
	fence    uint64 // the revision by which it was taken
	released chan struct{}
	stopped  chan struct{}
}

// acquire takes the lease of a key for at least ttl (1 s or more, whole seconds). holder must be different for every call. The error is errBusy where another holds it,
// and says by whom. The context that it returns ends, with errLeaseLost, before the lease does.
func acquire(ctx context.Context, js jetstream.JetStream, key, holder string, ttl time.Duration) (*lease, context.Context, error) {
	kv, err := js.KeyValue(ctx, stream.Leases)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, nil, stream.ErrSetup
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open bucket %s: %w", stream.Leases, err)
	}
	began := time.Now()
	rev, err := kv.Create(ctx, key, []byte(holder), jetstream.KeyTTL(ttl))
	if errors.Is(err, jetstream.ErrKeyExists) {
		by := ""
		if entry, err := kv.Get(ctx, key); err == nil {
			by = " by " + string(entry.Value())
		}
		return nil, nil, fmt.Errorf("%w%s", errBusy, by)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("take lease %s: %w", key, err)
	}
	l := &lease{
		js: js, kv: kv, key: key, holder: holder, ttl: ttl, rev: rev, fence: rev,
		released: make(chan struct{}), stopped: make(chan struct{}),
	}
	held, lose := context.WithCancelCause(ctx)
	go l.keep(held, lose, began)
	return l, held, nil
}

// keep renews the lease until it is released or lost.
func (l *lease) keep(ctx context.Context, lose context.CancelCauseFunc, began time.Time) {
	defer close(l.stopped)
	defer lose(nil)
	ticker := time.NewTicker(l.ttl / 4)
	defer ticker.Stop()
	deadline := began.Add(l.ttl - l.ttl/4) // by our clock, which need not run like the broker's
	for {
		select {
		case <-l.released:
			return
		case <-ctx.Done():
			<-l.released
			return
		case <-ticker.C:
		}
		began := time.Now()
		try, cancel := context.WithDeadline(ctx, deadline)
		// KeyValue.Update would drop the key's time to live.
		ack, err := l.js.Publish(try, "$KV."+stream.Leases+"."+l.key, []byte(l.holder),
			jetstream.WithExpectLastSequencePerSubject(l.rev), jetstream.WithMsgTTL(l.ttl))
		cancel()
		var api *jetstream.APIError
		switch {
		case err == nil:
			l.rev, deadline = ack.Sequence, began.Add(l.ttl-l.ttl/4)
		case errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence && l.mine(ctx):
			// The renewal before this one was stored, and only its answer was lost.
		case errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence, time.Now().After(deadline):
			lose(errLeaseLost)
			<-l.released
			return
		}
	}
}

// mine tells whether the key still has our value, and takes over its revision.
func (l *lease) mine(ctx context.Context) bool {
	entry, err := l.kv.Get(ctx, l.key)
	if err != nil || string(entry.Value()) != l.holder || entry.Revision() < l.rev {
		return false
	}
	l.rev = entry.Revision()
	return true
}

// release gives the lease back, so that nobody has to wait for its end. It may be called once.
func (l *lease) release() {
	close(l.released)
	<-l.stopped
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = l.kv.Delete(ctx, l.key, jetstream.LastRevision(l.rev)) // else it expires
}
