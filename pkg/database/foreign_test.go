package database_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

func TestForeignKeysOfOthersAreFoundAndNamed(t *testing.T) {
	t.Parallel()
	db := dbtest.Postgres(t)
	found, err := database.ForeignKeys(t.Context(), db)
	require.NoError(t, err)
	assert.Empty(t, found, "Usher's own is no trouble")
	ctx, stop := context.WithCancel(t.Context())
	watch, ended := database.NewWatch(db), make(chan struct{})
	require.NoError(t, watch.Foreign())
	go func() { defer close(ended); watch.Run(ctx) }()
	defer func() { stop(); <-ended }()

	for _, statement := range []string{
		"ALTER TABLE sessions ADD CONSTRAINT \"sessions_userId_fkey\" FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE",
		"CREATE TABLE public.\"Plan\" (id text PRIMARY KEY)",
		"ALTER TABLE subscription_items ADD CONSTRAINT plan FOREIGN KEY (plan_id) REFERENCES public.\"Plan\" (id) NOT VALID",
		"CREATE TABLE public.\"Post\" (id text PRIMARY KEY, plan text REFERENCES public.\"Plan\" (id), author text CONSTRAINT \"Post_author_fkey\" REFERENCES users (id))",
	} {
		require.NoError(t, db.Exec(statement).Error)
	}
	found, err = database.ForeignKeys(t.Context(), db)
	require.NoError(t, err)
	require.Len(t, found, 3, "one between the application's own tables is left out")
	var names []string
	for _, k := range found {
		names = append(names, k.Table+" "+k.Constraint+" "+k.References)
	}
	assert.Equal(t, []string{`usher.sessions sessions_userId_fkey usher.users`, `usher.subscription_items plan public."Plan"`, `public."Post" Post_author_fkey usher.users`}, names)
	assert.Equal(t, []bool{true, true, false}, []bool{found[0].Fatal, found[1].Fatal, found[2].Fatal})

	warnings, err := database.Warnings(t.Context(), db)
	require.NoError(t, err)
	text := strings.Join(warnings, "\n")
	for _, k := range found {
		assert.Contains(t, text, k.String())
	}
	require.Eventually(t, func() bool { return watch.Foreign() != nil }, time.Minute, 10*time.Millisecond, "one that is made later is noticed")
	require.ErrorContains(t, watch.Foreign(), `foreign key sessions_userId_fkey of table usher.sessions references usher.users: events come in any order`)
	assert.NotContains(t, watch.Foreign().Error(), "Post_author_fkey", "it stops no event")
	require.NoError(t, watch.Check(), "most events are applied")

	for _, k := range found { // what it says to do is enough
		_, fix, _ := strings.Cut(k.Fix, "ALTER")
		require.NoError(t, db.Exec("ALTER"+fix).Error)
	}
	require.Eventually(t, func() bool { return watch.Foreign() == nil }, time.Minute, 10*time.Millisecond)
	found, err = database.ForeignKeys(t.Context(), db)
	require.NoError(t, err)
	assert.Empty(t, found)
}

// TestForeignKeysThatCannotBeLookedAtKeepNothingFromWorking is a server that shows its catalogues to administrators only.
func TestForeignKeysThatCannotBeLookedAtKeepNothingFromWorking(t *testing.T) {
	t.Parallel()
	admin, _, db := withRole(t)
	require.NoError(t, admin.Exec("REVOKE SELECT ON pg_constraint FROM PUBLIC").Error)
	found, err := database.ForeignKeys(t.Context(), db)
	require.NoError(t, err)
	assert.Empty(t, found)
	_, err = database.Warnings(t.Context(), db)
	require.NoError(t, err)
}

func TestTableNamesAreThoseOfAMigratedDatabase(t *testing.T) {
	t.Parallel()
	names, err := database.TableNames()
	require.NoError(t, err)
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		query := "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
		if database.IsPostgres(db) {
			query = "SELECT tablename FROM pg_tables WHERE schemaname = 'usher'"
		}
		var have []string
		require.NoError(t, db.Raw(query).Scan(&have).Error)
		assert.ElementsMatch(t, names, have)
	})
}
