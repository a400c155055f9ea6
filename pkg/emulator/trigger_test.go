package emulator_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

// trigger returns the object of the wished event, and the types of those that came before it.
func trigger(t *testing.T, c *emulator.Clerk, w emulator.Wish) (data gjson.Result, before []string) {
	t.Helper()
	events, err := c.Trigger(w)
	require.NoError(t, err)
	require.NotEmpty(t, events)
	for _, e := range events[:len(events)-1] {
		before = append(before, e.Type)
	}
	return gjson.GetBytes(events[len(events)-1].Body, "data"), before
}

func TestTriggeredObjectsJoin(t *testing.T) {
	t.Parallel()
	c := emulator.New(emulator.Config{})
	session, before := trigger(t, c, emulator.Wish{Type: "session.created"})
	assert.Equal(t, []string{"user.created"}, before)
	first := session.Get("user_id").String()
	assert.Equal(t, first, session.Get("user.id").String())
	user, ok := c.Object("users", first)
	require.True(t, ok)
	assert.JSONEq(t, string(user.JSON), session.Get("user").Raw)

	second, before := trigger(t, c, emulator.Wish{Type: "user.created"})
	assert.Empty(t, before)
	session, before = trigger(t, c, emulator.Wish{Type: "session.created"})
	assert.Empty(t, before)
	assert.Equal(t, second.Get("id").String(), session.Get("user_id").String(), "the newest")
	session, _ = trigger(t, c, emulator.Wish{Type: "session.created", Nth: 1})
	assert.Equal(t, first, session.Get("user_id").String())
	session, _ = trigger(t, c, emulator.Wish{Type: "session.created", Set: []fixture.PathValue{fixture.Set("data.user_id", first)}})
	assert.Equal(t, first, session.Get("user.id").String(), "who is named")

	member, before := trigger(t, c, emulator.Wish{Type: "organizationMembership.created"})
	assert.Equal(t, []string{"organization.created"}, before)
	org, ok := c.Object("organizations", member.Get("organization.id").String())
	require.True(t, ok)
	assert.JSONEq(t, string(org.JSON), member.Get("organization").Raw)
	other, before := trigger(t, c, emulator.Wish{Type: "organizationMembership.created"})
	assert.Empty(t, before)
	assert.Equal(t, org.ID, other.Get("organization.id").String())
	assert.NotEqual(t, member.Get("public_user_data.user_id").String(), other.Get("public_user_data.user_id").String(), "nobody joins twice")
	_, before = trigger(t, c, emulator.Wish{Type: "organizationMembership.created"})
	assert.Equal(t, []string{"user.created"}, before, "who is left to join")
	for _, typ := range []string{"organizationInvitation.created", "organizationDomain.created"} {
		object, before := trigger(t, c, emulator.Wish{Type: typ})
		assert.Empty(t, before)
		assert.Equal(t, org.ID, object.Get("organization_id").String())
	}

	ended, _ := trigger(t, c, emulator.Wish{Type: "session.ended"})
	assert.Equal(t, "ended", ended.Get("status").String())
	again, _ := trigger(t, c, emulator.Wish{Type: "session.ended"})
	assert.NotEqual(t, ended.Get("id").String(), again.Get("id").String(), "one that has not ended")

	item, before := trigger(t, c, emulator.Wish{Type: "subscriptionItem.created"})
	assert.Equal(t, []string{"subscription.created"}, before)
	_, ok = c.Object("subscriptions", item.Get("subscription_id").String())
	assert.True(t, ok)
}

func TestTriggeredChangesTakeNothingBack(t *testing.T) {
	t.Parallel()
	c := emulator.New(emulator.Config{})
	ada, _ := trigger(t, c, emulator.Wish{Type: "user.created", Set: []fixture.PathValue{fixture.Set("data.first_name", "Ada")}})
	updated, before := trigger(t, c, emulator.Wish{Type: "user.updated", Set: []fixture.PathValue{fixture.Set("data.last_name", "King")}})
	assert.Empty(t, before)
	assert.Equal(t, ada.Get("id").String(), updated.Get("id").String())
	assert.Equal(t, "Ada", updated.Get("first_name").String())
	assert.Equal(t, ada.Get("email_addresses").Raw, updated.Get("email_addresses").Raw)
	assert.Greater(t, updated.Get("updated_at").Int(), ada.Get("updated_at").Int())
	gone, _ := trigger(t, c, emulator.Wish{Type: "user.deleted"})
	assert.Equal(t, ada.Get("id").String(), gone.Get("id").String())
	live, deleted := c.Count("users")
	assert.Equal(t, []int{0, 1}, []int{live, deleted})
	back, _ := trigger(t, c, emulator.Wish{Type: "user.updated", Set: []fixture.PathValue{fixture.Set("data.id", ada.Get("id").String())}})
	assert.Equal(t, ada.Get("id").String(), back.Get("id").String())
	live, _ = c.Count("users")
	assert.Equal(t, 1, live)
}

