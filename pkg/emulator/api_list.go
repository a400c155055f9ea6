package emulator

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/tidwall/gjson"
	"github.com/tidwall/sjson"
)

const (
	defaultLimit = 10
	maxLimit     = 500
	// maxFilter is how many values a filter may have.
	maxFilter = 100
)

// userOrders are what users can be listed by.
var userOrders = []string{
	"created_at", "updated_at", "email_address", "web3wallet", "first_name", "last_name", "phone_number", "username", "last_active_at", "last_sign_in_at",
}

// userFilters are those that the emulator implements, with where a user has the values.
var userFilters = map[string]string{
	"email_address": "email_addresses.#.email_address", "phone_number": "phone_numbers.#.phone_number",
	"external_id": "external_id", "username": "username",
}

func field(data []byte, path string) string { return gjson.GetBytes(data, path).String() }

// listing is what a list request asks for.
type listing struct {
	limit, offset int
	after         string
	field         string
	descending    bool
}

// listing reads the paging parameters; where they are wrong it has answered and returns false.
func (c *call) listing(cursor bool, orders []string) (listing, bool) {
	l := listing{limit: defaultLimit, field: "created_at", descending: true}
	number := func(name string, least int) (int, bool) {
		text := c.one(name)
		n, err := strconv.Atoi(text)
		if err != nil || n < least {
			c.unprocessable(name, fmt.Sprintf("%s must be an integer not below %d.", name, least))
			return 0, false
		}
		return n, true
	}
	var ok bool
	if c.has("limit") {
		if l.limit, ok = number("limit", 1); !ok {
			return l, false
		}
		if l.limit > maxLimit {
			if c.api.cfg.Strict {
				c.unprocessable("limit", "limit must be less than or equal to 500.")
				return l, false
			}
			l.limit = defaultLimit
		}
	}
	if c.mood == TenOnly {
		l.limit = min(l.limit, defaultLimit)
	}
	if c.has("offset") {
		if l.offset, ok = number("offset", 0); !ok {
			return l, false
		}
	}
	if order := c.one("order_by"); order != "" {
		name := order
		l.descending = order[0] == '-'
		if order[0] == '-' || order[0] == '+' {
			name = order[1:]
		}
		if !slices.Contains(orders, name) {
			// A + that was not encoded comes as a space and ends here too.
			c.unprocessable("order_by", fmt.Sprintf("order_by must be one of %s.", strings.Join(orders, ", ")))
			return l, false
		}
		l.field = name
	}
	if cursor && c.has("starting_after") && !c.api.cfg.IgnoreCursor {
		l.after = c.one("starting_after")
		switch {
		case c.api.cfg.NoCursor:
			c.fail(http.StatusUnprocessableEntity, "form_param_unknown", "is unknown", "starting_after is not a valid parameter for this request.", "starting_after")
			return l, false
		case l.after == "" || l.field != "created_at" || l.offset != 0:
			c.unprocessable("starting_after", "starting_after needs order_by created_at and no offset.")
			return l, false
		}
	}
	return l, true
}

func (c *call) has(name string) bool { return len(c.query[name]) > 0 }

func (c *call) one(name string) string {
	if !c.has(name) {
		return ""
	}
	return c.query[name][0]
}

// only refuses parameters that are not named. Clerk may ignore some; a test should not rely on that.
func (c *call) only(names ...string) bool {
	for _, name := range slices.Sorted(maps.Keys(c.query)) {
		if !slices.Contains(names, name) {
			c.fail(http.StatusUnprocessableEntity, "form_param_unknown", "is unknown", name+" is not a valid parameter for this request.", name)
			return false
		}
	}
	return true
}

// sorted is a table's living objects by a field, ascending, as of a count of changes.
type sorted struct {
	changes int
	list    []*Object
}

