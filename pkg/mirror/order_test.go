package mirror_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"
	"pgregory.net/rapid"

	"github.com/usherhq/usher/pkg/event"
)

// story draws the events of a few objects over a few moments, so that ties of every kind are frequent: equal updated_at, equal
// timestamps, timestamps in seconds, years ahead or none, children of the deleted and of those who return, deletes with and without their object, ended sessions, copies inside others.
func story(t *rapid.T, decode func(id string, body []byte) event.Event) []event.Event {
	const start = int64(1_768_471_200_000)
	moment := rapid.Int64Range(0, 6)
	at := func(name string) int64 { return start + 400*moment.Draw(t, name) }
	name := rapid.SampledFrom([]string{"a", "b", "c"})
	number := rapid.IntRange(1, 2)
	user := func() map[string]any {
		u := map[string]any{"id": fmt.Sprintf("user_%d", number.Draw(t, "user")), "first_name": name.Draw(t, "first_name"), "banned": rapid.Bool().Draw(t, "banned"), "created_at": start}
		if rapid.IntRange(0, 9).Draw(t, "has updated_at") > 0 {
			u["updated_at"] = at("user updated_at")
		}
		return u
	}
	organization := func() map[string]any {
		return map[string]any{"id": fmt.Sprintf("org_%d", number.Draw(t, "organization")), "name": name.Draw(t, "name"), "updated_at": at("organization updated_at")}
	}
	gone := func(data map[string]any) map[string]any {
		if rapid.Bool().Draw(t, "full object") {
			return data
		}
		return map[string]any{"id": data["id"], "deleted": true}
	}
	one := func(i int) event.Event {
		var typ string
		var data map[string]any
		of := func(id string, extra map[string]any) map[string]any {
			extra["id"], extra["updated_at"] = fmt.Sprintf("%s_%d", id, number.Draw(t, id)), at("child updated_at")
			return extra
		}
		switch rapid.IntRange(0, 9).Draw(t, "kind") {
		case 0, 1:
			typ, data = rapid.SampledFrom([]string{"user.created", "user.updated"}).Draw(t, "type"), user()
		case 2:
			typ, data = "user.deleted", gone(user())
		case 3:
			typ, data = "organization.updated", organization()
		case 4:
			typ, data = "organization.deleted", gone(organization())
		case 5:
			typ = rapid.SampledFrom([]string{"organizationMembership.created", "organizationMembership.updated", "organizationMembership.deleted"}).Draw(t, "type")
			data = of("orgmem", map[string]any{"role": name.Draw(t, "role"), "organization": organization()})
			if rapid.Bool().Draw(t, "has user") {
				data["public_user_data"] = map[string]any{"user_id": fmt.Sprintf("user_%d", number.Draw(t, "user"))}
			}
		case 6:
			typ = rapid.SampledFrom([]string{"organizationInvitation.created", "organizationInvitation.accepted", "organizationInvitation.renamed"}).Draw(t, "type")
			data = of("orginv", map[string]any{"object": "organization_invitation", "status": name.Draw(t, "status"), "organization_id": fmt.Sprintf("org_%d", number.Draw(t, "organization"))})
		case 7:
			typ, data = "organizationDomain.updated", of("orgdmn", map[string]any{"organization_id": fmt.Sprintf("org_%d", number.Draw(t, "organization"))})
			if rapid.IntRange(0, 3).Draw(t, "deleted") == 0 {
				typ, data = "organizationDomain.deleted", gone(data)
			}
		default:
			status := rapid.SampledFrom([]string{"active", "pending", "ended", "removed", "revoked", "expired", "replaced", "abandoned"}).Draw(t, "status")
			typ = "session.created"
			data = map[string]any{"id": fmt.Sprintf("sess_%d", number.Draw(t, "session")), "status": status, "client_id": name.Draw(t, "client"), "updated_at": at("session updated_at")}
			switch rapid.IntRange(0, 2).Draw(t, "user of a session") {
			case 0:
				data["user"] = user()
			case 1:
				data["user_id"] = fmt.Sprintf("user_%d", number.Draw(t, "user"))
			}
			if rapid.IntRange(0, 9).Draw(t, "deleted") == 0 {
				typ, data = "session.deleted", gone(data)
			}
		}
		timestamp := at("timestamp")
		if rapid.IntRange(0, 19).Draw(t, "years ahead") == 0 { // of the receipt
			timestamp *= 2
		}
		switch rapid.IntRange(0, 9).Draw(t, "unit") {
		case 0, 1:
			timestamp /= 1000
		case 2:
			timestamp = 0
		}
		return decode(fmt.Sprintf("msg_%c%d", rapid.SampledFrom([]rune("aZ0_é")).Draw(t, "id"), i), bodyOf(panics{}, typ, timestamp, data))
	}
	events := make([]event.Event, rapid.IntRange(1, 25).Draw(t, "events"))
	for i := range events {
		events[i] = one(i)
	}
	return events
}

