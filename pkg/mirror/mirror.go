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
	"maps"
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

// Knows reports whether events of the type are mirrored whatever they carry. Others are not an error: what is no full object of a known
// resource writes nothing.
func Knows(t event.Type) bool {
	table := byResource[t.Resource()]
	return table != nil && slices.Contains(table.verbs, t.Verb())
}

// tableOf is the table of an event's object, nil for none. Of an unknown verb it wants the full object: an unknown event of a known
// resource may carry part of the object, or something else.
func tableOf(e *event.Event) *Table {
	if table := byResource[e.Type.Resource()]; table != nil && (slices.Contains(table.verbs, e.Type.Verb()) || table.full(e)) {
		return table
	}
	return nil
}

// full reports whether an event carries an object that says itself what it is: its name, its id and when it changed.
func (t *Table) full(e *event.Event) bool {
	if e.Object.ID == "" || e.Object.UpdatedAt == 0 {
		return false
	}
	name := gjson.GetBytes(e.Data, "object")
	if !name.Exists() {
		return t.nameless
	}
	plain := strings.TrimPrefix(strings.TrimPrefix(name.Str, "commerce_"), "billing_")
	return strings.ReplaceAll(plain, "_", "") == strings.ToLower(t.Resource)
}

// unmirrored are the types that are known and change no row.
var unmirrored = []event.Type{"email.created", "sms.created"}

