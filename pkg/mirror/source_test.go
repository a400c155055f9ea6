package mirror_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"
	"pgregory.net/rapid"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
)

// of is the event as another source's.
func of(source string, e event.Event) event.Event {
	e.Source = source
	return e
}

// applyApart applies events as the worker does: those of a batch that fails one by one, without those of another source's objects.
func applyApart(t require.TestingT, db *gorm.DB, batch []event.Event) (refused int) {
	err := tryApply(context.Background(), db, batch...)
	if !errors.Is(err, mirror.ErrWrongSource) {
		require.NoError(t, err)
		return 0
	}
	if len(batch) == 1 {
		return 1
	}
	for _, e := range batch {
		refused += applyApart(t, db, []event.Event{e})
	}
	return refused
}

// TestNoEventOfAnotherSourceChangesARow: one source makes the rows, then the events of both come in any order and any batches, about the same
// objects. The rows are those of the first source's events alone.
func TestNoEventOfAnotherSourceChangesARow(t *testing.T) {
	t.Parallel()
	for _, kind := range databases {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			db := kind.open(t)
			rapid.Check(t, func(rt *rapid.T) {
				number := 0
				source := func(name string) func(string, []byte) event.Event {
					return func(id string, body []byte) event.Event {
						number++
						return of(name, decode(t, fmt.Sprintf("%s_%d", id, number), body))
					}
				}
				first := source("first")
				var made []event.Event
				for _, object := range []struct{ resource, id string }{
					{"user", "user_1"},
					{"user", "user_2"},
					{"organization", "org_1"},
					{"organization", "org_2"},
					{"organizationMembership", "orgmem_1"},
					{"organizationMembership", "orgmem_2"},
					{"session", "sess_1"},
					{"session", "sess_2"},
					{"organizationInvitation", "orginv_1"},
					{"organizationInvitation", "orginv_2"},
					{"organizationDomain", "orgdmn_1"},
					{"organizationDomain", "orgdmn_2"},
				} {
					made = append(made, first("msg_made", bodyOf(panics{}, object.resource+".created", 1, map[string]any{"id": object.id, "updated_at": 1})))
				}
				firsts, seconds := story(rt, first), story(rt, source("second"))
				rowsAfter := func(batches ...[]event.Event) (rows string, refused int) {
					tx := db.Begin()
					require.NoError(rt, tx.Error)
					defer tx.Rollback()
					for _, batch := range batches {
						refused += applyApart(rt, tx, batch)
					}
					return dump(t, tx), refused
				}
				want, _ := rowsAfter(made, firsts)
				mixed := rapid.Permutation(append(append([]event.Event{}, firsts...), seconds...)).Draw(rt, "mixed")
				batches := [][]event.Event{made}
				for len(mixed) > 0 {
					n := rapid.IntRange(1, len(mixed)).Draw(rt, "batch")
					batches, mixed = append(batches, mixed[:n]), mixed[n:]
				}
				rows, refused := rowsAfter(batches...)
				require.Equal(rt, want, rows)
				require.Equal(rt, len(seconds), refused, "each of the second's events is refused")
			})
		})
	}
}

