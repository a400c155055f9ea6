package command

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/ingest"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/dbtest"
)

var update = flag.Bool("update", false, "rewrite the generated parts of docs/reference.md")

const referencePath = "../../../docs/reference.md"

// TestReferenceIsWhatTheProgramDoes generates the lists of docs/reference.md from the program itself.
func TestReferenceIsWhatTheProgramDoes(t *testing.T) {
	t.Parallel()
	have, err := os.ReadFile(referencePath)
	require.NoError(t, err)
	want := string(have)
	for name, generate := range map[string]func(*testing.T) string{
		"settings": settingsReference, "answers": answersReference, "tables": tablesReference,
		"commands": commandsReference, "metrics": metricsReference,
	} {
		block := regexp.MustCompile(`(?s)(<!-- ` + name + ` -->\n).*?(<!-- /` + name + ` -->)`)
		require.Regexp(t, block, want, "docs/reference.md has no part for %s", name)
		want = block.ReplaceAllString(want, "${1}"+strings.ReplaceAll(generate(t), "$", "$$")+"${2}")
	}
	if *update {
		require.NoError(t, os.WriteFile(referencePath, []byte(want), 0o600))
		return
	}
	require.Equal(t, want, string(have), "run: go test ./cli/internal/command -run Reference -update")
}

func settingsReference(*testing.T) string {
	var b strings.Builder
	b.WriteString("| name | meaning | default |\n|---|---|---|\n")
	for _, s := range config.Describe() {
		def := ""
		if s.Default != "" {
			def = "`" + s.Default + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", s.Name, s.Doc, def)
	}
	return b.String()
}

func answersReference(*testing.T) string {
	var b strings.Builder
	b.WriteString("| status | code | message | `Retry-After` |\n|---|---|---|---|\n")
	for _, a := range ingest.Refusals() {
		retry := ""
		if a.RetryAfter > 0 {
			retry = fmt.Sprintf("%d s", a.RetryAfter)
		}
		fmt.Fprintf(&b, "| %d | `%s` | %s | %s |\n", a.Status, a.Code, a.Message, retry)
	}
	return b.String()
}

func tablesReference(t *testing.T) string {
	t.Helper()
	db := dbtest.Postgres(t)
	var columns []struct{ Kind, TableName, ColumnName, DataType, IsNullable string }
	require.NoError(t, db.Raw(`SELECT CASE t.table_type WHEN 'VIEW' THEN 'view' ELSE 'table' END AS kind, c.table_name, c.column_name, c.data_type, c.is_nullable
		FROM information_schema.columns c JOIN information_schema.tables t USING (table_schema, table_name)
		WHERE c.table_schema = current_schema() AND c.table_name NOT LIKE 'goose%'
		ORDER BY t.table_type, c.table_name, c.ordinal_position`).Scan(&columns).Error)
	short := map[string]string{"timestamp with time zone": "timestamptz", "double precision": "float8"}
	var b strings.Builder
	last := ""
	for _, c := range columns {
		if c.TableName != last {
			if last != "" {
				b.WriteString("\n")
			}
			last = c.TableName
			fmt.Fprintf(&b, "- %s `%s`:", c.Kind, c.TableName)
		}
		typ := c.DataType
		if s, ok := short[typ]; ok {
			typ = s
		}
		if c.Kind == "table" && c.IsNullable == "NO" {
			typ += " not null"
		}
		fmt.Fprintf(&b, " `%s` %s;", c.ColumnName, typ)
	}
	return strings.ReplaceAll(b.String(), ";\n", "\n") + "\n"
}

func commandsReference(*testing.T) string {
	c := &cli{env: Env{Stdout: &strings.Builder{}, Stderr: &strings.Builder{}}, flags: map[string]string{}}
	var b strings.Builder
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Runnable() && cmd.Name() != "help" && cmd.Name() != "completion" && cmd.HasParent() && !cmd.Hidden {
			fmt.Fprintf(&b, "#### `%s`\n\n%s.\n\n", strings.TrimSuffix(cmd.UseLine(), " [flags]"), strings.TrimSuffix(cmd.Short, "."))
			rows := 0
			var reads []string
			cmd.Flags().VisitAll(func(f *pflag.Flag) {
				switch setting := f.Annotations[settingMark]; {
				case f.Hidden || f.Name == "help":
				case setting != nil:
					reads = append(reads, "`"+setting[0]+"`")
				default:
					rows++
					fmt.Fprintf(&b, "- `--%s`: %s\n", f.Name, f.Usage)
				}
			})
			if len(reads) > 12 {
				reads = []string{"all"}
			}
			if len(reads) > 0 {
				rows++
				fmt.Fprintf(&b, "- settings that are flags: %s\n", strings.Join(reads, ", "))
			}
			if rows > 0 {
				b.WriteString("\n")
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(c.root())
	return b.String()
}

func metricsReference(t *testing.T) string {
	t.Helper()
	settings, err := config.Load(config.Environ{
		"USHER_DATA_DIR=" + t.TempDir(), "CLERK_WEBHOOK_SIGNING_SECRET=whsec_MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0", "CLERK_SECRET_KEY=sk_test_reference",
		"USHER_INGEST_ADDR=127.0.0.1:0", "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0",
	}, nil)
	require.NoError(t, err)
	i, err := allinone.New(t.Context(), allinone.Config{Settings: settings, Mode: "serve", Dir: settings.DataDir, Log: zap.NewNop()})
	require.NoError(t, err)
	defer func() { require.NoError(t, i.Close()) }()
	families, err := prometheus.Gatherers{i.Registry}.Gather()
	require.NoError(t, err)
	lines := []string{}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "usher_") {
			continue
		}
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		name := f.GetName()
		if len(labels) > 0 {
			name += "{" + strings.Join(labels, ",") + "}"
		}
		lines = append(lines, fmt.Sprintf("| `%s` | %s | %s |\n", name, strings.ToLower(dto.MetricType_name[int32(f.GetType())]), f.GetHelp()))
	}
	slices.Sort(lines)
	return "| name | kind | meaning |\n|---|---|---|\n" + strings.Join(lines, "")
}
