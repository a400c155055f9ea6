// Package event is the vocabulary of Usher: one event is one thing that changed at Clerk.
//
// It decodes the envelope of a webhook once and cheaply, finds the person an event is about, and
// gives every event the version by which rows are ordered. It guarantees that decoding never
// fails for an unknown type, an unknown field or a field of an unexpected type: only a body that
// is not a JSON object (or nested deeper than encoding/json goes, 10,000 levels), that lacks type or
// data, or whose type or ids are over [MaxID], is [ErrMalformed]. It knows no database, no
// broker and no network, and imports only the standard library.
package event

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrMalformed is wrapped by every error of [Decode]: the body can never become an event,
// whatever is tried again.
var ErrMalformed = errors.New("malformed event")

// Type is Clerk's name of what happened, such as "user.created". Types that Usher does not know
// are kept as they are.
type Type string

// Resource is the part before the first dot ("user" of "user.created").
func (t Type) Resource() string {
	resource, _, _ := strings.Cut(string(t), ".")
	return resource
}

// Verb is the part after the first dot ("created" of "user.created"), empty where there is none.
func (t Type) Verb() string {
	_, verb, _ := strings.Cut(string(t), ".")
	return verb
}

// Deleted tells whether the type announces that its object is gone.
func (t Type) Deleted() bool { return t.Verb() == "deleted" }

// Origin says which way an event came in. Handlers may look at it; routing may not.
type Origin string

// The origins of an event.
const (
	OriginWebhook   Origin = "webhook"
	OriginReconcile Origin = "reconcile"
	OriginBackfill  Origin = "backfill"
	OriginReplay    Origin = "replay"
)

// Event is one change at Clerk. It is a value that is never changed after it was decoded; Raw and
// Data share memory with the body that it was decoded from.
type Event struct {
	// ID is the svix-id of the delivery ("msg_…"), or "rec_…" for a reconciled event. It stays the
	// same over every retry and replay.
	ID     string
	Type   Type
	Source string // the configured Clerk instance, as in Usher-Source
	Origin Origin
	// FirstOrigin is the origin that the event had before any replay, however often it was replayed; equal to
	// Origin where it never was. A replay changes Origin, so a handler that leaves something out for a backfill
	// (no reminders for what happened long ago) asks FirstOrigin.
	FirstOrigin Origin
	// InstanceID is Clerk's id of the instance ("ins_…"), empty where the envelope has none.
	InstanceID string
	// Timestamp is when the change happened, in ms since the epoch, 0 where the envelope has none.
	// A value in seconds was turned into the last millisecond of its second.
	Timestamp int64
	// ReceivedAt is when ingest accepted the event (or the reconciler made it).
	ReceivedAt time.Time
	// Seq is the event's sequence in its stream, 0 before it was stored.
	Seq uint64
	// ReplayID is the publish id of a deliberate replay, empty for a first delivery.
	ReplayID string
	// WithEffects tells, of a deliberate replay, that effects on the outside (mail, chat) are wanted again.
	WithEffects bool
	// TraceParent is the W3C trace context that the event came in with, empty for none.
	TraceParent string

	Object Object
	Data   json.RawMessage // the object, as Clerk sent it
	Raw    []byte          // the whole body, as it was signed; of messages without texts and codes
}

// Object is the head of the object an event carries: what routing and ordering need. A field that
// is absent, null or of an unexpected type is zero.
type Object struct {
	ID        string
	UserID    string // the person the event is about; for a user's own events the user
	OrgID     string
	CreatedAt int64 // ms since the epoch
	UpdatedAt int64 // ms since the epoch
	Deleted   bool  // data.deleted, or a type that says so
}

// Ref names an event. An id names one only within its source: the sender chooses it, and who has the secret of one source must
// not be able to speak of another's events.
type Ref struct{ Source, ID string }

// Compare orders refs, by the source first.
func (r Ref) Compare(o Ref) int {
	return cmp.Or(strings.Compare(r.Source, o.Source), strings.Compare(r.ID, o.ID))
}

// String is the ref as logs and publish ids have it. No source's name holds a colon.
func (r Ref) String() string { return r.Source + ":" + r.ID }

// BySource groups ids by their source, of which there are few.
func BySource(refs []Ref) map[string][]string {
	ids := map[string][]string{}
	for _, r := range refs {
		ids[r.Source] = append(ids[r.Source], r.ID)
	}
	return ids
}

// Ref is what tells the event from all others.
func (e *Event) Ref() Ref { return Ref{e.Source, e.ID} }

// Key is the person an event is about: the user id where the event has one, else the organization
// id, else the object's id, else "_".
func (e *Event) Key() string {
	for _, key := range []string{e.Object.UserID, e.Object.OrgID, e.Object.ID} {
		if key != "" {
			return key
		}
	}
	return "_"
}

