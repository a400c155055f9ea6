package emulator

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tidwall/gjson"
	"github.com/tidwall/sjson"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

// TriggerPath is where an [API] takes a [Wish], with its secret key. Clerk has no such path.
const TriggerPath = "/emulator/events"

// Wish is an event that [Clerk.Trigger] makes.
type Wish struct {
	Type string // a type of pkg/fixture, or a variant's name
	Nth  int    // of several that are wished for at once, from 0 on: they are about one object after the other
	// Set is applied last, in order. An id in it says which of the instance's objects the event is about, such as data.user_id of a session.
	Set []fixture.PathValue
	// Alone makes the event of objects of its own, as if the instance were new, and keeps none.
	Alone bool
	// Body is an envelope that is taken as it is, in place of all else.
	Body []byte
}

// Trigger makes an event as if it had happened now, by the machine's clock, and lets the instance's state follow it. An event of something new joins
// what is there: a session belongs to a user, a membership to a user and an organization. What is missing comes first in the
// result, the wished one last. Any other event is about the newest object that it fits. A story that is still told knows nothing of it. The error wraps
// [fixture.ErrUnknown] where there is no payload of the type.
func (c *Clerk) Trigger(w Wish) ([]Event, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.triggered = max(c.triggered+1, time.Now().UnixMilli())
	t := &trigger{c: c, nth: max(w.Nth, 0), alone: w.Alone, at: c.triggered}
	body := w.Body
	if body == nil {
		var err error
		if body, err = t.compose(w.Type, w.Set); err != nil {
			return nil, err
		}
	}
	t.announce(body)
	return t.events, nil
}

// Remember takes a living object into the state without an event, as one that was there before. table is one of [Tables].
func (c *Clerk) Remember(table string, object []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(table, gjson.GetBytes(object, "id").String(), gjson.GetBytes(object, "updated_at").Int(), 0, bytes.Clone(object))
}

// trigger is the making of one event and of those that it needs.
type trigger struct {
	c      *Clerk
	nth    int
	alone  bool
	set    []fixture.PathValue // of the event that is being composed
	at     int64               // ms, its time
	events []Event
}

// announce lets the state follow an event. What is no event of an object that the mirror would take changes nothing.
func (t *trigger) announce(body []byte) {
	c, typ, data := t.c, gjson.GetBytes(body, "type").String(), gjson.GetBytes(body, "data")
	id, kind := data.Get("id").String(), event.Type(typ)
	t.events = append(t.events, Event{ID: fixture.NewID(), Type: typ, ObjectID: id, At: time.Now().UTC(), Body: body})
	name := tables[kind.Resource()]
	full := data.Get("object").Exists() && data.Get("updated_at").Exists()
	if t.alone || id == "" || name == "" || !full && !slices.Contains(fixture.Types(), typ) {
		return
	}
	if !kind.Deleted() && !possible(data) { // no list could have it
		return
	}
	deletedAt, table := int64(0), c.table(name)
	if kind.Deleted() {
		deletedAt = max(gjson.GetBytes(body, "timestamp").Int(), 1)
		if l := c.people[id]; name == "users" && l != nil {
			l.gone = true
			delete(c.people, id)
		}
	} else if o := table.byID[id]; o != nil && o.DeletedAt != 0 && !o.buried { // it is back
		at, _ := slices.BinarySearchFunc(table.alive, o.CreatedAt+1, byCreation)
		table.alive = slices.Insert(table.alive, at, o)
		table.live++
	}
	c.keep(name, id, data.Get("updated_at").Int(), deletedAt, []byte(data.Raw))
}

var idRE = regexp.MustCompile(`^[\w-]+$`)

// possible reports whether an object is text, with an id and times of the types that Clerk has there.
func possible(data gjson.Result) bool {
	updated := data.Get("updated_at")
	return utf8.ValidString(data.Raw) && data.Get("id").Type == gjson.String && idRE.MatchString(data.Get("id").Str) && data.Get("created_at").Type == gjson.Number && (updated.Type == gjson.Number || !updated.Exists())
}

