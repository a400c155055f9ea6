package mirror

import (
	"slices"
	"strings"

	"github.com/usherhq/usher/pkg/database"
)

// Kind is what a column holds.
type Kind int

// The kinds. A value that does not fit its column is NULL (Bool: false), never an error.
const (
	Text Kind = iota // text, NULL where Clerk has none or an empty one
	Bool             // never NULL
	Int              // bigint
	Time             // UTC, ms
	JSON             // jsonb, text on SQLite
)

// Column is a typed column of one resource.
type Column struct {
	Name string
	Kind Kind
	// Paths are where in the object the value stands, "a" or "a.b.c". The first that has a value of the
	// kind counts. None: the value is computed.
	Paths []string
}

// Table is the mirror of one resource.
type Table struct {
	Name     string
	Resource string   // the part of an event's type before the dot
	Columns  []Column // without those that every table has: see Common
	verbs    []string
	upsert   *database.Upsert
	nameless bool     // Clerk's objects do not say what they are
	parents  []parent // whose deletion takes the rows of this table along, in the order of their rank
	persons  []person // whom the rows name
	typed    []Column // all that the object determines: Columns, and Clerk's times
	targets  map[string][]target
	first    []int // by typed column: its first place; one more at the end
	ended    int   // the column of that name, -1 where there is none
	status   int   // as ended
}

// parent is a table of which the rows of another are children, and the column of those that has its id.
type parent struct {
	name  string // of its table
	in    string // the name of the column
	index int    // of the column among the typed ones
	table *Table
}

// target is what a top-level key of the object fills.
type target struct {
	kind  Kind
	place int    // one for each path of each column; those of a column stand together, in the order of their rank
	path  string // below the key, empty for its value itself
}

// clerkTimes are the columns of every table that the object determines. They stand behind the table's own.
var clerkTimes = []Column{
	{Name: "clerk_created_at", Kind: Time, Paths: []string{"created_at"}},
	{Name: "clerk_updated_at", Kind: Time, Paths: []string{"updated_at"}},
}

// deletedWith is the last column of tables whose rows have parents: the parent that took the row along, NULL where it lives or was deleted
// itself.
var deletedWith = database.Column{Name: "deleted_with", Type: "text"}

// common are the columns after those of the resource, in every table; id and source stand before them.
var common = []database.Column{
	{Name: "clerk_created_at", Type: "timestamptz"},
	{Name: "clerk_updated_at", Type: "timestamptz"},
	{Name: "version", Type: "bigint"},
	{Name: "seen_at", Type: "bigint"},
	{Name: "deleted_at", Type: "timestamptz"},
	{Name: "raw", Type: "jsonb"},
	{Name: "event_id", Type: "text"},
	{Name: "origin", Type: "text"},
	{Name: "synced_at", Type: "timestamptz"},
}

var types = map[Kind]string{Text: "text", Bool: "boolean", Int: "bigint", Time: "timestamptz", JSON: "jsonb"}

// parentTables is how many tables there are at the beginning of tables whose rows others are children of.
const parentTables = 2

