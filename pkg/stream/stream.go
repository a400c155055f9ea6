// Package stream knows how events lie in NATS JetStream: names, subjects, headers, the
// configuration of streams and consumers, and how an event is published so that the answer means
// "on disk".
//
// It guarantees that a configuration that is already right is never written again (a needless
// update can drop delayed messages) and that a difference is reported field by field instead of
// being changed in silence. It decides nothing about retries: that is the worker's.
package stream

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/usherhq/usher/pkg/event"
)

// Names of the streams.
const (
	Events      = "CLERK_EVENTS"
	DeadLetters = "CLERK_DLQ"
)

// Headers of a stored event (see docs/reference.md).
const (
	HeaderMsgID         = jetstream.MsgIDHeader
	HeaderEventID       = "Usher-Event-Id"
	HeaderType          = "Usher-Type"
	HeaderSource        = "Usher-Source"
	HeaderOrigin        = "Usher-Origin"
	HeaderFirstOrigin   = "Usher-First-Origin"   // of a replay: that of the event before any replay
	HeaderFirstSequence = "Usher-First-Sequence" // of a replay: that of the event before any replay, in [Events]
	HeaderReceivedAt    = "Usher-Received-At"
	HeaderReplayID      = "Usher-Replay-Id"
	HeaderReplayEffects = "Usher-Replay-Effects"
	HeaderTraceParent   = "traceparent"

	HeaderFailedSequence = "Usher-Original-Sequence" // of a dead letter: that of the message that failed, in [Events]
)

// HeaderRoom is how many bytes of a broker's max_payload are kept free for the headers of an event
// and of an atomic batch.
const HeaderRoom = 4 << 10

// LetterReplay begins the replay id of a dead letter. Such a replay wants the event applied, not applied again: where it
// was applied meanwhile, the handler does nothing.
const LetterReplay = "replay:"

// maxToken bounds one token of a subject, in bytes.
const maxToken = 128

// Token makes s fit for one token of a subject: a byte that is not a letter, a digit, "_" or "-"
// becomes "=" and two hex digits, an empty s becomes "_", and what is over 128 bytes is cut.
func Token(s string) string {
	if s == "" {
		return "_"
	}
	var b strings.Builder
	for i := 0; i < len(s) && b.Len() < maxToken; i++ {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "=%02X", c)
		}
	}
	return b.String()
}

// Subject is where an event is stored: clerk.evt.<source>.<resource>.<verb>.<key>. A body that could
// not be decoded (e.Type empty) lies under "_._._".
func Subject(e *event.Event) string { return "clerk.evt." + rest(e) }

// ReplaySubject is where an event is stored again for one handler only.
func ReplaySubject(handler string, e *event.Event) string {
	return "clerk.replay." + Token(handler) + "." + rest(e)
}

// DeadLetterSubject is where an event that a handler could not apply is kept.
func DeadLetterSubject(handler string, e *event.Event) string {
	return "clerk.dlq." + Token(handler) + "." + rest(e)
}

func rest(e *event.Event) string {
	key := "_"
	if e.Type != "" {
		key = Token(e.Key())
	}
	return strings.Join([]string{Token(e.Source), Token(e.Type.Resource()), Token(e.Type.Verb()), key}, ".")
}

// Message makes the message that stores e: the body as the event has it, and what the body does not
// say as headers. Every call makes a new one, since publishing writes into a message's headers.
func Message(e *event.Event) *nats.Msg {
	msg := nats.NewMsg(Subject(e))
	msg.Data = e.Raw
	msg.Header.Set(HeaderMsgID, e.Ref().String())
	msg.Header.Set(HeaderEventID, e.ID)
	msg.Header.Set(HeaderType, string(e.Type))
	msg.Header.Set(HeaderSource, e.Source)
	msg.Header.Set(HeaderOrigin, string(e.Origin))
	msg.Header.Set(HeaderReceivedAt, e.ReceivedAt.UTC().Format(time.RFC3339Nano))
	if e.TraceParent != "" {
		msg.Header.Set(HeaderTraceParent, e.TraceParent)
	}
	return msg
}

// Parse reads a stored event back from its body and headers. The error is [event.ErrMalformed]
// where the body cannot be decoded; the Event then still holds all that the headers say.
func Parse(header nats.Header, body []byte, seq uint64) (event.Event, error) {
	e, err := event.Decode(body)
	if err != nil {
		e = event.Event{Raw: body, Type: event.Type(header.Get(HeaderType))}
	}
	e.ID = header.Get(HeaderEventID)
	if e.ID == "" { // published by hand
		e.ID = header.Get(HeaderMsgID)
	}
	if e.ID == "" {
		e.ID = "seq_" + strconv.FormatUint(seq, 10)
	}
	e.Source = header.Get(HeaderSource)
	e.Origin = event.Origin(header.Get(HeaderOrigin))
	if e.Origin == "" {
		e.Origin = event.OriginWebhook
	}
	e.FirstOrigin = cmp.Or(event.Origin(header.Get(HeaderFirstOrigin)), e.Origin)
	e.ReplayID = header.Get(HeaderReplayID)
	e.WithEffects = header.Get(HeaderReplayEffects) == "true"
	e.TraceParent = header.Get(HeaderTraceParent)
	e.Seq = seq
	if at, perr := time.Parse(time.RFC3339Nano, header.Get(HeaderReceivedAt)); perr == nil {
		e.ReceivedAt = at
	}
	storable(&e)
	return e, err
}

// storable makes the names of an event fit for a column of text and for an index. PostgreSQL refuses some that JSON and headers
// allow, and the delivery log must be able to take every event: without a row an event's attempts would never end. What is
// too long is cut, with a digest of the whole, so that it stays one of a kind.
func storable(e *event.Event) {
	typ, origin, first := string(e.Type), string(e.Origin), string(e.FirstOrigin)
	for _, s := range []*string{&e.ID, &typ, &e.Source, &origin, &first, &e.Object.ID, &e.Object.UserID, &e.ReplayID} {
		if strings.ContainsRune(*s, 0) || !utf8.ValidString(*s) {
			*s = strings.ToValidUTF8(strings.ReplaceAll(*s, "\x00", "\uFFFD"), "\uFFFD")
		}
		if len(*s) > event.MaxID {
			sum := sha256.Sum256([]byte(*s))
			*s = strings.ToValidUTF8((*s)[:200], "") + ":" + hex.EncodeToString(sum[:12])
		}
	}
	e.Type, e.Origin, e.FirstOrigin = event.Type(typ), event.Origin(origin), event.Origin(first)
}
