package mirror

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"gorm.io/gorm"
)

// Row is a row as JSON shows it: the columns that a table has by their names, all but raw. Times are UTC, jsonb is JSON.
type Row map[string]any

// Living reads those of the rows of a table (a name of [Tables]) that exist, belong to source and are not deleted, by id.
func Living(ctx context.Context, db *gorm.DB, table, source string, ids []string) (map[string]Row, error) {
	t := byName[table]
	if t == nil {
		return nil, fmt.Errorf("read mirror: there is no table %q", table)
	}
	names, kinds := []string{"id", "source"}, []Kind{Text, Text}
	for _, c := range t.Columns {
		names, kinds = append(names, c.Name), append(kinds, c.Kind)
	}
	for _, c := range common {
		if c.Name == "raw" || c.Name == "deleted_at" {
			continue
		}
		kind := Text
		switch c.Type {
		case "timestamptz":
			kind = Time
		case "bigint":
			kind = Int
		}
		names, kinds = append(names, c.Name), append(kinds, kind)
	}
	rows, err := db.WithContext(ctx).Raw("SELECT "+strings.Join(names, ", ")+" FROM "+table+" WHERE id IN ? AND source = ? AND deleted_at IS NULL", ids, source).Rows()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", table, err)
	}
	defer func() { _ = rows.Close() }()
	living := map[string]Row{}
	for rows.Next() {
		row, err := scan(rows, names, kinds)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", table, err)
		}
		living[row["id"].(string)] = row
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", table, err)
	}
	return living, nil
}

func scan(rows *sql.Rows, names []string, kinds []Kind) (Row, error) {
	values := make([]any, len(names))
	for i, kind := range kinds {
		switch kind {
		case Bool:
			values[i] = new(bool)
		case Int:
			values[i] = new(sql.Null[int64])
		case Time:
			values[i] = new(sql.Null[time.Time])
		default:
			values[i] = new(sql.Null[string])
		}
	}
	if err := rows.Scan(values...); err != nil {
		return nil, err //nolint:wrapcheck // the caller says of what
	}
	row := make(Row, len(names))
	for i, name := range names {
		row[name] = nil
		switch v := values[i].(type) {
		case *bool:
			row[name] = *v
		case *sql.Null[int64]:
			if v.Valid {
				row[name] = v.V
			}
		case *sql.Null[time.Time]:
			if v.Valid {
				row[name] = v.V.UTC()
			}
		case *sql.Null[string]:
			if v.Valid && kinds[i] == JSON {
				row[name] = json.RawMessage(v.V)
			} else if v.Valid {
				row[name] = v.V
			}
		}
	}
	return row, nil
}
