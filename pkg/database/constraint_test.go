package database_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// TestConstraintNamesTheRuleThatRefused: it is what an operator looks for in the error.
func TestConstraintNamesTheRuleThatRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ postgres, sqlite string }{
		"INSERT INTO ours VALUES (1, 'a', NULL)": {"constraint ours_pkey of table ours", "unique ours.id"},
		"INSERT INTO ours VALUES (2, NULL, 1)":   {"column name of table ours", "not null ours.name"},
		"INSERT INTO ours VALUES (3, 'x', 1)":    {"constraint short_names of table ours", "constraint short_names"},
		"INSERT INTO ours VALUES (4, 'a', 77)":   {"constraint to_theirs of table ours", "a foreign key"},
		"INSERT INTO nowhere VALUES (1)":         {"", ""},
	} {
		for _, db := range []string{"postgres", "sqlite"} {
			t.Run(db+"/"+name, func(t *testing.T) {
				t.Parallel()
				open, want := dbtest.Postgres, c.postgres
				if db == "sqlite" {
					open, want = dbtest.SQLite, c.sqlite
				}
				conn := open(t)
				require.NoError(t, conn.Exec("CREATE TABLE theirs (id int PRIMARY KEY)").Error)
				require.NoError(t, conn.Exec(`CREATE TABLE ours (id int PRIMARY KEY, name text NOT NULL, their int, CONSTRAINT short_names CHECK (name <> 'x'),
					CONSTRAINT to_theirs FOREIGN KEY (their) REFERENCES theirs (id))`).Error)
				if db == "sqlite" {
					require.NoError(t, conn.Exec("PRAGMA foreign_keys = ON").Error)
				}
				require.NoError(t, conn.Exec("INSERT INTO ours VALUES (1, 'a', NULL)").Error)
				err := conn.Exec(name).Error
				require.Error(t, err)
				assert.Equal(t, want, database.Constraint(fmt.Errorf("apply users: %w", err)), err)
			})
		}
	}
	assert.Empty(t, database.Constraint(nil))
}