// TestARowBelongsToTheSourceThatMadeIt, in each way that a row is made and whatever comes after it.
func TestARowBelongsToTheSourceThatMadeIt(t *testing.T) {
	t.Parallel()
	const at, later = int64(1_768_471_200_000), int64(4_102_444_800_000)
	user := map[string]any{"id": "user_1", "first_name": "Ada", "updated_at": at}
	session := map[string]any{"id": "sess_1", "status": "active", "updated_at": at, "user": map[string]any{"id": "user_1", "first_name": "copy", "updated_at": later}}
	gone := map[string]any{"id": "user_1", "deleted": true}
	first := func(typ string, data map[string]any) event.Event {
		return decode(t, "msg_1", bodyOf(t, typ, at, data))
	}
	second := func(typ string, data map[string]any) event.Event {
		return of("staging", decode(t, "msg_2", bodyOf(t, typ, later, data)))
	}
	newer := map[string]any{"id": "user_1", "first_name": "Eve", "updated_at": later}
	for _, kind := range databases {
		for name, test := range map[string]struct {
			made, other event.Event
			refused     int
		}{
			"an object, overwritten":            {first("user.created", user), second("user.updated", newer), 1},
			"an object, deleted":                {first("user.created", user), second("user.deleted", gone), 1},
			"a stub, overwritten":               {first("session.created", session), second("user.updated", newer), 1},
			"a tombstone, brought back":         {first("user.deleted", gone), second("user.updated", newer), 1},
			"an older event is refused as well": {first("user.created", newer), second("user.updated", user), 1},
			"a copy in another's object":        {first("user.created", user), second("session.created", session), 0},
			"a copy over a stub": {
				first("session.created", session),
				second("session.created", map[string]any{"id": "sess_2", "updated_at": later, "user": newer}), 0,
			},
		} {
			t.Run(kind.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				db := kind.open(t)
				apply(t, db, test.made)
				users := func() string {
					return dumpTable(t, db, "users", []string{"id", "source", "first_name", "event_id"}, nil)
				}
				want := users()
				require.NotEmpty(t, want)
				assert.Equal(t, test.refused, applyApart(t, db, []event.Event{test.other}))
				assert.Equal(t, want, users())
			})
		}
	}
}

// TestTheErrorOfAnotherSourcesEventSaysWhose the row is.
func TestTheErrorOfAnotherSourcesEventSaysWhose(t *testing.T) {
	t.Parallel()
	for _, kind := range databases {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			db := kind.open(t)
			body := bodyOf(t, "user.updated", 1_768_471_200_000, map[string]any{"id": "user_1", "updated_at": 1})
			apply(t, db, decode(t, "msg_1", body))
			err := tryApply(t.Context(), db, of("staging", decode(t, "msg_2", body)))
			require.ErrorIs(t, err, mirror.ErrWrongSource)
			assert.ErrorContains(t, err, `user.updated msg_2 of source "staging" about user_1 in users: object belongs to another source: "clerk"`)
			assert.False(t, database.IsInfrastructure(err))
		})
	}
}

func TestRowsOfASourceThatIsNotConfiguredAreNamed(t *testing.T) {
	t.Parallel()
	for _, kind := range databases {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			db := kind.open(t)
			apply := func(source, id, body string) {
				require.NoError(t, tryApply(t.Context(), db, of(source, decode(t, id, []byte(body)))))
			}
			texts, err := mirror.UnknownSources(t.Context(), db, nil)
			require.NoError(t, err)
			assert.Empty(t, texts)
			apply("old", "msg_1", `{"type":"user.created","timestamp":1700000000000,"data":{"id":"user_1","object":"user","updated_at":1}}`)
			apply("old", "msg_2", `{"type":"user.created","timestamp":1700000000000,"data":{"id":"user_2","object":"user","updated_at":1}}`)
			apply("old", "msg_3", `{"type":"organization.created","timestamp":1700000000000,"data":{"id":"org_1","object":"organization","updated_at":1}}`)
			apply("clerk", "msg_4", `{"type":"user.created","timestamp":1700000000000,"data":{"id":"user_4","object":"user","updated_at":1}}`)
			apply("zed", "msg_5", `{"type":"organization.created","timestamp":1700000000000,"data":{"id":"org_2","object":"organization","updated_at":1}}`)
			apply("gone", "msg_6", `{"type":"user.deleted","timestamp":1700000000000,"data":{"id":"user_6","object":"user","deleted":true}}`)

			texts, err = mirror.UnknownSources(t.Context(), db, []string{"clerk", "staging"})
			require.NoError(t, err)
			require.Len(t, texts, 2)
			assert.Contains(t, texts[0], `rows of source "old", which is not configured: 2 users, 1 organizations;`)
			assert.Contains(t, texts[1], `rows of source "zed", which is not configured: 1 organizations;`)
			texts, err = mirror.UnknownSources(t.Context(), db, []string{"zed", "clerk", "old"})
			require.NoError(t, err)
			assert.Empty(t, texts)
		})
	}
}
