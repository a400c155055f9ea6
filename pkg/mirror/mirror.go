// Package mirror keeps one row an object of Clerk's, and is the only writer of those rows.
//
// It guarantees that any order and any repetition of events ends in the same rows: a row is wholly determined by the
// event that wins, and which wins is a total order (package event). A delete leaves a tombstone. A copy of an object
// inside another's event makes a stub at most. It keeps every object as Clerk sent it in raw, but for what
// no database can hold (see [Clean]), and it fails for no field's type. It refuses to guess: events of types it does not
// know write nothing. A row belongs to the source that made it, be it as a stub or as a tombstone: no event of another source changes it.
package mirror

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/gjson"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/event"
)

// ErrNoID is wrapped by the error of [Apply] for an event whose object has no id: it can never be applied.
var ErrNoID = errors.New("object has no id")

// ErrWrongSource is wrapped by the error of [Apply] for an event about an object whose row belongs to another source.
var ErrWrongSource = errors.New("object belongs to another source")

// Knows tells whether events of the type are mirrored. Others are not an error: they write nothing.
func Knows(t event.Type) bool { return tableOf(t) != nil }

// tableOf is strict about the verb: an unknown event of a known resource may carry part of the object, or something else.
func tableOf(t event.Type) *Table {
	table := byResource[t.Resource()]
	if table == nil || !slices.Contains(table.verbs, t.Verb()) {
		return nil
	}
	return table
}

// row is one state of one object.
type row struct {
	id      string
	source  string
	event   *event.Event // whose object it is; nil for a copy inside another's
	version event.Version
	ended   bool
	values  []any // as the table's upsert wants them
}

// newer is the order of states of one object: Version's, but for sessions it comes second.
func (r *row) newer(o *row) bool {
	if r.ended != o.ended {
		return r.ended
	}
	return r.version.Compare(o.version) > 0
}

// endedStatus are the states from which a session never comes back.
var endedStatus = map[string]bool{"ended": true, "removed": true, "revoked": true, "expired": true, "replaced": true, "abandoned": true}

// Apply writes a batch in the caller's transaction: the newest state of each object in it, where the table has no newer one.
// Repetition and order do not matter, neither within nor between batches. Rows are written table by table in
// order of their ids, so that concurrent batches wait for each other but never in a circle. An error (of the
// database, [ErrNoID] or [ErrWrongSource]) says nothing about which event of the batch caused it; the transaction must then be rolled back.
func Apply(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
	now := time.Now().UTC().Truncate(time.Millisecond)
	newest := make(map[*Table]map[string]*row, len(tables))
	var memory scratch
	for i := range batch {
		if err := collect(newest, &batch[i], now, &memory); err != nil {
			return err
		}
	}
	for _, table := range tables {
		states := newest[table]
		if len(states) == 0 {
			continue
		}
		sorted := make([]*row, 0, len(states))
		for _, r := range states {
			sorted = append(sorted, r)
		}
		slices.SortFunc(sorted, func(a, b *row) int { return strings.Compare(a.id, b.id) })
		rows := make([][]any, len(sorted))
		for i, r := range sorted {
			rows[i] = r.values
		}
		written, err := table.upsert.Exec(ctx, tx, rows)
		if err == nil && written < int64(len(rows)) { // what the table has is newer, or not theirs
			err = table.checkSource(ctx, tx, sorted)
		}
		if err != nil {
			return fmt.Errorf("apply events: %w", err)
		}
	}
	return nil
}

