package clerk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/tidwall/gjson"
	"go.uber.org/zap"
)

const (
	maxPageSize  = 500 // Clerk's; above it, it has been seen to fall back to its default
	defaultLimit = 10  // Clerk's, where it did not understand ours
	// overlap is how many objects of the page before are read again with an offset: the sign that nothing slipped between.
	overlap = 20
	// minPageSize leaves a page more than its overlap, and cannot be mistaken for defaultLimit.
	minPageSize = 2 * overlap
	// memory is how many pages of objects are remembered to tell repeats in a sorted list; those before them are told by the order.
	memory = 2
	// stalls is how many pages in a row may bring nothing new before the list is given up.
	stalls = 4
)

// Order is how a resource is listed.
type Order int

const (
	// Created is oldest first, for whole sweeps.
	Created Order = iota
	// Updated is newest change first, for looking at what changed lately. An object that changes while the pages are
	// read moves to the front and may be missed: the next look begins where this one began.
	Updated
)

// resource is a table that the API lists for the whole instance.
type resource struct {
	name, path       string
	below            string // the path below an organization that lists those of it, where there is one
	array            bool   // a bare array, with a count of its own; else data and total_count
	cursor           bool   // starting_after
	created, updated bool   // can be ordered by created_at, updated_at
	addressable      bool   // has one address for each object
	optional         bool   // belongs to a feature that an instance may do without
	partial          bool   // the list leaves objects out: that one is not in it proves nothing
}

var resources = []resource{
	{name: "users", path: "/users", array: true, cursor: true, created: true, updated: true, addressable: true},
	{name: "organizations", path: "/organizations", created: true, addressable: true, optional: true},
	{name: "organization_memberships", path: "/organization_memberships", below: "/memberships", created: true, optional: true},
	// Of these two it is not documented that the instance's list can be ordered.
	// Invitations that a domain made are in no list, and of the others it depends on their status.
	{name: "organization_invitations", path: "/organization_invitations", below: "/invitations", optional: true, partial: true},
	{name: "organization_domains", path: "/organization_domains", below: "/domains", optional: true},
	{name: "roles", path: "/organization_roles", created: true, optional: true},
	{name: "permissions", path: "/organization_permissions", created: true, optional: true},
	{name: "waitlist_entries", path: "/waitlist_entries", created: true, optional: true},
}

// sessions can be read one by one and of one user only.
var sessions = resource{name: "sessions", path: "/sessions", addressable: true}

// Resources lists the tables of the mirror that the API can list for the whole instance.
func Resources() []string {
	names := make([]string, len(resources))
	for i := range resources {
		names[i] = resources[i].name
	}
	return names
}

// Sorted tells whether Pages of a resource come in an order. Created pages of a resource that is not sorted come as Clerk
// likes and cannot be resumed (a cursor begins again); Updated pages of it are refused.
func Sorted(resource string, order Order) bool {
	r, err := lookup(resource)
	return err == nil && (order == Created && r.created || order == Updated && r.updated)
}

// Addressable tells whether Get can ask for one object of a resource; for the others see [Client.Find].
func Addressable(resource string) bool {
	r, err := lookup(resource)
	return err == nil && r.addressable
}

// Optional tells whether a resource belongs to a feature that an instance may do without: reading it may be [ErrNotEnabled].
func Optional(resource string) bool {
	r, err := lookup(resource)
	return err == nil && r.optional
}

// Partial tells whether Clerk's list of a resource leaves out objects that there are. That it does not have one proves nothing then.
func Partial(resource string) bool {
	r, err := lookup(resource)
	return err == nil && r.partial
}

func lookup(name string) (resource, error) {
	for _, r := range append(resources[:len(resources):len(resources)], sessions) {
		if r.name == name {
			return r, nil
		}
	}
	return resource{}, fmt.Errorf("not a resource of the API: %w", ErrUnreadable)
}

// Page is one page of a list, without what an earlier page of the same range already held.
type Page struct {
	Objects []Object
	ReadAt  time.Time // when it was asked for: nothing in it is older than this
	Cursor  string    // with which Pages goes on after this page; empty at the end
	Total   int64     // what Clerk says the whole list holds, -1 where it does not say
}

