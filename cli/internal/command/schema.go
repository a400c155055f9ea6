package command

import (
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/mirror"
)

func (c *cli) schema() *cobra.Command {
	var s schemaPrinter
	dialect := "postgres"
	cmd := &cobra.Command{
		Use:   "schema prisma|drizzle|sql",
		Short: "Print the mirror's tables and views as models for Prisma or Drizzle, or as SQL",
		Long: "schema prints what an application's developers read: the tables of Clerk's objects, and the views live_users,\n" +
			"live_organizations, … of those that are not deleted, which have no private metadata and nothing that is Usher's own.\n" +
			"It asks no database; USHER_DATABASE_SCHEMA names the PostgreSQL schema. What it prints is written to a file as it is,\n" +
			"and printed again after each update of Usher; its first lines say what to set, so that Prisma and Drizzle leave Usher's\n" +
			"tables alone. docs/prisma.md shows the whole way. The SQL is for reading: `usher setup` makes the tables.\n\n" +
			"Where the application has a model of the same name, such as User, take --views or --prefix.",
		Example: "  usher schema prisma --views > prisma/usher.prisma\n" +
			"  usher schema prisma --views --field 'LiveUser: posts Post[]' > prisma/usher.prisma\n" +
			"  usher schema drizzle > src/db/usher.ts\n" +
			"  usher schema sql --dialect sqlite",
		Args:      cobra.ExactArgs(1),
		ValidArgs: []string{"prisma", "drizzle", "sql"},
		RunE: func(_ *cobra.Command, args []string) error {
			settings, err := c.settings()
			if err != nil {
				return err
			}
			s.schema, s.sqlite = settings.DatabaseSchema, dialect == "sqlite"
			text, err := s.print(args[0], dialect)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprint(c.env.Stdout, text); err != nil {
				return fmt.Errorf("print: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&s.viewsOnly, "views", false, "only the views: all that most applications read")
	cmd.Flags().StringVar(&s.prefix, "prefix", "", "put before the names of models, such as Clerk for ClerkUser")
	cmd.Flags().StringArrayVar(&s.fields, "field", nil, "prisma: a line for a model, such as the other side of a relation of yours: 'LiveUser: posts Post[]'; may be repeated")
	cmd.Flags().StringVar(&dialect, "dialect", dialect, "postgres, or sqlite (sql only)")
	c.settingFlags(cmd, "USHER_DATABASE_SCHEMA")
	return cmd
}

// schemaPrinter prints the mirror for those who read it.
type schemaPrinter struct {
	schema    string
	sqlite    bool
	viewsOnly bool
	prefix    string
	fields    []string
	tables    []string // all of Usher's
}

// prefixRE is what names of models in Prisma begin with.
var prefixRE = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]*$`)

func (s *schemaPrinter) print(format, dialect string) (string, error) {
	switch {
	case dialect != "postgres" && dialect != "sqlite":
		return "", fmt.Errorf("--dialect %s: want postgres or sqlite", dialect)
	case s.sqlite && format != "sql":
		return "", fmt.Errorf("%s: models are of PostgreSQL only; for SQLite `usher schema sql --dialect sqlite` prints the tables", format)
	case s.prefix != "" && !prefixRE.MatchString(s.prefix):
		return "", fmt.Errorf("--prefix %q: want a letter, and after it letters, digits and _, such as Clerk", s.prefix)
	case len(s.fields) > 0 && format != "prisma":
		return "", errors.New("--field: only prisma takes it")
	}
	var err error
	if s.tables, err = database.TableNames(); err != nil {
		return "", err
	}
	switch format {
	case "prisma":
		return s.prisma()
	case "drizzle":
		return s.drizzle(), nil
	case "sql":
		return s.sql(dialect)
	default:
		return "", fmt.Errorf("%q is not prisma, drizzle or sql", format)
	}
}

// relation is what a column of a table refers to: a row that is there sooner or later. One between any two tables.
type relation struct {
	from, column, to string
	one, many        string // the fields of either side
}

var relations = []relation{
	{"organization_memberships", "organization_id", "organizations", "organization", "memberships"},
	{"organization_memberships", "user_id", "users", "user", "memberships"},
	{"organization_invitations", "organization_id", "organizations", "organization", "invitations"},
	{"organization_invitations", "user_id", "users", "user", "invitations"},
	{"organization_domains", "organization_id", "organizations", "organization", "domains"},
	{"sessions", "user_id", "users", "user", "sessions"},
	{"subscriptions", "payer_user_id", "users", "payerUser", "subscriptions"},
	{"subscriptions", "payer_organization_id", "organizations", "payerOrganization", "subscriptions"},
	{"subscription_items", "subscription_id", "subscriptions", "subscription", "items"},
	{"payment_attempts", "payer_user_id", "users", "payerUser", "paymentAttempts"},
	{"payment_attempts", "payer_organization_id", "organizations", "payerOrganization", "paymentAttempts"},
	{"user_emails", "user_id", "users", "user", "emails"},
	{"user_phones", "user_id", "users", "user", "phones"},
	{"user_accounts", "user_id", "users", "user", "accounts"},
}

// shapes are what is printed.
func (s *schemaPrinter) shapes() []mirror.Shape {
	if s.viewsOnly {
		return mirror.ViewShapes()
	}
	return append(mirror.TableShapes(), mirror.ViewShapes()...)
}

// shows is the name in the mirror of what a shape shows: views of living rows are related like their tables.
func shows(shape mirror.Shape) string {
	if isLive(shape) {
		return shape.Of
	}
	return shape.Name
}

func isLive(shape mirror.Shape) bool { return strings.HasPrefix(shape.Name, "live_") }

// model is the name of a shape's model, such as LiveUser. A shape that unfolds a part of living users is related to these.
func (s *schemaPrinter) model(shape mirror.Shape) string {
	name := upperFirst(shape.Object)
	if isLive(shape) {
		name = "Live" + name
	}
	return s.prefix + name
}

// related is the model at the other end of a relation of a shape's: views are related to views.
func (s *schemaPrinter) related(shape mirror.Shape, other string) (string, bool) {
	for _, candidate := range s.shapes() {
		if shows(candidate) == other && (candidate.Of != "") == (shape.Of != "") {
			return s.model(candidate), true
		}
	}
	return "", false
}

func (s *schemaPrinter) prisma() (string, error) {
	added := map[string][]string{}
	for _, field := range s.fields {
		model, line, found := strings.Cut(field, ":")
		model = strings.TrimSpace(model)
		if !found || !slices.ContainsFunc(s.shapes(), func(shape mirror.Shape) bool { return s.model(shape) == model }) {
			return "", fmt.Errorf("--field %q: want MODEL: FIELD with a model that is printed, such as 'LiveUser: posts Post[]'", field)
		}
		added[model] = append(added[model], strings.TrimSpace(line))
	}
	var b strings.Builder
	fmt.Fprintf(&b, prismaHead, s.schema, s.schema)
	for _, name := range s.tables {
		fmt.Fprintf(&b, "// external: %s.%s\n", s.schema, name)
	}
	for _, shape := range s.shapes() {
		kind, key := "model", "@id"
		if shape.Of != "" {
			kind, key = "view", "@unique"
		}
		fmt.Fprintf(&b, "\n%s %s {\n", kind, s.model(shape))
		var lines [][]string
		for _, c := range shape.Columns {
			typ, attributes := prismaTypes[c.Type].name, prismaTypes[c.Type].attribute
			if c.Name == "id" {
				attributes = key
			} else if !c.NotNull {
				typ += "?"
			}
			if field := camel(c.Name); field != c.Name {
				attributes = strings.TrimSpace(attributes + fmt.Sprintf(" @map(%q)", c.Name))
			}
			lines = append(lines, []string{camel(c.Name), typ, attributes})
		}
		lines = append(lines, s.prismaRelations(shape)...)
		b.WriteString(aligned("  ", lines))
		for _, line := range added[s.model(shape)] {
			b.WriteString("  " + line + "\n")
		}
		fmt.Fprintf(&b, "\n  @@map(%q)\n  @@schema(%q)\n}\n", shape.Name, s.schema)
	}
	return b.String(), nil
}

func (s *schemaPrinter) prismaRelations(shape mirror.Shape) (lines [][]string) {
	for _, r := range relations {
		if r.from == shows(shape) {
			if other, ok := s.related(shape, r.to); ok {
				typ := other + "?"
				if slices.ContainsFunc(shape.Columns, func(c mirror.ShapeColumn) bool { return c.Name == r.column && c.NotNull }) {
					typ = other
				}
				lines = append(lines, []string{r.one, typ, fmt.Sprintf("@relation(fields: [%s], references: [id])", camel(r.column))})
			}
		}
		if r.to == shows(shape) {
			if other, ok := s.related(shape, r.from); ok {
				lines = append(lines, []string{r.many, other + "[]", ""})
			}
		}
	}
	return lines
}

const prismaHead = `// Clerk's objects as Usher keeps them. Printed by ` + "`usher schema prisma`" + `: print it again after each update of Usher, and do not edit it.
// For Prisma 6.14 or newer and PostgreSQL. Read the views (LiveUser, …); write nothing here: Usher alone does, from Clerk's webhooks.
//
// In schema.prisma, in the same folder:
//
//   generator client {
//     …
//     previewFeatures = ["views"]
//   }
//
//   datasource db {
//     provider = "postgresql"
//     schemas  = ["public", %q]
//   }
//
// In prisma.config.ts (prisma7.config.ts), so that ` + "`prisma db push` and `prisma migrate`" + ` leave the tables of the schema %q alone; without it they drop them:
//
//   import { readFileSync } from "node:fs";
//
//   const usher = readFileSync("prisma/usher.prisma", "utf8").match(/(?<=^\/\/ external: ).+$/gm);
//   if (!usher) throw new Error("prisma/usher.prisma names no tables: print it again with ` + "`usher schema prisma`" + `");
//
//   export default defineConfig({
//     schema: "prisma", // the folder
//     experimental: { externalTables: true },
//     tables: { external: usher },
//     …
//   });
//
// A relation from a model of yours goes to a view, with --field 'LiveUser: posts Post[]' for its other side; one to a table makes a foreign key.
//
`

// prismaTypes are the types of fields by PostgreSQL's types.
var prismaTypes = map[string]struct{ name, attribute string }{
	"text": {"String", ""}, "boolean": {"Boolean", ""}, "bigint": {"BigInt", ""}, "double precision": {"Float", ""},
	"timestamptz": {"DateTime", "@db.Timestamptz(6)"}, "jsonb": {"Json", ""},
}

func (s *schemaPrinter) drizzle() string {
	var body strings.Builder
	used := map[string]bool{}
	newTable, newView := "usher.table", "usher.view"
	if s.schema == "public" { // Drizzle has no pgSchema of that name
		newTable, newView = "pgTable", "pgView"
		used["pgTable"], used["pgView"] = !s.viewsOnly, true
	} else {
		used["pgSchema"] = true
		fmt.Fprintf(&body, "\nexport const usher = pgSchema(%q);\n", s.schema)
	}
	for _, shape := range s.shapes() {
		call, end := newTable, ");"
		if shape.Of != "" {
			call, end = newView, ").existing();"
		}
		fmt.Fprintf(&body, "\nexport const %s = %s(%q, {\n", s.variable(shape), call, shape.Name)
		for _, c := range shape.Columns {
			column := drizzleTypes[c.Type]
			used[column.function] = true
			text := fmt.Sprintf("%s(%q%s)", column.function, c.Name, column.options)
			switch {
			case c.Name == "id" && shape.Of == "":
				text += ".primaryKey()"
			case c.NotNull:
				text += ".notNull()"
			}
			fmt.Fprintf(&body, "  %s: %s,\n", camel(c.Name), text)
		}
		body.WriteString("}" + end + "\n")
	}
	var b strings.Builder
	fmt.Fprintf(&b, drizzleHead, s.schema)
	if s.schema == "public" {
		fmt.Fprintf(&b, "// Usher's tables are in the schema public: tell drizzle-kit so, or its push drops them:\n//   tablesFilter: [%s],\n", `"*", "!`+strings.Join(s.tables, `", "!`)+`"`)
	}
	if !s.viewsOnly {
		b.WriteString("import { relations } from \"drizzle-orm\";\n")
		body.WriteString(s.drizzleRelations())
	}
	var names []string
	for name, is := range used {
		if is {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	fmt.Fprintf(&b, "import { %s } from \"drizzle-orm/pg-core\";\n", strings.Join(names, ", "))
	return b.String() + body.String()
}

// drizzleRelations are those of tables: Drizzle has none of views, which are joined.
func (s *schemaPrinter) drizzleRelations() string {
	var b strings.Builder
	byName := map[string]mirror.Shape{}
	for _, shape := range mirror.TableShapes() {
		byName[shape.Name] = shape
	}
	for _, shape := range mirror.TableShapes() {
		var lines []string
		helpers := map[string]bool{}
		for _, r := range relations {
			from, isTable := byName[r.from]
			if isTable && r.from == shape.Name {
				other := s.variable(byName[r.to])
				helpers["one"] = true
				lines = append(lines, fmt.Sprintf("  %s: one(%s, { fields: [%s.%s], references: [%s.id] }),", r.one, other, s.variable(shape), camel(r.column), other))
			}
			if isTable && r.to == shape.Name {
				helpers["many"] = true
				lines = append(lines, fmt.Sprintf("  %s: many(%s),", r.many, s.variable(from)))
			}
		}
		if len(lines) == 0 {
			continue
		}
		var names []string
		for _, name := range []string{"one", "many"} {
			if helpers[name] {
				names = append(names, name)
			}
		}
		fmt.Fprintf(&b, "\nexport const %sRelations = relations(%s, ({ %s }) => ({\n%s\n}));\n", s.variable(shape), s.variable(shape), strings.Join(names, ", "), strings.Join(lines, "\n"))
	}
	return b.String()
}

// variable is the name of a shape's constant, such as liveUsers.
func (s *schemaPrinter) variable(shape mirror.Shape) string {
	if s.prefix == "" {
		return camel(shape.Name)
	}
	return strings.ToLower(s.prefix[:1]) + s.prefix[1:] + upperFirst(camel(shape.Name))
}

const drizzleHead = `// Clerk's objects as Usher keeps them. Printed by ` + "`usher schema drizzle`" + `: print it again after each update of Usher, and do not edit it.
// For drizzle-orm 0.36 or newer and PostgreSQL. Read the views (liveUsers, …); write nothing here: Usher alone does, from Clerk's webhooks.
//
// drizzle-kit must not take these tables for yours. In drizzle.config.ts:
//   schema: "./src/db/schema.ts",  // your tables, and not this file
//   schemaFilter: ["public"],      // your schemas, and not %q
// Never reference a column of these tables with .references(): that makes a foreign key.
`

// drizzleTypes are the functions of columns by PostgreSQL's types. What bigint counts is below 2^53.
var drizzleTypes = map[string]struct{ function, options string }{
	"text": {"text", ""}, "boolean": {"boolean", ""}, "bigint": {"bigint", `, { mode: "number" }`}, "double precision": {"doublePrecision", ""},
	"timestamptz": {"timestamp", ", { withTimezone: true }"}, "jsonb": {"jsonb", ""},
}

func (s *schemaPrinter) sql(dialect string) (string, error) {
	made, err := readDefinitions(database.Schema(dialect))
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("-- What applications read of Usher's. Printed by `usher schema sql`, for reading: `usher setup` makes it, and Usher alone writes it.\n")
	if !s.sqlite {
		fmt.Fprintf(&b, "SET search_path = \"%s\";\n", strings.ReplaceAll(s.schema, `"`, `""`))
	}
	for _, shape := range s.shapes() {
		if shape.Of != "" {
			fmt.Fprintf(&b, "\n%s\n", made.views[shape.Name])
			continue
		}
		var lines [][]string
		for i, c := range shape.Columns {
			typ := s.sqlType(c.Type)
			switch {
			case c.Name == "id":
				typ += " PRIMARY KEY"
			case c.NotNull:
				typ += " NOT NULL"
			}
			if i < len(shape.Columns)-1 {
				typ += ","
			}
			lines = append(lines, []string{c.Name, typ})
		}
		fmt.Fprintf(&b, "\nCREATE TABLE %s (\n%s);\n", shape.Name, aligned("    ", lines))
		for _, index := range made.indexes {
			if index.table == shape.Name {
				b.WriteString(index.text + "\n")
			}
		}
	}
	return b.String(), nil
}

// definitions are what the migrations make besides tables.
type definitions struct {
	views   map[string]string // by name
	indexes []index
}

type index struct{ name, table, text string }

var (
	viewRE  = regexp.MustCompile(`(?ms)^CREATE (?:OR REPLACE )?VIEW (\w+) AS\b.*?;$`)
	indexRE = regexp.MustCompile(`(?m)^(?:CREATE INDEX (\w+) ON (\w+) .*|DROP INDEX (\w+));`)
)

// readDefinitions takes them from the migrations' text, as what they came to.
func readDefinitions(files fs.FS) (definitions, error) {
	made := definitions{views: map[string]string{}}
	names, err := fs.Glob(files, "*.sql")
	if err != nil {
		return made, fmt.Errorf("read migrations: %w", err)
	}
	for _, name := range names {
		text, err := fs.ReadFile(files, name)
		if err != nil {
			return made, fmt.Errorf("read migrations: %w", err)
		}
		for _, m := range viewRE.FindAllStringSubmatch(string(text), -1) {
			made.views[m[1]] = m[0]
		}
		for _, m := range indexRE.FindAllStringSubmatch(string(text), -1) {
			made.indexes = slices.DeleteFunc(made.indexes, func(i index) bool { return i.name == m[3] })
			if m[1] != "" {
				made.indexes = append(made.indexes, index{name: m[1], table: m[2], text: m[0]})
			}
		}
	}
	return made, nil
}

func (s *schemaPrinter) sqlType(typ string) string {
	if !s.sqlite {
		return typ
	}
	switch typ {
	case "jsonb":
		return "text"
	case "timestamptz":
		return "datetime"
	case "double precision":
		return "real"
	default:
		return typ
	}
}

// aligned sets the cells of lines below each other.
func aligned(indent string, lines [][]string) string {
	widths := make([]int, 3)
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], len(cell))
		}
	}
	var b strings.Builder
	for _, line := range lines {
		cells := make([]string, len(line))
		for i, cell := range line {
			cells[i] = fmt.Sprintf("%-*s", widths[i], cell)
		}
		b.WriteString(strings.TrimRight(indent+strings.Join(cells, " "), " ") + "\n")
	}
	return b.String()
}

// camel is a column's name as TypeScript writes it: organizationId for organization_id.
func camel(name string) string {
	words := strings.Split(name, "_")
	for i, word := range words[1:] {
		words[i+1] = upperFirst(word)
	}
	return strings.Join(words, "")
}

func upperFirst(word string) string { return strings.ToUpper(word[:1]) + word[1:] }
