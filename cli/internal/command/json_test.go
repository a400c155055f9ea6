package command

import (
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/worker"
)

// jsonDoc is docs/json.md: for each command line the type of each path, and which paths were seen in what it printed.
type jsonDoc struct {
	t     *testing.T
	types map[string]map[string]string
	seen  map[string]map[string]bool
}

func readJSONDoc(t *testing.T) *jsonDoc {
	t.Helper()
	text, err := os.ReadFile("../../../docs/json.md")
	require.NoError(t, err)
	d := &jsonDoc{t: t, types: map[string]map[string]string{}, seen: map[string]map[string]bool{}}
	row := regexp.MustCompile("^\\| `([^`]+)` \\| ([^|]+?) \\|")
	var fields map[string]string
	for line := range strings.Lines(string(text)) {
		if title, ok := strings.CutPrefix(line, "## "); ok {
			fields = map[string]string{}
			seen := map[string]bool{}
			for name := range strings.SplitSeq(strings.TrimSpace(title), ", ") {
				name = strings.Trim(name, "`")
				d.types[name], d.seen[name] = fields, seen
			}
		}
		if m := row.FindStringSubmatch(line); m != nil {
			require.NotContains(t, fields, m[1], line)
			fields[m[1]] = m[2]
		}
	}
	return d
}

// check compares what a command printed with its part of the page.
func (d *jsonDoc) check(command string, r result) {
	d.t.Helper()
	require.Contains(d.t, d.types, command)
	for line := range strings.SplitSeq(strings.TrimSpace(r.out), "\n") {
		if !strings.HasPrefix(r.out, "{\n") { // ndjson: one object a line
			d.walk(command, "", decodeJSON(d.t, line))
		}
	}
	if strings.HasPrefix(r.out, "{\n") {
		d.walk(command, "", decodeJSON(d.t, r.out))
	}
}

func decodeJSON(t *testing.T, text string) any {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	var value any
	require.NoError(t, dec.Decode(&value), text)
	return value
}

// find is the path of the page that a path of the output matches.
func (d *jsonDoc) find(command, path string) (string, bool) {
	for known := range d.types[command] {
		pattern := "^" + regexp.MustCompile(`<\w+>`).ReplaceAllString(regexp.QuoteMeta(known), `[\w. -]+`) + "$"
		if regexp.MustCompile(pattern).MatchString(path) {
			return known, true
		}
	}
	return "", false
}

func (d *jsonDoc) walk(command, path string, value any) {
	d.t.Helper()
	known, found := d.find(command, path)
	typ := d.types[command][known]
	if found {
		d.seen[command][known] = true
		if strings.HasPrefix(typ, "any") {
			return
		}
	}
	switch v := value.(type) {
	case map[string]any:
		for key, inner := range v {
			d.walk(command, strings.TrimPrefix(path+"."+key, "."), inner)
		}
		return
	case []any:
		for _, inner := range v {
			d.walk(command, path+"[]", inner)
		}
		if len(v) == 0 { // nothing can be said of what it would hold
			for known := range d.types[command] {
				if strings.HasPrefix(known, path+"[]") {
					found, d.seen[command][known] = true, true
				}
			}
			assert.True(d.t, found, "%s: %s is not in docs/json.md", command, path)
		}
		return
	}
	if !assert.True(d.t, found, "%s: %s is not in docs/json.md", command, path) {
		return
	}
	ok := false
	switch v := value.(type) {
	case nil:
		ok = strings.Contains(typ, "or null")
	case bool:
		ok = strings.HasPrefix(typ, "boolean")
	case json.Number:
		_, err := v.Int64()
		ok = strings.HasPrefix(typ, "number") || strings.HasPrefix(typ, "integer") && (err == nil || !strings.ContainsAny(v.String(), ".e"))
	case string:
		_, err := time.Parse(time.RFC3339, v)
		ok = strings.HasPrefix(typ, "string") || strings.HasPrefix(typ, "time") && err == nil && strings.HasSuffix(v, "Z")
	}
	assert.True(d.t, ok, "%s: %s is %v, and docs/json.md says %s", command, path, value, typ)
}

