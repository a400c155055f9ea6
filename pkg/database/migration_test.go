package database_test

import (
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/pressly/goose/v3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// upTo migrates a database to a version of the past.
func upTo(t testing.TB, db *gorm.DB, version int64) {
	t.Helper()
	pool, err := db.DB()
	require.NoError(t, err)
	dialect, files := goose.DialectSQLite3, database.Schema("sqlite")
	if database.IsPostgres(db) {
		dialect, files = goose.DialectPostgres, database.Schema("postgres")
	}
	if database.IsPostgres(db) {
		require.NoError(t, db.Exec("CREATE SCHEMA IF NOT EXISTS usher").Error)
	}
	provider, err := goose.NewProvider(dialect, pool, files, goose.WithDisableGlobalRegistry(true))
	require.NoError(t, err)
	_, err = provider.UpTo(t.Context(), version)
	require.NoError(t, err)
}

// emptyDatabases are databases without a schema, open.
func emptyDatabases(t *testing.T, run func(t *testing.T, db *gorm.DB)) {
	t.Helper()
	eachEmpty(t, func(t *testing.T, url string) { run(t, dbtest.Open(t, url)) })
}

// TestDeliveriesOfBeforeSourcesWereApartAreKept and their key then tells sources apart.
func TestDeliveriesOfBeforeSourcesWereApartAreKept(t *testing.T) {
	t.Parallel()
	emptyDatabases(t, func(t *testing.T, db *gorm.DB) {
		upTo(t, db, 10)
		at := time.Date(2026, 1, 2, 3, 4, 5, 6_000_000, time.UTC)
		row := map[string]any{
			"handler": "mirror", "event_id": "msg_1", "type": "user.created", "source": "clerk", "origin": "webhook", "object_id": "user_1", "user_id": "user_1",
			"status": "dead", "attempts": 3, "received_at": at, "processed_at": at.Add(time.Second), "duration_ms": 1.5, "error": "no", "reason": "rejected",
			"stream_seq": 7, "first_failed_at": at, "next_attempt_at": at, "fingerprint": "f", "letter_seq": 9, "replay_id": "r",
		}
		require.NoError(t, db.Table("deliveries").Create(maps.Clone(row)).Error)
		before := one(t, db)

		upTo(t, db, 11)
		assert.Equal(t, before, one(t, db))

		row["source"] = "staging"
		require.NoError(t, db.Table("deliveries").Create(maps.Clone(row)).Error, "the same id of another source is another event")
		require.Error(t, db.Table("deliveries").Create(maps.Clone(row)).Error)
	})
}

func one(t *testing.T, db *gorm.DB) map[string]any {
	t.Helper()
	var rows []map[string]any
	require.NoError(t, db.Table("deliveries").Find(&rows).Error)
	require.Len(t, rows, 1)
	return rows[0]
}

// TestTheKeyOfDeliveriesIsMadeAfterAnInterruption: PostgreSQL commits each statement of the migration.
func TestTheKeyOfDeliveriesIsMadeAfterAnInterruption(t *testing.T) {
	t.Parallel()
	for name, done := range map[string][]string{
		"after the index": {"CREATE UNIQUE INDEX deliveries_by_source ON deliveries (handler, source, event_id)"},
		"after the key": {
			"CREATE UNIQUE INDEX deliveries_by_source ON deliveries (handler, source, event_id)",
			"ALTER TABLE deliveries DROP CONSTRAINT deliveries_pkey, ADD CONSTRAINT deliveries_pkey PRIMARY KEY USING INDEX deliveries_by_source",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := dbtest.Open(t, dbtest.EmptyPostgresURL(t))
			upTo(t, db, 10)
			for _, statement := range done {
				require.NoError(t, db.Exec(statement).Error)
			}
			upTo(t, db, 11)
			var key []string
			require.NoError(t, db.Raw(`SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey)
				WHERE i.indrelid = 'deliveries'::regclass AND i.indisprimary ORDER BY array_position(i.indkey::int2[], a.attnum)`).Scan(&key).Error)
			assert.Equal(t, []string{"handler", "source", "event_id"}, key)
			var indexes int64
			require.NoError(t, db.Raw("SELECT count(*) FROM pg_index WHERE indrelid = 'deliveries'::regclass").Scan(&indexes).Error)
			assert.EqualValues(t, 5, indexes, "none is left over")
		})
	}
}

