package emulator

import (
	"bytes"
	"strings"
	"time"

	"github.com/tidwall/gjson"
	"github.com/tidwall/sjson"
)

// The changes below happen at once, at the emulated now, and beside the story: their events are returned
// and not queued. A caller that throws them away has a webhook that was lost.

// SignUp lets one more person sign up and sign in, who then does nothing more.
func (c *Clerk) SignUp() (userID string, events []Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var l *life
	events = c.aside(func() {
		number := c.lives
		c.lives++
		by := clients[number%len(clients)]
		by.ip += "99"
		name := c.rng.IntN(len(latin))
		l = &life{c: c, client: by, name: latin[name] + ".extra." + time.UnixMilli(c.now).UTC().Format("150405.000"), host: hosts[0]}
		l.signUp(name, script{})
	})
	return l.user.ID, events
}

// Rename changes a person's name, false where nobody living has this id.
func (c *Clerk) Rename(userID string) ([]Event, bool) { return c.alter(userID, (*life).rename) }

// Leave deletes a person's account with all that belongs to it, false where nobody living has this id.
func (c *Clerk) Leave(userID string) ([]Event, bool) { return c.alter(userID, (*life).leave) }

func (c *Clerk) alter(userID string, what chapter) ([]Event, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.people[userID]
	if l == nil {
		return nil, false
	}
	return c.aside(func() { what(l) }), true
}

// Edit sets fields of a living object (paths as in sjson) and its updated_at, unless the fields name that. A story that still
// goes on knows nothing of it: the next event of the same object takes the fields back. False where no such object lives.
func (c *Clerk) Edit(table, id string, fields map[string]any) (Event, bool) {
	return c.force(table, id, "updated", func(o *Object, at int64) ([]byte, int64) {
		data, updated := []byte(o.JSON), at
		for path, value := range fields {
			data, _ = sjson.SetBytes(data, path, value) // a path that cannot be set leaves the object as it is
		}
		if _, given := fields["updated_at"]; given {
			updated = gjson.GetBytes(data, "updated_at").Int()
		} else {
			data, _ = sjson.SetBytes(data, "updated_at", updated)
		}
		return data, updated
	})
}

// Twin makes another object like a living one, with an id and times of its own and no part in the story: the cheap way to many
// of them. False where no such object lives.
func (c *Clerk) Twin(table, id string) (twin string, e Event, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.state[table]
	if t == nil || t.byID[id] == nil || t.byID[id].DeletedAt != 0 {
		return "", Event{}, false
	}
	prefix, _, _ := strings.Cut(id, "_")
	at := c.tick()
	twin = c.id(prefix)
	data := bytes.ReplaceAll(t.byID[id].JSON, []byte(`"id":"`+id+`"`), []byte(`"id":"`+twin+`"`))
	for _, path := range []string{"created_at", "updated_at"} {
		data, _ = sjson.SetBytes(data, path, at) // it can be set: the object has it
	}
	events := c.aside(func() { c.emit(resourceOf(table)+".created", twin, nil, at, data) })
	return twin, events[0], true
}

// Remove deletes one living object, and with it, without an event, the children of a user or an organization. False where no such object lives.
func (c *Clerk) Remove(table, id string) (Event, bool) {
	e, ok := c.force(table, id, "deleted", func(o *Object, _ int64) ([]byte, int64) {
		if table == "organization_memberships" { // its delete carries the full object
			return o.JSON, o.UpdatedAt
		}
		return c.render(deleted{Deleted: true, ID: id, Object: gjson.GetBytes(o.JSON, "object").Str}), 0
	})
	if ok && table == "users" {
		c.mu.Lock()
		if l := c.people[id]; l != nil {
			l.gone = true
			delete(c.people, id)
		}
		c.mu.Unlock()
	}
	return e, ok
}

func (c *Clerk) force(table, id, verb string, change func(*Object, int64) ([]byte, int64)) (Event, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.state[table]
	if t == nil || t.byID[id] == nil || t.byID[id].DeletedAt != 0 {
		return Event{}, false
	}
	events := c.aside(func() {
		data, updated := change(t.byID[id], c.tick())
		c.emit(resourceOf(table)+"."+verb, id, nil, updated, data)
	})
	return events[0], true
}

// aside runs what emits events and takes them out of the story's queue.
func (c *Clerk) aside(do func()) []Event {
	queue := c.queue
	c.queue = nil
	do()
	events := c.queue
	c.queue = queue
	return events
}

func resourceOf(table string) string {
	for resource, name := range tables {
		if name == table {
			return resource
		}
	}
	return strings.TrimSuffix(table, "s")
}