// compose makes an envelope without announcing it.
func (t *trigger) compose(typ string, set []fixture.PathValue) ([]byte, error) {
	t.set = set
	body, err := fixture.MakeAt(typ, time.UnixMilli(t.at))
	if err != nil {
		return nil, fmt.Errorf("trigger: %w", err)
	}
	kind := event.Type(gjson.GetBytes(body, "type").String())
	d := &doc{[]byte(gjson.GetBytes(body, "data").Raw)}
	canonical := slices.Contains(fixture.Types(), typ)
	var o *Object
	if canonical && !t.alone && kind.Verb() != "created" && kind != "session.pending" {
		o = t.subject(kind)
	}
	if o != nil {
		t.change(d, o, kind)
	} else if err := t.dress(d, kind); err != nil {
		return nil, err
	}
	if body, err = sjson.SetRawBytes(body, "data", d.json); err != nil {
		return nil, fmt.Errorf("trigger %s: %w", typ, err)
	}
	if canonical && t.c.cfg.InstanceID != "" {
		if body, err = sjson.SetBytes(body, "instance_id", t.c.cfg.InstanceID); err != nil {
			return nil, fmt.Errorf("trigger %s: %w", typ, err)
		}
	}
	body, err = fixture.Apply(body, set...)
	if err != nil {
		return nil, fmt.Errorf("trigger %s: %w", typ, err)
	}
	return body, nil
}

// before makes an event that must come first, a second earlier, and returns its object.
func (t *trigger) before(typ string, set ...fixture.PathValue) (gjson.Result, error) {
	outer, at := t.set, t.at
	defer func() { t.set, t.at = outer, at }()
	t.at -= time.Second.Milliseconds()
	body, err := t.compose(typ, set)
	if err != nil {
		return gjson.Result{}, err
	}
	if !t.alone {
		t.announce(body)
	}
	return gjson.GetBytes(body, "data"), nil
}

// named is the living object of a table that one of the sets names, nil for none.
func (t *trigger) named(table string, paths ...string) *Object {
	for _, s := range t.set {
		if !slices.Contains(paths, s.Path) {
			continue
		}
		if o := t.c.table(table).byID[strings.Trim(s.Value, `"`)]; o != nil && o.DeletedAt == 0 {
			return o
		}
	}
	return nil
}

// missing is the id that one of the sets names, where nothing living of the table has it: empty for none.
func (t *trigger) missing(table string, paths ...string) string {
	for _, s := range t.set {
		if id := strings.Trim(s.Value, `"`); slices.Contains(paths, s.Path) && id != "" && t.living(table, id) == nil {
			return id
		}
	}
	return ""
}

// pick is the nth newest living object of a table that fits, from the newest again where they are used up; nil for none.
func (t *trigger) pick(table string, fits func(*Object) bool) *Object {
	var list []*Object
	for _, o := range slices.Backward(t.c.table(table).alive) {
		if fits == nil || fits(o) {
			list = append(list, o)
			if len(list) > t.nth {
				return o
			}
		}
	}
	if len(list) == 0 {
		return nil
	}
	return list[t.nth%len(list)]
}

// subject is the object that an event changes or ends, nil where it fits no object.
func (t *trigger) subject(kind event.Type) *Object {
	name := tables[kind.Resource()]
	if name == "" {
		return nil
	}
	for _, s := range t.set {
		if s.Path == "data.id" { // one that is named, or a new one of that name
			return t.named(name, "data.id")
		}
	}
	var open []string // states that the event ends, so that the next one meets another object
	switch {
	case kind.Resource() == "session":
		open = []string{"active", "pending"}
	case kind.Resource() == "organizationInvitation":
		open = []string{"pending"}
	case !kind.Deleted():
		return t.pick(name, nil)
	}
	nth := t.nth
	defer func() { t.nth = nth }()
	t.nth = 0
	return t.pick(name, func(o *Object) bool {
		return open == nil || slices.Contains(open, gjson.GetBytes(o.JSON, "status").Str)
	})
}

// changes are the fields of an object that an event of a resource takes from the canonical payload; all else stays as it is.
var changes = map[string][]string{
	"session":                {"status", "latest_activity"},
	"organizationMembership": {"role", "role_name", "permissions"},
	"organizationInvitation": {"status"},
	"organizationDomain":     {"affiliation_verification", "verification", "enrollment_mode", "total_pending_invitations", "total_pending_suggestions"},
	"role":                   {"description"},
	"permission":             {"description"},
	"waitlistEntry":          {"status", "invitation"},
	"subscription":           {"status", "canceled_at", "past_due_at", "ended_at"},
	"subscriptionItem":       {"status", "is_free_trial"},
	"paymentAttempt":         {"status", "paid_at", "failed_at", "failed_reason"},
}

