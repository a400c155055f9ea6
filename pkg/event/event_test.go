package event_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// People and things of the fixtures.
const (
	ada    = "user_38HzI2pYfb8qPaRGOtjol4SEChQ"
	acme   = "org_38I6aTD3SCO3kbkUpujsQtG5UiL"
	domain = "orgdmn_38IDsp21UKRUfqHcoJ8zr9I0Mhj"
)

func TestDecodeFindsTheHeadOfEveryKnownType(t *testing.T) {
	t.Parallel()
	// By resource, since all types of a resource keep things in the same place; the exceptions follow by type.
	keys := map[string]string{
		"user": ada, "session": ada, "organization": ada, "organizationMembership": "user_", "organizationInvitation": "user_",
		"organizationDomain": acme, "role": "role_", "permission": "perm_", "waitlistEntry": "wle_", "subscription": "user_|org_",
		"subscriptionItem": "user_|org_", "paymentAttempt": "user_|org_", "email": "ema_", "sms": "user_",
		"organization.deleted": acme, "organizationDomain.deleted": domain,
	}
	require.Len(t, fixture.Types(), 46)
	for _, typ := range fixture.Types() {
		body, ok := fixture.Event(typ)
		require.True(t, ok)
		e, err := event.Decode(body)
		require.NoError(t, err, typ)

		var want struct {
			Timestamp  int64           `json:"timestamp"`
			InstanceID string          `json:"instance_id"`
			Data       json.RawMessage `json:"data"`
		}
		require.NoError(t, json.Unmarshal(body, &want))
		var data map[string]any
		require.NoError(t, json.Unmarshal(want.Data, &data))

		assert.Equal(t, typ, string(e.Type))
		assert.Equal(t, want.Timestamp, e.Timestamp, typ)
		assert.Equal(t, want.InstanceID, e.InstanceID, typ)
		assert.Equal(t, string(want.Data), string(e.Data), typ)
		assert.Equal(t, string(body), string(e.Raw), typ)
		assert.Equal(t, data["id"], e.Object.ID, typ)
		if updated, ok := data["updated_at"].(float64); ok {
			assert.Equal(t, int64(updated), e.Object.UpdatedAt, typ)
		} else {
			assert.Zero(t, e.Object.UpdatedAt, typ)
		}
		assert.Equal(t, strings.HasSuffix(typ, ".deleted"), e.Object.Deleted, typ)

		prefixes, ok := keys[typ]
		if !ok {
			prefixes = keys[e.Type.Resource()]
		}
		require.NotEmpty(t, prefixes, "no expectation for %s", typ)
		assert.Condition(t, func() bool {
			for prefix := range strings.SplitSeq(prefixes, "|") {
				if strings.HasPrefix(e.Key(), prefix) {
					return true
				}
			}
			return false
		}, "%s: key %s, want %s…", typ, e.Key(), prefixes)
	}
}

func TestDecodeTakesEveryVariant(t *testing.T) {
	t.Parallel()
	for _, name := range fixture.Variants() {
		body, ok := fixture.Variant(name)
		require.True(t, ok)
		e, err := event.Decode(body)
		require.NoError(t, err, name)
		assert.NotEmpty(t, e.Type, name)
		assert.NotEmpty(t, e.Key(), name)
	}
}