// secondsBelow is the bound under which a timestamp is read as seconds: 10^11 ms is the year 1973,
// 10^11 s the year 5138.
const secondsBelow = 100_000_000_000

// Millis normalises a timestamp of Clerk's to ms. A value in seconds counts as the last
// millisecond of its second, so that it never sorts before something of the same second.
func Millis(ts int64) int64 {
	if ts > 0 && ts < secondsBelow {
		return ts*1000 + 999
	}
	return max(ts, 0)
}

// Decode reads the envelope of one webhook body. It requires a JSON object with a non-empty type
// and an object as data; everything else may be absent, null or odd. Names count as they are written, and
// of a repeated name the last. ID, Source, Origin, FirstOrigin, ReceivedAt and Seq are the caller's to fill in: the
// body does not hold them. The result keeps body.
func Decode(body []byte) (Event, error) {
	if !json.Valid(body) {
		// Only to say what is wrong with it, and where.
		return Event{}, fmt.Errorf("%w: %w", ErrMalformed, json.Unmarshal(body, new(json.RawMessage)))
	}
	body, raw := bytes.TrimLeft(body, " \t\r\n"), body
	if body[0] != '{' {
		return Event{}, fmt.Errorf("%w: not an object", ErrMalformed)
	}
	e := Event{Raw: raw}
	for name, value := range members(body) {
		switch string(name) {
		case "type":
			e.Type = Type(text(value))
		case "data":
			e.Data = value
		case "timestamp":
			e.Timestamp = Millis(number(value))
		case "instance_id":
			e.InstanceID = text(value)
		}
	}
	if e.Type == "" {
		return Event{}, fmt.Errorf("%w: type is missing", ErrMalformed)
	}
	if len(e.Data) == 0 || e.Data[0] != '{' {
		return Event{}, fmt.Errorf("%w: data is missing or not an object", ErrMalformed)
	}
	e.Object = objectOf(e.Type, e.Data)
	for _, id := range []struct{ name, value string }{
		{"type", string(e.Type)}, {"the object's id", e.Object.ID}, {"the user's id", e.Object.UserID}, {"the organization's id", e.Object.OrgID},
	} {
		if len(id.value) > MaxID {
			return Event{}, fmt.Errorf("%w: %s has %d bytes, at most %d are taken", ErrMalformed, id.name, len(id.value), MaxID)
		}
	}
	return e, nil
}

// MaxID bounds every id of an event, and its type, in bytes: they are keys of tables and indexes. Clerk's have some 30.
const MaxID = 255

// objectOf finds the head of an object, with the user and the organization that Clerk keeps in another place
// for each resource.
func objectOf(t Type, data []byte) Object {
	o := Object{Deleted: t.Deleted()}
	var userID, createdBy, inviterID, orgID, lastActiveOrg, user, org, publicUserData, payer, template, invitation []byte
	for name, value := range members(data) {
		switch string(name) {
		case "id":
			o.ID = text(value)
		case "created_at":
			o.CreatedAt = Millis(number(value))
		case "updated_at":
			o.UpdatedAt = Millis(number(value))
		case "deleted":
			o.Deleted = t.Deleted() || string(value) == "true"
		case "user_id":
			userID = value
		case "created_by":
			createdBy = value
		case "inviter_id":
			inviterID = value
		case "organization_id":
			orgID = value
		case "last_active_organization_id":
			lastActiveOrg = value
		case "user":
			user = value
		case "organization":
			org = value
		case "public_user_data":
			publicUserData = value
		case "payer":
			payer = value
		case "data":
			template = value
		case "invitation":
			invitation = value
		}
	}
	switch t.Resource() {
	case "user":
		o.UserID = o.ID
	case "organization":
		o.UserID, o.OrgID = text(createdBy), o.ID
	case "session":
		o.UserID, o.OrgID = cmp.Or(text(userID), textIn(user, "id")), text(lastActiveOrg)
	case "organizationMembership":
		o.UserID = cmp.Or(textIn(publicUserData, "user_id"), text(userID))
		o.OrgID = cmp.Or(textIn(org, "id"), text(orgID))
	case "organizationInvitation":
		o.UserID, o.OrgID = cmp.Or(text(userID), textIn(publicUserData, "user_id"), text(inviterID)), text(orgID)
	case "subscription", "subscriptionItem", "paymentAttempt":
		o.UserID, o.OrgID = textIn(payer, "user_id"), textIn(payer, "organization_id")
	default: // e-mail, SMS, waitlist entries, domains, and what Clerk adds tomorrow
		o.UserID = cmp.Or(text(userID), textIn(user, "id"), textIn(publicUserData, "user_id"), textIn(invitation, "user_id"),
			textIn(template, "user_id"), textIn(valueIn(template, "user"), "id"))
		o.OrgID = text(orgID)
	}
	return o
}