// TestLinksToThePortalAreRemoved from alerts that were made when they still held one.
func TestLinksToThePortalAreRemoved(t *testing.T) {
	t.Parallel()
	emptyDatabases(t, func(t *testing.T, db *gorm.DB) {
		upTo(t, db, 13)
		for id, body := range map[string]string{"a": "What to do:\n1. Open https://app.svix.com/login#key=hush\n2. Look\n3. x", "b": "1. Open Clerk's dashboard, Webhooks\n2. Look"} {
			require.NoError(t, db.Table("notifications").Create(map[string]any{
				"id": id, "effect_key": id, "channel": "email", "kind": "silence", "status": "sent", "subject": "s", "body": body, "created_at": time.Now().UTC(),
			}).Error)
		}
		_, err := database.Migrate(t.Context(), db)
		require.NoError(t, err)
		var bodies []string
		require.NoError(t, db.Raw("SELECT body FROM notifications ORDER BY id").Scan(&bodies).Error)
		assert.Equal(t, []string{"What to do:\n1. Run `usher portal` and open the link that it prints\n2. Look\n3. x", "1. Open Clerk's dashboard, Webhooks\n2. Look"}, bodies)
	})
}

// TestWhoWasDeletedBeforeIsForgotten in what other objects say of the user.
func TestWhoWasDeletedBeforeIsForgotten(t *testing.T) {
	t.Parallel()
	emptyDatabases(t, func(t *testing.T, db *gorm.DB) {
		upTo(t, db, 14)
		at := time.Date(2026, 1, 2, 3, 4, 5, 6_000_000, time.UTC)
		add := func(table, id, raw string, columns map[string]any) {
			t.Helper()
			row := map[string]any{"id": id, "source": "clerk", "version": 1, "seen_at": 1, "raw": raw, "event_id": "msg_1", "origin": "webhook", "synced_at": at}
			maps.Copy(row, columns)
			require.NoError(t, db.Table(table).Create(row).Error)
		}
		for user, deleted := range map[string]any{"gone": at, "lives": nil} {
			add("users", user, `{"id":"`+user+`","object":"user","deleted":true,"external_id":"crm"}`, map[string]any{"deleted_at": deleted, "children_deleted_at": deleted, "external_id": "crm"})
			add("sessions", "sess_"+user, `{"id":"s","user":{"id":"`+user+`","first_name":"Ada"},"latest_activity":{"ip_address":"192.0.2.1","city":"x","country":"GB"}}`,
				map[string]any{"user_id": user, "ip_address": "192.0.2.1", "city": "x", "country": "GB"})
			add("organization_memberships", "mem_"+user, `{"public_user_data":{"user_id":"`+user+`","first_name":"Ada"}}`, map[string]any{"user_id": user})
			add("organization_invitations", "inv_"+user, `{"email_address":"a@b.c","url":"u"}`, map[string]any{"user_id": user, "email": "a@b.c"})
			add("organization_invitations", "by_"+user, `{"email_address":"c@b.c","public_inviter_data":{"first_name":"Ada"}}`, map[string]any{"inviter_id": user, "email": "c@b.c"})
			for _, table := range []string{"subscriptions", "subscription_items", "payment_attempts"} {
				add(table, "pay_"+user, `{"payer":{"id":"p","user_id":"`+user+`","email":"a@b.c","first_name":"Ada"}}`, map[string]any{"payer_user_id": user})
			}
		}
		upTo(t, db, 15)
		for query, want := range map[string]string{
			"SELECT raw FROM users":                    `{"id":"gone","object":"user","deleted":true}`,
			"SELECT raw FROM sessions":                 `{"id":"s","user_id":"gone","latest_activity":{"country":"GB"}}`,
			"SELECT raw FROM organization_memberships": `{"public_user_data":{"user_id":"gone"}}`,
			"SELECT raw FROM organization_invitations WHERE id LIKE 'inv%' AND user_id":   `{}`,
			"SELECT raw FROM organization_invitations WHERE id LIKE 'by%' AND inviter_id": `{"email_address":"c@b.c","public_inviter_data":{"user_id":"gone"}}`,
			"SELECT raw FROM subscriptions":                                               `{"payer":{"id":"p","user_id":"gone"}}`,
			"SELECT raw FROM subscription_items":                                          `{"payer":{"id":"p","user_id":"gone"}}`,
			"SELECT raw FROM payment_attempts":                                            `{"payer":{"id":"p","user_id":"gone"}}`,
		} {
			if !strings.Contains(query, "WHERE") {
				query += " WHERE id"
			}
			for _, user := range []string{"gone", "lives"} {
				var raw string
				require.NoError(t, db.Raw(query+" LIKE '%"+user+"'").Scan(&raw).Error, query)
				if user == "gone" {
					assert.JSONEq(t, want, raw, query)
				} else {
					assert.Regexp(t, "Ada|crm|a@b.c", raw, query)
				}
			}
		}
		var left int64
		require.NoError(t, db.Raw(`SELECT (SELECT count(*) FROM sessions WHERE ip_address IS NOT NULL) + (SELECT count(*) FROM organization_invitations WHERE email = 'a@b.c')
			+ (SELECT count(*) FROM users WHERE external_id IS NOT NULL) + (SELECT count(*) FROM users WHERE last_deleted_at IS NULL)`).Scan(&left).Error)
		assert.EqualValues(t, 4, left, "of the one who lives")
	})
}