// checkSource returns [ErrWrongSource] where a row belongs to another source than the event about its object. A copy inside another object
// is left out: it changes no row but its own source's, and that is all.
func (t *Table) checkSource(ctx context.Context, tx *gorm.DB, rows []*row) error {
	events := make(map[string]*row, len(rows))
	ids := make([]string, 0, len(rows))
	for _, r := range rows {
		if r.event != nil {
			events[r.id], ids = r, append(ids, r.id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	var owned []struct{ ID, Source string }
	if err := tx.WithContext(ctx).Raw("SELECT id, source FROM "+t.Name+" WHERE id IN ?", ids).Scan(&owned).Error; err != nil {
		return fmt.Errorf("look whose %s they are: %w", t.Name, err)
	}
	for _, o := range owned {
		if r := events[o.ID]; r.source != o.Source {
			return wrongSource(r, t, o.Source)
		}
	}
	return nil
}

func wrongSource(r *row, t *Table, owner string) error {
	return fmt.Errorf("%s %s of source %q about %s in %s: %w: %q", r.event.Type, r.event.ID, r.source, r.id, t.Name, ErrWrongSource, owner)
}

// collect adds what one event says: its object, and a stub of the copy inside it.
func collect(newest map[*Table]map[string]*row, e *event.Event, now time.Time, memory *scratch) error {
	table := tableOf(e.Type)
	if table == nil {
		return nil
	}
	if e.Object.ID == "" {
		return fmt.Errorf("apply %s %s: %w", e.Type, e.ID, ErrNoID)
	}
	s := state{
		id: CleanText(e.Object.ID), eventID: CleanText(e.ID), source: CleanText(e.Source), origin: CleanText(string(e.Origin)),
		version: e.Version(), now: now,
	}
	s.version.EventID = s.eventID
	if e.Object.Deleted {
		s.deletedAt = max(s.version.SeenAt, 1)
	}
	raw := string(Clean(e.Data))
	object := table.row(memory, &s, raw)
	object.event = e
	if err := keep(newest, table, object); err != nil {
		return err
	}

	inside, copied := embedded(e.Type, raw)
	if inside == nil {
		return nil
	}
	id := copied.Get("id")
	if id.Type != gjson.String || id.Str == "" {
		return nil
	}
	s.id, s.deletedAt = id.Str, 0
	s.version = e.StubVersion(integer(copied.Get("updated_at")))
	s.version.EventID = s.eventID
	return keep(newest, inside, inside.row(memory, &s, copied.Raw))
}

// keep remembers the newest state of an object. Two sources that speak of one object are told apart by the database, event by event.
func keep(newest map[*Table]map[string]*row, table *Table, r *row) error {
	states := newest[table]
	if states == nil {
		states = map[string]*row{}
		newest[table] = states
	}
	have := states[r.id]
	switch {
	case have == nil:
		states[r.id] = r
	case have.source != r.source:
		return fmt.Errorf("%s in %s: %w: %q and %q in one batch", r.id, table.Name, ErrWrongSource, have.source, r.source)
	case r.newer(have):
		r.event = cmp.Or(r.event, have.event)
		states[r.id] = r
	default:
		have.event = cmp.Or(have.event, r.event)
	}
	return nil
}

// embedded is the copy of another object inside an event, and its table.
func embedded(t event.Type, raw string) (*Table, gjson.Result) {
	switch t.Resource() {
	case "organizationMembership":
		if organization := gjson.Get(raw, "organization"); organization.IsObject() {
			return organizationsTable, organization
		}
	case "session":
		if user := gjson.Get(raw, "user"); user.IsObject() {
			return usersTable, user
		}
	}
	return nil, gjson.Result{}
}

// state is what a row holds besides the object.
type state struct {
	id, source, eventID, origin string
	version                     event.Version
	deletedAt                   int64 // ms, 0 for none
	now                         time.Time
}

// row makes the row of an object. raw must be clean.
func (t *Table) row(memory *scratch, s *state, raw string) *row {
	typed := t.derive(memory, raw)
	r := &row{id: s.id, source: s.source, version: s.version}
	if t.ended >= 0 {
		if s.deletedAt != 0 {
			typed[t.ended] = value{set: true, n: 1}
		}
		r.ended = typed[t.ended].n != 0
	}
	r.values = append(make([]any, 0, 2+len(t.Columns)+len(common)), s.id, s.source)
	for i, v := range typed {
		r.values = append(r.values, v.box(t.typed[i].Kind))
	}
	r.values = append(r.values, s.version.Version, s.version.SeenAt, timeOf(s.deletedAt).box(Time), raw, s.eventID, s.origin, s.now)
	return r
}

// scratch is the memory of derive, for any table.
type scratch struct{ values []value }

// derive says what a living object makes of the typed columns, in their order, in one pass over its keys: the one place that knows,
// for writing a row and for judging one. All spellings of raw make the same. The result is valid until the scratch is used again.
func (t *Table) derive(memory *scratch, raw string) []value {
	n := len(t.typed)
	memory.values = slices.Grow(memory.values[:0], n+t.first[n])[:n+t.first[n]]
	clear(memory.values)
	columns, places := memory.values[:n], memory.values[n:]
	var primary primaries
	gjson.Parse(raw).ForEach(func(key, found gjson.Result) bool {
		for _, target := range t.targets[key.Str] {
			if target.path == "" {
				places[target.place] = read(target.kind, found)
			} else {
				places[target.place] = read(target.kind, dig(found, target.path))
			}
		}
		if t == usersTable {
			primary.see(key.Str, found)
		}
		return true
	})
	for i := range columns {
		for _, v := range places[t.first[i]:t.first[i+1]] {
			if v.set { // the first path that has one
				columns[i] = v
				break
			}
		}
	}
	if t == usersTable {
		columns[0], columns[1], columns[2] = primary.columns()
	}
	if t.ended >= 0 && endedStatus[columns[t.status].text] {
		columns[t.ended].n = 1
	}
	for i := range columns {
		if t.typed[i].Kind == Bool {
			columns[i].set = true // false, where there is none
		}
	}
	return columns
}
