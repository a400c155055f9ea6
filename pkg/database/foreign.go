package database

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"gorm.io/gorm"
)

// ForeignKey is a foreign key on Usher's tables, or to them, that is not Usher's.
type ForeignKey struct {
	Table      string `json:"table"`      // that has it, with its schema
	Constraint string `json:"constraint"` // its name
	References string `json:"references"` // the other table, with its schema
	Fatal      bool   `json:"fatal"`      // it keeps events from being applied
	Effect     string `json:"effect"`
	Fix        string `json:"fix"`
}

// String says what is there, what it does and what to do.
func (k ForeignKey) String() string {
	return fmt.Sprintf("foreign key %s of table %s references %s: %s; %s", k.Constraint, k.Table, k.References, k.Effect, k.Fix)
}

// TableNames are the tables that the migrations make, that of the migrations among them, sorted. They are the same in both dialects.
func TableNames() ([]string, error) {
	columns, err := schemaColumns()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, c := range columns {
		names = append(names, c.table)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// Usher's only foreign key is that of drifts.
const foreignKeys = `SELECT n.nspname = $1 AND t.relname = ANY($2::text[]), format('%I.%I', n.nspname, t.relname), c.conname, format('%I.%I', rn.nspname, r.relname),
	format('ALTER TABLE %I.%I DROP CONSTRAINT %I', n.nspname, t.relname, c.conname)
FROM pg_constraint c
JOIN pg_class t ON t.oid = c.conrelid JOIN pg_namespace n ON n.oid = t.relnamespace
JOIN pg_class r ON r.oid = c.confrelid JOIN pg_namespace rn ON rn.oid = r.relnamespace
WHERE c.contype = 'f' AND c.conparentid = 0
	AND (n.nspname = $1 AND t.relname = ANY($2::text[]) OR rn.nspname = $1 AND r.relname = ANY($2::text[]))
	AND NOT (n.nspname = $1 AND t.relname = 'drifts' AND c.conname = 'drifts_run_id_fkey')
ORDER BY 1 DESC, 2, 3`

// ForeignKeys finds the foreign keys that are not Usher's: on its tables, which are Fatal, since an event about a row may come before that
// about the row that it references, and on others that reference its tables. None for SQLite, where a table that exists gets none,
// and for a user who may not read pg_constraint.
func ForeignKeys(ctx context.Context, db *gorm.DB) ([]ForeignKey, error) {
	d, ok := db.Dialector.(pgDialector)
	if !ok {
		return nil, nil
	}
	tables, err := TableNames()
	if err != nil {
		return nil, err
	}
	pool, err := db.DB()
	if err != nil {
		return nil, fmt.Errorf("look for foreign keys: %w", err)
	}
	rows, err := pool.QueryContext(ctx, foreignKeys, d.schema, tables)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42501" {
		return nil, nil // what only looks keeps nothing from working
	}
	if err != nil {
		return nil, fmt.Errorf("look for foreign keys: %w", err)
	}
	defer func() { _ = rows.Close() }()
	var keys []ForeignKey
	for rows.Next() {
		var k ForeignKey
		var drop string
		if err := rows.Scan(&k.Fatal, &k.Table, &k.Constraint, &k.References, &drop); err != nil {
			return nil, fmt.Errorf("look for foreign keys: %w", err)
		}
		if k.Fatal {
			k.Effect = "events come in any order, and one whose row references a row that is not there yet is retried and then dead-lettered"
			k.Fix = "drop it: " + drop
		} else {
			k.Effect = "the application cannot write a row before Clerk's webhook has come, and ON DELETE never fires, since Usher keeps deleted rows"
			k.Fix = "keep the id in a plain column: " + drop
		}
		keys = append(keys, k)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("look for foreign keys: %w", err)
	}
	return keys, nil
}

// foreignTrouble names the foreign keys that are fatal, nil for none.
func foreignTrouble(keys []ForeignKey) error {
	var texts []string
	for _, k := range keys {
		if k.Fatal {
			texts = append(texts, k.String())
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}