// change makes d, the canonical data of an event, that of the same event of a living object.
func (t *trigger) change(d *doc, o *Object, kind event.Type) {
	canonical := gjson.ParseBytes(bytes.Clone(d.json))
	before := gjson.ParseBytes(o.JSON)
	switch {
	case kind == "organizationMembership.deleted": // a full object, as of its last change
		d.json = bytes.Clone(o.JSON)
		return
	case kind.Deleted():
		d.put("id", o.ID)
		for _, field := range []string{"external_id", "slug"} {
			d.take(field, before.Get(field))
		}
		return
	}
	d.json = bytes.Clone(o.JSON)
	for _, field := range changes[kind.Resource()] {
		d.take(field, canonical.Get(field))
	}
	d.put("updated_at", t.at)
	d.put("last_active_at", t.at)
	d.put("invitation.email_address", before.Get("email_address").String())
	if user := t.living("users", before.Get("user_id").String()); kind.Resource() == "session" && user != nil {
		d.take("user", gjson.ParseBytes(user.JSON))
	}
	if user := t.living("users", before.Get("public_user_data.user_id").String()); user != nil {
		d.public("public_user_data", gjson.ParseBytes(user.JSON))
	}
	if org := t.living("organizations", before.Get("organization.id").String()); org != nil {
		d.take("organization", gjson.ParseBytes(org.JSON))
	}
	if kind == "organizationInvitation.accepted" {
		if user := t.pick("users", nil); user != nil {
			d.json, _ = sjson.SetBytes(d.json, "user_id", user.ID) // an object takes it
		}
	}
}

func (t *trigger) living(table, id string) *Object {
	if o := t.c.table(table).byID[id]; o != nil && o.DeletedAt == 0 {
		return o
	}
	return nil
}

// user is the person that an event is about, who signs up first where the instance has no user.
func (t *trigger) user(fits func(*Object) bool, paths ...string) (gjson.Result, error) {
	o := t.named("users", paths...)
	if id := t.missing("users", paths...); o == nil && id != "" && !t.alone {
		return t.before("user.created", fixture.Set("data.id", id))
	}
	if o == nil && !t.alone {
		o = t.pick("users", fits)
	}
	if o == nil {
		return t.before("user.created")
	}
	return gjson.ParseBytes(o.JSON), nil
}

func (t *trigger) organization(paths ...string) (gjson.Result, error) {
	o := t.named("organizations", paths...)
	if id := t.missing("organizations", paths...); o == nil && id != "" && !t.alone {
		return t.before("organization.created", fixture.Set("data.id", id))
	}
	if o == nil && !t.alone {
		nth := t.nth
		t.nth = 0 // the newest: its members are to be many
		o = t.pick("organizations", nil)
		t.nth = nth
	}
	if o == nil {
		return t.before("organization.created")
	}
	return gjson.ParseBytes(o.JSON), nil
}

// dress makes d the data of a new object, of a person, an organization of its own, or of those that are there.
func (t *trigger) dress(d *doc, kind event.Type) error {
	if d.get("deleted").Bool() { // of something that was never there
		return nil
	}
	switch kind.Resource() {
	case "user":
		d.person(t.c.newPerson())
	case "waitlistEntry":
		p := t.c.newPerson()
		d.put("email_address", p.address())
		d.put("invitation.email_address", p.address())
	case "role", "permission":
		d.put("key", d.get("key").String()+"_"+suffix(5))
	case "session":
		user, err := t.user(nil, "data.user_id")
		if err != nil {
			return err
		}
		d.take("user", user)
		d.take("user_id", user.Get("id"))
	case "email", "sms":
		if t.alone || len(t.c.table("users").alive) == 0 { // the code of a sign-up comes before its user
			p := t.c.newPerson()
			d.put("to_email_address", p.address())
			d.put("to_phone_number", p.phone)
			return nil
		}
		user, err := t.user(nil, "data.user_id")
		if err != nil {
			return err
		}
		d.take("user_id", user.Get("id"))
		d.take("email_address_id", user.Get("primary_email_address_id"))
		d.put("to_email_address", identifier(user))
	case "organization":
		user, err := t.user(nil, "data.created_by")
		if err != nil {
			return err
		}
		name := tradeNames[t.c.newPerson().number%len(tradeNames)]
		d.put("name", name[0])
		d.put("slug", name[1]+"-"+suffix(4))
		d.take("created_by", user.Get("id"))
	case "organizationMembership", "organizationInvitation", "organizationDomain":
		return t.dressOfOrganization(d, kind)
	case "subscription", "subscriptionItem", "paymentAttempt":
		return t.dressBilling(d, kind)
	}
	return nil
}