// panics fails inside a generator, where no testing.TB is at hand.
type panics struct{ testing.TB }

func (panics) Helper()                   {}
func (panics) Errorf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }
func (panics) FailNow()                  { panic("failed") }

// TestEveryOrderAndRepetitionEndsInTheSameRows compares three ways to the same rows: all events in one batch, where Go chooses; one batch an event,
// where the database chooses; and a permutation with repetitions, cut into batches anywhere.
func TestEveryOrderAndRepetitionEndsInTheSameRows(t *testing.T) {
	t.Parallel()
	for _, kind := range databases {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			db := kind.open(t)
			rapid.Check(t, func(rt *rapid.T) {
				events := story(rt, func(id string, body []byte) event.Event { return decode(t, id, body) })
				rowsAfter := func(batches ...[]event.Event) string {
					tx := db.Begin()
					require.NoError(rt, tx.Error)
					defer tx.Rollback()
					for _, batch := range batches {
						require.NoError(rt, applyTo(context.Background(), tx, batch...))
					}
					return dump(t, tx)
				}
				want := rowsAfter(events)
				var single [][]event.Event
				for _, e := range events {
					single = append(single, []event.Event{e})
				}
				require.Equal(rt, want, rowsAfter(single...), "one batch an event")

				repeated := append(append([]event.Event{}, events...), rapid.SliceOfN(rapid.SampledFrom(events), 0, len(events)).Draw(rt, "repeated")...)
				shuffled := rapid.Permutation(repeated).Draw(rt, "shuffled")
				var batches [][]event.Event
				for len(shuffled) > 0 {
					n := rapid.IntRange(1, len(shuffled)).Draw(rt, "batch")
					batches, shuffled = append(batches, shuffled[:n]), shuffled[n:]
				}
				require.Equal(rt, want, rowsAfter(batches...), "shuffled, repeated, cut")
			})
		})
	}
}