// inOrder returns the living objects of a table by a field, ascending. The caller holds the lock and only reads.
func (t *table) inOrder(by string) []*Object {
	if by == "created_at" {
		return t.alive
	}
	if s := t.sorted[by]; s.list != nil && s.changes == t.changes {
		return s.list
	}
	list := slices.Clone(t.alive)
	sortBy(list, by)
	t.sorted[by] = sorted{changes: t.changes, list: list}
	return list
}

func sortBy(list []*Object, by string) {
	switch by {
	case "created_at":
		slices.SortStableFunc(list, func(a, b *Object) int { return cmp.Compare(a.CreatedAt, b.CreatedAt) })
	case "updated_at":
		slices.SortStableFunc(list, func(a, b *Object) int { return cmp.Compare(a.UpdatedAt, b.UpdatedAt) })
	default:
		path := by
		switch by {
		case "email_address":
			path = "email_addresses.0.email_address"
		case "phone_number":
			path = "phone_numbers.0.phone_number"
		}
		keys := make(map[*Object]gjson.Result, len(list))
		for _, o := range list {
			keys[o] = gjson.GetBytes(o.JSON, path)
		}
		slices.SortStableFunc(list, func(a, b *Object) int {
			x, y := keys[a], keys[b]
			switch {
			case x.Less(y, true):
				return -1
			case y.Less(x, true):
				return 1
			default:
				return 0
			}
		})
	}
}

// window returns what of n objects in ascending order a listing shows, as indexes from first on by step.
// after is the index of the cursor, -1 where there is none.
func (l listing) window(n, after int) (first, count, step int) {
	skip := l.offset
	first, step = 0, 1
	if l.descending {
		first, step = n-1, -1
		if after >= 0 {
			skip = n - after
		}
	} else if after >= 0 {
		skip = after + 1
	}
	return first + skip*step, max(0, min(l.limit, n-skip)), step
}

// cut takes a listing's page out of ascending objects.
func (l listing) cut(list []*Object, after int) []Object {
	first, count, step := l.window(len(list), after)
	page := make([]Object, count)
	for i := range page {
		page[i] = *list[first+i*step]
	}
	return page
}

// hidden is what lists leave out, nil for nothing.
func (a *API) hidden(table string) func(*Object) bool {
	if a.cfg.Unlisted == nil {
		return nil
	}
	return func(o *Object) bool { return a.cfg.Unlisted(table, *o) }
}

// page takes one page of a table, false where the cursor names nobody.
func (c *Clerk) page(name string, l listing, lasting bool, hidden func(*Object) bool) (page []Object, total int, found bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.state[name]
	if t == nil {
		return nil, 0, l.after == ""
	}
	list := t.inOrder(l.field)
	after := -1
	if hidden != nil {
		list = slices.DeleteFunc(slices.Clone(list), hidden)
		if l.after != "" {
			after = slices.IndexFunc(list, func(o *Object) bool { return o.ID == l.after })
			return l.cut(list, after), len(list), after >= 0
		}
	}
	if l.after != "" {
		o := t.byID[l.after]
		if o == nil || (o.DeletedAt != 0 && !lasting) {
			return nil, 0, false
		}
		if o.DeletedAt == 0 {
			after = t.place(o)
		} else {
			at, _ := slices.BinarySearchFunc(t.alive, o.CreatedAt, byCreation)
			if l.descending {
				after = at // the next older one is before this
			} else if after = at - 1; after < 0 {
				l.after, after = "", -1
			}
		}
	}
	return l.cut(list, after), len(list), true
}

// some takes a page out of the objects that a filter chose.
func some(list []*Object, l listing) (page []Object, total int) {
	sortBy(list, l.field)
	return l.cut(list, -1), len(list)
}

// owned are the living objects that belong to another one.
func (c *Clerk) owned(name, owner string) []*Object {
	var list []*Object
	if t := c.state[name]; t != nil {
		for _, o := range t.owned[owner] {
			if o.DeletedAt == 0 {
				list = append(list, o)
			}
		}
	}
	return list
}

