package e2e

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
)

// TestServicesBehindAPooler runs the services through a real PgBouncer in transaction mode, which has fewer sessions than they have
// connections and drops the parameters of their start, as people are told to configure it: each event is applied once, and nothing is
// outside of Usher's schema.
func TestServicesBehindAPooler(t *testing.T) {
	t.Parallel()
	direct := dbtest.EmptyPostgresURL(t)
	pooled := dbtest.PgBouncer(t, direct, "pool_mode = transaction", "default_pool_size = 4",
		"ignore_startup_parameters = search_path,plan_cache_mode,extra_float_digits,options,synchronous_commit,default_transaction_isolation,statement_timeout,idle_in_transaction_session_timeout")
	c := newCluster(t, pooled+"?pgbouncer=true&connection_limit=1&schema=public", 5*time.Second)
	c.ready()
	clerk := emulator.New(emulator.Config{Seed: rand.Uint64()})
	load := startLoadWith(t, c.webhooks, clerk, loadOptions{pace: time.Second / 200})
	load.wait(300)
	answered := load.finish()
	c.settled(len(answered), time.Minute)
	c.ledger(answered, clerk)

	db, err := database.Open(t.Context(), direct, "usher")
	require.NoError(t, err)
	t.Cleanup(func() { _ = database.Close(db) })
	var others []string
	require.NoError(t, db.Raw("SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname NOT IN ('usher', 'pg_catalog', 'information_schema')").Scan(&others).Error)
	require.Empty(t, others)
}
