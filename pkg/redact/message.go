package redact

import (
	"bytes"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
)

// What is kept of a mail or a text message: who sent what kind of it to whom, and what became of it. All else may hold its text, its code or
// its link.
var (
	keptOfEnvelope = []string{"instance_id", "object", "timestamp", "type"}
	keptOfMessage  = []string{
		"id", "object", "user_id", "slug", "status", "delivered_by_clerk", "created_at", "created_at_ms", "updated_at", "updated_at_ms",
		"to_email_address", "email_address_id", "from_email_name", "reply_to_email_name", "to_phone_number", "phone_number_id", "from_phone_number",
	}
)

// What a mail or a text message has and other events have not, in lower case. The expression begins with literal text, so that a large body is
// searched and not matched byte by byte.
var (
	marksOfMessage  = []string{`"email.`, `"sms.`, `"ema_`, `"sms_`, "otp_code", "body_plain", "magic_link"}
	objectOfMessage = regexp.MustCompile(`"object"\s*:\s*"(email|sms_message)"`)
)

// messageLike judges bodies without a type. Rather one body too many is redacted.
func messageLike(body []byte) bool {
	lower := bytes.ToLower(body)
	return slices.ContainsFunc(marksOfMessage, func(mark string) bool { return bytes.Contains(lower, []byte(mark)) }) || objectOfMessage.Match(lower)
}

var userIDRE = regexp.MustCompile(`^"user_[0-9A-Za-z]+"$`)

// IsMessage reports whether a type is of mails or text messages.
func IsMessage(typ string) bool {
	resource, _, _ := strings.Cut(strings.ToLower(typ), ".")
	return resource == "email" || resource == "sms"
}

// Message is the body of an event without what a mail or a text message told its receiver: texts, codes, links. It reports whether the event
// is one (email.*, sms.*); other bodies are returned as they are. typ is the event's type, empty where it could not be decoded.
//
// Equal bodies make equal results, and a result is its own. What cannot be read is replaced whole.
func Message(typ string, body []byte) ([]byte, bool) {
	var envelope map[string]json.RawMessage
	err := json.Unmarshal(body, &envelope)
	if typ == "" {
		_ = json.Unmarshal(envelope["type"], &typ)
	}
	if !IsMessage(typ) && (typ != "" && err == nil || !messageLike(body)) {
		return body, false
	}
	if err != nil || envelope == nil {
		return mustMarshal(map[string]string{"data": Masked}), true
	}
	for name, value := range envelope {
		switch {
		case name == "data":
			envelope[name] = message(value)
		case name == "event_attributes":
			envelope[name] = origin(value)
		case !slices.Contains(keptOfEnvelope, name) || isComposed(value):
			envelope[name] = masked(value)
		}
	}
	return mustMarshal(envelope), true
}

// isComposed reports whether a value is an object or a list, in which anything may be.
func isComposed(value json.RawMessage) bool { return value[0] == '{' || value[0] == '[' }

// origin keeps of an event's attributes where the request came from that caused it.
func origin(attributes json.RawMessage) json.RawMessage {
	var from struct {
		Request *struct {
			IP        *string `json:"client_ip,omitempty"`
			UserAgent *string `json:"user_agent,omitempty"`
		} `json:"http_request,omitempty"`
	}
	if string(attributes) == "null" || json.Unmarshal(attributes, &from) != nil {
		return masked(attributes)
	}
	return mustMarshal(from)
}

// message redacts the object of a message.
func message(object json.RawMessage) json.RawMessage {
	var fields map[string]json.RawMessage
	if json.Unmarshal(object, &fields) != nil || fields == nil {
		return masked(object)
	}
	for name, value := range fields {
		switch {
		case name == "data":
			fields[name] = person(value)
		case !slices.Contains(keptOfMessage, name) || isComposed(value):
			fields[name] = masked(value)
		}
	}
	return mustMarshal(fields)
}

// person keeps of a template's data the id of the user that it is about, where it has one.
func person(data json.RawMessage) json.RawMessage {
	var about struct {
		UserID json.RawMessage `json:"user_id,omitempty"`
		User   *struct {
			ID json.RawMessage `json:"id"`
		} `json:"user,omitempty"`
	}
	if json.Unmarshal(data, &about) != nil {
		return masked(data)
	}
	if !userIDRE.Match(about.UserID) {
		about.UserID = nil
	}
	if about.User != nil && !userIDRE.Match(about.User.ID) {
		about.User = nil
	}
	if about.UserID == nil && about.User == nil {
		return masked(data)
	}
	return mustMarshal(about)
}

// masked stands for a value, null for null.
func masked(value json.RawMessage) json.RawMessage {
	if string(value) == "null" {
		return value
	}
	return mustMarshal(Masked)
}

func mustMarshal(value any) []byte {
	out, err := json.Marshal(value)
	if err != nil {
		panic(err) // strings, and JSON that was read before
	}
	return out
}
