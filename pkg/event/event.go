// Package event is the vocabulary of Usher: one event is one thing that changed at Clerk.
//
// It decodes the envelope of a webhook once and cheaply, finds the person an event is about, and
// gives every event the version by which rows are ordered. It guarantees that decoding never
// fails for an unknown type, an unknown field or a field of an unexpected type: only a body that
// is not a JSON object, or that lacks type or data, is [ErrMalformed]. It knows no database, no
// broker and no network, and imports only the standard library.
package event

import (
	"bytes"
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
	// TraceParent is the W3C trace context that the event came in with, empty for none.
	TraceParent string

	Object Object
	Data   json.RawMessage // the object, as Clerk sent it
	Raw    []byte          // the whole body, as it was signed
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

// number reads an integer leniently: 12, 12.0, 1.2e1 and "12" are 12, all else is 0.
type number int64

func (n *number) UnmarshalJSON(b []byte) error {
	b = bytes.Trim(b, `"`)
	if i, err := json.Number(b).Int64(); err == nil {
		*n = number(i)
	} else if f, err := json.Number(b).Float64(); err == nil && f > -1e18 && f < 1e18 {
		*n = number(f)
	}
	return nil
}

// text reads a string leniently: anything else is "".
type text string

func (t *text) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) == nil {
		*t = text(s)
	}
	return nil
}

// flag reads a bool leniently: anything but true is false.
type flag bool

func (f *flag) UnmarshalJSON(b []byte) error {
	*f = string(b) == "true"
	return nil
}

// ref is a nested object of which only an id matters; anything that is not an object is no id.
type ref struct {
	ID, UserID, OrgID text
}

func (r *ref) UnmarshalJSON(b []byte) error {
	var v struct {
		ID     text `json:"id"`
		UserID text `json:"user_id"`
		OrgID  text `json:"organization_id"`
	}
	if json.Unmarshal(b, &v) == nil {
		r.ID, r.UserID, r.OrgID = v.ID, v.UserID, v.OrgID
	}
	return nil
}

type envelope struct {
	Type       text            `json:"type"`
	Data       json.RawMessage `json:"data"`
	Timestamp  number          `json:"timestamp"`
	InstanceID text            `json:"instance_id"`
}

type head struct {
	ID             text   `json:"id"`
	UserID         text   `json:"user_id"`
	CreatedBy      text   `json:"created_by"`
	InviterID      text   `json:"inviter_id"`
	OrganizationID text   `json:"organization_id"`
	LastActiveOrg  text   `json:"last_active_organization_id"`
	User           ref    `json:"user"`
	Organization   ref    `json:"organization"`
	PublicUserData ref    `json:"public_user_data"`
	Payer          ref    `json:"payer"`
	CreatedAt      number `json:"created_at"`
	UpdatedAt      number `json:"updated_at"`
	Deleted        flag   `json:"deleted"`
}

// Decode reads the envelope of one webhook body. It requires a JSON object with a non-empty type
// and an object as data; everything else may be absent, null or odd. ID, Source, Origin, ReceivedAt
// and Seq are the caller's to fill in: the body does not hold them. The result keeps body.
func Decode(body []byte) (Event, error) {
	var env envelope
	if err := json.Unmarshal(body, &env); err != nil {
		return Event{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if env.Type == "" {
		return Event{}, fmt.Errorf("%w: type is missing", ErrMalformed)
	}
	if len(env.Data) == 0 || env.Data[0] != '{' {
		return Event{}, fmt.Errorf("%w: data is missing or not an object", ErrMalformed)
	}
	var h head
	if err := json.Unmarshal(env.Data, &h); err != nil {
		return Event{}, fmt.Errorf("%w: data: %w", ErrMalformed, err)
	}
	e := Event{
		Type:       Type(env.Type),
		InstanceID: string(env.InstanceID),
		Timestamp:  Millis(int64(env.Timestamp)),
		Data:       env.Data,
		Raw:        body,
	}
	e.Object = objectOf(e.Type, &h)
	return e, nil
}

// objectOf finds the user and the organization of an event, which Clerk keeps in another place
// for each resource.
func objectOf(t Type, h *head) Object {
	o := Object{
		ID:        string(h.ID),
		CreatedAt: Millis(int64(h.CreatedAt)),
		UpdatedAt: Millis(int64(h.UpdatedAt)),
		Deleted:   bool(h.Deleted) || t.Deleted(),
	}
	var user, org text
	switch t.Resource() {
	case "user":
		user = h.ID
	case "organization":
		user, org = h.CreatedBy, h.ID
	case "session":
		user, org = first(h.UserID, h.User.ID), h.LastActiveOrg
	case "organizationMembership":
		user, org = first(h.PublicUserData.UserID, h.UserID), first(h.Organization.ID, h.OrganizationID)
	case "organizationInvitation":
		user, org = first(h.UserID, h.InviterID), h.OrganizationID
	case "subscription", "subscriptionItem", "paymentAttempt":
		user, org = h.Payer.UserID, h.Payer.OrgID
	default: // e-mail, SMS, domains, and what Clerk adds tomorrow
		user, org = h.UserID, h.OrganizationID
	}
	o.UserID, o.OrgID = string(user), string(org)
	return o
}

func first(values ...text) text {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
