package command

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/mirror"
)

func TestSchemaPrintsModels(t *testing.T) {
	t.Parallel()
	for file, args := range map[string][]string{
		"schema.prisma":       {"prisma"},
		"schema.views.prisma": {"prisma", "--views", "--prefix", "Clerk", "--field", "ClerkLiveUser: posts Post[]", "--database-schema", "mirror"},
		"schema.drizzle.ts":   {"drizzle"},
		"schema.public.ts":    {"drizzle", "--views", "--database-schema", "public"},
	} {
		have := newHarness(t).Run(append([]string{"schema"}, args...)...).want(exitOK).out
		path := filepath.Join("testdata", file)
		if *update {
			require.NoError(t, os.WriteFile(path, []byte(have), 0o600))
		}
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, string(want), have, "%s: run go test ./cli/internal/command -run SchemaPrints -update, and `make schema-check`", file)
	}
}

// TestSchemaNamesEveryColumn holds the models against the migrated database.
func TestSchemaNamesEveryColumn(t *testing.T) {
	t.Parallel()
	db := dbtest.Postgres(t)
	prisma, drizzle := newHarness(t).Run("schema", "prisma").want(exitOK).out, newHarness(t).Run("schema", "drizzle").want(exitOK).out
	modelOf := func(name string) string {
		return regexp.MustCompile(`(?s)\n(?:model|view) \w+ \{\n[^}]*?@@map\("` + name + `"\)`).FindString(prisma)
	}
	for _, shape := range append(mirror.TableShapes(), mirror.ViewShapes()...) {
		var columns []string
		require.NoError(t, db.Raw("SELECT column_name FROM information_schema.columns WHERE table_schema = 'usher' AND table_name = ?", shape.Name).Scan(&columns).Error)
		require.NotEmpty(t, columns)
		model := modelOf(shape.Name)
		constant := regexp.MustCompile(`(?s)usher\.(?:table|view)\("` + shape.Name + `", \{.*?\n\}\)`).FindString(drizzle)
		for _, column := range columns {
			assert.Regexp(t, `(?m)^  `+camel(column)+` +[A-Z]`, model, shape.Name)
			assert.Regexp(t, `(?m)^  `+camel(column)+`: \w+\("`+column+`"`, constant, shape.Name)
		}
	}
	var tables []string
	require.NoError(t, db.Raw("SELECT tablename FROM pg_tables WHERE schemaname = 'usher'").Scan(&tables).Error)
	for _, table := range tables {
		assert.Contains(t, prisma, "\n// external: usher."+table+"\n")
	}
	for _, r := range relations {
		assert.Contains(t, append(mirror.TableShapes(), mirror.ViewShapes()...), shapeWith(t, r.from, r.column), "%v", r)
	}
}

func shapeWith(t *testing.T, name, column string) mirror.Shape {
	t.Helper()
	for _, shape := range append(mirror.TableShapes(), mirror.ViewShapes()...) {
		for _, c := range shape.Columns {
			if shape.Name == name && c.Name == column {
				return shape
			}
		}
	}
	t.Fatalf("there is no %s.%s", name, column)
	return mirror.Shape{}
}

// TestSchemaSQLMakesWhatTheMigrationsMake runs what is printed.
func TestSchemaSQLMakesWhatTheMigrationsMake(t *testing.T) {
	t.Parallel()
	what := func(t *testing.T, db *gorm.DB, columns, indexes string) string {
		t.Helper()
		var text []string
		for _, query := range []string{columns, indexes} {
			var lines []string
			require.NoError(t, db.Raw(query).Scan(&lines).Error)
			require.NotEmpty(t, lines)
			text = append(text, lines...)
		}
		return strings.Join(text, "\n")
	}
	names := map[string]bool{}
	for _, shape := range append(mirror.TableShapes(), mirror.ViewShapes()...) {
		names["'"+shape.Name+"'"] = true
	}
	var list []string
	for name := range names {
		list = append(list, name)
	}
	in := strings.Join(list, ", ")
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		empty := openDatabase(t, dbtest.EmptyPostgresURL(t))
		require.NoError(t, empty.Exec("CREATE SCHEMA usher").Error)
		require.NoError(t, empty.Exec("SELECT 1").Error)
		run(t, empty, newHarness(t).Run("schema", "sql").want(exitOK).out)
		columns := fmt.Sprintf(`SELECT table_name || ' ' || column_name || ' ' || data_type || ' ' || is_nullable FROM information_schema.columns WHERE table_schema = 'usher' AND table_name IN (%s) ORDER BY 1`, in)
		indexes := fmt.Sprintf(`SELECT indexdef FROM pg_indexes WHERE schemaname = 'usher' AND tablename IN (%s) ORDER BY 1`, in)
		assert.Equal(t, what(t, dbtest.Postgres(t), columns, indexes), what(t, empty, columns, indexes))
	})
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		empty := openDatabase(t, dbtest.EmptySQLiteURL(t))
		run(t, empty, newHarness(t).Run("schema", "sql", "--dialect", "sqlite").want(exitOK).out)
		columns := fmt.Sprintf(`SELECT m.name || ' ' || c.name || ' ' || c.type || ' ' || c."notnull" FROM sqlite_master m JOIN pragma_table_info(m.name) c WHERE m.name IN (%s) ORDER BY 1`, in)
		indexes := fmt.Sprintf(`SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name IN (%s) ORDER BY 1`, in)
		assert.Equal(t, what(t, dbtest.SQLite(t), columns, indexes), what(t, empty, columns, indexes))
	})
}

// run runs statements one by one.
func run(t *testing.T, db *gorm.DB, text string) {
	t.Helper()
	for statement := range strings.SplitSeq(text, ";\n") {
		if strings.TrimSpace(statement) != "" {
			require.NoError(t, db.Exec(statement).Error, statement)
		}
	}
}

func TestSchemaRefusesWhatItCannotPrint(t *testing.T) {
	t.Parallel()
	for says, args := range map[string][]string{
		"models are of PostgreSQL only":       {"prisma", "--dialect", "sqlite"},
		"want postgres or sqlite":             {"sql", "--dialect", "mysql"},
		`"typeorm" is not prisma`:             {"typeorm"},
		"only prisma takes it":                {"drizzle", "--field", "LiveUser: posts Post[]"},
		"--prefix \"2\": want a letter":       {"prisma", "--prefix", "2"},
		"want MODEL: FIELD with a model that": {"prisma", "--field", "Post: user LiveUser"},
		"accepts 1 arg(s)":                    {},
	} {
		assert.Contains(t, newHarness(t).Run(append([]string{"schema"}, args...)...).want(exitUsage).err, says)
	}
	sqlite := newHarness(t, "USHER_DATABASE_URL=sqlite:x.db").Run("schema", "prisma").want(exitOK)
	assert.Contains(t, sqlite.out, `@@schema("usher")`, "it asks no database")
}
