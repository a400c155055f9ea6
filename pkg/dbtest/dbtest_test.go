package dbtest_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

func TestEachGivesFreshMigratedDatabases(t *testing.T) {
	t.Parallel()
	for range 2 {
		dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
			require.NoError(t, database.CheckMigrated(t.Context(), db))
			var n int64
			require.NoError(t, db.Raw("SELECT count(*) FROM users").Scan(&n).Error)
			assert.Zero(t, n)
			require.NoError(t, db.Exec("INSERT INTO users (id, source, version, seen_at, raw, event_id, origin, synced_at) VALUES ('user_1', 'clerk', 1, 1, '{}', 'msg_1', 'webhook', ?)", time.Now()).Error)
		})
	}
}

func TestServerKeepsItsPortAndDataOverStopAndKill(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	address := server.Create(t, "usher")
	db := dbtest.Open(t, address)
	_, err := database.Migrate(t.Context(), db)
	require.NoError(t, err)
	for i, end := range []func(){server.Stop, server.Kill} {
		require.NoError(t, db.Exec("INSERT INTO deliveries (handler, event_id, type, source, origin, status, received_at) VALUES ('mirror', ?, 't', 's', 'o', 'processed', now())", fmt.Sprint(i)).Error)
		end()
		require.Error(t, database.Ping(t.Context(), db))
		server.Start(t)
		require.NoError(t, database.Ping(t.Context(), db))
		var n int
		require.NoError(t, db.Raw("SELECT count(*) FROM deliveries").Scan(&n).Error)
		assert.Equal(t, i+1, n)
	}
}

// TestServerEndsWithAKilledProcess runs itself as the process that is killed.
func TestServerEndsWithAKilledProcess(t *testing.T) {
	if os.Getenv("DBTEST_CHILD") != "" {
		fmt.Printf("\nURL %s\n", dbtest.PostgresURL(t))
		<-time.After(time.Minute)
		return
	}
	if os.Getenv("TEST_DATABASE_URL") != "" {
		t.Skip("skipped: TEST_DATABASE_URL names a server that is not ours")
	}
	t.Parallel()
	dbtest.PostgresURL(t)                         // skips where there is none
	dir, err := os.MkdirTemp("", "dbtest-child-") // t.TempDir is below a folder that PostgreSQL's user may not enter
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o777))
	child := exec.Command(os.Args[0], "-test.run", "^TestServerEndsWithAKilledProcess$", "-test.v")
	child.Env = append(os.Environ(), "DBTEST_CHILD=1", "TMPDIR="+dir)
	out, err := child.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, child.Start())
	address := ""
	for lines := bufio.NewScanner(out); address == "" && lines.Scan(); {
		address, _ = strings.CutPrefix(lines.Text(), "URL ")
		if !strings.HasPrefix(address, "postgres:") {
			address = ""
		}
	}
	require.NotEmpty(t, address)
	db := dbtest.Open(t, address)
	require.NoError(t, child.Process.Kill())
	_ = child.Wait()
	assert.Eventually(t, func() bool {
		left, err := os.ReadDir(dir)
		return err == nil && len(left) == 0 && database.Ping(context.Background(), db) != nil
	}, 60*time.Second, 20*time.Millisecond)
}
