package e2e

import (
	"encoding/json"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/fixture"
)

// TestTriggeredEventsTellOneStory: what is triggered beside dev joins, is of different people, and is what the offline Clerk has.
func TestTriggeredEventsTellOneStory(t *testing.T) {
	t.Parallel()
	dataDir := filepath.Join(t.TempDir(), "data")
	env := append([]string{"USHER_DATA_DIR=" + dataDir}, randomPorts...)
	p := start(t, env, "dev")
	p.ready(dataDir)
	type item struct {
		ID, Type  string
		Status    int
		Duplicate bool
	}
	sent := 0
	trigger := func(args ...string) (items []item, stderr string) {
		t.Helper()
		code, out, stderr := run(t, env, append([]string{"trigger", "-o", "json"}, args...)...)
		require.Equal(t, 0, code, stderr)
		var list struct{ Items []item }
		require.NoError(t, json.Unmarshal([]byte(out), &list))
		sent += len(list.Items)
		return list.Items, stderr
	}
	db, err := database.Open(t.Context(), "sqlite:"+filepath.Join(dataDir, "dev", "usher.db"), "")
	require.NoError(t, err)
	defer func() { _ = database.Close(db) }()
	count := func(query string, args ...any) (n int) {
		t.Helper()
		require.NoError(t, db.Raw(query, args...).Scan(&n).Error)
		return n
	}
	settled := func(ids ...string) {
		t.Helper()
		require.Eventually(t, func() bool {
			return count("SELECT count(*) FROM deliveries WHERE event_id IN ? AND status = 'processed'", ids) == len(ids)
		}, time.Minute, 20*time.Millisecond)
	}
	idsOf := func(items []item) (ids []string) {
		for _, i := range items {
			assert.Equal(t, 202, i.Status)
			ids = append(ids, i.ID)
		}
		return ids
	}

	sessions, stderr := trigger("session.created")
	require.Len(t, sessions, 1, "what was asked for")
	assert.Contains(t, stderr, "note: user.created user_", "and it says what it needs beside that")
	settled(idsOf(sessions)...)
	require.Eventually(t, func() bool {
		return count("SELECT count(*) FROM sessions s JOIN users u ON u.id = s.user_id WHERE u.version > 0 AND u.email <> ''") == 1
	}, time.Minute, 20*time.Millisecond)

	users, _ := trigger("user.created", "--count", "10")
	settled(idsOf(users)...)
	assert.Equal(t, 11, count("SELECT count(DISTINCT email) FROM users"))
	assert.Equal(t, 11, count("SELECT count(*) FROM (SELECT DISTINCT first_name, last_name FROM users)"))

	organizations, stderr := trigger("organization.created", "--count", "2")
	assert.NotContains(t, stderr, "note:", "there are users")
	members, _ := trigger("organizationMembership.created", "--count", "3")
	more, _ := trigger("session.created", "--count", "3")
	settled(idsOf(append(append(organizations, members...), more...))...)
	assert.Equal(t, 3, count(`SELECT count(DISTINCT u.id) FROM organization_memberships m JOIN users u ON u.id = m.user_id JOIN organizations o ON o.id = m.organization_id
		WHERE u.version > 0 AND o.version > 0`))
	assert.Equal(t, 4, count("SELECT count(*) FROM sessions s JOIN users u ON u.id = s.user_id WHERE u.version > 0"))

	// An update is of a user who is there, and takes nothing back.
	ada, _ := trigger("user.created", "--set", "data.first_name=Augusta", "--set", "data.unsafe_metadata.plan=pro")
	settled(idsOf(ada)...)
	king, _ := trigger("user.updated", "--set", "data.last_name=King")
	settled(idsOf(king)...)
	assert.Equal(t, 1, count("SELECT count(*) FROM users WHERE first_name = 'Augusta' AND last_name = 'King'"))
	assert.Equal(t, 12, count("SELECT count(*) FROM users"))
	gone, _ := trigger("user.deleted")
	settled(idsOf(gone)...)
	assert.Zero(t, count("SELECT count(*) FROM users WHERE first_name = 'Augusta'"))
	assert.Equal(t, 11, count("SELECT count(*) FROM users WHERE deleted_at IS NULL"))

	verify := func() {
		t.Helper()
		code, out, stderr := run(t, env, "verify")
		require.Equal(t, 0, code, out+stderr)
	}
	verify()
	for _, typ := range append(fixture.Types(), fixture.Variants()...) {
		items, _ := trigger(typ)
		require.Len(t, items, 1, typ)
	}
	verify()
	assert.Equal(t, 0, p.stop(), p.stderr.String())
}

// TestTheOfflineClerkKnowsADatabaseThatWasKept: a dev that is started again on it finds no drift, and what is triggered joins what is there.
func TestTheOfflineClerkKnowsADatabaseThatWasKept(t *testing.T) {
	t.Parallel()
	dataDir := filepath.Join(t.TempDir(), "data")
	env := append([]string{"USHER_DATA_DIR=" + dataDir}, randomPorts...)
	url := dbtest.EmptyPostgresURL(t)
	for round := range 2 {
		p := start(t, env, "dev", "--database-url", url)
		p.ready(dataDir)
		if round == 0 {
			code, _, stderr := run(t, env, "trigger", "user.created", "--count", "3")
			require.Equal(t, 0, code, stderr)
		}
		require.Eventually(t, func() bool {
			code, _, _ := run(t, env, "verify")
			return code == 0
		}, time.Minute, 100*time.Millisecond)
		code, _, stderr := run(t, env, "trigger", "session.created")
		require.Equal(t, 0, code, stderr)
		assert.NotContains(t, stderr, "note:", "there are users")
		assert.Equal(t, 0, p.stop(), p.stderr.String())
	}
}
