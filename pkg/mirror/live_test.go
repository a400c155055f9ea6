package mirror_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/mirror"
)

// TestShapesAreWhatTheDatabaseHas fails for a column that a migration adds and nobody describes, and for one that a live view leaves out.
func TestShapesAreWhatTheDatabaseHas(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for _, shape := range append(mirror.TableShapes(), mirror.ViewShapes()...) {
			var want []string
			for _, c := range shape.Columns {
				want = append(want, c.Name)
			}
			var have []string
			query := "SELECT name FROM pragma_table_info(?) ORDER BY cid"
			if database.IsPostgres(db) {
				query = "SELECT column_name FROM information_schema.columns WHERE table_schema = 'usher' AND table_name = ? ORDER BY ordinal_position"
			}
			require.NoError(t, db.Raw(query, shape.Name).Scan(&have).Error)
			assert.Equal(t, want, have, shape.Name)
			if !database.IsPostgres(db) {
				continue
			}
			var columns []struct{ ColumnName, DataType, IsNullable string }
			require.NoError(t, db.Raw("SELECT column_name, data_type, is_nullable FROM information_schema.columns WHERE table_schema = 'usher' AND table_name = ? ORDER BY ordinal_position", shape.Name).Scan(&columns).Error)
			for i, c := range columns {
				assert.Equal(t, shape.Columns[i].Type, strings.ReplaceAll(c.DataType, "timestamp with time zone", "timestamptz"), shape.Name+"."+c.ColumnName)
				if shape.Of == "" {
					assert.Equal(t, shape.Columns[i].NotNull, c.IsNullable == "NO", shape.Name+"."+c.ColumnName)
				} else {
					assert.NotEqual(t, "bigint", c.DataType, "JSON.stringify refuses it: %s.%s", shape.Name, c.ColumnName)
					assert.NotContains(t, []string{"raw", "version", "seen_at", "private_metadata", "deleted_at"}, c.ColumnName, shape.Name)
				}
			}
		}
		var tables, views []string
		query := "SELECT name FROM sqlite_master WHERE type = 'view' ORDER BY name"
		withTombstones := "SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c WHERE m.type = 'table' AND c.name = 'deleted_at' ORDER BY m.name"
		if database.IsPostgres(db) {
			query = "SELECT table_name FROM information_schema.views WHERE table_schema = 'usher' ORDER BY table_name"
			withTombstones = "SELECT table_name FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name) WHERE table_schema = 'usher' AND table_type = 'BASE TABLE' AND column_name = 'deleted_at' ORDER BY table_name"
		}
		require.NoError(t, db.Raw(withTombstones).Scan(&tables).Error)
		require.NoError(t, db.Raw(query).Scan(&views).Error)
		require.NotEmpty(t, tables)
		for _, table := range tables {
			assert.Contains(t, views, "live_"+table)
		}
		var described []string
		for _, shape := range mirror.ViewShapes() {
			described = append(described, shape.Name)
		}
		assert.ElementsMatch(t, described, views)
	})
}

func TestLiveViewsShowTheLivingAndTakeNoWrites(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		user := func(id string) map[string]any {
			return map[string]any{
				"id": id, "object": "user", "first_name": "Ada", "created_at": 1768471200000, "updated_at": 1768471200000, "private_metadata": map[string]any{"plan": "secret"},
				"primary_email_address_id": "idn_1", "email_addresses": []any{map[string]any{"id": "idn_1", "email_address": id + "@example.com"}},
			}
		}
		membership := map[string]any{
			"id": "orgmem_1", "object": "organization_membership", "updated_at": 1768471200000, "role": "org:admin",
			"organization":     map[string]any{"id": "org_1", "name": "Acme", "members_count": 9007199254740991, "updated_at": 1768471200000},
			"public_user_data": map[string]any{"user_id": "user_stub", "first_name": "Grace"},
		}
		apply(t, db,
			decode(t, "msg_1", bodyOf(t, "user.created", 1768471200000, user("user_1"))), decode(t, "msg_2", bodyOf(t, "user.created", 1768471200000, user("user_2"))),
			decode(t, "msg_3", bodyOf(t, "user.deleted", 1768471300000, map[string]any{"id": "user_2", "object": "user", "deleted": true})),
			decode(t, "msg_4", bodyOf(t, "organizationMembership.created", 1768471200000, membership)))
		var ids []string
		require.NoError(t, db.Raw("SELECT id FROM live_users ORDER BY id").Scan(&ids).Error)
		var all []string
		require.NoError(t, db.Raw("SELECT id FROM users WHERE id <> 'user_2' ORDER BY id").Scan(&all).Error)
		assert.Equal(t, all, ids, "a stub is there, a tombstone is not")
		var org struct {
			Name         string
			MembersCount float64
		}
		require.NoError(t, db.Raw("SELECT o.name, o.members_count FROM live_organization_memberships m JOIN live_organizations o ON o.id = m.organization_id").Scan(&org).Error)
		assert.Equal(t, "Acme", org.Name)
		assert.InDelta(t, 9007199254740991, org.MembersCount, 0)

		for _, shape := range mirror.ViewShapes() {
			column := shape.Columns[0].Name
			for _, statement := range []string{
				"INSERT INTO " + shape.Name + " (" + column + ") VALUES ('x')", "UPDATE " + shape.Name + " SET " + column + " = 'x'", "DELETE FROM " + shape.Name,
			} {
				require.ErrorContains(t, db.Exec(statement).Error, "view", statement)
			}
		}
	})
}

// TestLiveViewsCostNothing: the planner sees the table with its indexes, and no join.
func TestLiveViewsCostNothing(t *testing.T) {
	t.Parallel()
	db := dbtest.Postgres(t)
	require.NoError(t, db.Exec(`INSERT INTO users (id, source, email, external_id, clerk_created_at, version, seen_at, raw, event_id, origin, synced_at)
		SELECT 'user_' || n, 'clerk', n || '@example.com', n, now(), 1, 1, '{}', 'msg_' || n, 'webhook', now() FROM generate_series(1, 5000) AS n`).Error)
	require.NoError(t, db.Exec("ANALYZE users").Error)
	plan := func(query string) string {
		var lines []string
		require.NoError(t, db.Raw("EXPLAIN "+query).Scan(&lines).Error)
		return strings.Join(lines, "\n")
	}
	for where, index := range map[string]string{
		"WHERE id = 'user_1'":                  "users_pkey",
		"WHERE id IN ('user_1', 'user_2')":     "users_pkey",
		"WHERE email = '7@example.com'":        "users_email_exact",
		"WHERE lower(email) = '7@example.com'": "users_email",
		"WHERE external_id = '7'":              "users_external_id",
		"ORDER BY id LIMIT 10":                 "users_pkey",
	} {
		assert.Regexp(t, "(using|on) "+index+" ", plan("SELECT * FROM live_users "+where), where)
	}
	for _, shape := range mirror.ViewShapes() {
		if !strings.HasPrefix(shape.Name, "live_") {
			continue
		}
		for _, c := range shape.Columns {
			if c.Type != "text" {
				continue
			}
			where := " AS t WHERE " + c.Name + " = 'x'"
			assert.Equal(t, plan("SELECT id, source FROM "+shape.Of+where+" AND deleted_at IS NULL"), plan("SELECT id, source FROM "+shape.Name+where), "the same plan at the same cost")
		}
	}
}
