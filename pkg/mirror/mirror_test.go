package mirror_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/mirror"
)

func TestKnowsTypesByTheirVerb(t *testing.T) {
	t.Parallel()
	for _, typ := range fixture.Types() {
		want := !strings.HasPrefix(typ, "email.") && !strings.HasPrefix(typ, "sms.")
		assert.Equal(t, want, mirror.Knows(event.Type(typ)), typ)
	}
	for _, typ := range []event.Type{"", "user", "user.", "user.somethingNew", "users.created", "invitation.created", ".created"} {
		assert.False(t, mirror.Knows(typ), typ)
	}
	assert.True(t, mirror.Knows("session.expired"), "the reconciler's")
}

func TestUnknownTypesWriteNothing(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		body, _ := fixture.Variant("unknown-type")
		apply(t, db, decode(t, "msg_1", body), decode(t, "msg_2", bodyOf(t, "email.created", 1, map[string]any{"body": "no id"})))
		assert.Empty(t, dump(t, db))
	})
}

func TestAnObjectWithoutIDIsAnErrorOfTheEvent(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for _, id := range []any{nil, "", 7, map[string]any{}} {
			err := tryApply(t.Context(), db, decode(t, "msg_1", bodyOf(t, "user.created", 1768471200000, map[string]any{"id": id})))
			require.ErrorIs(t, err, mirror.ErrNoID)
			assert.False(t, database.IsInfrastructure(err))
		}
		assert.Empty(t, dump(t, db))
	})
}

// TestPrimaryAddressIsTheOneOfTheID covers what goes wrong most often with Clerk's users.
func TestPrimaryAddressIsTheOneOfTheID(t *testing.T) {
	t.Parallel()
	address := func(id, address, status string) map[string]any {
		return map[string]any{"id": id, "email_address": address, "verification": map[string]any{"status": status}}
	}
	tests := map[string]struct {
		data     map[string]any
		email    any
		verified bool
	}{
		"second of two": {map[string]any{"primary_email_address_id": "idn_2", "email_addresses": []any{address("idn_1", "a@example.com", "verified"), address("idn_2", "b@example.com", "unverified")}}, "b@example.com", false},
		"verified":      {map[string]any{"primary_email_address_id": "idn_1", "email_addresses": []any{address("idn_1", "a@example.com", "verified")}}, "a@example.com", true},
		"dangling id":   {map[string]any{"primary_email_address_id": "idn_9", "email_addresses": []any{address("idn_1", "a@example.com", "verified")}}, nil, false},
		"null id":       {map[string]any{"primary_email_address_id": nil, "email_addresses": []any{address("idn_1", "a@example.com", "verified")}}, nil, false},
		"no list":       {map[string]any{"primary_email_address_id": "idn_1"}, nil, false},
		"odd list":      {map[string]any{"primary_email_address_id": "idn_1", "email_addresses": []any{"idn_1", 7, nil, []any{}}}, nil, false},
		"null verification": {map[string]any{"primary_email_address_id": "idn_1", "email_addresses": []any{
			map[string]any{"id": "idn_1", "email_address": "a@example.com", "verification": nil},
		}}, "a@example.com", false},
	}
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for name, test := range tests {
			data := maps.Clone(test.data) // the two databases are tested at once
			data["id"], data["updated_at"] = "user_"+name, 1768471200000
			apply(t, db, decode(t, "msg_1", bodyOf(t, "user.created", 1768471200000, data)))
			var row struct {
				Email         *string
				EmailVerified bool
			}
			require.NoError(t, db.Raw("SELECT email, email_verified FROM users WHERE id = ?", "user_"+name).Scan(&row).Error)
			if test.email == nil {
				assert.Nil(t, row.Email, name)
			} else if assert.NotNil(t, row.Email, name) {
				assert.Equal(t, test.email, *row.Email, name)
			}
			assert.Equal(t, test.verified, row.EmailVerified, name)
		}
	})
}