// tables in the order in which every transaction writes them, so that two never wait for each other.
var tables = []*Table{
	{Name: "users", Resource: "user", Columns: []Column{
		{Name: "email"},
		{Name: "email_verified", Kind: Bool},
		{Name: "phone"}, // computed, see primaries
		asText("username"), asText("first_name"), asText("last_name"), asText("image_url"), asBool("has_image"), asBool("banned"), asBool("locked"),
		asText("external_id"), asJSON("public_metadata"), asJSON("unsafe_metadata"), asJSON("private_metadata"), asTime("last_sign_in_at"), asTime("last_active_at"),
	}},
	{Name: "organizations", Resource: "organization", Columns: []Column{
		asText("name"), asText("slug"), asText("image_url"), asBool("has_image"), asText("created_by"), asInt("max_allowed_memberships"), asInt("members_count"),
		asJSON("public_metadata"), asJSON("private_metadata"),
	}},
	{Name: "organization_memberships", Resource: "organizationMembership", parents: []parent{{name: "organizations", in: "organization_id"}, {name: "users", in: "user_id"}}, Columns: []Column{
		asText("organization_id", "organization.id", "organization_id"), asText("user_id", "public_user_data.user_id", "user_id"),
		asText("role"), asText("role_name"), asJSON("permissions"), asJSON("public_metadata"), asJSON("private_metadata"),
	}},
	{Name: "organization_invitations", Resource: "organizationInvitation", verbs: []string{"accepted", "revoked", "expired"}, parents: []parent{{name: "organizations", in: "organization_id"}}, Columns: []Column{
		asText("organization_id"), asText("email", "email_address"), asText("role"), asText("role_name"), asText("status"), asText("inviter_id"), asText("user_id"), asTime("expires_at"),
		asJSON("public_metadata"), asJSON("private_metadata"),
	}},
	{Name: "organization_domains", Resource: "organizationDomain", parents: []parent{{name: "organizations", in: "organization_id"}}, Columns: []Column{
		asText("organization_id"), asText("name"), asText("enrollment_mode"), asText("affiliation_email", "affiliation_email_address"),
		asText("affiliation_status", "affiliation_verification.status", "verification.status"), asText("ownership_status", "ownership_verification.status"),
		asInt("total_pending_invitations"), asInt("total_pending_suggestions"),
	}},
	{Name: "roles", Resource: "role", Columns: []Column{
		asText("key"), asText("name"), asText("description"), asBool("is_creator_eligible"), asJSON("permissions"),
	}},
	{Name: "permissions", Resource: "permission", Columns: []Column{
		asText("key"), asText("name"), asText("description"), asText("type"),
	}},
	{Name: "sessions", Resource: "session", verbs: []string{"pending", "active", "ended", "removed", "revoked", "expired", "replaced", "abandoned"}, parents: []parent{{name: "users", in: "user_id"}}, Columns: []Column{
		asText("user_id", "user_id", "user.id"), asText("client_id"), asText("status"),
		{Name: "ended", Kind: Bool},
		asText("last_active_organization_id"), asJSON("actor"),
		asText("ip_address", "latest_activity.ip_address"), asText("city", "latest_activity.city"), asText("country", "latest_activity.country"),
		asText("browser_name", "latest_activity.browser_name"), asText("device_type", "latest_activity.device_type"), asBool("is_mobile", "latest_activity.is_mobile"),
		asTime("last_active_at"), asTime("expire_at"), asTime("abandon_at"),
	}},
	{Name: "waitlist_entries", Resource: "waitlistEntry", Columns: []Column{
		asText("email", "email_address"), asText("status"), asBool("is_locked"), asText("invitation_id", "invitation.id"),
	}},
	{Name: "subscriptions", Resource: "subscription", verbs: []string{"active", "pastDue", "canceled", "ended", "abandoned", "upcoming", "expired"}, Columns: []Column{
		asText("status"), asText("payer_user_id", "payer.user_id"), asText("payer_organization_id", "payer.organization_id"), asText("latest_payment_id"),
		asTime("active_at"), asTime("past_due_at"), asTime("canceled_at"), asTime("ended_at"),
	}},
	{Name: "subscription_items", Resource: "subscriptionItem", verbs: []string{"active", "canceled", "upcoming", "ended", "abandoned", "incomplete", "pastDue", "freeTrialEnding", "expired"}, Columns: []Column{
		asText("subscription_id"), asText("status"), asText("payer_user_id", "payer.user_id"), asText("payer_organization_id", "payer.organization_id"),
		asText("plan_id", "plan_id", "plan.id"), asText("plan_slug", "plan.slug"), asText("plan_name", "plan.name"), asText("plan_period", "plan_period", "interval"),
		asInt("amount", "amount.amount", "plan.amount", "plan.fee.amount"), asText("currency", "amount.currency", "plan.currency", "plan.fee.currency"),
		asBool("is_free_trial"), asTime("period_start"), asTime("period_end"), asTime("past_due_at"), asTime("canceled_at"), asTime("ended_at"),
	}},
	{Name: "payment_attempts", Resource: "paymentAttempt", nameless: true, Columns: []Column{
		asText("status"), asText("charge_type"), asText("payer_user_id", "payer.user_id"), asText("payer_organization_id", "payer.organization_id"), asText("payment_id"), asText("invoice_id"),
		asInt("amount", "totals.grand_total.amount"), asText("currency", "totals.grand_total.currency"), asText("failed_reason", "failed_reason", "failed_reason.code"),
		asTime("billing_date"), asTime("paid_at"), asTime("failed_at"),
	}},
}