// filtered are the living objects that a test accepts.
func (c *Clerk) filtered(name string, accept func(*Object) bool) []*Object {
	var list []*Object
	if t := c.state[name]; t != nil {
		for _, o := range t.alive {
			if accept(o) {
				list = append(list, o)
			}
		}
	}
	return list
}

// --- answers ---

func (c *call) spoilPage(page []Object) []Object {
	switch {
	case c.mood == Short:
		return page[:len(page)/2]
	case c.mood == NoID && len(page) > 0:
		page[0].JSON = bytes.Replace(page[0].JSON, []byte(`"id":"`+page[0].ID+`"`), []byte(`"id":""`), 1)
	case c.mood == SaysDeleted && len(page) > 0:
		last := &page[len(page)-1]
		last.JSON, _ = sjson.SetBytes(last.JSON, "deleted", true) // it can be set; and keeps its place in the order
	}
	return page
}

func (c *call) spoilCount(n int) int {
	off := max(1, n/10)
	switch c.mood { // the others leave counts as they are
	case CountLow:
		return max(0, n-off)
	case CountHigh:
		return n + off
	default:
		return n
	}
}

func join(to []byte, page []Object) []byte {
	size := 64
	for i := range page {
		size += len(page[i].JSON) + 1
	}
	to = append(slices.Grow(to, size), '[')
	for i := range page {
		if i > 0 {
			to = append(to, ',')
		}
		to = append(to, page[i].JSON...)
	}
	return append(to, ']')
}

func (c *call) array(page []Object) { c.answer(join(nil, c.spoilPage(page))) }

func (c *call) counted(page []Object, total int) {
	body := join([]byte(`{"data":`), c.spoilPage(page))
	body = append(body, `,"total_count":`...)
	body = strconv.AppendInt(body, int64(c.spoilCount(total)), 10)
	c.answer(append(body, '}'))
}

// listOf serves a whole table in pages.
func (a *API) listOf(table string, orders ...string) func(*call) {
	return func(c *call) {
		l, ok := c.listing(false, orders)
		if !ok {
			return
		}
		switch table {
		case "organizations":
			if !c.only("limit", "offset", "order_by", "organization_id", "include_members_count") {
				return
			}
			if ids := c.query["organization_id"]; len(ids) > maxFilter {
				c.unprocessable("organization_id", "organization_id may have at most 100 values.")
				return
			} else if len(ids) > 0 {
				c.clerk.mu.Lock()
				page, total := some(c.clerk.filtered(table, func(o *Object) bool { return slices.Contains(ids, o.ID) }), l)
				c.clerk.mu.Unlock()
				c.counted(page, total)
				return
			}
		case "organization_invitations", "waitlist_entries":
			if !c.only("limit", "offset", "order_by", "status") {
				return
			}
			if status := c.query["status"]; len(status) > 0 {
				c.clerk.mu.Lock()
				page, total := some(c.clerk.filtered(table, func(o *Object) bool { return slices.Contains(status, field(o.JSON, "status")) }), l)
				c.clerk.mu.Unlock()
				c.counted(page, total)
				return
			}
		default:
			if !c.only("limit", "offset", "order_by") {
				return
			}
		}
		page, total, _ := c.clerk.page(table, l, false, a.hidden(table))
		c.counted(page, total)
	}
}

// ofOrganization serves what belongs to one organization.
func (a *API) ofOrganization(table string) func(*call) {
	return func(c *call) {
		o, ok := c.organization()
		if !ok {
			return
		}
		l, ok := c.listing(false, []string{"created_at"})
		if !ok || !c.only("limit", "offset", "order_by", "user_id") {
			return
		}
		c.clerk.mu.Lock()
		list := c.clerk.owned(table, o.ID)
		if hidden := a.hidden(table); hidden != nil {
			list = slices.DeleteFunc(list, hidden)
		}
		if ids := c.query["user_id"]; len(ids) > 0 {
			list = slices.DeleteFunc(list, func(o *Object) bool { return !slices.Contains(ids, field(o.JSON, "public_user_data.user_id")) })
		}
		page, total := some(list, l)
		c.clerk.mu.Unlock()
		c.counted(page, total)
	}
}