func TestKey(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, typ, data, want string }{
		{"user", "user.created", `{"id":"user_1"}`, "user_1"},
		{"user without id", "user.deleted", `{"deleted":true}`, "_"},
		{"session", "session.created", `{"id":"sess_1","user_id":"user_1","user":{"id":"user_2"},"last_active_organization_id":"org_1"}`, "user_1"},
		{"session with the user embedded only", "session.ended", `{"id":"sess_1","user":{"id":"user_2"}}`, "user_2"},
		{"session of nobody", "session.removed", `{"id":"sess_1","user_id":null,"user":null}`, "sess_1"},
		{"organization", "organization.created", `{"id":"org_1","created_by":"user_1"}`, "user_1"},
		{"organization of nobody", "organization.updated", `{"id":"org_1"}`, "org_1"},
		{"organization deleted", "organization.deleted", `{"id":"org_1","deleted":true}`, "org_1"},
		{"membership", "organizationMembership.created", `{"id":"m","organization":{"id":"org_1"},"public_user_data":{"user_id":"user_1"}}`, "user_1"},
		{"membership without its user", "organizationMembership.deleted", `{"id":"m","organization":{"id":"org_1"}}`, "org_1"},
		{"invitation accepted", "organizationInvitation.accepted", `{"id":"i","user_id":"user_1","inviter_id":"user_2","organization_id":"org_1"}`, "user_1"},
		{"invitation", "organizationInvitation.created", `{"id":"i","inviter_id":"user_2","organization_id":"org_1"}`, "user_2"},
		{"invitation by nobody", "organizationInvitation.created", `{"id":"i","inviter_id":null,"organization_id":"org_1"}`, "org_1"},
		{"domain", "organizationDomain.created", `{"id":"d","organization_id":"org_1"}`, "org_1"},
		{"domain deleted", "organizationDomain.deleted", `{"id":"d","deleted":true}`, "d"},
		{"role", "role.created", `{"id":"role_1"}`, "role_1"},
		{"permission", "permission.updated", `{"id":"perm_1"}`, "perm_1"},
		{"invitation of a user", "organizationInvitation.created", `{"id":"i","public_user_data":{"user_id":"user_1"},"inviter_id":"user_2"}`, "user_1"},
		{"waitlist entry", "waitlistEntry.created", `{"id":"wle_1","invitation":null}`, "wle_1"},
		{"waitlist entry of a user", "waitlistEntry.updated", `{"id":"wle_1","invitation":{"id":"inv_1","user_id":"user_1"}}`, "user_1"},
		{"waitlist entry with its user", "waitlistEntry.updated", `{"id":"wle_1","user":{"id":"user_1"}}`, "user_1"},
		{"sign-up mail", "email.created", `{"id":"e","user_id":null,"data":{"otp_code":"1","user":{"id":"user_1"}}}`, "user_1"},
		{"sign-up mail of nobody", "email.created", `{"id":"e","user_id":null,"data":{"user":{"public_metadata":{}}}}`, "e"},
		{"sign-up SMS", "sms.created", `{"id":"s","user_id":"","data":{"user_id":"user_1"}}`, "user_1"},
		{"subscription of a user", "subscription.active", `{"id":"s","payer":{"id":"p","user_id":"user_1","organization_id":null}}`, "user_1"},
		{"subscription of an organization", "subscription.active", `{"id":"s","payer":{"id":"p","organization_id":"org_1"}}`, "org_1"},
		{"subscription item", "subscriptionItem.ended", `{"id":"s","payer":{"user_id":"user_1"}}`, "user_1"},
		{"payment", "paymentAttempt.updated", `{"id":"s","payer":{"user_id":"user_1"}}`, "user_1"},
		{"payment of nobody", "paymentAttempt.updated", `{"id":"s","payer":7}`, "s"},
		{"e-mail", "email.created", `{"id":"e","user_id":"user_1"}`, "user_1"},
		{"SMS to nobody known", "sms.created", `{"id":"s","user_id":null}`, "s"},
		{"unknown type", "robot.built", `{"id":"r","user_id":"user_1"}`, "user_1"},
		{"unknown type of an organization", "robot.built", `{"id":"r","organization_id":"org_1"}`, "org_1"},
		{"nothing at all", "robot.built", `{}`, "_"},
		{"type without a dot", "ping", `{"id":"p"}`, "p"},
	} {
		e, err := event.Decode([]byte(`{"type":"` + tc.typ + `","data":` + tc.data + `}`))
		require.NoError(t, err, tc.name)
		assert.Equal(t, tc.want, e.Key(), tc.name)
	}
}

