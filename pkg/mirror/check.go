package mirror

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/jsondoc"
)

// Difference is a typed column that does not hold what the row's raw says: what it holds and what it should, as JSON (times as RFC 3339).
type Difference struct {
	Column     string
	Have, Want json.RawMessage
}

// Check holds the typed columns of one row at a time against its raw, with the code that writes them: of a row that
// [Apply] wrote, none differs. It uses its memory again for every row, so one goroutine uses it at a time.
//
// A tombstone is not to be judged: its columns are of a delete. Neither is a stub (version 0).
type Check struct {
	table   *Table
	columns string
	cells   []cell
	targets []any
	memory  scratch
}

// NewCheck makes a Check for the rows of a table (a name of [Tables]) in db.
func NewCheck(db *gorm.DB, table string) (*Check, error) {
	t := byName[table]
	if t == nil {
		return nil, fmt.Errorf("read mirror: there is no table %q", table)
	}
	c := &Check{table: t, cells: make([]cell, len(t.typed))}
	names := make([]string, len(t.typed))
	for i, column := range t.typed {
		c.cells[i].kind = column.Kind
		c.targets = append(c.targets, &c.cells[i])
		names[i] = column.Name
		if column.Kind == Time && !database.IsPostgres(db) {
			names[i] = "+" + column.Name // as text: the driver would guess at its form, which costs more than all else
		}
	}
	c.columns = strings.Join(names, ", ")
	return c, nil
}

// Columns is what to select: the typed columns, and clerk_created_at and clerk_updated_at.
func (c *Check) Columns() string { return c.columns }

// Targets are what to scan Columns into. They take whatever stands in them, which SQLite does not look at.
func (c *Check) Targets() []any { return c.targets }

// CreatedAt is clerk_created_at of the row that was scanned last: in ms, 0 for none or for what is no time, and as the argument of a
// query that stands for exactly what the column holds.
func (c *Check) CreatedAt() (ms int64, column any) {
	at := &c.cells[len(c.cells)-len(clerkTimes)]
	if at.is.set && !at.odd {
		ms = at.is.n
	}
	return ms, at.source
}

// Differences are the columns of the row that was scanned last that do not hold what raw says, nil for none. It must be called before the
// next row is scanned.
func (c *Check) Differences(raw string) []Difference {
	var differences []Difference
	for i, want := range c.table.derive(&c.memory, raw) {
		if have := &c.cells[i]; !have.holds(want) {
			differences = append(differences, Difference{Column: c.table.typed[i].Name, Have: have.json(), Want: want.json(have.kind)})
		}
	}
	return differences
}

// cell is what one column of a row holds. It implements [sql.Scanner].
type cell struct {
	kind   Kind
	is     value
	bytes  []byte // the text, where the driver has it so
	odd    bool   // not of the kind: only SQLite lets that in
	source any
}

// Scan implements [sql.Scanner]. What it takes is the driver's until the next row.
func (c *cell) Scan(source any) error {
	c.is, c.bytes, c.odd, c.source = value{set: source != nil}, nil, false, source
	switch v := source.(type) {
	case nil:
	case bool:
		c.odd = c.kind != Bool
		if v {
			c.is.n = 1
		}
	case int64:
		c.odd = c.kind != Int && (c.kind != Bool || v != 0 && v != 1)
		c.is.n = v
	case string:
		switch c.kind {
		case Text, JSON:
			c.is.text = v
		case Time:
			c.is.n, c.odd = timeIn(v)
		default:
			c.odd = true
		}
	case []byte:
		c.odd = c.kind != JSON && c.kind != Text
		c.bytes = v
	case time.Time:
		c.odd = c.kind != Time
		c.is.n = v.UnixMilli()
	default:
		c.odd = true
	}
	return nil
}

// timeIn reads a time in the one form that SQLite's have. Another form is odd, whatever time it means: the texts would not sort.
func timeIn(text string) (ms int64, odd bool) {
	at, err := time.Parse(database.SQLiteTime, text)
	if err != nil || len(text) != len(database.SQLiteTime) || !strings.HasSuffix(text, "+00:00") {
		return 0, true
	}
	return at.UnixMilli(), false
}

func (c *cell) holds(want value) bool {
	if c.odd || c.is.set != want.set || c.is.n != want.n {
		return false
	}
	switch {
	case !want.set || c.kind != Text && c.kind != JSON:
		return true
	case c.bytes == nil && c.is.text == want.text, c.bytes != nil && string(c.bytes) == want.text:
		return true
	default:
		return c.kind == JSON && jsondoc.Equal([]byte(c.text()), []byte(want.text))
	}
}

func (c *cell) text() string {
	if c.bytes != nil {
		return string(c.bytes)
	}
	return c.is.text
}

func (c *cell) json() json.RawMessage {
	if c.odd {
		source := c.source
		if b, ok := source.([]byte); ok {
			source = string(b)
		}
		out, err := json.Marshal(source)
		if err != nil { // a float that is no number
			return quoted(fmt.Sprint(source))
		}
		return out
	}
	v := c.is
	v.text = c.text()
	return v.json(c.kind)
}

// json is the value as JSON shows it.
func (v value) json(kind Kind) json.RawMessage {
	switch {
	case !v.set:
		return json.RawMessage("null")
	case kind == Bool:
		return strconv.AppendBool(nil, v.n != 0)
	case kind == Int:
		return strconv.AppendInt(nil, v.n, 10)
	case kind == Time:
		return quoted(time.UnixMilli(v.n).UTC().Format("2006-01-02T15:04:05.000Z07:00"))
	case kind == JSON && json.Valid([]byte(v.text)):
		return json.RawMessage(v.text)
	default:
		return quoted(v.text)
	}
}

func quoted(text string) json.RawMessage {
	out, _ := json.Marshal(text) // cannot fail
	return out
}
