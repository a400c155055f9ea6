package reconciler

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// Where a table has a million rows, none of these may read them all, or sort them.
func TestSweepsReadRowsThroughTheIndexOfTheirSource(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, pool *gorm.DB) {
		require.NoError(t, pool.Connection(func(db *gorm.DB) error {
			if database.IsPostgres(db) { // which reads tables as small as these whole
				require.NoError(t, db.Exec("SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off").Error)
			}
			var query string
			var args []any
			note := func(db *gorm.DB) { query, args = db.Statement.SQL.String(), db.Statement.Vars }
			require.NoError(t, pool.Callback().Row().After("gorm:row").Register("note", note))
			require.NoError(t, pool.Callback().Query().After("gorm:query").Register("note", note))
			b := books{db, "clerk"}
			for _, table := range []string{"users", "organizations", "organization_memberships", "waitlist_entries"} {
				for name, read := range map[string]func(){
					"pages": func() {
						for _, err := range b.livingPages(t.Context(), table, time.Now().UnixMilli()) {
							require.NoError(t, err)
						}
					},
					"ends": func() {
						_, err := b.ends(t.Context(), table, 3)
						require.NoError(t, err)
					},
					"count": func() {
						_, err := b.count(t.Context(), table)
						require.NoError(t, err)
					},
				} {
					read()
					plan := explain(t, db, query, args)
					assert.Contains(t, plan, table+"_source_created", "%s: %s\n%s", name, query, plan)
					assert.NotContains(t, plan, "Sort", "%s: %s", name, plan)
					assert.NotContains(t, plan, "TEMP B-TREE", "%s: %s", name, plan)
				}
			}
			return nil
		}))
	})
}

func explain(t *testing.T, db *gorm.DB, query string, args []any) string {
	t.Helper()
	prefix := "EXPLAIN QUERY PLAN "
	if database.IsPostgres(db) {
		prefix = "EXPLAIN "
	}
	rows, err := db.Statement.ConnPool.QueryContext(t.Context(), prefix+query, args...)
	require.NoError(t, err)
	defer func() { _ = rows.Close() }()
	columns, err := rows.Columns()
	require.NoError(t, err)
	var plan strings.Builder
	for rows.Next() {
		values := make([]any, len(columns))
		for i := range values {
			values[i] = new(any)
		}
		require.NoError(t, rows.Scan(values...))
		fmt.Fprintln(&plan, *values[len(values)-1].(*any))
	}
	require.NoError(t, rows.Err())
	return plan.String()
}