// Pages ranges over a whole resource, [Config].PageSize objects a page, oldest first or newest change first; the last page may be
// empty, and there always is one. It ends after the first error, and whatever came before an error is not the whole.
//
// Every object that exists from the first request to the last is in a page, and none is in two, whatever is created,
// changed (in order Created) and deleted meanwhile. One that Clerk shows late, below those already read, may come out of order.
//
// cursor is empty or the one of a page, also of another process; what the following pages hold then is the same, but that objects of the same
// millisecond as the last one of that page may come again.
func (c *Client) Pages(ctx context.Context, resource string, order Order, cursor string) iter.Seq2[Page, error] {
	return func(yield func(Page, error) bool) {
		w, err := c.walk(resource, order, cursor)
		for err == nil {
			var page Page
			if page, err = w.next(ctx); err != nil || !yield(page, nil) || page.Cursor == "" {
				break
			}
		}
		if err != nil {
			yield(Page{}, fmt.Errorf("list %s: %w", resource, err))
		}
	}
}

// walk is a way through one list.
type walk struct {
	c       *Client
	path    string
	query   url.Values
	order   Order
	sorted  bool
	cursor  bool
	growing bool // at its end, and nobody says how long it is
	pos     position
	kept    map[string]struct{} // the last ones, or all where the list is not sorted
	ring    []mark
	ahead   *answer // the page after, where it was read to know whether there is one
	// goal is the key of the object that was the newest when the walk began: behind it a page that is not full is the
	// last. Without it, a list that keeps growing would have no end.
	goal  mark
	aimed bool
	// Of a sorted list, what is before this key has been passed.
	floor   int64
	floored bool
}

type mark struct {
	id  string
	key int64
}

// position is where a walk stands: what a cursor holds.
type position struct {
	Resource string   `json:"r"`
	Order    Order    `json:"o,omitempty"`
	Passed   int      `json:"n,omitempty"`   // objects of the list that are behind, by the list as it then was
	Key      int64    `json:"k,omitempty"`   // created_at or updated_at of the last one
	IDs      []string `json:"ids,omitempty"` // of the last ones, newest last
}

func (c *Client) walk(name string, order Order, cursor string) (*walk, error) {
	r, err := lookup(name)
	if err != nil || r.name == sessions.name {
		return nil, fmt.Errorf("cannot be listed for the whole instance: %w", ErrUnreadable)
	}
	if order == Updated && !r.updated || order < Created || order > Updated {
		return nil, fmt.Errorf("cannot be listed by change: %w", ErrUnreadable)
	}
	w := &walk{
		c: c, path: r.path, query: url.Values{}, order: order, sorted: Sorted(name, order),
		cursor: r.cursor && order == Created, growing: r.array && order == Created, pos: position{Resource: name, Order: order}, kept: map[string]struct{}{},
	}
	switch {
	case order == Updated:
		w.query.Set("order_by", "-updated_at")
	case r.created:
		w.query.Set("order_by", "+created_at")
	}
	if cursor == "" {
		return w, nil
	}
	var from position
	if err := json.Unmarshal([]byte(cursor), &from); err != nil || from.Resource != name || from.Order != order || from.Passed < 0 || len(from.IDs) > memory*maxPageSize {
		return nil, fmt.Errorf("the cursor is not one of this list: %w", ErrUnreadable)
	}
	if w.sorted && len(from.IDs) > 0 {
		w.pos = from
		for _, id := range from.IDs {
			w.kept[id] = struct{}{}
			w.ring = append(w.ring, mark{id: id, key: from.Key})
		}
		w.floor, w.floored = from.Key, true
	}
	return w, nil
}

func (w *walk) key(o *Object) int64 {
	if w.order == Updated {
		return -o.UpdatedAt
	}
	return o.CreatedAt
}

// passed tells whether an object was in an earlier page.
func (w *walk) passed(o *Object) bool {
	if _, ok := w.kept[o.ID]; ok {
		return true
	}
	return w.sorted && w.floored && w.key(o) < w.floor
}