func (t *trigger) dressOfOrganization(d *doc, kind event.Type) error {
	org, err := t.organization("data.organization.id", "data.organization_id")
	if err != nil {
		return err
	}
	d.take("organization", org)
	d.take("organization_id", org.Get("id"))
	for _, field := range []string{"id", "name", "slug", "image_url", "has_image"} {
		d.take("public_organization_data."+field, org.Get(field))
	}
	if kind.Resource() == "organizationDomain" {
		name := org.Get("slug").String() + ".example.com"
		d.put("name", name)
		d.put("affiliation_email_address", "admin@"+name)
		return nil
	}
	if kind.Resource() == "organizationInvitation" {
		inviter, err := t.user(nil, "data.inviter_id")
		if err != nil {
			return err
		}
		d.public("public_inviter_data", inviter)
		d.take("inviter_id", inviter.Get("id"))
		if !d.get("user_id").Exists() {
			d.put("email_address", t.c.newPerson().address())
			return nil
		}
	}
	members := map[string]bool{}
	if !t.alone {
		for _, m := range t.c.owned("organization_memberships", org.Get("id").String()) {
			members[gjson.GetBytes(m.JSON, "public_user_data.user_id").Str] = true
		}
	}
	nth := t.nth
	t.nth = 0 // who has joined is a member for the next
	user, err := t.user(func(o *Object) bool { return !members[o.ID] }, "data.public_user_data.user_id", "data.user_id")
	t.nth = nth
	if err != nil {
		return err
	}
	d.public("public_user_data", user)
	d.take("user_id", user.Get("id"))
	d.put("email_address", identifier(user))
	return nil
}

func (t *trigger) dressBilling(d *doc, kind event.Type) error {
	user, err := t.user(nil, "data.payer.user_id")
	if err != nil {
		return err
	}
	id := user.Get("id").String()
	var subscription gjson.Result
	if !t.alone {
		for _, o := range slices.Backward(t.c.table("subscriptions").alive) {
			if gjson.GetBytes(o.JSON, "payer.user_id").Str == id {
				subscription = gjson.ParseBytes(o.JSON)
				break
			}
		}
	}
	if kind.Resource() != "subscription" && !subscription.Exists() {
		if t.alone {
			subscription = gjson.ParseBytes(d.json) // its ids are its own
		} else if subscription, err = t.before("subscription.created", fixture.Set("data.payer.user_id", id)); err != nil {
			return err
		}
	}
	if payer := subscription.Get("payer"); payer.Exists() && payer.Get("user_id").Str == id {
		d.take("payer", payer)
	} else {
		for _, field := range []string{"first_name", "last_name", "image_url"} {
			d.take("payer."+field, user.Get(field))
		}
		d.put("payer.email", identifier(user))
		d.put("payer.user_id", id)
	}
	d.take("payer_id", d.get("payer.id"))
	if !t.alone {
		d.take("subscription_id", subscription.Get("id"))
	}
	return nil
}

// identifier is what Clerk shows of a user to others.
func identifier(user gjson.Result) string {
	primary := user.Get("primary_email_address_id").String()
	for _, address := range user.Get("email_addresses").Array() {
		if address.Get("id").String() == primary {
			return address.Get("email_address").String()
		}
	}
	if phone := user.Get("phone_numbers.0.phone_number"); phone.Exists() {
		return phone.String()
	}
	return user.Get("email_addresses.0.email_address").String()
}

var tradeNames = [][2]string{
	{"Acme Research", "acme-research"},
	{"Łódź Labs", "lodz-labs"},
	{"Blue <Bird> & Sons", "blue-bird"},
	{"Café Zürich", "cafe-zuerich"},
	{"Northwind", "northwind"},
	{"東京商会", "tokyo"},
	{"Initech", "initech"},
	{"Umbrella", "umbrella"},
}