func TestViewsUnfoldLiveUsers(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for _, name := range []string{"user.updated.unverified-secondary-email", "user.created.oauth-google", "user.created.phone-only-no-email"} {
			body, _ := fixture.Variant(name)
			apply(t, db, decode(t, "msg_"+name, body))
		}
		apply(t, db, decode(t, "msg_odd", bodyOf(t, "user.created", 1768471200000, map[string]any{"id": "user_odd", "email_addresses": "none", "phone_numbers": []any{1, nil}, "external_accounts": map[string]any{}})))
		read := func(query string) (lines []string) {
			rows, err := db.Raw(query).Rows()
			require.NoError(t, err)
			defer func() { _ = rows.Close() }()
			for rows.Next() {
				var text sql.NullString
				var verified, primary bool
				require.NoError(t, rows.Scan(&text, &verified, &primary))
				lines = append(lines, fmt.Sprint(text.String, " ", verified, " ", primary))
			}
			require.NoError(t, rows.Err())
			return lines
		}
		emails := "SELECT email_address, verified, is_primary FROM user_emails ORDER BY email_address"
		assert.Equal(t, []string{"ada.lovelace@example.com true false", "ada.new@example.net false false", "ada@example.org true true", "grace.hopper@example.com true true"}, read(emails))
		assert.Equal(t, []string{"+15555550100 true true", "+15555550123 true true"}, read("SELECT phone_number, verified, is_primary FROM user_phones ORDER BY phone_number"))
		assert.Equal(t, []string{"oauth_google true true"}, read("SELECT provider, verified, true FROM user_accounts"))
		deleted, _ := fixture.Event("user.deleted")
		apply(t, db, decode(t, "msg_deleted", deleted))
		assert.Equal(t, []string{"grace.hopper@example.com true true"}, read(emails), "a deleted user has no addresses")
	})
}

// TestNothingInAPayloadLosesTheEvent stores what PostgreSQL refuses as it comes.
func TestNothingInAPayloadLosesTheEvent(t *testing.T) {
	t.Parallel()
	big := `"` + strings.Repeat("metadata ", 120_000) + `"`
	tests := map[string]struct{ metadata, want string }{
		"NUL":              {`{"a\u0000b":"c\u0000"}`, "{\"a\uFFFDb\":\"c\uFFFD\"}"},
		"escaped NUL text": {`{"a":"\\u0000"}`, `{"a":"\\u0000"}`},
		"lone surrogates":  {`{"a":"\ud83d","b":"\ude00x","c":"\ud83d\u0041"}`, "{\"a\":\"\uFFFD\",\"b\":\"\uFFFDx\",\"c\":\"\uFFFDA\"}"},
		"surrogate pair":   {`{"a":"\ud83d\ude00"}`, `{"a":"😀"}`},
		"invalid UTF-8":    {"{\"a\":\"\xff\xc3x\xed\xa0\x80\"}", "{\"a\":\"\uFFFD\uFFFDx\uFFFD\uFFFD\uFFFD\"}"},
		"big integer":      {`{"a":123456789012345678901234567890}`, `{"a":123456789012345678901234567890}`},
		"absurd numbers":   {`{"a":1e131073,"b":-1E-99999,"c":` + strings.Repeat("9", 1001) + `,"d":1e99999999999999999999}`, `{"a":"1e131073","b":"-1E-99999","c":"` + strings.Repeat("9", 1001) + `","d":"1e99999999999999999999"}`},
		"1 MiB":            {`{"a":` + big + `}`, `{"a":` + big + `}`},
		"deep":             {strings.Repeat(`{"a":[`, 2000) + "1" + strings.Repeat("]}", 2000), ""},
	}
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for name, test := range tests {
			body := []byte(`{"type":"user.created","timestamp":1768471200000,"data":{"id":"user_` + name + `","first_name":"a\u0000\ud800b","updated_at":1768471200000,"unsafe_metadata":` + test.metadata + `}}`)
			apply(t, db, decode(t, "msg_"+name, body))
			var row struct{ FirstName, UnsafeMetadata, Raw string }
			require.NoError(t, db.Raw("SELECT first_name, unsafe_metadata, raw FROM users WHERE id = ?", "user_"+name).Scan(&row).Error)
			assert.Equal(t, "a\uFFFD\uFFFDb", row.FirstName, name)
			assert.True(t, json.Valid([]byte(row.Raw)), name)
			if test.want != "" {
				assert.Equal(t, show(t, mirror.JSON, test.want), show(t, mirror.JSON, row.UnsafeMetadata), name)
			}
		}
		var n int
		require.NoError(t, db.Raw("SELECT count(*) FROM user_emails").Scan(&n).Error, "the views read every row")
	})
}