// fresh takes those out of a page that were not in an earlier one, and remembers them.
func (w *walk) fresh(objects []Object) []Object {
	objects = slices.DeleteFunc(objects, func(o Object) bool {
		if w.passed(&o) {
			return true
		}
		w.kept[o.ID] = struct{}{} // a list may also repeat itself within a page
		w.ring = append(w.ring, mark{id: o.ID, key: w.key(&o)})
		return false
	})
	if n := len(objects); n > 0 {
		w.pos.Key = w.ring[len(w.ring)-1].key
	}
	if old := len(w.ring) - memory*w.c.pageSize; w.sorted && old > 0 {
		for _, m := range w.ring[:old] {
			delete(w.kept, m.id)
		}
		w.ring = slices.Delete(w.ring, 0, old)
		w.floor, w.floored = w.ring[0].key, true
	}
	return objects
}

// next reads the next page that has something new, or the last one.
func (w *walk) next(ctx context.Context) (Page, error) {
	for range stalls {
		a, last, err := w.read(ctx)
		if err != nil {
			return Page{}, err
		}
		if err := w.inOrder(a.objects); err != nil {
			return Page{}, err
		}
		page := Page{Objects: w.fresh(a.objects), ReadAt: a.at, Total: a.total}
		if last {
			return page, nil
		}
		if len(page.Objects) > 0 {
			page.Cursor = w.mark()
			return page, nil
		}
	}
	return Page{}, fmt.Errorf("%d pages in a row brought nothing new: %w", stalls, ErrUnreadable)
}

// mark is the cursor of the page that was just read.
func (w *walk) mark() string {
	pos := w.pos
	if !w.sorted {
		pos = position{Resource: w.pos.Resource, Order: w.pos.Order}
	}
	pos.IDs = nil
	for _, m := range w.ring[max(0, len(w.ring)-8):] {
		if w.sorted {
			pos.IDs = append(pos.IDs, m.id)
		}
	}
	text, err := json.Marshal(pos)
	if err != nil {
		panic(err) // strings and numbers
	}
	return string(text)
}

// inOrder refuses a page whose order is not the one that was asked for.
func (w *walk) inOrder(objects []Object) error {
	if !w.sorted {
		return nil
	}
	for i := 1; i < len(objects); i++ {
		if w.key(&objects[i]) < w.key(&objects[i-1]) {
			return fmt.Errorf("not in the order that was asked for: %w", ErrUnreadable)
		}
	}
	return nil
}

// read reads the next page and tells whether it is the last.
func (w *walk) read(ctx context.Context) (a answer, last bool, err error) {
	if w.growing && !w.aimed {
		newest, err := w.c.list(ctx, w.path, url.Values{"order_by": {"-created_at"}}, -1, 1)
		if err != nil {
			return answer{}, false, err
		}
		if len(newest.objects) > 0 {
			w.goal = mark{id: newest.objects[0].ID, key: newest.objects[0].CreatedAt}
		}
		w.aimed = true
	}
	a, last, err = w.step(ctx)
	if err != nil || !last || w.goal.id == "" || w.reached(a.objects) {
		return a, last, err
	}
	// The list ended before the one that was its newest. Then that one must have left.
	if _, err := w.c.one(ctx, w.path+"/"+w.goal.id, w.goal.id); err == nil {
		return answer{}, false, fmt.Errorf("the list ends before %s, which is there: %w", w.goal.id, ErrUnreadable)
	} else if !errors.Is(err, ErrNotFound) {
		return answer{}, false, err
	}
	return a, true, nil
}

// step is read without the question whether the end is believable.
func (w *walk) step(ctx context.Context) (a answer, last bool, err error) {
	if w.cursor && !w.c.withoutCursor.Load() {
		a, last, err = w.readAfter(ctx)
		if !errors.Is(err, errNoCursor) {
			return a, last, err
		}
		w.ahead = nil
	}
	return w.readFrom(ctx)
}

// errNoCursor says that starting_after does not work. It never leaves the package.
var errNoCursor = errors.New("no cursor")

