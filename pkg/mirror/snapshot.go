package mirror

import (
	"context"
	"fmt"
	"iter"
	"time"

	"gorm.io/gorm"
)

// Record is one row as the reconciler compares it.
type Record struct {
	ID        string
	Version   int64 // ms, 0 for a stub
	SeenAt    int64 // ms
	DeletedAt *time.Time
	Raw       []byte // JSON; PostgreSQL gives it in its own spelling
}

// page is how many rows [All] holds at once.
const page = 1000

// Snapshot returns up to limit rows of a table (a name of [Tables]) whose id comes after the given one ("" for the first),
// in the order of their ids as the database sorts text, tombstones included.
func Snapshot(ctx context.Context, db *gorm.DB, table, after string, limit int) ([]Record, error) {
	if byName[table] == nil {
		return nil, fmt.Errorf("read mirror: there is no table %q", table)
	}
	rows, err := db.WithContext(ctx).Raw("SELECT id, version, seen_at, deleted_at, raw FROM "+table+" WHERE id > ? ORDER BY id LIMIT ?", after, limit).Rows()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", table, err)
	}
	defer func() { _ = rows.Close() }()
	var records []Record
	for rows.Next() {
		var r Record
		if err := rows.Scan(&r.ID, &r.Version, &r.SeenAt, &r.DeletedAt, &r.Raw); err != nil {
			return nil, fmt.Errorf("read %s: %w", table, err)
		}
		records = append(records, r)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", table, err)
	}
	return records, nil
}

// All goes through a whole table in the order of [Snapshot], a page at a time: memory stays flat, no transaction is held, and a row
// that is written meanwhile is seen in its old or its new state. An error is the last thing it yields.
func All(ctx context.Context, db *gorm.DB, table string) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		after := ""
		for {
			records, err := Snapshot(ctx, db, table, after, page)
			if err != nil {
				yield(Record{}, err)
				return
			}
			for _, r := range records {
				if !yield(r, nil) {
					return
				}
			}
			if len(records) < page {
				return
			}
			after = records[len(records)-1].ID
		}
	}
}