func TestDecodeIsLenient(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, body string
		want       event.Object
		timestamp  int64
	}{
		{name: "only type and data", body: `{"type":"user.created","data":{}}`},
		{
			name: "numbers as strings and fractions", body: `{"type":"user.updated","timestamp":"1768471200036","data":{"id":"u","created_at":1.7684712e12,"updated_at":"1768471200001"}}`,
			want: event.Object{ID: "u", UserID: "u", CreatedAt: 1768471200000, UpdatedAt: 1768471200001}, timestamp: 1768471200036,
		},
		{
			name: "odd types", body: `{"type":"user.updated","timestamp":{},"instance_id":[],"data":{"id":5,"user":"x","organization":[],"payer":null,"created_at":"soon","updated_at":null,"deleted":"yes"}}`,
		},
		{
			name: "numbers that are no time", body: `{"type":"user.updated","timestamp":-5,"data":{"created_at":1e300,"updated_at":-1}}`,
		},
		{
			name: "the last of a repeated key counts", body: `{"type":"x","data":{"id":"a"},"type":"user.updated","data":{"id":"b","id":"c","updated_at":1768471200001,"updated_at":1768471200002}}`,
			want: event.Object{ID: "c", UserID: "c", UpdatedAt: 1768471200002},
		},
		{
			name: "also where the last is odd", body: `{"type":"session.created","timestamp":1768471200001,"timestamp":"x","data":{"id":"b","id":5,"updated_at":1768471200001,"updated_at":{},"user":{"id":"u"},"user":5}}`,
		},
		{
			name: "names count as they are written", body: `{"Type":"x","type":"user.updated","DATA":5,"data":{"ID":"x","id":"u","\u0075pdated_at":1768471200002}}`,
			want: event.Object{ID: "u", UserID: "u", UpdatedAt: 1768471200002},
		},
		{
			name: "braces and quotes in strings", body: `{"a":"}\"]{","type":"user.updated","data":{"x":["}",{"]":"\\"}],"id":"u"},"b":[[]]}`,
			want: event.Object{ID: "u", UserID: "u"},
		},
		{
			name: "escapes and no valid UTF-8", body: "{\"type\":\"user\\u002ecreated\",\"data\":{\"id\":\"a\\u00e9\\n\xff\"}}",
			want: event.Object{ID: "aé\n\ufffd", UserID: "aé\n\ufffd"},
		},
		{
			name: "white space", body: " \r\n\t{ \"type\" : \"user.created\" , \"data\" : { \"id\" : \"u\" } } \n",
			want: event.Object{ID: "u", UserID: "u"},
		},
		{
			name: "deep nesting", body: `{"type":"user.created","data":{"id":"u","public_metadata":` + strings.Repeat(`{"a":[`, 2000) + strings.Repeat(`]}`, 2000) + `}}`,
			want: event.Object{ID: "u", UserID: "u"},
		},
		{
			name: "NUL in metadata", body: `{"type":"user.created","data":{"id":"u","public_metadata":{"a":"\u0000"}}}`,
			want: event.Object{ID: "u", UserID: "u"},
		},
		{
			name: "a huge string", body: `{"type":"user.created","data":{"bio":"` + strings.Repeat("x", 1<<20) + `","id":"u"}}`,
			want: event.Object{ID: "u", UserID: "u"},
		},
	} {
		e, err := event.Decode([]byte(tc.body))
		require.NoError(t, err, tc.name)
		assert.Equal(t, tc.want, e.Object, tc.name)
		assert.Equal(t, tc.timestamp, e.Timestamp, tc.name)
		assert.Equal(t, tc.body, string(e.Raw), tc.name)
	}
}

func TestDecodeRefusesOnlyWhatCanNeverBeAnEvent(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"empty": "", "blank": " \n", "null": "null", "number": "1", "string": `"user.created"`, "list": `[{"type":"a","data":{}}]`,
		"half": `{"type":"user.created","data":{"id":"u"`, "more behind": `{"type":"a","data":{}}{}`, "trailing comma": `{"type":"a","data":{},}`,
		"no type": `{"data":{}}`, "type in capitals": `{"TYPE":"a","data":{}}`, "empty type": `{"type":"","data":{}}`, "null type": `{"type":null,"data":{}}`, "odd type": `{"type":7,"data":{}}`,
		"no data": `{"type":"a"}`, "null data": `{"type":"a","data":null}`, "data is a list": `{"type":"a","data":[]}`, "data is text": `{"type":"a","data":"{}"}`,
		"byte order mark": "\ufeff" + `{"type":"a","data":{}}`, "UTF-16": "{\x00}\x00",
		"nested beyond measure": `{"type":"a","data":{"x":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000) + `}}`,
	} {
		e, err := event.Decode([]byte(body))
		require.ErrorIs(t, err, event.ErrMalformed, name)
		assert.Equal(t, event.Event{}, e, name)
	}
}

func TestDataSharesMemoryWithTheBody(t *testing.T) {
	t.Parallel()
	body, _ := fixture.Event("user.created")
	e, err := event.Decode(body)
	require.NoError(t, err)
	copy(body, strings.Repeat("#", len(body)))
	assert.Equal(t, byte('#'), e.Raw[0])
	assert.Equal(t, byte('#'), e.Data[0])
}

func TestTypeIsCutAtItsFirstDot(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		typ            event.Type
		resource, verb string
		deleted        bool
	}{
		{"user.created", "user", "created", false},
		{"user.deleted", "user", "deleted", true},
		{"ping", "ping", "", false},
		{"a.b.deleted", "a", "b.deleted", false},
		{"", "", "", false},
		{".deleted", "", "deleted", true},
	} {
		assert.Equal(t, tc.resource, tc.typ.Resource(), tc.typ)
		assert.Equal(t, tc.verb, tc.typ.Verb(), tc.typ)
		assert.Equal(t, tc.deleted, tc.typ.Deleted(), tc.typ)
	}
}

func TestMillis(t *testing.T) {
	t.Parallel()
	for in, want := range map[int64]int64{
		0: 0, -1: 0, 1: 1999, 1716883200: 1716883200999, 99_999_999_999: 99_999_999_999_999,
		100_000_000_000: 100_000_000_000, 1768471200036: 1768471200036,
	} {
		assert.Equal(t, want, event.Millis(in), in)
	}
	second := time.Unix(1716883200, 0)
	assert.GreaterOrEqual(t, event.Millis(second.Unix()), second.Add(999*time.Millisecond).UnixMilli(), "never before something of the same second")
}
