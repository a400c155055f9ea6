package redact

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

func TestMessageKeepsOnlyWhoWasSentWhatKind(t *testing.T) {
	for name, test := range map[string]struct{ typ, body, want string }{
		"a code": {
			"email.created", `{"type":"email.created", "data":{"id":"ema_1","subject":"1 is it","body":"<b>","body_plain":null,"data":{"otp_code":"1","user":{}},"to_email_address":"a@b.c","user_id":null,"delivered_by_clerk":true},"timestamp":1768471185000}`,
			`{"data":{"body":"redacted","body_plain":null,"data":"redacted","delivered_by_clerk":true,"id":"ema_1","subject":"redacted","to_email_address":"a@b.c","user_id":null},"timestamp":1768471185000,"type":"email.created"}`,
		},
		"the person":  {"sms.created", `{"data":{"data":{"code":"1","user":{"id":"user_1","x":1},"user_id":"user_2"}}}`, `{"data":{"data":{"user_id":"user_2","user":{"id":"user_1"}}}}`},
		"no person":   {"sms.created", `{"data":{"data":{"user":{"id":"123456"},"user_id":123456}}}`, `{"data":{"data":"redacted"}}`},
		"what is new": {"email.created", `{"data":{"amp":"1","status":{"code":"1"},"slug":["1"]},"preview":"1"}`, `{"data":{"amp":"redacted","slug":"redacted","status":"redacted"},"preview":"redacted"}`},
		"what is new around it": {
			"email.created", `{"data":{},"event_attributes":{"http_request":{"client_ip":"1.2.3.4","user_agent":"Firefox","query":"code=1"},"code":"1"},"object":{"code":"1"},"timestamp":["1"]}`,
			`{"data":{},"event_attributes":{"http_request":{"client_ip":"1.2.3.4","user_agent":"Firefox"}},"object":"redacted","timestamp":"redacted"}`,
		},
		"odd attributes":              {"email.created", `{"event_attributes":["1"]}`, `{"event_attributes":"redacted"}`},
		"a new verb":                  {"Email.bounced", `{"data":{"message":"1"}}`, `{"data":{"message":"redacted"}}`},
		"of a repeated name the last": {"email.created", `{"data":{"id":"a"},"data":{"id":"b","id":"c"}}`, `{"data":{"id":"c"}}`},
		"no object":                   {"email.created", `{"data":"1"}`, `{"data":"redacted"}`},
		"a list":                      {"email.created", `["1"]`, `{"data":"redacted"}`},
		"cut":                         {"", `{"data":{"object":"email","subject":"1`, `{"data":"redacted"}`},
		"without a type":              {"", `{"data":{"object":"sms_message","message":"1"}}`, `{"data":{"message":"redacted","object":"sms_message"}}`},
		"a type that is too long":     {"", `{"type":"email.created","data":[1]}`, `{"data":"redacted","type":"email.created"}`},
		"redacted before":             {"email.created", `{"data":{"body":"redacted","data":{"user":{"id":"user_1"}}}}`, `{"data":{"body":"redacted","data":{"user":{"id":"user_1"}}}}`},
	} {
		out, message := Message(test.typ, []byte(test.body))
		assert.True(t, message, name)
		assert.JSONEq(t, test.want, string(out), name)
		again, _ := Message(test.typ, out)
		assert.Equal(t, string(out), string(again), name)
	}
	for typ, body := range map[string]string{
		"user.created": `{"data":{"body":"kept","public_metadata":{"otp_code":"kept"}},"type":"user.created"}`,
		"emailx.sent":  `{"data":{"body":"kept"}}`,
		"":             `{"data":{"email_addresses":[{"object":"email_address"}]},"type":"user.cr`,
	} {
		out, message := Message(typ, []byte(body))
		assert.False(t, message, typ)
		assert.Equal(t, body, string(out), typ)
	}
}

func TestEveryMessageOfClerksIsRedacted(t *testing.T) {
	messages := 0
	for _, typ := range fixture.Types() {
		body, _ := fixture.Event(typ)
		out, message := Message(typ, body)
		assert.Equal(t, event.Type(typ).Resource() == "email" || event.Type(typ).Resource() == "sms", message, typ)
		if message {
			messages++
			for _, text := range []string{"123456", "Acme", "verification code", "Do not share"} {
				assert.NotContains(t, string(out), text, typ)
			}
			was, err := event.Decode(body)
			assert.NoError(t, err)
			is, err := event.Decode(out)
			assert.NoError(t, err)
			assert.Equal(t, was.Object, is.Object, typ)
			assert.Equal(t, was.Timestamp, is.Timestamp, typ)
		}
	}
	assert.Equal(t, 2, messages)
}
