package emulator

import (
	"cmp"
	"encoding/json"
	"iter"
	"slices"

	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/pkg/event"
)

// tables maps what an event type is about to its table in the mirror. E-mails and SMS have none.
var tables = map[string]string{
	"user":                   "users",
	"organization":           "organizations",
	"organizationMembership": "organization_memberships",
	"organizationInvitation": "organization_invitations",
	"organizationDomain":     "organization_domains",
	"session":                "sessions",
	"role":                   "roles",
	"permission":             "permissions",
	"waitlistEntry":          "waitlist_entries",
	"subscription":           "subscriptions",
	"subscriptionItem":       "subscription_items",
	"paymentAttempt":         "payment_attempts",
}

// Tables lists the names under which Clerk's objects are kept, sorted: those of the mirror's tables.
func Tables() []string {
	names := make([]string, 0, len(tables))
	for _, name := range tables {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Object is one of Clerk's objects as it now is.
type Object struct {
	ID        string
	CreatedAt int64 // ms
	UpdatedAt int64 // ms
	DeletedAt int64 // ms, the timestamp of the delete; 0 while it lives
	// JSON is the full object as last announced, of one that was deleted itself the data of its delete; read-only.
	JSON   json.RawMessage
	buried bool // deleted with its parent
}

type table struct {
	byID  map[string]*Object
	order []*Object // by creation
	live  int

	// What the Backend API lists from.
	alive   []*Object            // the living ones by created_at
	owned   map[string][]*Object // by the id of what they belong to, deleted ones included; see owners
	changes int                  // counted, so that a sorted copy knows when it is old
	sorted  map[string]sorted    // by field
}

// owners names, for the tables that the Backend API lists by it, where an object says what it belongs to.
var owners = map[string]string{
	"sessions": "user_id", "organization_memberships": "organization.id",
	"organization_invitations": "organization_id", "organization_domains": "organization_id",
}

func (c *Clerk) table(name string) *table {
	t := c.state[name]
	if t == nil {
		t = &table{byID: map[string]*Object{}, owned: map[string][]*Object{}, sorted: map[string]sorted{}}
		c.state[name] = t
	}
	return t
}

func (c *Clerk) keep(name, id string, updated, deleted int64, data []byte) {
	if c.cfg.Forget || name == "" {
		return
	}
	t := c.table(name)
	o := t.byID[id]
	if o == nil {
		o = &Object{ID: id, CreatedAt: gjson.GetBytes(data, "created_at").Int()}
		t.byID[id] = o
		t.order = append(t.order, o)
		t.live++
		at, _ := slices.BinarySearchFunc(t.alive, o.CreatedAt+1, byCreation)
		t.alive = slices.Insert(t.alive, at, o)
		if path := owners[name]; path != "" {
			owner := gjson.GetBytes(data, path).String()
			t.owned[owner] = append(t.owned[owner], o)
		}
	}
	if deleted != 0 {
		t.bury(o)
		c.buryChildren(name, id, deleted)
	} else if o.buried { // it went with its parent, whatever is still said of it
		deleted = o.DeletedAt
	}
	t.changes++
	o.JSON, o.UpdatedAt, o.DeletedAt = data, cmp.Or(updated, o.UpdatedAt), deleted
	if created := gjson.GetBytes(data, "created_at"); deleted == 0 && created.Exists() && created.Int() != o.CreatedAt { // made once more, under the same id
		if at := t.place(o); at < len(t.alive) {
			t.alive = slices.Delete(t.alive, at, at+1)
		}
		o.CreatedAt = created.Int()
		at, _ := slices.BinarySearchFunc(t.alive, o.CreatedAt+1, byCreation)
		t.alive = slices.Insert(t.alive, at, o)
	}
}

// bury takes an object from those that live.
func (t *table) bury(o *Object) {
	if o.DeletedAt != 0 {
		return
	}
	t.live--
	if at := t.place(o); at < len(t.alive) {
		t.alive = slices.Delete(t.alive, at, at+1)
	}
}

// buryChildren deletes what goes with a user or an organization, without a word, as Clerk does.
func (c *Clerk) buryChildren(parent, id string, at int64) {
	gone := func(name string, o *Object) {
		if t := c.state[name]; o.DeletedAt == 0 {
			t.bury(o)
			t.changes++
			o.DeletedAt, o.buried = at, true
		}
	}
	switch parent {
	case "users":
		for _, o := range slices.Clone(c.table("organization_memberships").alive) {
			if gjson.GetBytes(o.JSON, "public_user_data.user_id").Str == id {
				gone("organization_memberships", o)
			}
		}
		for _, o := range c.table("sessions").owned[id] {
			gone("sessions", o)
		}
	case "organizations":
		for _, name := range []string{"organization_memberships", "organization_invitations", "organization_domains"} {
			for _, o := range c.table(name).owned[id] {
				gone(name, o)
			}
		}
	}
}

func byCreation(o *Object, created int64) int { return cmp.Compare(o.CreatedAt, created) }

// place is where a living object stands among those by creation, their number where it does not.
func (t *table) place(o *Object) int {
	at, _ := slices.BinarySearchFunc(t.alive, o.CreatedAt, byCreation)
	for ; at < len(t.alive) && t.alive[at].CreatedAt == o.CreatedAt; at++ {
		if t.alive[at] == o {
			return at
		}
	}
	return len(t.alive)
}

// Object returns one object of a table, deleted ones included, false where there never was one.
// Like all accessors it is safe while a story is being told.
func (c *Clerk) Object(table, id string) (Object, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.state[table]; t != nil {
		if o := t.byID[id]; o != nil {
			return *o, true
		}
	}
	return Object{}, false
}

// Objects ranges over the living objects of a table in the order of their creation, as they are when
// the range begins.
func (c *Clerk) Objects(table string) iter.Seq[Object] {
	return func(yield func(Object) bool) {
		for _, o := range c.list(table) {
			if o.DeletedAt == 0 && !yield(o) {
				return
			}
		}
	}
}

// Deleted ranges over the deleted objects of a table in the order of their creation.
func (c *Clerk) Deleted(table string) iter.Seq[Object] {
	return func(yield func(Object) bool) {
		for _, o := range c.list(table) {
			if o.DeletedAt != 0 && !yield(o) {
				return
			}
		}
	}
}

func (c *Clerk) list(table string) []Object {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.state[table]
	if t == nil {
		return nil
	}
	list := make([]Object, len(t.order))
	for i, o := range t.order {
		list[i] = *o
	}
	return list
}

// Count returns how many objects of a table live, and how many were deleted.
func (c *Clerk) Count(table string) (live, deleted int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.state[table]; t != nil {
		return t.live, len(t.order) - t.live
	}
	return 0, 0
}

// TableState is all of one table: what a mirror of it must equal.
type TableState struct {
	Live    map[string]json.RawMessage // id → full object
	Deleted map[string]json.RawMessage // id → data of the delete
}

// State returns all tables by name, also empty ones. The JSON is shared and read-only.
func (c *Clerk) State() map[string]TableState {
	c.mu.Lock()
	defer c.mu.Unlock()
	state := make(map[string]TableState, len(tables))
	for _, name := range tables {
		s := TableState{Live: map[string]json.RawMessage{}, Deleted: map[string]json.RawMessage{}}
		if t := c.state[name]; t != nil {
			for id, o := range t.byID {
				if o.DeletedAt == 0 {
					s.Live[id] = o.JSON
				} else {
					s.Deleted[id] = o.JSON
				}
			}
		}
		state[name] = s
	}
	return state
}

// TableOf is the table of an event type's objects, empty for e-mails, SMS and what is not known.
func TableOf(typ string) string { return tables[event.Type(typ).Resource()] }