// readAfter reads the page after the last object by the cursor. A page that is not full is not yet the last: it must reach
// the goal, or the one after it must be empty.
func (w *walk) readAfter(ctx context.Context) (answer, bool, error) {
	a := w.ahead
	w.ahead = nil
	if a == nil {
		first, err := w.after(ctx, w.last())
		if err != nil {
			return answer{}, false, err
		}
		a = &first
	}
	w.pos.Passed += len(a.objects)
	if len(a.objects) == 0 {
		return *a, true, nil
	}
	if len(a.objects) == w.c.pageSize {
		return *a, false, nil
	}
	if w.reached(a.objects) {
		return *a, true, nil
	}
	ids := make([]string, 0, len(a.objects))
	for i := range a.objects {
		ids = append(ids, a.objects[i].ID)
	}
	rest, err := w.after(ctx, ids)
	if err != nil {
		return answer{}, false, err
	}
	if len(rest.objects) > 0 && len(a.objects) == defaultLimit {
		return answer{}, false, w.c.limitNotUnderstood()
	}
	w.ahead = &rest
	return *a, len(rest.objects) == 0, nil
}

func (c *Client) limitNotUnderstood() error {
	return fmt.Errorf("asked for %d objects a page, got %d and there are more: %w", c.pageSize, defaultLimit, ErrUnreadable)
}

// reached tells whether a page, or those before it, hold the newest object of when the walk began, or younger ones.
func (w *walk) reached(objects []Object) bool {
	if w.goal.id == "" {
		return false
	}
	return len(w.ring) > 0 && w.pos.Key >= w.goal.key || len(objects) > 0 && w.key(&objects[len(objects)-1]) >= w.goal.key
}

// last are the ids of the objects read last, newest last.
func (w *walk) last() []string {
	ids := make([]string, len(w.ring))
	for i := range w.ring {
		ids[i] = w.ring[i].id
	}
	return ids
}

// after reads the page after the newest of these objects that the API still takes as a cursor.
func (w *walk) after(ctx context.Context, ids []string) (answer, error) {
	query := maps.Clone(w.query)
	if len(ids) == 0 {
		return w.c.list(ctx, w.path, query, 0, w.c.pageSize)
	}
	// The newest ones may be deleted by now, but hardly all of a page: go back faster and faster.
	for back := 1; ; back = min(back*2, len(ids)) {
		query.Set("starting_after", ids[len(ids)-back])
		a, err := w.c.list(ctx, w.path, query, -1, w.c.pageSize)
		var f *fault
		switch {
		case err == nil:
			if len(a.objects) > 0 && w.behind(&a.objects[0], ids, back) {
				w.giveUpCursor("starting_after is not looked at")
				return answer{}, errNoCursor
			}
			return a, nil
		case !errors.As(err, &f) || (f.status != http.StatusUnprocessableEntity && f.status != http.StatusNotFound && f.status != http.StatusBadRequest):
			return answer{}, err
		case f.code == "form_param_unknown":
			w.giveUpCursor("starting_after is not known")
			return answer{}, errNoCursor
		case back == len(ids):
			w.giveUpCursor("starting_after is refused")
			return answer{}, errNoCursor
		}
	}
}

// behind tells whether an object cannot come after the back-last of these.
func (w *walk) behind(o *Object, ids []string, back int) bool {
	return (w.passed(o) || slices.Contains(ids, o.ID)) && !slices.Contains(ids[len(ids)-back+1:], o.ID)
}

func (w *walk) giveUpCursor(reason string) {
	if w.c.withoutCursor.CompareAndSwap(false, true) {
		w.c.log.Info("Clerk's API has no cursor, paging by offset", zap.String("reason", reason))
	}
}

