//go:build npm

package command

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/dbtest"
)

// TestPrismaAndDrizzleTakeTheModelsAndLeaveTheTablesAlone runs the tools themselves, whose packages npm fetches. `make schema-check`
// runs it: it needs node, npm and their registry, so the other tests do without it.
//
// Prisma 6 is the last that can run its schema engine as WebAssembly, without a binary that npm does not have; its adapter lacks two types of
// PostgreSQL's catalogues, which are added to it. Prisma 7 validates and generates, and its client reads.
func TestPrismaAndDrizzleTakeTheModelsAndLeaveTheTablesAlone(t *testing.T) {
	t.Parallel()
	url := dbtest.PostgresURL(t)
	db := openDatabase(t, url)
	require.NoError(t, db.Exec(`INSERT INTO users (id, source, email, first_name, version, seen_at, raw, event_id, origin, synced_at)
		VALUES ('user_ada', 'clerk', 'ada@example.com', 'Ada', 1768471200000, 1768471200000, '{}', 'msg_1', 'webhook', now())`).Error)
	catalogue := func() string {
		t.Helper()
		var lines []string
		require.NoError(t, db.Raw(`SELECT 'column ' || table_name || '.' || column_name || ' ' || data_type || ' ' || is_nullable FROM information_schema.columns WHERE table_schema = 'usher'
			UNION ALL SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'usher'
			UNION ALL SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
				WHERE connamespace = 'usher'::regnamespace OR contype = 'f'
			UNION ALL SELECT 'view ' || viewname || ' ' || definition FROM pg_views WHERE schemaname = 'usher' ORDER BY 1`).Scan(&lines).Error)
		require.NotEmpty(t, lines)
		return strings.Join(lines, "\n")
	}
	before := catalogue()

	project := func(name string, packages ...string) (dir string, run func(args ...string) string) {
		dir = filepath.Join(t.TempDir(), name)
		require.NoError(t, os.CopyFS(dir, os.DirFS(filepath.Join("testdata", "tools", name))))
		run = func(args ...string) string {
			t.Helper()
			cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
			cmd.Dir = dir
			// Prisma 7 looks for its schema engine, which nothing here starts.
			cmd.Env = append(os.Environ(), "DATABASE_URL="+url, "PRISMA_HIDE_UPDATE_MESSAGE=1", "CHECKPOINT_DISABLE=1", "PRISMA_SCHEMA_ENGINE_BINARY="+os.Args[0])
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%v: %s", args, out)
			return string(out)
		}
		run(append([]string{"npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"}, packages...)...)
		return dir, run
	}
	printTo := func(file string, args ...string) {
		t.Helper()
		require.NoError(t, os.WriteFile(file, []byte(newHarness(t).Run(append([]string{"schema"}, args...)...).want(exitOK).out), 0o600))
	}

	dir, run := project("prisma6", "prisma@6.19.0", "@prisma/client@6.19.0", "@prisma/adapter-pg@6.19.0")
	for _, file := range []string{"index.js", "index.mjs"} {
		adapter := filepath.Join(dir, "node_modules", "@prisma", "adapter-pg", "dist", file)
		text, err := os.ReadFile(adapter)
		require.NoError(t, err)
		const known = "if (fieldTypeId >= FIRST_NORMAL_OBJECT_ID) {"
		require.Contains(t, string(text), known)
		text = []byte(strings.ReplaceAll(string(text), known, "if (fieldTypeId === 18) return 6; // char\nif (fieldTypeId >= FIRST_NORMAL_OBJECT_ID || fieldTypeId === 19 /* name */) {"))
		require.NoError(t, os.WriteFile(adapter, text, 0o600))
	}
	usher := filepath.Join(dir, "prisma", "usher.prisma")
	for _, flags := range [][]string{{"--views"}, {}} {
		printTo(usher, append([]string{"prisma", "--field", "LiveUser: posts Post[]"}, flags...)...)
		assert.Contains(t, run("npx", "prisma", "validate"), "valid")
		assert.Contains(t, run("npx", "prisma", "db", "push", "--skip-generate"), "in sync")
		assert.Equal(t, before, catalogue(), "%v", flags)
	}
	require.NoError(t, db.Exec(`DROP TABLE public."Post"`).Error)
	assert.Contains(t, run("npx", "prisma", "migrate", "dev", "--name", "init", "--skip-generate"), "in sync")
	assert.Contains(t, run("npx", "prisma", "migrate", "status"), "up to date")
	assert.Equal(t, before, catalogue())
	migrations, err := filepath.Glob(filepath.Join(dir, "prisma", "migrations", "*", "migration.sql"))
	require.NoError(t, err)
	require.Len(t, migrations, 1)
	sql, err := os.ReadFile(migrations[0])
	require.NoError(t, err)
	assert.NotContains(t, string(sql), "usher")
	assert.NotContains(t, string(sql), "FOREIGN KEY")

	dir, run = project("prisma7", "prisma@7.10.1", "@prisma/client@7.10.0", "@prisma/adapter-pg@7.10.1", "tsx@4.23.15", "dotenv@17")
	printTo(filepath.Join(dir, "prisma", "usher.prisma"), "prisma", "--field", "LiveUser: posts Post[]")
	assert.Contains(t, run("npx", "prisma", "validate"), "valid")
	assert.Contains(t, run("npx", "prisma", "generate"), "Generated Prisma Client")
	assert.Equal(t, `{"id":"user_ada","email":"ada@example.com","posts":[{"title":"Hello"}]}
[{"title":"Hello","user":{"firstName":"Ada"}},{"title":"Orphan","user":null}]
{"version":"1768471200000"}
no writes
`, run("npx", "tsx", "read.ts"))

	require.NoError(t, db.Exec(`DROP TABLE public."Post", public._prisma_migrations`).Error)
	dir, run = project("drizzle", "drizzle-kit@0.31.11", "drizzle-orm@0.45.4", "pg@8.23.1", "tsx@4.23.15")
	printTo(filepath.Join(dir, "usher.ts"), "drizzle")
	assert.Contains(t, run("npx", "drizzle-kit", "generate"), "1 tables")
	run("npx", "drizzle-kit", "push", "--force")
	assert.Equal(t, before, catalogue())
	assert.Equal(t, `[{"title":"Hello","author":"Ada"},{"title":"Orphan","author":null}]
{"id":"user_ada","version":1768471200000,"sessions":[]}
`, run("npx", "tsx", "read.ts"))
}