// TestVersionRule holds the decisions one by one: what stays after both events, in either order.
func TestVersionRule(t *testing.T) {
	t.Parallel()
	const at = int64(1_768_471_200_000)
	user := func(updated int64, name string) map[string]any {
		return map[string]any{"id": "user_1", "updated_at": updated, "first_name": name}
	}
	session := func(updated int64, status string, extra ...any) map[string]any {
		data := map[string]any{"id": "sess_1", "updated_at": updated, "status": status}
		for i := 0; i < len(extra); i += 2 {
			data[extra[i].(string)] = extra[i+1]
		}
		return data
	}
	tests := map[string]struct {
		loser, winner []byte
		query, want   string
	}{
		"the later updated_at wins, whatever the timestamps": {bodyOf(t, "user.updated", at+999, user(at, "old")), bodyOf(t, "user.updated", at, user(at+1, "new")), "SELECT first_name FROM users", "new"},
		"of one updated_at the later event wins":             {bodyOf(t, "user.updated", at, user(at, "old")), bodyOf(t, "user.updated", at+1, user(at, "new")), "SELECT first_name FROM users", "new"},
		"of one moment the greater event id wins":            {bodyOf(t, "user.updated", at, user(at, "old")), bodyOf(t, "user.updated", at, user(at, "new")), "SELECT first_name FROM users", "new"},
		"seconds count as the end of their second":           {bodyOf(t, "user.updated", at+500, user(at, "old")), bodyOf(t, "user.updated", at/1000, user(at, "new")), "SELECT first_name FROM users", "new"},
		"a late update loses against the tombstone":          {bodyOf(t, "user.updated", at+999, user(at+5, "late")), bodyOf(t, "user.deleted", at+10, map[string]any{"id": "user_1", "deleted": true}), "SELECT deleted_at IS NOT NULL AND first_name IS NULL FROM users", "true"},
		"a change after the delete brings the row back":      {bodyOf(t, "user.deleted", at+10, map[string]any{"id": "user_1", "deleted": true}), bodyOf(t, "user.updated", at+20, user(at+20, "back")), "SELECT first_name FROM users WHERE deleted_at IS NULL", "back"},
		"a stub loses against everything of the object":      {bodyOf(t, "session.created", at+999, session(at, "active", "user", user(at+900, "stub"))), bodyOf(t, "user.created", at, user(at, "own")), "SELECT first_name FROM users", "own"},
		"a stub loses against a tombstone":                   {bodyOf(t, "session.created", at+999, session(at, "active", "user", user(at+900, "stub"))), bodyOf(t, "user.deleted", at, map[string]any{"id": "user_1", "deleted": true}), "SELECT deleted_at IS NOT NULL FROM users", "true"},
		"of two stubs the later copy wins":                   {bodyOf(t, "session.created", at+999, session(at, "active", "user", user(at, "old"))), bodyOf(t, "session.created", at, session(at, "active", "user", user(at+1, "new"))), "SELECT first_name FROM users WHERE version = 0", "new"},
		"an ended session stays ended":                       {bodyOf(t, "session.created", at+999, session(at+900, "active")), bodyOf(t, "session.ended", at, session(at, "ended")), "SELECT status FROM sessions WHERE ended", "ended"},
		"of two ends the later one wins":                     {bodyOf(t, "session.ended", at, session(at, "ended")), bodyOf(t, "session.removed", at, session(at+1, "removed")), "SELECT status FROM sessions WHERE ended", "removed"},
		"a deleted session stays deleted":                    {bodyOf(t, "session.created", at+999, session(at+900, "active")), bodyOf(t, "session.deleted", at, map[string]any{"id": "sess_1", "deleted": true}), "SELECT deleted_at IS NOT NULL AND ended FROM sessions", "true"},
		"a full object in a delete takes the later time":     {bodyOf(t, "organizationMembership.updated", at, map[string]any{"id": "orgmem_1", "updated_at": at + 50}), bodyOf(t, "organizationMembership.deleted", at+60, map[string]any{"id": "orgmem_1", "updated_at": at + 50, "role": "org:admin"}), "SELECT deleted_at IS NOT NULL AND role = 'org:admin' FROM organization_memberships", "true"},
		"the organization of a membership makes a stub":      {bodyOf(t, "organization.updated", at, map[string]any{"id": "org_2", "updated_at": at}), bodyOf(t, "organizationMembership.created", at, map[string]any{"id": "orgmem_1", "updated_at": at, "organization": map[string]any{"id": "org_1", "name": "Acme", "updated_at": at}}), "SELECT name FROM organizations WHERE version = 0", "Acme"},
		"an object without updated_at still beats its stub":  {bodyOf(t, "session.created", at, session(at, "active", "user", user(at+900, "stub"))), bodyOf(t, "user.created", 0, map[string]any{"id": "user_1", "first_name": "own"}), "SELECT first_name FROM users", "own"},
	}
	for _, kind := range databases {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			db := kind.open(t)
			for name, test := range tests {
				loser, winner := decode(t, "msg_1", test.loser), decode(t, "msg_2", test.winner)
				orders := map[string][][]event.Event{
					"in order": {{loser}, {winner}}, "out of order": {{winner}, {loser}}, "one batch": {{loser, winner}}, "one batch, out of order": {{winner, loser}},
				}
				for order, batches := range orders {
					tx := db.Begin()
					for _, batch := range batches {
						require.NoError(t, applyTo(t.Context(), tx, batch...))
					}
					assert.Equal(t, test.want, one(t, tx, test.query), "%s, %s", name, order)
					tx.Rollback()
				}
			}
		})
	}
}

// one is the only value of a query.
func one(t *testing.T, db *gorm.DB, query string) string {
	t.Helper()
	var value any
	require.NoError(t, db.Raw(query).Row().Scan(&value), query)
	if n, ok := value.(int64); ok {
		value = n != 0
	}
	return fmt.Sprint(value)
}

func TestSyncedAtIsWhenTheRowWasWritten(t *testing.T) {
	t.Parallel()
	for _, kind := range databases {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			db := kind.open(t)
			before := time.Now().Truncate(time.Millisecond)
			apply(t, db, decode(t, "msg_1", bodyOf(t, "user.created", 1, map[string]any{"id": "user_1"})))
			var first, second time.Time
			require.NoError(t, db.Raw("SELECT synced_at FROM users").Row().Scan(&first))
			assert.False(t, first.Before(before) || first.After(time.Now()))
			apply(t, db, decode(t, "msg_1", bodyOf(t, "user.created", 1, map[string]any{"id": "user_1"})))
			require.NoError(t, db.Raw("SELECT synced_at FROM users").Row().Scan(&second))
			assert.Equal(t, first, second, "a repeated event writes nothing")
		})
	}
}