func asText(name string, paths ...string) Column { return column(name, Text, paths) }
func asBool(name string, paths ...string) Column { return column(name, Bool, paths) }
func asInt(name string, paths ...string) Column  { return column(name, Int, paths) }
func asTime(name string) Column                  { return column(name, Time, nil) }
func asJSON(name string) Column                  { return column(name, JSON, nil) }

func column(name string, kind Kind, paths []string) Column {
	if len(paths) == 0 {
		paths = []string{name}
	}
	return Column{Name: name, Kind: kind, Paths: paths}
}

var (
	byResource = map[string]*Table{}
	byName     = map[string]*Table{}
)

// Where the stubs of embedded copies go.
var usersTable, organizationsTable *Table

func init() { //nolint:gochecknoinits // tables that are built once from the description above
	for _, t := range tables {
		t.build()
		byResource[t.Resource], byName[t.Name] = t, t
	}
	usersTable, organizationsTable = byName["users"], byName["organizations"]
	for _, t := range tables {
		for i := range t.parents {
			t.parents[i].table, t.parents[i].index = byName[t.parents[i].name], t.index(t.parents[i].in)
		}
	}
}

func (t *Table) build() {
	t.verbs = append([]string{"created", "updated", "deleted"}, t.verbs...)
	t.targets = map[string][]target{}
	t.ended, t.status, t.persons = t.index("ended"), t.index("status"), persons[t.Name]
	columns := []database.Column{{Name: "id", Type: "text"}, {Name: "source", Type: "text"}}
	for _, c := range t.Columns {
		columns = append(columns, database.Column{Name: c.Name, Type: types[c.Kind]})
	}
	t.typed = slices.Concat(t.Columns, clerkTimes)
	places := 0
	for _, c := range t.typed {
		t.first = append(t.first, places)
		for _, path := range c.Paths {
			key, below, _ := strings.Cut(path, ".")
			t.targets[key] = append(t.targets[key], target{kind: c.Kind, place: places, path: below})
			places++
		}
	}
	t.first = append(t.first, places)
	order := []string{"version", "seen_at", "event_id"}
	if t.ended >= 0 { // an ended session never goes back, whatever its version
		order = append([]string{"ended"}, order...)
	}
	columns = append(columns, common...)
	if len(t.parents) > 0 {
		columns = append(columns, deletedWith)
	}
	t.upsert = &database.Upsert{
		Table: t.Name, Columns: columns, Conflict: []string{"id"},
		Guard: t.Name + ".source = excluded.source AND (" + t.Name + "." + strings.Join(order, ", "+t.Name+".") + ") < (excluded." + strings.Join(order, ", excluded.") + ")",
	}
}

func (t *Table) index(name string) int {
	return slices.IndexFunc(t.Columns, func(c Column) bool { return c.Name == name })
}

// Where in a row's values stand its source, its deleted_at and, last, its deleted_with.
const sourceAt = 1

func (t *Table) deletedAt() int { return 2 + len(t.typed) + 2 }

func (t *Table) deletedWith() int { return len(t.upsert.Columns) - 1 }

// Tables describes the mirror, in the order in which it is written. The result is the caller's, its Columns are not to be changed.
func Tables() []Table {
	result := make([]Table, len(tables))
	for i, t := range tables {
		result[i] = *t
	}
	return result
}

// Parents are the columns of a table (a name of [Tables]) that have the ids of a row's parents, by the names of their tables: a row is deleted
// with any of them. Empty for most tables.
func Parents(table string) map[string]string {
	columns := map[string]string{}
	if t := byName[table]; t != nil {
		for _, p := range t.parents {
			columns[p.name] = p.in
		}
	}
	return columns
}

// Common are the names of the columns that every table has besides its Columns, in the tables' order: id and source
// stand before the resource's own, the others after them.
func Common() []string {
	names := []string{"id", "source"}
	for _, c := range common {
		names = append(names, c.Name)
	}
	return names
}