// whole asserts that every command that prints JSON is on the page, and that all of the page was seen.
func (d *jsonDoc) whole() {
	d.t.Helper()
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Flags().Lookup("output") != nil {
			assert.Contains(d.t, d.types, cmd.CommandPath(), "docs/json.md has no part for %s", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk((&cli{flags: map[string]string{}}).root())
	for _, command := range slices.Sorted(maps.Keys(d.types)) {
		for path, typ := range d.types[command] {
			assert.True(d.t, d.seen[command][path] || strings.Contains(typ, "optional"), "%s: nothing printed has %s", command, path)
		}
	}
}

// TestJSONIsDocumented runs every command that prints JSON.
func TestJSONIsDocumented(t *testing.T) {
	t.Parallel()
	d := readJSONDoc(t)

	r, clerk, _ := clerkRoad(t, dbtest.SQLiteURL(t), emulator.Config{Seed: 3})
	d.check("usher setup", r.Run("setup", "-o", "json").want(exitOK))
	d.check("usher setup", r.Run("setup", "-o", "ndjson").want(exitOK))
	d.check("usher setup", r.with("USHER_STREAM_MAX_BYTES=2GiB").Run("setup", "-o", "json").want(exitNo))
	d.check("usher setup", r.with("USHER_STREAM_MAX_BYTES=2GiB").Run("setup", "--apply", "-o", "json").want(exitOK))
	d.check("usher setup", newHarness(t, "USHER_NATS_URL="+r.nats.URL()).Run("setup", "--plan", "-o", "json").want(exitOK))
	d.check("usher config", r.Run("config", "-o", "json").want(exitOK))
	d.check("usher trigger", r.Run("trigger", "user.created", "--url", r.ingest, "-o", "json").want(exitOK))
	d.check("usher trigger --list", r.Run("trigger", "--list", "-o", "json").want(exitOK))
	for range clerk.Story(5) { // nothing of it arrives
	}
	d.check("usher verify", r.Run("verify", "-o", "json").want(exitNo))
	d.check("usher reconcile", r.Run("reconcile", "--full", "-o", "json").want(exitOK))
	r.quiet()
	require.NoError(t, r.db.Exec("UPDATE users SET first_name = 'by hand'").Error)
	d.check("usher verify", r.Run("verify", "-o", "json").want(exitNo)) // fields
	d.check("usher backfill", r.Run("backfill", "-o", "json"))
	d.check("usher events tail", r.Run("events", "tail", "--since", "1h", "--limit", "2", "-o", "json").want(exitOK))
	listed := r.Run("events", "list", "-o", "json").want(exitOK)
	d.check("usher events list", listed)
	d.check("usher events show", r.Run("events", "show", into[listing[listedEvent]](listed).Items[0].ID, "-o", "json").want(exitOK))

	y, c, cfg := newCounting(t, dbtest.SQLiteURL(t), 3)
	d.check("usher dlq list", y.Run("dlq", "list", "-o", "json").want(exitOK))
	d.check("usher dlq list --count", y.Run("dlq", "list", "--count", "-o", "json").want(exitOK))
	d.check("usher dlq list --group", y.Run("dlq", "list", "--group", "-o", "json").want(exitOK))
	d.check("usher dlq show", y.Run("dlq", "show", "msg_u000", "-o", "json").want(exitOK))
	d.check("usher dlq discard", y.Run("dlq", "discard", "msg_u000", "--yes", "-o", "json").want(exitOK))
	c.set(func(event.Event) error { return errBroken })
	cfg.Attempts, cfg.RetryInitial, cfg.RetryMax = 5, 10*time.Minute, 10*time.Minute
	y.work(cfg)
	failed := y.Run("dlq", "replay", "msg_u001", "--yes", "-o", "json").want(exitNo)
	d.check("usher dlq replay", failed)
	assert.Equal(t, 1, into[bulkResult](failed).Retrying)
	shown := y.Run("events", "show", "msg_u001", "-o", "json").want(exitOK)
	d.check("usher events show", shown)
	assert.NotNil(t, into[shownEvent](shown).Deliveries[0].NextAttemptAt)
	m := newYard(t, dbtest.SQLiteURL(t))
	m.work(worker.Config{Attempts: 1})
	m.broken("bad")
	m.publish("bad", "good")
	m.wait("mirror", "dead", 1)
	m.wait("mirror", "processed", 1)
	d.check("usher dlq replay", m.Run("dlq", "replay", "--all", "--dry-run", "-o", "json").want(exitNo))
	d.check("usher replay", m.Run("replay", "--event", "msg_good", "--yes", "-o", "json").want(exitOK))

	demo := newHarness(t, anyPorts...)
	d.check("usher dev", demo.Run("dev", "--demo", "--exit", "--users", "20", "-o", "json").want(exitOK))
	d.whole()
}