func (a *API) membershipsOfUser(c *call) {
	id := c.r.PathValue("id")
	if o, ok := c.clerk.Object("users", id); !ok || o.DeletedAt != 0 {
		c.noUser(id)
		return
	}
	l, ok := c.listing(false, []string{"created_at"})
	if !ok || !c.only("limit", "offset", "order_by") {
		return
	}
	c.clerk.mu.Lock()
	page, total := some(c.clerk.filtered("organization_memberships", func(o *Object) bool { return field(o.JSON, "public_user_data.user_id") == id }), l)
	c.clerk.mu.Unlock()
	c.counted(page, total)
}

func (a *API) sessions(c *call) {
	user := c.one("user_id")
	if user == "" && c.one("client_id") == "" {
		c.fail(http.StatusUnprocessableEntity, "form_param_missing", "is missing", "user_id or client_id must be given.", "user_id")
		return
	}
	l, ok := c.listing(false, []string{"created_at"})
	if !ok || !c.only("limit", "offset", "user_id", "client_id", "status", "paginated") {
		return
	}
	c.clerk.mu.Lock()
	accept := func(o *Object) bool {
		return (!c.has("client_id") || field(o.JSON, "client_id") == c.one("client_id")) && (!c.has("status") || field(o.JSON, "status") == c.one("status"))
	}
	var list []*Object
	if user != "" {
		list = slices.DeleteFunc(c.clerk.owned("sessions", user), func(o *Object) bool { return !accept(o) })
	} else {
		list = c.clerk.filtered("sessions", accept)
	}
	page, total := some(list, l)
	c.clerk.mu.Unlock()
	for i := range page {
		page[i].JSON = bareSession(page[i].JSON)
	}
	if c.one("paginated") == "true" {
		c.counted(page, total)
	} else {
		c.array(page)
	}
}

// --- users ---

// userFilter returns the users that the request's filters choose, nil where it has none. Where they are wrong it has
// answered and returns false. The caller holds no lock.
func (c *call) userFilter() (choose func() []*Object, ok bool) {
	include, exclude := map[string]bool{}, map[string]bool{}
	for _, value := range c.query["user_id"] {
		// A + that was not encoded comes as a space; Clerk's parsers strip it too.
		id := strings.TrimLeft(value, "+ ")
		if rest, minus := strings.CutPrefix(value, "-"); minus {
			exclude[rest] = true
		} else {
			include[id] = true
		}
	}
	var tests []func(*Object) bool
	for name, values := range c.query {
		path, known := userFilters[name]
		if known {
			tests = append(tests, func(o *Object) bool {
				found := gjson.GetBytes(o.JSON, path)
				if !found.IsArray() {
					return found.Type == gjson.String && slices.Contains(values, found.Str)
				}
				return slices.ContainsFunc(found.Array(), func(v gjson.Result) bool { return slices.Contains(values, v.Str) })
			})
		}
		if (known || name == "user_id") && len(values) > maxFilter {
			c.unprocessable(name, name+" may have at most 100 values.")
			return nil, false
		}
	}
	for name, later := range map[string]bool{"created_at_after": true, "created_at_before": false} {
		if !c.has(name) {
			continue
		}
		at, err := strconv.ParseInt(c.one(name), 10, 64)
		if err != nil {
			c.unprocessable(name, name+" must be a time in milliseconds.")
			return nil, false
		}
		tests = append(tests, func(o *Object) bool { return later && o.CreatedAt > at || !later && o.CreatedAt < at })
	}
	if len(include)+len(exclude)+len(tests) == 0 {
		return nil, true
	}
	accept := func(o *Object) bool {
		if exclude[o.ID] {
			return false
		}
		for _, test := range tests {
			if !test(o) {
				return false
			}
		}
		return true
	}
	return func() []*Object {
		if len(include) == 0 {
			return c.clerk.filtered("users", accept)
		}
		var list []*Object
		for id := range include { // unknown ids are ignored
			if t := c.clerk.state["users"]; t != nil && t.byID[id] != nil && t.byID[id].DeletedAt == 0 && accept(t.byID[id]) {
				list = append(list, t.byID[id])
			}
		}
		return list
	}, true
}

