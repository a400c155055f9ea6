package mirror_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"
	"pgregory.net/rapid"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
)

// The corpus, and what the other tests write, are held against their raw wherever a test dumps the tables: see dump.

func TestNoRowOfAStoryDiffersFromItsRaw(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		var batch []event.Event
		for e := range emulator.New(emulator.Config{Seed: 11}).Story(80) {
			batch = append(batch, decode(t, e.ID, e.Body))
		}
		apply(t, db, batch...)
		var users int
		require.NoError(t, db.Raw("SELECT count(*) FROM users WHERE deleted_at IS NULL AND version > 0").Scan(&users).Error)
		require.Greater(t, users, 50)
		assert.Empty(t, misfits(t, db))
	})
}

// oddJSON draws the text of a JSON value in some spelling, with names that may come twice.
func oddJSON(t *rapid.T, depth int) string {
	space := rapid.SampledFrom([]string{"", "", " ", "\n\t"})
	kinds := 3
	if depth > 0 {
		kinds = 5
	}
	switch rapid.IntRange(0, kinds).Draw(t, "kind") {
	case 0:
		return rapid.SampledFrom([]string{"null", "true", "false"}).Draw(t, "word")
	case 1:
		return rapid.SampledFrom([]string{
			"0", "-0", "-0.0", "12", "12.0", "1.50", "1.2e1", "12e-1", "-5E+3", "0.1e1", "1e18", "9e18", "-1.23456789012345678e17", "123456789012345678.0", "9007199254740993",
			"12345678901234567890", "1e300", "1e-300", "1e400", "1.7684712e12", "1768471200000", "1768471200000.999999999", "1768471200", "-1768471200000", "253402300800000", "0e5", "100e-2",
		}).Draw(t, "number")
	case 2, 3:
		return `"` + rapid.SampledFrom([]string{
			"", "a", `\u0061`, `\/`, "/", `\u0000`, `\ud83d\ude00`, "😀", `\ud83d`, `\"\\\b\f\n\r\t`, "é", `\u00e9`, `\u0001`, `\u007f`, "\u2028", "12", "1.2e1", `\u0031\u0032`, "1e18", "idn_1", `idn\u005f1`,
			"verified", "ended", `ende\u0064`, "2026-01-15", " 12", "0x1p4", "1_000", "Infinity", "1768471200000",
		}).Draw(t, "string") + `"`
	case 4:
		var list []string
		for range rapid.IntRange(0, 3).Draw(t, "elements") {
			list = append(list, space.Draw(t, "space")+oddJSON(t, depth-1))
		}
		return "[" + strings.Join(list, ",") + "]"
	default:
		var members []string
		for range rapid.IntRange(0, 5).Draw(t, "members") {
			name := rapid.SampledFrom([]string{
				"id", `\u0069d`, "user_id", "status", `st\u0061tus`, "email_address", "phone_number", "verification", "verification", "amount", "currency", "code", "fee", "slug", "name", "a.b", "", "é", `\u00e9`, "*",
			}).Draw(t, "name")
			members = append(members, space.Draw(t, "space")+`"`+name+`"`+space.Draw(t, "space")+":"+oddJSON(t, depth-1))
		}
		return "{" + strings.Join(members, ",") + "}"
	}
}

// TestColumnsAreOfTheValueNotOfItsSpelling writes objects that Clerk would never send. PostgreSQL keeps each in its own spelling: numbers
// anew, keys in another order and once.
func TestColumnsAreOfTheValueNotOfItsSpelling(t *testing.T) {
	t.Parallel()
	for _, kind := range databases {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			db := kind.open(t)
			rapid.Check(t, func(rt *rapid.T) {
				tx := db.Begin()
				require.NoError(rt, tx.Error)
				defer tx.Rollback()
				var batch []event.Event
				for i, table := range mirror.Tables() {
					keys := []string{"created_at", "updated_at", `created\u005fat`, "primary_email_address_id", "primary_phone_number_id", "email_addresses", "email_addresses", "phone_numbers"}
					for _, column := range table.Columns {
						for _, path := range column.Paths {
							key, _, _ := strings.Cut(path, ".")
							keys = append(keys, key)
						}
					}
					members := []string{fmt.Sprintf(`"id":"id_%d"`, i)}
					for range rapid.IntRange(0, 20).Draw(rt, "members") {
						key := rapid.SampledFrom(keys).Draw(rt, "key")
						value := oddJSON(rt, 2)
						if key == "email_addresses" && rapid.Bool().Draw(rt, "list") {
							value = `[{"id":"idn_1","email_address":` + oddJSON(rt, 0) + `,"verification":` + oddJSON(rt, 1) + `,"id":` + oddJSON(rt, 0) + `},` + value + `]`
						}
						members = append(members, `"`+key+`":`+value)
					}
					body := `{"type":"` + table.Resource + `.updated","timestamp":1768471200000,"data":{` + strings.Join(rapid.Permutation(members).Draw(rt, "order"), ",") + `}}`
					e, err := event.Decode([]byte(body))
					require.NoError(rt, err, body)
					e.ID, e.Source = "msg_1", "clerk"
					batch = append(batch, e)
				}
				require.NoError(rt, applyTo(t.Context(), tx, batch...))
				require.Empty(rt, misfits(t, tx))
			})
		})
	}
}

