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
	js     jetstream.JetStream
	kv     jetstream.KeyValue
	key    string
	holder string
	ttl    time.Duration
	fence  uint64 // the revision by which it was taken
	// Of the newest renewal; keep's until stopped is closed.
	rev   uint64
	until time.Time // by our clock, which need not run like the broker's: the lease is surely held till then
	sent  time.Time // when the oldest renewal since then was sent that had no answer; zero for none

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
		return nil, nil, fmt.Errorf("open bucket %s: %w", stream.Leases, stream.Explain(err))
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
		return nil, nil, fmt.Errorf("take lease %s: %w", key, stream.Explain(err))
	}
	l := &lease{
		js: js, kv: kv, key: key, holder: holder, ttl: ttl, rev: rev, fence: rev, until: began.Add(ttl - ttl/4),
		released: make(chan struct{}), stopped: make(chan struct{}),
	}
	held, lose := context.WithCancelCause(ctx)
	go l.keep(held, lose)
	return l, held, nil
}

// keep renews the lease until it is released or lost.
func (l *lease) keep(ctx context.Context, lose context.CancelCauseFunc) {
	defer close(l.stopped)
	defer lose(nil)
	timer := time.NewTimer(l.ttl / 4)
	defer timer.Stop()
	for {
		select {
		case <-l.released:
			return
		case <-ctx.Done():
			<-l.released
			return
		case <-timer.C:
		}
		began := time.Now()
		again, err := l.renew(ctx, began)
		if err != nil {
			lose(err)
			<-l.released
			return
		}
		if again {
			timer.Reset(0)
		} else {
			timer.Reset(l.ttl/4 - time.Since(began))
		}
	}
}

// renew makes one try, which leaves time for another before the lease is lost. again asks for the next at once. The error is errLeaseLost.
func (l *lease) renew(ctx context.Context, now time.Time) (again bool, err error) {
	try, cancel := context.WithDeadline(ctx, earlier(l.until, now.Add(l.ttl/4)))
	defer cancel()
	// KeyValue.Update would drop the key's time to live.
	ack, err := l.js.Publish(try, "$KV."+stream.Leases+"."+l.key, []byte(l.holder),
		jetstream.WithExpectLastSequencePerSubject(l.rev), jetstream.WithMsgTTL(l.ttl))
	switch {
	case err == nil:
		l.rev, l.until, l.sent = ack.Sequence, now.Add(l.ttl-l.ttl/4), time.Time{}
		return false, nil
	case isWrongRevision(err):
		mine, err := l.mine(try)
		if err == nil && !mine {
			return false, errLeaseLost
		}
		if err == nil && !l.sent.IsZero() { // a renewal before this one was stored, and only its answer was lost
			l.until, l.sent = l.sent.Add(l.ttl-l.ttl/4), time.Time{}
			return true, nil
		}
	case l.sent.IsZero():
		l.sent = now
	}
	if !time.Now().Before(l.until) {
		return false, errLeaseLost
	}
	return false, nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func isWrongRevision(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence
}

// mine tells whether the key still has our value, and takes over its revision.
func (l *lease) mine(ctx context.Context) (bool, error) {
	entry, err := l.kv.Get(ctx, l.key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read lease %s: %w", l.key, stream.Explain(err))
	}
	if string(entry.Value()) != l.holder || entry.Revision() < l.rev {
		return false, nil
	}
	l.rev = entry.Revision()
	return true, nil
}

// release gives the lease back, so that nobody has to wait for its end. It may be called once.
func (l *lease) release() {
	close(l.released)
	<-l.stopped
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := l.kv.Delete(ctx, l.key, jetstream.LastRevision(l.rev))
	if !isWrongRevision(err) {
		return // where it could not be deleted it expires
	}
	// The end of the context may have cut off a renewal that was stored.
	if mine, err := l.mine(ctx); err == nil && mine {
		_ = l.kv.Delete(ctx, l.key, jetstream.LastRevision(l.rev))
	}
}