// person is a new person.
type person struct {
	number      int
	first, last string
	mailbox     string
	phone       string
}

func (p person) address() string { return p.mailbox + "@" + hosts[0] }

// newPerson is another one than the last 191. It leaves the story's chance alone.
func (c *Clerk) newPerson() person {
	if c.persons == 0 {
		c.persons = 1 + mathrand.IntN(len(firstNames)*len(lastNames))
	}
	n := c.persons
	c.persons++
	return person{
		number: n, first: firstNames[n%len(firstNames)], last: lastNames[(n/len(firstNames)+n)%len(lastNames)],
		mailbox: latin[n%len(latin)] + "." + suffix(6), phone: fmt.Sprintf("+1555555%04d", 100+n%100),
	}
}

// suffix makes a name one of its own.
func suffix(n int) string {
	text := make([]byte, n)
	for i := range text {
		text[i] = "abcdefghijklmnopqrstuvwxyz0123456789"[mathrand.IntN(36)]
	}
	return string(text)
}

// doc is an object that is being written. What it does not have is not added, so that every payload keeps its shape.
type doc struct{ json []byte }

func (d *doc) get(path string) gjson.Result { return gjson.GetBytes(d.json, path) }

func (d *doc) put(path string, value any) {
	if d.get(path).Exists() {
		d.json, _ = sjson.SetBytes(d.json, path, value) // it is there, so it can be set
	}
}

// take puts what another object has.
func (d *doc) take(path string, value gjson.Result) {
	if value.Exists() && d.get(path).Exists() {
		d.json, _ = sjson.SetRawBytes(d.json, path, []byte(value.Raw)) // as in put
	}
}

// person names a user anew, where it has names and addresses.
func (d *doc) person(p person) {
	name := func(prefix string) {
		for field, value := range map[string]string{"first_name": p.first, "last_name": p.last} {
			if d.get(prefix+field).Type == gjson.String {
				d.put(prefix+field, value)
			}
		}
	}
	name("")
	for i := range d.get("email_addresses").Array() {
		address := p.address()
		if i > 0 {
			address = p.mailbox + "+" + strconv.Itoa(i) + "@" + hosts[i%len(hosts)]
		}
		d.put("email_addresses."+strconv.Itoa(i)+".email_address", address)
	}
	for i := range d.get("phone_numbers").Array() {
		d.put("phone_numbers."+strconv.Itoa(i)+".phone_number", p.phone)
	}
	for i := range d.get("external_accounts").Array() {
		prefix := "external_accounts." + strconv.Itoa(i) + "."
		name(prefix)
		d.put(prefix+"email_address", p.address())
	}
	if d.get("username").Type == gjson.String {
		d.put("username", strings.ReplaceAll(p.mailbox, ".", "_"))
	}
	if d.get("external_id").Type == gjson.String {
		d.put("external_id", "crm-"+suffix(6))
	}
}

// public writes what others see of a user.
func (d *doc) public(path string, user gjson.Result) {
	for _, field := range []string{"banned", "deprovisioned", "first_name", "last_name", "has_image", "image_url", "profile_image_url", "username"} {
		d.take(path+"."+field, user.Get(field))
	}
	d.take(path+".user_id", user.Get("id"))
	d.put(path+".identifier", identifier(user))
}

// trigger answers a wish with the events that are to be sent, in their order.
func (a *API) trigger(c *call) {
	var w Wish
	if err := json.NewDecoder(io.LimitReader(c.r.Body, 4<<20)).Decode(&w); err != nil {
		c.fail(http.StatusUnprocessableEntity, "request_body_invalid", "is invalid", "The body is no wish: "+err.Error(), "")
		return
	}
	events, err := c.clerk.Trigger(w)
	if err != nil {
		c.fail(http.StatusUnprocessableEntity, "form_param_value_invalid", "is invalid", err.Error(), "")
		return
	}
	body, err := json.Marshal(Wished{Events: events})
	if err != nil {
		panic(err) // strings and bytes
	}
	c.answer(body)
}

// Wished is the answer of [TriggerPath].
type Wished struct {
	Events []Event
}
