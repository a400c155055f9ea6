package event

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"time"
)

// Compose makes the event that Clerk would have sent of an object, with at (when the object was read) as its timestamp: a late
// one then loses against what came meanwhile. data is the object as JSON, instanceID may be empty. ID, Source, Origin and ReceivedAt are the
// caller's to fill in. What cannot be decoded is an event all the same, for the worker to dead-letter.
func Compose(typ Type, data []byte, instanceID string, at time.Time) Event {
	body := make([]byte, 0, len(data)+160)
	body = append(append(body, `{"data":`...), data...)
	if instanceID != "" {
		text, _ := json.Marshal(instanceID) // cannot fail
		body = append(append(body, `,"instance_id":`...), text...)
	}
	body = append(body, `,"object":"event","timestamp":`...)
	body = strconv.AppendInt(body, at.UnixMilli(), 10)
	text, _ := json.Marshal(string(typ)) // cannot fail
	body = append(append(append(body, `,"type":`...), text...), '}')
	e, err := Decode(body)
	if err != nil {
		return Event{Raw: body, Type: typ}
	}
	return e
}

// ReconciledID is the id of an event that Usher made itself: the same for everybody who corrects the same thing, so that two
// who find it publish one event. generation tells apart the corrections of a thing that went wrong again.
func ReconciledID(identity []byte, generation int) string {
	h := sha256.New()
	_, _ = h.Write(identity)
	if generation > 0 {
		_, _ = fmt.Fprintf(h, "\x00%d", generation)
	}
	return "rec_" + hex.EncodeToString(h.Sum(nil)[:16])
}