// TestEveryTypeCanBeTriggered: also as the first event of all, and alone.
func TestEveryTypeCanBeTriggered(t *testing.T) {
	t.Parallel()
	c := emulator.New(emulator.Config{})
	for _, typ := range append(fixture.Types(), fixture.Variants()...) {
		for _, alone := range []bool{true, false} {
			events, err := c.Trigger(emulator.Wish{Type: typ, Alone: alone})
			require.NoError(t, err, typ)
			for _, e := range events {
				_, err := event.Decode(e.Body)
				require.NoError(t, err, "%s: %s", typ, e.Body)
			}
			if alone {
				assert.Len(t, events, 1, typ)
			}
		}
		fresh := emulator.New(emulator.Config{})
		_, err := fresh.Trigger(emulator.Wish{Type: typ})
		require.NoError(t, err, typ)
	}
	_, err := c.Trigger(emulator.Wish{Type: "user.vanished"})
	require.ErrorIs(t, err, fixture.ErrUnknown)
}

func TestWhoIsNamedAndNotThereComesFirst(t *testing.T) {
	t.Parallel()
	c := emulator.New(emulator.Config{})
	member, before := trigger(t, c, emulator.Wish{Type: "organizationMembership.created", Set: []fixture.PathValue{
		fixture.Set("data.organization.id", "org_mine"), fixture.Set("data.public_user_data.user_id", "user_ada"),
	}})
	assert.Equal(t, []string{"user.created", "organization.created", "user.created"}, before, "one founded it")
	assert.Equal(t, "org_mine", member.Get("organization.id").String())
	assert.Equal(t, "user_ada", member.Get("public_user_data.user_id").String())
	session, before := trigger(t, c, emulator.Wish{Type: "session.created", Set: []fixture.PathValue{fixture.Set("data.user_id", "user_bob")}})
	assert.Equal(t, []string{"user.created"}, before)
	assert.Equal(t, "user_bob", session.Get("user.id").String())
	for table, id := range map[string]string{"organizations": "org_mine", "users": "user_bob"} {
		_, ok := c.Object(table, id)
		assert.True(t, ok, id)
	}
}

// What no Clerk can have is sent, and spoils none of its lists.
func TestAnImpossibleObjectIsNotKept(t *testing.T) {
	t.Parallel()
	c := emulator.New(emulator.Config{})
	ada, _ := trigger(t, c, emulator.Wish{Type: "user.created"})
	id := ada.Get("id").String()
	for _, set := range []fixture.PathValue{
		fixture.Set("data.created_at", "soon"), fixture.Set("data.updated_at", "{}"), fixture.Set("data.id", "5"),
	} {
		_, _ = trigger(t, c, emulator.Wish{Type: "user.updated", Set: []fixture.PathValue{set}})
		kept, ok := c.Object("users", id)
		require.True(t, ok)
		assert.JSONEq(t, ada.Raw, string(kept.JSON), set.Path)
	}
	_, _ = trigger(t, c, emulator.Wish{Type: "user.created", Set: []fixture.PathValue{fixture.Set("data.id", "ada lovelace")}})
	for _, id := range []string{"5", "ada lovelace"} {
		_, ok := c.Object("users", id)
		assert.False(t, ok, id)
	}
	for what, body := range map[string]string{
		"made at no time": `{"type":"user.created","data":{"id":"user_x","object":"user","updated_at":1760000000000}}`,
		"no text":         `{"type":"user.created","data":{"id":"user_x","object":"user","created_at":1,"updated_at":1,"first_name":"` + "\xff" + `"}}`,
	} {
		_, _ = trigger(t, c, emulator.Wish{Body: []byte(body)})
		_, ok := c.Object("users", "user_x")
		assert.False(t, ok, what)
	}
}

func TestAnObjectThatIsMadeOnceMoreIsListedByItsNewTime(t *testing.T) {
	t.Parallel()
	c := emulator.New(emulator.Config{})
	again := emulator.Wish{Type: "user.created", Set: []fixture.PathValue{fixture.Set("data.id", "user_again")}}
	_, _ = trigger(t, c, again)
	_, _ = trigger(t, c, emulator.Wish{Type: "user.created"})
	_, _ = trigger(t, c, again)
	var last int64
	var ids []string
	for o := range c.Objects("users") {
		created := gjson.GetBytes(o.JSON, "created_at").Int()
		assert.Equal(t, created, o.CreatedAt)
		last = max(last, created)
		ids = append(ids, o.ID)
	}
	assert.Len(t, ids, 2)
	newest, _ := c.Object("users", "user_again")
	assert.Equal(t, last, newest.CreatedAt)
}
