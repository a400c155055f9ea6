package database_test

import (
	"context"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// What the dialects' migrations make is the same, by names: a probe of one knows the other.
func TestAMigratedDatabaseLacksNothing(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		require.NoError(t, database.Probe(t.Context(), db))
		require.NoError(t, database.Probe(t.Context(), db, "deliveries", "users"))
		if database.IsPostgres(db) { // and the other way round
			var columns int64
			require.NoError(t, db.Raw("SELECT count(*) FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name) WHERE table_schema = 'usher' AND table_type = 'BASE TABLE'").Scan(&columns).Error)
			assert.EqualValues(t, columns, database.SchemaColumns(t))
		}
	})
}

func TestProbeNamesWhatIsGone(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for _, c := range []struct{ breaks, heals, says string }{
			{"ALTER TABLE deliveries RENAME TO old_deliveries", "ALTER TABLE old_deliveries RENAME TO deliveries", "does not have table deliveries: it was dropped or renamed"},
			{"ALTER TABLE deliveries RENAME COLUMN fingerprint TO print", "ALTER TABLE deliveries RENAME COLUMN print TO fingerprint", "does not have column deliveries.fingerprint"},
		} {
			require.NoError(t, db.Exec(c.breaks).Error)
			err := database.Probe(t.Context(), db)
			require.ErrorIs(t, err, database.ErrMissing)
			require.ErrorContains(t, err, c.says)
			require.NoError(t, db.Exec(c.heals).Error)
			require.NoError(t, database.Probe(t.Context(), db))
		}
	})
}

func TestProbeNamesASchemaThatIsGoneRightsAndReadOnly(t *testing.T) {
	t.Parallel()
	address := dbtest.PostgresURL(t)
	admin := dbtest.Open(t, address)
	var name string
	require.NoError(t, admin.Raw("SELECT current_database()").Scan(&name).Error)
	role := "r_" + name
	do := func(statements ...string) {
		t.Helper()
		for _, statement := range statements {
			require.NoError(t, admin.Exec(strings.ReplaceAll(statement, "ROLE", role)).Error)
		}
	}
	do("CREATE USER ROLE PASSWORD 'x'")
	t.Cleanup(func() {
		db := dbtest.Open(t, address)
		_ = db.Exec("DROP OWNED BY " + role).Error
		_ = db.Exec("DROP USER " + role).Error
	})
	u, err := url.Parse(address)
	require.NoError(t, err)
	u.User = url.UserPassword(role, "x")
	db := dbtest.Open(t, u.String())
	says := func(want error, words ...string) {
		t.Helper()
		err := database.Probe(t.Context(), db, "users")
		require.ErrorIs(t, err, want)
		for _, word := range words {
			require.ErrorContains(t, err, word)
		}
	}
	says(database.ErrAuth, `may not use schema "usher"`, "GRANT USAGE")
	_, err = database.Migrate(t.Context(), db)
	for _, err := range []error{database.CheckMigrated(t.Context(), db), err} { // no migration is missing
		require.ErrorIs(t, err, database.ErrAuth)
		require.ErrorContains(t, err, "GRANT USAGE ON SCHEMA usher")
	}
	do("GRANT USAGE ON SCHEMA usher TO ROLE")
	says(database.ErrAuth, "may not SELECT", "GRANT SELECT ON usher.")
	do("GRANT SELECT ON ALL TABLES IN SCHEMA usher TO ROLE")
	require.NoError(t, database.Probe(t.Context(), db), "who only reads needs no more")
	says(database.ErrAuth, "may not INSERT", "usher.users")
	do("GRANT INSERT, UPDATE ON usher.users TO ROLE")
	require.NoError(t, database.Probe(t.Context(), db, "users"))
	do("ALTER SCHEMA usher RENAME TO usher_old")
	says(database.ErrMissing, `schema "usher" does not exist`, "usher setup")
	do("ALTER SCHEMA usher_old RENAME TO usher")
	require.NoError(t, database.Probe(t.Context(), db, "users"))

	do("ALTER USER ROLE SET default_transaction_read_only = on")
	db = dbtest.Open(t, u.String())
	require.NoError(t, database.Probe(t.Context(), db))
	require.ErrorContains(t, database.Probe(t.Context(), db, "users"), "default_transaction_read_only is on")
}

func TestProbeOfAServerThatIsDownSaysSo(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	db := dbtest.Open(t, server.Create(t, "usher"))
	_, err := database.Migrate(t.Context(), db)
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	w := database.NewWatch(db)
	require.Error(t, w.Check(), "nobody has looked yet")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.Run(ctx)
	}()
	require.Eventually(t, func() bool { return w.Check() == nil }, time.Minute, time.Millisecond)
	server.Stop()
	require.Eventually(t, func() bool { return w.Check() != nil }, time.Minute, 10*time.Millisecond)
	require.Eventually(t, func() bool {
		err := w.Check()
		return err != nil && strings.Contains(err.Error(), "no PostgreSQL answers at") && strings.Contains(err.Error(), "check that it runs")
	}, time.Minute, 10*time.Millisecond)
	server.Start(t)
	require.Eventually(t, func() bool { return w.Check() == nil }, time.Minute, 10*time.Millisecond)
	stop()
	<-ended
}

func TestAFileThatIsRemovedWhileItIsOpenIsNoticed(t *testing.T) {
	t.Parallel()
	address := dbtest.SQLiteURL(t)
	db := dbtest.Open(t, address)
	require.NoError(t, database.Probe(t.Context(), db))
	file := strings.TrimPrefix(address, "sqlite:")
	require.NoError(t, os.Rename(file, file+".old"))
	require.ErrorContains(t, database.Probe(t.Context(), db), "removed or replaced")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.ErrorIs(t, database.Probe(t.Context(), db), database.ErrMissing)
	require.NoError(t, os.Rename(file+".old", file))
	require.NoError(t, database.Probe(t.Context(), db))
}
