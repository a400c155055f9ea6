package event

import (
	"cmp"
	"strings"
	"time"
)

// maxAhead is how far a time in an event may be ahead of the event's receipt.
const maxAhead = 24 * time.Hour

// Ahead reports whether a time in ms is more than a day after at: no clock is that wrong, so the time is not believed.
func Ahead(ms int64, at time.Time) bool {
	return !at.IsZero() && ms > at.Add(maxAhead).UnixMilli()
}

// believed is a time in ms, or that of the event's receipt where it is [Ahead]. The receipt is a header of the event, so every
// delivery and replay of it gives the same.
func (e *Event) believed(ms int64) int64 {
	if Ahead(ms, e.ReceivedAt) {
		return e.ReceivedAt.UnixMilli()
	}
	return ms
}

// Version is the place of a row in the history of its object. The order is total, so that every
// order of arrival ends in the same row: the larger Version wins.
type Version struct {
	// Version is the object's updated_at in ms. A delete takes the time of its event, a full object
	// in a delete the larger of both. A stub has 0.
	Version int64
	// SeenAt is the time of the event in ms; for an object that was read from the API, of the read.
	SeenAt int64
	// EventID decides what is left, arbitrarily but everywhere alike.
	EventID string
}

// Compare is negative where v is older than o, positive where it is newer, 0 where they are the same.
func (v Version) Compare(o Version) int {
	if c := cmp.Compare(v.Version, o.Version); c != 0 {
		return c
	}
	if c := cmp.Compare(v.SeenAt, o.SeenAt); c != 0 {
		return c
	}
	return strings.Compare(v.EventID, o.EventID)
}

// Version is the version that the event gives to its object's row.
//
// An event without a timestamp (Clerk's samples of 2022) is seen at its object's updated_at, or,
// where it has none either, when it was received: both stay the same over every redelivery. A full
// object that lacks updated_at takes created_at, then SeenAt, and never less than 1, so that it beats a stub. A time that is more
// than a day ahead of the receipt counts as that of the receipt, so that it cannot pin a row.
func (e *Event) Version() Version {
	updated, created, seen := e.believed(e.Object.UpdatedAt), e.believed(e.Object.CreatedAt), e.believed(e.Timestamp)
	if seen == 0 {
		seen = max(updated, created)
	}
	if seen == 0 && !e.ReceivedAt.IsZero() {
		seen = e.ReceivedAt.UnixMilli()
	}
	v := Version{Version: updated, SeenAt: seen, EventID: e.ID}
	switch {
	case e.Object.Deleted:
		v.Version = max(v.Version, seen)
	case v.Version == 0 && created != 0:
		v.Version = created
	case v.Version == 0:
		v.Version = seen
	}
	v.Version = max(v.Version, 1)
	return v
}

// StubVersion is the version of a copy that is embedded in another object's event: it is older than
// everything that Clerk said of the object itself. updatedAt is the copy's own, in ms.
func (e *Event) StubVersion(updatedAt int64) Version {
	return Version{Version: 0, SeenAt: e.believed(Millis(updatedAt)), EventID: e.ID}
}
