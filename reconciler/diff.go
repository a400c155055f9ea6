package reconciler

import (
	"iter"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
)

// Drift is how a row differs from its object. Empty is: it does not.
type Drift string

// The classes of drift.
const (
	Missing   Drift = "missing"   // Clerk has the object, the mirror has no row
	Stale     Drift = "stale"     // the row is of an older version
	Different Drift = "different" // the same version, other content, or columns that do not fit it
	Extra     Drift = "extra"     // the mirror has a living row, Clerk has no object
)

// Drifts are all classes.
func Drifts() []Drift { return []Drift{Missing, Stale, Different, Extra} }

// object is one of Clerk's as it was read.
type object struct {
	clerk.Object
	readAt time.Time // when its request was answered
}

// version is what the event of the object will have; 0 for an object without any time.
func (o *object) version() int64 {
	if v := event.Millis(o.UpdatedAt); v != 0 {
		return v
	}
	return event.Millis(o.CreatedAt)
}

// ahead reports whether the object's time of change is not believed, so that its event has the version of its receipt.
func (o *object) ahead() bool { return event.Ahead(o.version(), o.readAt) }

// row is one of the mirror's.
type row struct {
	id      string
	created int64 // ms, 0 for none
	version int64
	seenAt  int64
	deleted bool
	foreign bool // it belongs to another source
	raw     string
	columns []mirror.Difference // the columns that do not hold what raw says; none for stubs and tombstones, which are not looked at
}

func (r *row) misfits() []Field {
	var fields []Field
	for _, c := range r.columns {
		fields = append(fields, Field{Field: c.Column, Mirror: c.Have, Clerk: c.Want})
	}
	return fields
}

// verdict is what a comparison says.
type verdict struct {
	drift  Drift
	fields []Field // of Different and Stale
	// defeated: the mirror's tombstone is newer than the object, so no event of the object can bring it back. It was deleted since the
	// object was read, or, if it still lives, wrongly.
	defeated bool
	// held: the living row is newer than the object, and not by what came after it was read. No event of this object can change it.
	held bool
	// foreign: the row belongs to another source, whose events alone change it.
	foreign bool
}

// open tells whether there is something to settle.
func (v *verdict) open() bool { return v.drift != "" || v.defeated || v.held || v.foreign }

// held judges a row that is newer than its object. Times alone are no other content.
func held(table string, o *object, r *row) verdict {
	if r.seenAt >= o.readAt.UnixMilli() {
		return verdict{} // it came after the page
	}
	fields := differences(table, o.Raw, r.raw)
	if !slices.ContainsFunc(fields, func(f Field) bool { return f.Field != "updated_at" }) {
		fields = r.misfits()
	}
	return verdict{held: len(fields) > 0, fields: fields}
}

// compare judges one object against its row, which is nil where there is none. A row that is newer than what was read is no drift that
// an event could end: the page is behind, or the row is held.
func compare(table string, o *object, r *row) verdict {
	v := o.version()
	if o.ahead() { // the row has the time of a receipt: its version does not show whether they are the same
		v = 0
	}
	switch {
	case r == nil:
		return verdict{drift: Missing}
	case r.foreign:
		return verdict{foreign: true}
	case r.deleted && !o.ahead() && (v == 0 || r.version >= v):
		return verdict{defeated: true}
	case r.deleted:
		return verdict{drift: Missing}
	case v != 0 && r.version > v:
		return held(table, o, r)
	case v != 0 && r.version < v:
		return verdict{drift: Stale, fields: differences(table, o.Raw, r.raw)}
	}
	fields := differences(table, o.Raw, r.raw)
	if len(fields) == 0 { // raw is as it should be, so what does not fit it is not
		fields = r.misfits()
	}
	if len(fields) == 0 || r.seenAt >= o.readAt.UnixMilli() {
		return verdict{}
	}
	return verdict{drift: Different, fields: fields}
}

// merge walks objects and rows, which both ascend by the time of their creation, in one pass. emit gets every object with
// its row, or with nil where the rows have none of that time, and every row that no object came for. Within one time the order does
// not matter: only the rows of the time at hand wait, so memory does not grow. An object that comes out of order is emitted
// without a row; the caller looks for it by its id, so the worst that disorder costs is requests.
//
// When the next object is pulled, every row up to the time of the last one was compared with it: the rows from that time
// on, and the objects after it, are all that is left to do.
func merge(objects iter.Seq2[object, error], rows iter.Seq2[row, error], emit func(*object, *row) error) error {
	nextObject, stopObjects := iter.Pull2(objects)
	defer stopObjects()
	nextRow, stopRows := iter.Pull2(rows)
	defer stopRows()
	o, err, hasObject := nextObject()
	if err != nil {
		return err
	}
	r, err, hasRow := nextRow()
	if err != nil {
		return err
	}
	var now int64 // the time at hand
	waiting := map[string]*row{}
	// reach begins a later time: no object comes any more for who waits.
	reach := func(created int64) error {
		if created <= now {
			return nil
		}
		now = created
		for _, id := range slices.Sorted(maps.Keys(waiting)) {
			if err := emit(nil, waiting[id]); err != nil {
				return err
			}
		}
		clear(waiting)
		return nil
	}
	for hasObject || hasRow {
		if hasRow && (!hasObject || r.created <= event.Millis(o.CreatedAt)) {
			if err := reach(r.created); err != nil {
				return err
			}
			waits := r
			waiting[r.id] = &waits
			if r, err, hasRow = nextRow(); err != nil {
				return err
			}
			continue
		}
		if err := reach(event.Millis(o.CreatedAt)); err != nil {
			return err
		}
		found, partner := o, waiting[o.ID]
		delete(waiting, o.ID)
		if err := emit(&found, partner); err != nil {
			return err
		}
		if o, err, hasObject = nextObject(); err != nil {
			return err
		}
	}
	return reach(math.MaxInt64)
}