// row is one state of one object.
type row struct {
	id      string
	source  string
	event   *event.Event // whose object it is; nil for a copy inside another's
	version event.Version
	ended   bool
	values  []any // as the table's upsert wants them

	// lastDeleted is, of users, the time of the newest delete in the batch, in ms; 0 for none.
	lastDeleted int64

	written bool
	stands  int64 // version of the row in the table, where this one was not written
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

// states are the newest states of the objects of a batch.
type states map[*Table]map[string]*row

// change is what one event asks for.
type change struct {
	effect  event.Effect // where it asks for nothing
	own     place
	version event.Version
	stub    place // of the copy inside it
}

// place is where a row is; its table is nil for none.
type place struct {
	table *Table
	id    string
}

// Apply writes a batch in the caller's transaction: the newest state of each object in it, where the table has no newer one. It returns
// what each event changed.
// Repetition and order do not matter, neither within nor between batches. Rows are written table by table in
// order of their ids, so that concurrent batches wait for each other but never in a circle. An error (of the
// database, [ErrNoID] or [ErrWrongSource]) says nothing about which event of the batch caused it; the transaction must then be rolled back.
//
// A child lives no longer than its parents: a membership than its organization and user, an invitation or domain than its organization, a
// session than its user. The row of a child keeps its own version and raw; deleted_at is that of its own delete, else of
// its parent's tombstone, which deleted_with names. Where a parent returns, so do the children that only it took along.
//
// Who is deleted is not named any more: not by the tombstone, nor by what others' objects say of the user.
func Apply(ctx context.Context, tx *gorm.DB, batch []event.Event) ([]event.Effect, error) {
	now := time.Now().UTC().Truncate(time.Millisecond)
	newest := make(states, len(tables))
	changes := make([]change, len(batch))
	var memory scratch
	for i := range batch {
		var err error
		if changes[i], err = collect(newest, &batch[i], now, &memory); err != nil {
			return nil, err
		}
	}
	if err := newest.write(ctx, tx, now); err != nil {
		return nil, fmt.Errorf("apply events: %w", err)
	}
	effects := make([]event.Effect, len(batch))
	for i := range changes {
		effects[i] = newest.effect(&changes[i])
	}
	return effects, nil
}

// write writes parents before children, and between them settles who is deleted with whom.
func (s states) write(ctx context.Context, tx *gorm.DB, now time.Time) error {
	for i, table := range tables {
		if i == parentTables {
			if err := s.settleFamilies(ctx, tx, now); err != nil {
				return err
			}
		}
		if err := table.write(ctx, tx, s.sorted(table), now); err != nil {
			return err
		}
	}
	return nil
}

func wrongSource(r *row, t *Table, owner string) error {
	return fmt.Errorf("%s %s of source %q about %s in %s: %w: %q", r.event.Type, r.event.ID, r.source, r.id, t.Name, ErrWrongSource, owner)
}

// sorted are the states of one table by their ids.
func (s states) sorted(table *Table) []*row {
	return slices.SortedFunc(maps.Values(s[table]), func(a, b *row) int { return strings.Compare(a.id, b.id) })
}

func (t *Table) write(ctx context.Context, tx *gorm.DB, rows []*row, now time.Time) error {
	if len(rows) == 0 {
		return nil
	}
	values := make([][]any, len(rows))
	for i, r := range rows {
		values[i] = r.values
	}
	n, err := t.upsert.Exec(ctx, tx, values)
	if err != nil {
		return err
	}
	return t.note(ctx, tx, rows, n, now)
}

// note notes which rows were written, n of them. It returns [ErrWrongSource] where a row belongs to another source than the event about its object.
func (t *Table) note(ctx context.Context, tx *gorm.DB, rows []*row, n int64, now time.Time) error {
	byID := make(map[string]*row, len(rows))
	ids := make([]string, len(rows))
	for i, r := range rows {
		r.written = n == int64(len(rows))
		byID[r.id], ids[i] = r, r.id
	}
	if n == int64(len(rows)) {
		return nil
	}
	found, err := query(ctx, tx, "SELECT id, source, version, seen_at, event_id, synced_at FROM "+t.Name+" WHERE id", ids)
	if err != nil {
		return fmt.Errorf("read %s: %w", t.Name, err)
	}
	defer func() { _ = found.Close() }()
	for found.Next() {
		var id, source string
		var v event.Version
		var synced time.Time
		if err := found.Scan(&id, &source, &v.Version, &v.SeenAt, &v.EventID, &synced); err != nil {
			return fmt.Errorf("read %s: %w", t.Name, err)
		}
		r := byID[id]
		switch {
		case r == nil:
		case r.source == source:
			r.written, r.stands = v == r.version && synced.Equal(now), v.Version
		case r.event != nil: // a copy inside another object only leaves the row as it is
			return wrongSource(r, t, source)
		}
	}
	if err := found.Err(); err != nil {
		return fmt.Errorf("read %s: %w", t.Name, err)
	}
	return nil
}

// effect says what an event changed, once all is written.
func (s states) effect(c *change) event.Effect {
	if c.own.table == nil {
		return c.effect
	}
	won := s[c.own.table][c.own.id]
	stands := won.stands
	if won.written {
		stands = won.version.Version
	}
	switch {
	case won.written && won.version == c.version && won.values[c.own.table.deletedAt()] != nil:
		return event.EffectDeleted
	case won.written && won.version == c.version:
		return event.EffectApplied
	}
	if c.stub.table != nil {
		if stub := s[c.stub.table][c.stub.id]; stub.written && stub.version.Version == 0 && stub.version.EventID == c.version.EventID {
			return event.EffectStub
		}
	}
	if stands == c.version.Version {
		return event.EffectUnchanged
	}
	return event.EffectOlder
}

// collect adds what one event says: its object, and a stub of the copy inside it.
func collect(newest states, e *event.Event, now time.Time, memory *scratch) (change, error) {
	table := tableOf(e)
	switch {
	case table == nil && slices.Contains(unmirrored, e.Type):
		return change{effect: event.EffectUnchanged}, nil
	case table == nil:
		return change{effect: event.EffectUnknownType}, nil
	case e.Object.ID == "":
		return change{}, fmt.Errorf("apply %s %s: %w", e.Type, e.ID, ErrNoID)
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
	if table == usersTable && e.Object.Deleted {
		raw = only(raw, keptOfUser)
	}
	c := change{own: place{table, s.id}, version: s.version}
	object := table.row(memory, &s, raw)
	object.event = e
	if table == usersTable {
		object.lastDeleted = s.deletedAt
	}
	if err := keep(newest, table, object); err != nil {
		return change{}, err
	}

	inside, copied := embedded(e.Type, raw)
	if inside == nil {
		return c, nil
	}
	id := copied.Get("id")
	if id.Type != gjson.String || id.Str == "" {
		return c, nil
	}
	c.stub = place{inside, id.Str}
	s.id, s.deletedAt = id.Str, 0
	s.version = e.StubVersion(integer(copied.Get("updated_at")))
	s.version.EventID = s.eventID
	return c, keep(newest, inside, inside.row(memory, &s, copied.Raw))
}

// keep remembers the newest state of an object. Two sources that speak of one object are told apart by the database, event by event.
func keep(newest states, table *Table, r *row) error {
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
		r.event, r.lastDeleted = cmp.Or(r.event, have.event), max(r.lastDeleted, have.lastDeleted)
		states[r.id] = r
	default:
		have.event, have.lastDeleted = cmp.Or(have.event, r.event), max(r.lastDeleted, have.lastDeleted)
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
	r.values = append(make([]any, 0, len(t.upsert.Columns)), s.id, s.source)
	for i, v := range typed {
		r.values = append(r.values, v.box(t.typed[i].Kind))
	}
	r.values = append(r.values, s.version.Version, s.version.SeenAt, timeOf(s.deletedAt).box(Time), raw, s.eventID, s.origin, s.now)
	if len(t.parents) > 0 {
		r.values = append(r.values, nil)
	}
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
