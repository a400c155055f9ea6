package database

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgtype"
	"gorm.io/gorm"
)

// Column is a column of an [Upsert]. Type is the PostgreSQL type: text, bigint, boolean, float8, timestamptz, jsonb.
type Column struct {
	Name string
	Type string
}

// Upsert is a guarded multi-row upsert, the hot statement of the mirror and of the delivery log. It is
// SQL built once, since reflection and giant VALUES lists cost more than the rows: PostgreSQL gets one
// array a column, SQLite a few rows a statement. It must not be copied or changed after its first use, and is then safe for
// concurrent use.
//
// A value is nil, string, int64, float64, bool or time.Time; jsonb is given as string.
type Upsert struct {
	Table    string
	Columns  []Column
	Conflict []string // the key
	Guard    string   // WHERE of DO UPDATE; rows that fail it stay as they are

	once     sync.Once
	postgres string
	sqlite   []string // by the number of rows, [0] is empty
}

// sqliteRows is how many rows one SQLite statement takes. The driver compiles a statement at each use, which speaks for many, and
// looks for each parameter from the first on, which speaks for few (measured: 8 to 16 are best for 15 to 30 columns).
const sqliteRows = 12

// maxStatement bounds the text that goes to PostgreSQL in one statement: a message of its protocol and an array end at 1 GiB.
const maxStatement = 32 << 20

// Exec writes rows (one value a column) in the caller's transaction and returns how many were inserted or
// updated. No key may stand in it twice; rows should be sorted by key, so that two transactions lock in the same order.
func (u *Upsert) Exec(ctx context.Context, tx *gorm.DB, rows [][]any) (int64, error) {
	if len(rows) == 0 {
		return 0, nil
	}
	u.once.Do(u.build)
	exec := u.execSQLite
	if IsPostgres(tx) {
		exec = u.execPostgres
	}
	n, err := exec(ctx, tx, rows)
	if err != nil {
		return 0, fmt.Errorf("upsert into %s: %w", u.Table, err)
	}
	return n, nil
}

func (u *Upsert) build() {
	var names, arrays, selects, params, sets []string
	for i, c := range u.Columns {
		param, array, value := fmt.Sprintf("c%d", i), c.Type, fmt.Sprintf("c%d", i)
		if c.Type == "jsonb" { // an array of text is cheaper to send than one of jsonb
			array, value = "text", param+"::jsonb"
		}
		names, params = append(names, c.Name), append(params, param)
		arrays, selects = append(arrays, fmt.Sprintf("$%d::%s[]", i+1, array)), append(selects, value)
		if !slices.Contains(u.Conflict, c.Name) {
			sets = append(sets, c.Name+" = excluded."+c.Name)
		}
	}
	tail := " ON CONFLICT (" + strings.Join(u.Conflict, ", ") + ") DO UPDATE SET " + strings.Join(sets, ", ")
	if u.Guard != "" {
		tail += " WHERE " + u.Guard
	}
	into := "INSERT INTO " + u.Table + " (" + strings.Join(names, ", ") + ") "
	u.postgres = into + "SELECT " + strings.Join(selects, ", ") + " FROM unnest(" + strings.Join(arrays, ", ") + ") AS rows(" + strings.Join(params, ", ") + ")" + tail
	row := "(?" + strings.Repeat(", ?", len(names)-1) + ")"
	u.sqlite = make([]string, sqliteRows+1)
	for n := 1; n <= sqliteRows; n++ {
		u.sqlite[n] = into + "VALUES " + row + strings.Repeat(", "+row, n-1) + tail
	}
}

func (u *Upsert) execPostgres(ctx context.Context, tx *gorm.DB, rows [][]any) (int64, error) {
	var total int64
	for len(rows) > 0 {
		n, size := 0, 0
		for n < len(rows) && (n == 0 || size < maxStatement) {
			for _, value := range rows[n] {
				if text, ok := value.(string); ok {
					size += len(text)
				}
			}
			n++
		}
		args := make([]any, len(u.Columns))
		for i := range args {
			args[i] = array{rows: rows[:n], column: i, zero: cmp.Or(zero[u.Columns[i].Type], any(""))}
		}
		result, err := tx.Statement.ConnPool.ExecContext(ctx, u.postgres, args...)
		if err != nil {
			return 0, err //nolint:wrapcheck // Exec wraps it
		}
		written, err := result.RowsAffected()
		if err != nil {
			return 0, err //nolint:wrapcheck // Exec wraps it
		}
		total, rows = total+written, rows[n:]
	}
	return total, nil
}

// array is one column of rows as a PostgreSQL array, without a copy.
type array struct {
	rows   [][]any
	column int
	zero   any
}

// Dimensions implements pgtype.ArrayGetter.
func (a array) Dimensions() []pgtype.ArrayDimension {
	return []pgtype.ArrayDimension{{Length: int32(len(a.rows)), LowerBound: 1}}
}

// Index implements pgtype.ArrayGetter.
func (a array) Index(i int) any { return a.rows[i][a.column] }

// IndexType implements pgtype.ArrayGetter.
func (a array) IndexType() any { return a.zero }

// zero is a value of each type that an upsert takes, by which pgx chooses how to encode.
var zero = map[string]any{"bigint": int64(0), "boolean": false, "float8": float64(0), "timestamptz": time.Time{}}

func (u *Upsert) execSQLite(ctx context.Context, tx *gorm.DB, rows [][]any) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err //nolint:wrapcheck // Exec wraps it
	}
	// A batch takes milliseconds. With a context that can end, the driver would start a goroutine a statement.
	ctx = context.WithoutCancel(ctx)
	var total int64
	args := make([]any, 0, sqliteRows*len(u.Columns))
	for chunk := range slices.Chunk(rows, sqliteRows) {
		args = args[:0]
		for _, row := range chunk {
			args = append(args, row...)
		}
		result, err := tx.Statement.ConnPool.ExecContext(ctx, u.sqlite[len(chunk)], args...)
		if err != nil {
			return 0, err //nolint:wrapcheck // Exec wraps it
		}
		n, err := result.RowsAffected()
		if err != nil {
			return 0, err //nolint:wrapcheck // Exec wraps it
		}
		total += n
	}
	return total, nil
}
