package e2e

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// TestCrashesOfADatabaseThatCommitsLater crashes a PostgreSQL three times (an immediate stop, as of pg_ctl) whose defaults let it confirm a
// commit up to ten seconds before it is written: what the worker acknowledged to the broker must be there all the same.
func TestCrashesOfADatabaseThatCommitsLater(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	url := server.Create(t, "usher")
	admin, err := database.Open(t.Context(), server.URL("postgres"), "public")
	require.NoError(t, err)
	for _, sql := range []string{
		"ALTER SYSTEM SET synchronous_commit = off", "ALTER SYSTEM SET wal_writer_delay = '10s'", "ALTER SYSTEM SET wal_writer_flush_after = '1GB'",
		"ALTER DATABASE usher SET synchronous_commit = off", "ALTER ROLE postgres SET synchronous_commit = off", "SELECT pg_reload_conf()",
	} {
		require.NoError(t, admin.Exec(sql).Error)
	}
	require.NoError(t, database.Close(admin))
	c := newCluster(t, url, 5*time.Second)
	c.ready()
	clerk := newClerk()
	load := startLoadWith(t, c.webhooks, clerk, loadOptions{pace: time.Second / 300})
	const events, crashes = 1500, 3
	for range crashes {
		load.wait(load.accepted.Load() + events/(crashes+1))
		server.Kill()
		server.Start(t)
	}
	load.wait(load.accepted.Load() + events/(crashes+1))
	answered := load.finish()
	c.ready()
	c.settled(len(answered), 60*time.Second)
	c.ledger(answered, clerk)
	t.Logf("%d crashes of the database; %d events answered 202, each applied once", crashes, len(answered))
}
