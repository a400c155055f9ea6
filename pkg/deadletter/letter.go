package deadletter

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
)

// ErrNotFound tells that no such dead letter is known.
var ErrNotFound = errors.New("no such dead letter")

// ErrGone tells that a dead letter is known but that its body is not kept any more.
var ErrGone = errors.New("the letter is gone: it was older than 90 days, or the stream was made anew")

// Find returns what the log says of an event's dead letter at a handler, or [ErrNotFound].
func Find(ctx context.Context, db *gorm.DB, handler string, e event.Ref) (Entry, error) {
	entries, err := after(ctx, db, Filter{Handler: handler, event: &e}, place{}, 1)
	if err != nil {
		return Entry{}, err
	}
	if len(entries) == 0 {
		return Entry{}, ErrNotFound
	}
	return entries[0], nil
}

// Get reads the letter of an entry: the event as it was stored, and what the letter says besides. The error is [ErrGone] where
// it is not there any more.
func Get(ctx context.Context, js jetstream.JetStream, e Entry) (Record, error) {
	s, err := open(ctx, js)
	if err != nil {
		return Record{}, err
	}
	msg, err := read(ctx, s, e)
	if err != nil {
		return Record{}, err
	}
	return parse(msg), nil
}

func open(ctx context.Context, js jetstream.JetStream) (jetstream.Stream, error) {
	s, err := js.Stream(ctx, stream.DeadLetters)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, stream.ErrSetup
	}
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", stream.DeadLetters, stream.Explain(err))
	}
	return s, nil
}

// read reads the letter of an entry, and makes sure that it is its own.
func read(ctx context.Context, s jetstream.Stream, e Entry) (*jetstream.RawStreamMsg, error) {
	if e.LetterSeq == 0 {
		return nil, ErrGone
	}
	msg, err := s.GetMsg(ctx, e.LetterSeq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("read dead letter %d: %w", e.LetterSeq, stream.Explain(err))
	}
	if msg.Header.Get(stream.HeaderEventID) != e.EventID || msg.Header.Get(stream.HeaderSource) != e.Source || msg.Header.Get(headerHandler) != e.Handler { // a stream that was recreated
		return nil, ErrGone
	}
	return msg, nil
}

// Exists reports whether the letter of an event is still there. The error is the broker's: it cannot tell.
func Exists(ctx context.Context, js jetstream.JetStream, handler string, e event.Ref, seq uint64) (bool, error) {
	s, err := open(ctx, js)
	if err == nil {
		_, err = read(ctx, s, Entry{Handler: handler, Source: e.Source, EventID: e.ID, LetterSeq: seq})
	}
	if errors.Is(err, ErrGone) || errors.Is(err, stream.ErrSetup) {
		return false, nil
	}
	return err == nil, err
}

// parse reads a letter back.
func parse(msg *jetstream.RawStreamMsg) Record {
	h := msg.Header
	e, _ := stream.Parse(h, msg.Data, msg.Sequence) // what cannot be decoded is a dead letter all the same
	attempts, _ := strconv.Atoi(h.Get(headerAttempts))
	sequence, _ := strconv.ParseUint(h.Get(headerSequence), 10, 64)
	return Record{
		Handler: h.Get(headerHandler), Event: e, Reason: Reason(h.Get(headerReason)), Error: h.Get(headerError), Attempts: attempts,
		FirstFailedAt: parseTime(h.Get(headerFirstFailedAt)), LastFailedAt: parseTime(h.Get(headerLastFailedAt)),
		Subject: h.Get(headerSubject), Sequence: sequence, Header: h,
	}
}

func parseTime(text string) time.Time {
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return time.Time{}
	}
	return at
}

// Each calls fn for every dead letter that f selects and was there when it began, the oldest event first, with its letter, which is
// nil where it is gone. It holds a page of letters at a time. An error of fn ends it.
func Each(ctx context.Context, js jetstream.JetStream, db *gorm.DB, f Filter, fn func(Entry, *Record) error) error {
	dlq, err := open(ctx, js)
	if err != nil {
		return err
	}
	var n int
	if n, f.through, err = total(ctx, db, f); err != nil || n == 0 {
		return err
	}
	for at := (place{}); ; {
		entries, err := after(ctx, db, f, at, page)
		if err != nil || len(entries) == 0 {
			return err
		}
		at = entries[len(entries)-1].place()
		for len(entries) > 0 {
			messages, err := readPage(ctx, dlq, entries)
			if err != nil {
				return err
			}
			for i, msg := range messages {
				var record *Record
				if msg != nil {
					r := parse(msg)
					record = &r
				}
				if err := fn(entries[i], record); err != nil {
					return err
				}
			}
			entries = entries[len(messages):]
		}
	}
}
