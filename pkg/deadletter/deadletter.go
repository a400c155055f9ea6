// Package deadletter keeps the events that a handler could not apply, with everything that is
// needed to understand and to replay them: the body and the headers as they were stored, and who
// gave up, why, after how many attempts and when.
//
// A dead letter is durable before its original is given up, so an event is never in neither place. The stream holds the letters;
// the delivery log (status dead) is their index: lists, counts and groups come from it and read no letter. Replaying and
// discarding may be broken off and repeated at any point. What a crash in between leaves, [Sweeper] puts right. The
// package judges no error and calls no handler.
package deadletter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
)

// Reason says in one word why an event could not be applied. The set is closed: it is a label of metrics.
type Reason string

// The reasons.
const (
	Undecodable   Reason = "undecodable"    // the body is not an event
	WrongInstance Reason = "wrong_instance" // of a Clerk instance that is not the configured one
	WrongSource   Reason = "wrong_source"   // the object belongs to another source
	Rejected      Reason = "rejected"       // the handler said that it can never succeed
	HandlerError  Reason = "handler_error"  // the handler failed at every attempt
	Constraint    Reason = "constraint"     // the database refused the data at every attempt
	Panic         Reason = "panic"          // the handler panicked at every attempt
	Timeout       Reason = "timeout"        // the handler did not finish in time at every attempt
)

// Reasons lists the closed set.
func Reasons() []Reason {
	return []Reason{Undecodable, WrongInstance, WrongSource, Rejected, HandlerError, Constraint, Panic, Timeout}
}

// Headers that a dead letter has besides those of its event.
const (
	headerHandler       = "Usher-Handler"
	headerReason        = "Usher-Reason"
	headerError         = "Usher-Error"
	headerAttempts      = "Usher-Attempts"
	headerFirstFailedAt = "Usher-First-Failed-At"
	headerLastFailedAt  = "Usher-Last-Failed-At"
	headerSubject       = "Usher-Original-Subject"
	headerSequence      = stream.HeaderFailedSequence
)

// maxError bounds the error text of a letter, in bytes.
const maxError = 2048

// Record is one dead letter.
type Record struct {
	Handler       string
	Event         event.Event
	Reason        Reason
	Error         string
	Attempts      int
	FirstFailedAt time.Time
	LastFailedAt  time.Time
	Subject       string // of the original
	Sequence      uint64 // of the original
	Header        nats.Header
}

// Put stores a dead letter and returns its sequence in [stream.DeadLetters] once it is durable. Putting the same one again (after a crash
// before its original was given up) stores nothing new within [stream.DedupeWindow], unless the letter was taken away meanwhile: the
// sequence is always that of a letter which is there.
func Put(ctx context.Context, js jetstream.JetStream, r *Record) (uint64, error) {
	msg := nats.NewMsg(stream.DeadLetterSubject(r.Handler, &r.Event))
	msg.Data = r.Event.Raw
	for key, values := range maps.All(r.Header) {
		if !strings.HasPrefix(key, "Nats-") { // the broker's own, such as those of an atomic batch
			msg.Header[key] = values
		}
	}
	// With the event's id, since a stream that was made anew counts from one again.
	msg.Header.Set(stream.HeaderMsgID, fmt.Sprintf("%s:%s:%d:%s", r.Handler, stream.Events, r.Sequence, r.Event.Ref()))
	msg.Header.Set(stream.HeaderEventID, r.Event.ID)
	msg.Header.Set(stream.HeaderSource, r.Event.Source)
	msg.Header.Set(headerHandler, r.Handler)
	msg.Header.Set(headerReason, string(r.Reason))
	msg.Header.Set(headerError, OneLine(r.Error))
	msg.Header.Set(headerAttempts, strconv.Itoa(r.Attempts))
	msg.Header.Set(headerFirstFailedAt, r.FirstFailedAt.UTC().Format(time.RFC3339Nano))
	msg.Header.Set(headerLastFailedAt, r.LastFailedAt.UTC().Format(time.RFC3339Nano))
	msg.Header.Set(headerSubject, r.Subject)
	msg.Header.Set(headerSequence, strconv.FormatUint(r.Sequence, 10))
	ack, err := js.PublishMsg(ctx, msg)
	if err == nil && ack.Duplicate && isGone(ctx, js, ack.Sequence) {
		msg.Header.Set(stream.HeaderMsgID, msg.Header.Get(stream.HeaderMsgID)+":"+strconv.FormatUint(ack.Sequence, 10))
		ack, err = js.PublishMsg(ctx, msg)
	}
	if err != nil {
		return 0, fmt.Errorf("put dead letter of %s: %w", r.Event.ID, err)
	}
	return ack.Sequence, nil
}

// isGone tells whether a letter is known not to be there any more.
func isGone(ctx context.Context, js jetstream.JetStream, seq uint64) bool {
	s, err := js.Stream(ctx, stream.DeadLetters)
	if err != nil {
		return false
	}
	_, err = s.GetMsg(ctx, seq)
	return errors.Is(err, jetstream.ErrMsgNotFound)
}

// volatile is what differs between two failures of the same kind: numbers, hex, ids and quoted values.
var volatile = regexp.MustCompile(`"[^"]*"|'[^']*'|\b(?:[a-z]+_)?[0-9A-Za-z]{20,}\b|\b0x[0-9a-f]+\b|[0-9]+`)

// Fingerprint names a kind of failure: letters of the same handler and reason whose errors differ only in
// numbers, ids and quoted values share it.
func Fingerprint(handler string, reason Reason, errText string) string {
	sum := sha256.Sum256([]byte(handler + "\x00" + string(reason) + "\x00" + volatile.ReplaceAllString(OneLine(errText), "?")))
	return hex.EncodeToString(sum[:6])
}

// OneLine makes an error text fit for a header and a column: one line of valid UTF-8 of at most 2 KiB, with … where it was longer.
func OneLine(s string) string {
	s = strings.Join(strings.Fields(strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", "\uFFFD"), "\uFFFD")), " ")
	if len(s) <= maxError {
		return s
	}
	return strings.ToValidUTF8(s[:maxError-len("…")], "") + "…"
}