// readFrom reads the next page by offset. It begins with objects of the page before; where these are not there, so many were
// deleted that the list moved under the offset, and it goes back until it finds something it knows.
func (w *walk) readFrom(ctx context.Context) (answer, bool, error) {
	offset := max(0, w.pos.Passed-overlap)
	var a answer
	for {
		var err error
		if a, err = w.from(ctx, offset); err != nil {
			return answer{}, false, err
		}
		if offset == 0 || (len(a.objects) > 0 && w.passed(&a.objects[0])) {
			break
		}
		offset = max(0, offset-w.c.pageSize+overlap)
	}
	end := offset + len(a.objects)
	w.pos.Passed = end
	switch {
	case a.total >= 0:
		return a, int64(end) >= a.total, nil
	case len(a.objects) == 0:
		return a, true, nil
	case len(a.objects) == w.c.pageSize:
		return a, false, nil
	case w.reached(a.objects):
		return a, true, nil
	}
	// Nobody says how long the list is. It ends here if nothing new follows.
	rest, err := w.from(ctx, end)
	if err != nil {
		return answer{}, false, err
	}
	rest.objects = slices.DeleteFunc(rest.objects, func(o Object) bool {
		return w.passed(&o) || slices.ContainsFunc(a.objects, func(other Object) bool { return other.ID == o.ID })
	})
	if len(rest.objects) > 0 && len(a.objects) == defaultLimit {
		return answer{}, false, w.c.limitNotUnderstood()
	}
	// What follows is read again with its overlap: between the two requests the list may have moved.
	return a, len(rest.objects) == 0, nil
}

func (w *walk) from(ctx context.Context, offset int) (answer, error) {
	query := maps.Clone(w.query)
	return w.c.list(ctx, w.path, query, offset, w.c.pageSize)
}

// all reads a list whole and agreed with its own count.
func (c *Client) all(ctx context.Context, path string, query url.Values) ([]Object, error) {
	w := &walk{c: c, path: path, query: query, kept: map[string]struct{}{}}
	var objects []Object
	for {
		page, err := w.next(ctx)
		if err != nil {
			return nil, err
		}
		if page.Total < 0 {
			return nil, fmt.Errorf("no total_count: %w", ErrUnreadable)
		}
		if objects = append(objects, page.Objects...); page.Cursor == "" {
			if int64(len(objects)) < page.Total {
				return nil, fmt.Errorf("%d objects of %d: %w", len(objects), page.Total, ErrUnreadable)
			}
			return objects, nil
		}
	}
}

// answer is one page as the API gave it.
type answer struct {
	objects []Object
	total   int64 // -1 where the API does not say
	at      time.Time
}

// list makes one list request, again where that may help, and refuses what contradicts itself. offset below 0 is none.
func (c *Client) list(ctx context.Context, path string, query url.Values, offset, limit int) (answer, error) {
	query.Set("limit", strconv.Itoa(limit))
	if offset > 0 {
		query.Set("offset", strconv.Itoa(offset))
	}
	return retry(ctx, c, func(ctx context.Context) (answer, error) {
		body, at, err := c.call(ctx, http.MethodGet, path, query, "")
		if err != nil {
			return answer{}, err
		}
		a, err := readList(body, max(0, offset), limit)
		a.at = at
		return a, err
	})
}

func readList(body string, offset, limit int) (answer, error) {
	a := answer{total: -1}
	list := gjson.Parse(body)
	if list.IsObject() {
		total := list.Get("total_count")
		if list = list.Get("data"); total.Exists() {
			if a.total = total.Int(); total.Type != gjson.Number || a.total < 0 {
				return a, fmt.Errorf("total_count is not a count: %w", ErrUnreadable)
			}
		}
	}
	if !list.IsArray() {
		return a, fmt.Errorf("not a list: %w", ErrUnreadable)
	}
	var err error
	list.ForEach(func(_, value gjson.Result) bool {
		var o Object
		if o, err = object(value); err == nil {
			a.objects = append(a.objects, o)
		}
		return err == nil
	})
	if err != nil {
		return a, err
	}
	n, end := len(a.objects), int64(offset+len(a.objects))
	switch {
	case n > limit:
		return a, fmt.Errorf("asked for %d objects, got %d: %w", limit, n, ErrUnreadable)
	case a.total >= 0 && n < limit && end < a.total, a.total >= 0 && n > 0 && end > a.total:
		return a, fmt.Errorf("%d objects from %d on of %d: %w", n, offset, a.total, ErrUnreadable)
	}
	return a, nil
}
