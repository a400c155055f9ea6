package mirror

import "slices"

// Shape is a table or view of the mirror as the database has it, for those who print a schema.
type Shape struct {
	Name    string
	Object  string // what a row is, "organizationMembership"
	Of      string // of a view: the table that it shows
	Columns []ShapeColumn
}

// ShapeColumn is a column of a [Shape].
type ShapeColumn struct {
	Name    string
	Type    string // PostgreSQL's: text, boolean, bigint, double precision, timestamptz, jsonb
	NotNull bool   // of a view: the table's
}

// livePrefix is what the names of the views of living rows begin with.
const livePrefix = "live_"

// Columns that were added to a table behind the others, and that only this package reads.
var ownColumns = map[string][]string{
	"users":         {"children_deleted_at", "last_deleted_at"},
	"organizations": {"children_deleted_at"},
}

// notNull are the columns that every row has, besides those of kind [Bool].
var notNull = []string{"id", "source", "version", "seen_at", "raw", "event_id", "origin", "synced_at"}

// unfolded are the views of the arrays inside of users, of the living.
var unfolded = []Shape{
	unfold("user_emails", "userEmail", "email_address"),
	unfold("user_phones", "userPhone", "phone_number"),
	{
		Name: "user_accounts", Object: "userAccount", Of: "users", Columns: []ShapeColumn{
			{Name: "user_id", Type: "text", NotNull: true},
			{Name: "id", Type: "text"},
			{Name: "provider", Type: "text"},
			{Name: "provider_user_id", Type: "text"},
			{Name: "email_address", Type: "text"},
			{Name: "username", Type: "text"},
			{Name: "verified", Type: "boolean", NotNull: true},
		},
	},
}

func unfold(name, object, column string) Shape {
	return Shape{Name: name, Object: object, Of: "users", Columns: []ShapeColumn{
		{Name: "user_id", Type: "text", NotNull: true},
		{Name: "id", Type: "text"},
		{Name: column, Type: "text"},
		{Name: "verified", Type: "boolean", NotNull: true},
		{Name: "is_primary", Type: "boolean", NotNull: true},
	}}
}

// TableShapes are the tables of the mirror, in the order of [Tables].
func TableShapes() []Shape {
	shapes := make([]Shape, len(tables))
	for i, t := range tables {
		shapes[i] = Shape{Name: t.Name, Object: t.Resource}
		for _, c := range t.upsert.Columns {
			isBool := c.Type == types[Bool]
			shapes[i].Columns = append(shapes[i].Columns, ShapeColumn{Name: c.Name, Type: c.Type, NotNull: isBool || slices.Contains(notNull, c.Name)})
		}
		for _, name := range ownColumns[t.Name] {
			shapes[i].Columns = append(shapes[i].Columns, ShapeColumn{Name: name, Type: types[Time]})
		}
	}
	return shapes
}

// ViewShapes are the views that applications read: of the living rows of each table, and the arrays inside of users. They hold nothing that
// is Usher's own, no private metadata, and no bigint, which JSON.stringify refuses.
func ViewShapes() []Shape {
	shapes := make([]Shape, 0, len(tables)+len(unfolded))
	for _, t := range tables {
		s := Shape{Name: livePrefix + t.Name, Object: t.Resource, Of: t.Name, Columns: []ShapeColumn{
			{Name: "id", Type: types[Text], NotNull: true}, {Name: "source", Type: types[Text], NotNull: true},
		}}
		for _, c := range t.typed {
			if c.Name == "private_metadata" {
				continue
			}
			column := ShapeColumn{Name: c.Name, Type: types[c.Kind], NotNull: c.Kind == Bool}
			if c.Kind == Int {
				column.Type = "double precision"
			}
			s.Columns = append(s.Columns, column)
		}
		shapes = append(shapes, s)
	}
	return append(shapes, unfolded...)
}