func (c *call) onlyUsers(more ...string) bool {
	return c.only(append(more, append(slices.Collect(maps.Keys(userFilters)), "user_id", "created_at_after", "created_at_before")...)...)
}

func (a *API) countUsers(c *call) {
	choose, ok := c.userFilter()
	if choose == nil && a.cfg.Unlisted != nil {
		choose = func() []*Object { return c.clerk.filtered("users", func(*Object) bool { return true }) }
	}
	if !ok || !c.onlyUsers("limit", "offset", "order_by") { // the SDK sends those of the page too
		return
	}
	var n int
	switch {
	case c.crowd != nil:
		n = c.crowd.Size()
		if c.has("created_at_before") { // the other filters do not look at a crowd
			at, _ := strconv.ParseInt(c.one("created_at_before"), 10, 64) // was looked at above
			n = sort.Search(n, func(number int) bool { return c.crowd.CreatedAt(number) >= at })
		}
	case choose != nil:
		c.clerk.mu.Lock()
		list := choose()
		if hidden := a.hidden("users"); hidden != nil {
			list = slices.DeleteFunc(list, hidden)
		}
		n = len(list)
		c.clerk.mu.Unlock()
	default:
		n, _ = c.clerk.Count("users")
	}
	c.answer(fmt.Appendf(nil, `{"object":"total_count","total_count":%d}`, c.spoilCount(n)))
}

func (a *API) users(c *call) {
	l, ok := c.listing(true, userOrders)
	if !ok || !c.onlyUsers("limit", "offset", "order_by", "starting_after") {
		return
	}
	if c.crowd != nil {
		c.crowdPage(l)
		return
	}
	choose, ok := c.userFilter()
	if !ok {
		return
	}
	if choose == nil { // the lists of those that are asked for leave nobody out
		page, _, found := c.clerk.page("users", l, a.cfg.LastingCursor, a.hidden("users"))
		if !found {
			c.noUser(l.after)
			return
		}
		c.array(page)
		return
	}
	if l.after != "" {
		c.unprocessable("starting_after", "The emulator has no cursor over filtered users.")
		return
	}
	c.clerk.mu.Lock()
	page, _ := some(choose(), l)
	c.clerk.mu.Unlock()
	c.array(page)
}

// crowdPage lists a crowd: by creation or by change, which is the same; or those whose ids are asked for.
func (c *call) crowdPage(l listing) {
	if l.field != "created_at" && l.field != "updated_at" {
		c.unprocessable("order_by", "A crowd is ordered by created_at and updated_at only.")
		return
	}
	crowd := c.crowd
	numbers := make([]int, 0, l.limit)
	if ids := c.query["user_id"]; len(ids) > 0 {
		if len(ids) > maxFilter {
			c.unprocessable("user_id", "user_id may have at most 100 values.")
			return
		}
		for _, id := range ids {
			if number, ok := crowd.Number(strings.TrimLeft(id, "+ ")); ok && len(numbers) < l.limit {
				numbers = append(numbers, number)
			}
		}
	} else {
		after := -1
		if l.after != "" {
			number, ok := crowd.Number(l.after)
			if !ok {
				c.noUser(l.after)
				return
			}
			after = number
		}
		first, count, step := l.window(crowd.Size(), after)
		for i := range count {
			numbers = append(numbers, first+i*step)
		}
	}
	if c.mood == Short {
		numbers = numbers[:len(numbers)/2]
	}
	body := append(make([]byte, 0, 1024+len(numbers)*2200), '[')
	for i, number := range numbers {
		if i > 0 {
			body = append(body, ',')
		}
		body = crowd.Append(body, number)
	}
	c.answer(append(body, ']'))
}