// TestWrongTypesBecomeNull applies every resource with every field of another type.
func TestWrongTypesBecomeNull(t *testing.T) {
	t.Parallel()
	odd := []any{nil, "", "text", -1, 1e300, true, []any{}, []any{map[string]any{"id": 1}}, map[string]any{}, map[string]any{"id": []any{}, "user_id": 7, "amount": "x", "status": nil, "updated_at": "never"}}
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for _, table := range mirror.Tables() {
			for i, value := range odd {
				data := map[string]any{}
				for _, column := range table.Columns {
					for _, path := range column.Paths {
						key, _, _ := strings.Cut(path, ".")
						data[key] = value
					}
				}
				for _, key := range []string{"created_at", "updated_at", "deleted", "primary_email_address_id", "email_addresses", "phone_numbers", "organization", "user", "object"} {
					data[key] = value
				}
				data["id"] = fmt.Sprintf("id_%d", i)
				apply(t, db, decode(t, "msg_1", bodyOf(t, table.Resource+".updated", 1768471200000, data)))
			}
			var n int
			require.NoError(t, db.Raw("SELECT count(*) FROM "+table.Name+" WHERE id LIKE 'id_%'").Scan(&n).Error)
			assert.Equal(t, len(odd), n, table.Name)
		}
		dump(t, db)
	})
}

// TestConcurrentBatchesDoNotDeadlock lets appliers overlap on the same objects in opposite orders.
func TestConcurrentBatchesDoNotDeadlock(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		var stories [2][]event.Event
		for i := range 400 {
			at := int64(1_768_471_200_000 + i)
			user := map[string]any{"id": fmt.Sprintf("user_%d", i%20), "updated_at": at, "first_name": fmt.Sprint(i)}
			organization := map[string]any{"id": fmt.Sprintf("org_%d", i%20), "updated_at": at, "name": fmt.Sprint(i)}
			for n := range stories {
				id := fmt.Sprintf("msg_%d_%d", n, i)
				stories[n] = append(stories[n],
					decode(t, id+"a", bodyOf(t, "session.created", at, map[string]any{"id": fmt.Sprintf("sess_%d", i%20), "updated_at": at, "user": user})),
					decode(t, id+"b", bodyOf(t, "user.updated", at, user)),
					decode(t, id+"c", bodyOf(t, "organizationMembership.created", at, map[string]any{"id": fmt.Sprintf("orgmem_%d", i%20), "updated_at": at, "organization": organization})))
			}
		}
		want := func() string {
			tx := db.Begin()
			defer tx.Rollback()
			require.NoError(t, applyTo(t.Context(), tx, append(append([]event.Event{}, stories[0]...), stories[1]...)...))
			return dump(t, tx)
		}()
		var wg sync.WaitGroup
		errs := make([]error, 4)
		for n := range errs {
			wg.Go(func() {
				story := append([]event.Event{}, stories[n%2]...)
				rand.Shuffle(len(story), func(i, j int) { story[i], story[j] = story[j], story[i] })
				for len(story) > 0 && errs[n] == nil {
					size := min(30, len(story))
					errs[n] = tryApply(t.Context(), db, story[:size]...)
					story = story[size:]
				}
			})
		}
		wg.Wait()
		for _, err := range errs {
			require.NoError(t, err)
		}
		assert.Equal(t, want, dump(t, db))
	})
}

func TestAnEndedContextWritesNothing(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		ctx, cancel := context.WithCancel(t.Context())
		err := database.InTx(ctx, db, func(tx *gorm.DB) error {
			cancel()
			return applyTo(ctx, tx, decode(t, "msg_1", bodyOf(t, "user.created", 1, map[string]any{"id": "user_1"})))
		})
		require.Error(t, err)
		assert.True(t, database.IsInfrastructure(err), err)
		assert.Empty(t, dump(t, db))
	})
}

func TestAllGoesThroughEveryRowOnce(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		var batch []event.Event
		for i := range 2500 {
			batch = append(batch, decode(t, fmt.Sprintf("msg_%d", i), bodyOf(t, "user.created", 1768471200000, map[string]any{"id": fmt.Sprintf("user_%d", i), "updated_at": 1768471200000 + i})))
		}
		batch = append(batch, decode(t, "msg_d", bodyOf(t, "user.deleted", 1768471300000, map[string]any{"id": "user_7", "deleted": true})))
		apply(t, db, batch...)
		seen, deleted := map[string]int{}, 0
		for record, err := range mirror.All(t.Context(), db, "users") {
			require.NoError(t, err)
			seen[record.ID]++
			assert.True(t, json.Valid(record.Raw))
			if record.DeletedAt != nil {
				deleted++
				assert.Equal(t, "user_7", record.ID)
				assert.Equal(t, time.UnixMilli(1768471300000).UTC(), record.DeletedAt.UTC())
				assert.Equal(t, int64(1768471300000), record.Version)
			}
		}
		assert.Len(t, seen, 2500)
		assert.Equal(t, 1, deleted)
		_, err := mirror.Snapshot(t.Context(), db, "users; DROP TABLE users", "", 1)
		require.Error(t, err)
		for _, err := range mirror.All(t.Context(), db, "deliveries") {
			require.Error(t, err, "not of the mirror")
		}
	})
}