// TestOfANameThatIsGivenTwiceTheLastCounts holds where it matters that PostgreSQL keeps the last one only.
func TestOfANameThatIsGivenTwiceTheLastCounts(t *testing.T) {
	t.Parallel()
	const address = `"primary_email_address_id":"idn_1","email_addresses":[{"id":"idn_1",`
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for i, test := range []struct{ typ, data, query string }{
			{"user.updated", `"first_name":"a","first_name":"b"`, "first_name = 'b'"},
			{"user.updated", `"first_name":"a","first_n\u0061me":null`, "first_name IS NULL"},
			{"user.updated", `"created_at":1768471200000,"created_at":"never"`, "clerk_created_at IS NULL"},
			{"user.updated", address + `"email_address":"a","email_address":"b"}]`, "email = 'b'"},
			{"user.updated", address + `"id":"idn_2","email_address":"a"}]`, "email IS NULL"},
			{"user.updated", address + `"email_address":"a","verification":{"status":"verified","status":"x"}}]`, "NOT email_verified"},
			{"subscription.updated", `"payer":{"user_id":"a","user_id":"b"}`, "payer_user_id = 'b'"},
			{"subscription.updated", `"payer":{"user_id":"a"},"payer":{}`, "payer_user_id IS NULL"},
			{"subscriptionItem.updated", `"plan":{"fee":{"currency":"a","currency":"b"}}`, "currency = 'b'"},
			{"subscriptionItem.updated", `"plan_id":"a","plan":{"id":"b"},"plan_id":null`, "plan_id = 'b'"},
			{"session.updated", `"status":"ended","status":"active"`, "NOT ended"},
		} {
			id := fmt.Sprintf("id_%d", i)
			apply(t, db, decode(t, "msg_1", []byte(`{"type":"`+test.typ+`","timestamp":1768471200000,"data":{"id":"`+id+`",`+test.data+`}}`)))
			table := map[string]string{"user": "users", "session": "sessions", "subscription": "subscriptions", "subscriptionItem": "subscription_items"}[event.Type(test.typ).Resource()]
			assert.Equal(t, "true", one(t, db, "SELECT "+test.query+" FROM "+table+" WHERE id = '"+id+"'"), test.data)
		}
		assert.Empty(t, misfits(t, db))
	})
}

// TestAColumnThatWasChangedByHandIsNamed changes every column of every table, to a value and to NULL.
func TestAColumnThatWasChangedByHandIsNamed(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for _, table := range mirror.Tables() {
			full := map[string]any{"id": "id_full", "created_at": 1_768_471_200_001, "updated_at": 1_768_471_200_002}
			for _, column := range table.Columns {
				if len(column.Paths) == 0 {
					continue
				}
				key, _, below := strings.Cut(column.Paths[0], ".")
				if below { // what such a path leads to is shown by those that have none
					continue
				}
				full[key] = map[mirror.Kind]any{mirror.Text: "text", mirror.Bool: true, mirror.Int: 12, mirror.Time: 1_768_471_200_003, mirror.JSON: map[string]any{"a": 1.5, "b": nil}}[column.Kind]
			}
			apply(t, db, decode(t, "msg_1", bodyOf(t, table.Resource+".updated", 1_768_471_200_000, full)),
				decode(t, "msg_2", bodyOf(t, table.Resource+".updated", 1_768_471_200_000, map[string]any{"id": "id_bare"})))
			require.Empty(t, misfits(t, db))
			columns := append(table.Columns[:len(table.Columns):len(table.Columns)],
				mirror.Column{Name: "clerk_created_at", Kind: mirror.Time}, mirror.Column{Name: "clerk_updated_at", Kind: mirror.Time})
			for _, column := range columns {
				values := map[mirror.Kind][]any{
					mirror.Text: {"other", "", nil}, mirror.Bool: {gorm.Expr("NOT " + column.Name)}, mirror.Int: {-1, nil}, mirror.JSON: {`{"admin":true}`, `{"a":1.5}`, `[]`, `null`, nil},
					mirror.Time: {"2001-02-03 04:05:06.789+00:00", nil},
				}[column.Kind]
				if !database.IsPostgres(db) { // it takes whatever it is given
					values = append(values, map[mirror.Kind][]any{
						mirror.Text: {[]byte{0xff}}, mirror.Bool: {"yes", 2, 0.5}, mirror.Int: {"many", 1.5, []byte{1}}, mirror.JSON: {`{"a":`, `{"a":1.5,"b":null} 1`, []byte("x")},
						mirror.Time: {"2026-01-15T10:00:00.003Z", "2026-01-15 10:00:00+00:00", "2026-01-15 12:00:00.003+02:00", "soon", 1_768_471_200_003, ""},
					}[column.Kind]...)
				}
				for _, id := range []string{"id_full", "id_bare"} {
					for _, value := range values {
						tx := db.Begin()
						update := "UPDATE " + table.Name + " SET " + column.Name + " = ? WHERE id = ?"
						if value == nil {
							update += " AND " + column.Name + " IS NOT NULL"
						}
						result := tx.Exec(update, value, id)
						require.NoError(t, result.Error, update)
						if found := misfitsOf(t, tx, table.Name); result.RowsAffected > 0 {
							if assert.Len(t, found, 1, "%s %v %s", update, value, id) {
								assert.True(t, strings.HasPrefix(found[0], table.Name+" "+id+" "+column.Name+" "), found)
							}
						}
						tx.Rollback()
					}
				}
			}
		}
		for _, same := range []string{`{"b": null, "a": 1.50}`, `{"a":15e-1,"b":null}`, `{"a":1.5,"\u0062":null}`} {
			require.NoError(t, db.Exec("UPDATE users SET public_metadata = ? WHERE id = 'id_full'", same).Error)
			assert.Empty(t, misfits(t, db), same)
		}
		_, err := mirror.NewCheck(db, "deliveries")
		require.Error(t, err, "not of the mirror")
	})
}
