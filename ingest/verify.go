package ingest

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	svix "github.com/svix/svix-webhooks/go"

	"github.com/usherhq/usher/pkg/event"
)

// Tolerance is how far a delivery's timestamp may lie from this machine's clock, either way.
const Tolerance = 5 * time.Minute

// maxID bounds a delivery's id: Svix makes 31 characters.
const maxID = event.MaxID

// signed are the three headers that sign a delivery. Only what stands here is verified and used, so
// a second set of headers in the same request changes nothing.
type signed struct {
	id        string
	timestamp string
	signature string
	seconds   int64 // timestamp, in Unix seconds
}

// readHeaders takes the svix-* headers, or the webhook-* ones where any of those is missing.
func readHeaders(h http.Header) (signed, result) {
	s := signed{id: h.Get("Svix-Id"), timestamp: h.Get("Svix-Timestamp"), signature: h.Get("Svix-Signature")}
	if s.id == "" || s.timestamp == "" || s.signature == "" {
		s = signed{id: h.Get("Webhook-Id"), timestamp: h.Get("Webhook-Timestamp"), signature: h.Get("Webhook-Signature")}
	}
	if s.id == "" || s.timestamp == "" || s.signature == "" {
		return signed{}, headerMissing
	}
	seconds, err := strconv.ParseInt(s.timestamp, 10, 64)
	if err != nil || len(s.id) > maxID || !printable(s.id) {
		return signed{}, headerMalformed
	}
	s.seconds = seconds
	return s, ""
}

// wellFormed reports whether any of the signatures has the form that alone can match: v1, a comma, 32 bytes in base64.
func (s signed) wellFormed() bool {
	for signature := range strings.SplitSeq(s.signature, " ") {
		encoded, isV1 := strings.CutPrefix(signature, "v1,")
		if encoded, _, _ = strings.Cut(encoded, ","); isV1 && len(encoded) == base64.StdEncoding.EncodedLen(sha256.Size) {
			return true
		}
	}
	return false
}

// printable tells whether s can stand in any header and any log: visible ASCII, no space.
func printable(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// inTime tells whether a timestamp is at most [Tolerance] away from now. It compares whole numbers, since
// a far-fetched timestamp overflows a time.Duration.
func inTime(seconds int64, now time.Time) bool {
	limit, at := int64(Tolerance/time.Second), now.Unix()
	switch {
	case seconds < at-limit, seconds > at+limit:
		return false
	case seconds == at-limit:
		return now.Nanosecond() == 0
	default:
		return true
	}
}

// verifier checks signatures against the secrets of one source. It is safe for concurrent use.
type verifier []*svix.Webhook

// newVerifier takes secrets as they are: what is too weak was refused by [Config.Validate].
func newVerifier(secrets []string) (verifier, error) {
	var v verifier
	for i, secret := range secrets {
		hook, err := svix.NewWebhook(secret)
		if err != nil { // the error would quote the secret
			return nil, fmt.Errorf("signing secret %d is not base64 after whsec_", i+1)
		}
		v = append(v, hook)
	}
	return v, nil
}

// matches tells whether any secret made any of the signatures over exactly this body, id and timestamp.
func (v verifier) matches(s signed, body []byte) bool {
	h := http.Header{"Svix-Id": {s.id}, "Svix-Timestamp": {s.timestamp}, "Svix-Signature": {s.signature}}
	for _, hook := range v {
		if hook.VerifyIgnoringTimestamp(body, h) == nil {
			return true
		}
	}
	return false
}

// traceParent returns h's W3C trace context if it is valid, else "".
func traceParent(h http.Header) string {
	const zeros = "00000000000000000000000000000000"
	t := h.Get("Traceparent")
	if len(t) != 55 || t[2] != '-' || t[35] != '-' || t[52] != '-' || t[:2] == "ff" ||
		t[3:35] == zeros || t[36:52] == zeros[:16] {
		return ""
	}
	for i := range len(t) {
		c := t[i]
		if i != 2 && i != 35 && i != 52 && (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return ""
		}
	}
	return t
}
