package command

import (
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/fixture"
)

func TestHelpListsOwnFlagsFirstAndOnlyTheSettingsThatAreRead(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	settings := map[string]string{} // by flag
	for _, s := range config.Describe() {
		settings["--"+strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(s.Name, "USHER_"), "_", "-"))+" "] = s.Name
	}
	both := "database-url database-schema nats-url nats-creds nats-ca nats-cert nats-key "
	for line, want := range map[string]string{
		"trigger": "", "schema": "database-schema", "events tail": "nats-url nats-creds nats-ca nats-cert nats-key", "events list": both, "events show": both, "dlq list": both, "dlq show": both, "dlq discard": both,
		"dlq replay": both + "clerk-instance-id", "replay": both, "portal": "source clerk-api-url clerk-instance-id",
		"verify": both + "source clerk-api-url clerk-instance-id", "reconcile": both + "source clerk-api-url clerk-instance-id stream-replicas",
	} {
		out := h.Run(append(strings.Fields(line), "--help")...).want(exitOK).out
		own, rest, _ := strings.Cut(out, "\nSettings that it reads")
		read, global, found := strings.Cut(rest, "\nFlags of every command")
		if want == "" {
			own, global, found = strings.Cut(out, "\nFlags of every command")
		}
		require.True(t, found, out)
		assert.Contains(t, own, "\nFlags:\n", line)
		var have []string
		for flag, name := range settings {
			if strings.Contains(read, flag) {
				have = append(have, strings.TrimSpace(strings.TrimPrefix(flag, "--")))
			}
			assert.NotContains(t, own, "("+name+")", line)
		}
		assert.ElementsMatch(t, strings.Fields(want), have, line)
		for _, flag := range []string{"--data-dir", "--log-level", "--log-format"} {
			assert.Contains(t, global, flag, line)
		}
	}
	serve := h.Run("serve", "--help").want(exitOK).out
	for _, flag := range []string{"--ingest-addr", "--database-url", "--retention"} {
		assert.Contains(t, serve, flag)
	}
	assert.Contains(t, h.Run("trigger", "user.created", "--database-url", "sqlite:x").want(exitUsage).err, "unknown flag: --database-url")
	assert.Contains(t, h.Run("events", "list", "--stauts", "dead").want(exitUsage).err, "unknown flag: --stauts: did you mean --status?")
	help := h.Run("--help").want(exitOK).out
	assert.Contains(t, help, "completion")
	assert.NotContains(t, help, "--database-url")
}

func TestWrongNumbersAreNamedInWords(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	for line, says := range map[string]string{
		"events list --limit abc": `--limit "abc": want a whole number`, "replay --from-seq -1": `--from-seq "-1": want a whole number`,
		"dlq replay --all --rate x": `--rate "x": want a number`, "trigger user.created --count 99999999999999999999": "want a smaller number",
	} {
		r := h.Run(strings.Fields(line)...).want(exitUsage)
		assert.Contains(t, r.err, says, line)
		assert.NotContains(t, r.err, "strconv", line)
	}
}

func TestTheShellCompletesValues(t *testing.T) {
	t.Parallel()
	h := newHarness(t, "USHER_SOURCE_EU_SIGNING_SECRET="+stagingSecret)
	for line, want := range map[string][]string{
		"events list --output":    {"table", "json", "ndjson"},
		"events list --status":    {"processed", "retrying", "dead", "discarded"},
		"events list --effect":    {"applied", "stub"},
		"events list --handler":   {"mirror"},
		"events list --source":    {"clerk", "eu"},
		"dlq list --type":         {"user.created", "user.*", "*.deleted"},
		"dlq replay --reason":     {"constraint", "undecodable"},
		"verify --resource":       {"users", "organizations"},
		"verify --from":           {"clerk", "eu"},
		"--log-level":             {"debug", "info", "warn", "error"},
		"serve --log-format":      {"json", "console"},
		"serve --stream-replicas": {"1", "3", "5"},
		"trigger":                 {"user.created", "session.ended"},
		"events":                  {"list", "show", "tail"},
		"schema":                  {"prisma", "drizzle", "sql"},
		"schema sql --dialect":    {"postgres", "sqlite"},
	} {
		r := h.Run(append(append([]string{"__complete"}, strings.Fields(line)...), "")...).want(exitOK)
		var have []string
		for offered := range strings.Lines(r.out) {
			name, _, _ := strings.Cut(strings.TrimSpace(offered), "\t")
			have = append(have, name)
		}
		for _, value := range want {
			assert.Contains(t, have, value, line)
		}
		assert.Contains(t, r.err, "ShellCompDirectiveNoFileComp", line)
	}
	for _, line := range []string{"events show", "events list --user", "serve --smtp-url", "config"} {
		assert.Equal(t, ":4\n", h.Run(append(append([]string{"__complete"}, strings.Fields(line)...), "")...).want(exitOK).out, "%s: no file is meant", line)
	}
	assert.Equal(t, ":0\n", h.Run("__complete", "trigger", "--from-file", "").want(exitOK).out)
	assert.Contains(t, h.Run("completion", "bash").want(exitOK).out, "bash completion")
}

func TestATypoNamesTheCommandThatWasMeant(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	for line, want := range map[string]string{
		"revrify":                  `unknown command "revrify": did you mean verify?`,
		"revrify --resource users": `unknown command "revrify": did you mean verify?`,
		"--data-dir x revrify":     `unknown command "revrify": did you mean verify?`,
		"help revrify":             `unknown command "revrify": did you mean verify?`,
		"events lst --type user.*": `unknown command "events lst": did you mean events list?`,
		"dlq reply --all":          `unknown command "dlq reply": did you mean dlq replay?`,
		"tail":                     `unknown command "tail": did you mean events tail?`,
		"list":                     `unknown command "list": did you mean dlq list or events list?`,
		"nonsense":                 "unknown command \"nonsense\": `usher --help` lists the commands",
		"events nonsense":          "unknown command \"events nonsense\": `usher events --help` lists the commands",
		"\x1b[31mverify\x07":       `unknown command "\x1b[31mverify\a"`,
		"help \x1b]0;x\x07":        `unknown command "\x1b]0;x\a"`,
		"events --\x1b[31mtype":    "unknown flag",
	} {
		r := h.Run(strings.Fields(line)...).want(exitUsage)
		assert.Contains(t, r.err, "usher: "+want, line)
		assert.Equal(t, 1, strings.Count(r.err, "\n"), "%s: one line: %s", line, r.err)
		assert.False(t, strings.ContainsFunc(strings.TrimSuffix(r.err, "\n"), unicode.IsControl), "%q", r.err)
		assert.Empty(t, r.out, line)
	}
	for _, line := range []string{"help verify", "help events list", "events", "--help", "events --help", "help", "--log-level error events"} {
		assert.NotEmpty(t, h.Run(strings.Fields(line)...).want(exitOK).out, line)
	}
}

func TestMisspeltVariablesAreWarnedAboutOnce(t *testing.T) {
	t.Parallel()
	h := newHarness(t, "USHER_DATABSE_URL=postgres://joe:hunter2@db.example.com/app", "CLERK_PUBLISHABLE_KEY=pk_test_x", "CLERK_WEBHOOK_SECRET="+fixture.Secret,
		"USHER_NATS_URL=nats://127.0.0.1:1", "USHER_INGEST_SERVICE_HOST=10.0.0.1")
	for _, line := range []string{"config", "events list", "events tail", "setup --plan", "dlq list", "replay --all --dry-run", "verify", "trigger user.created", "serve"} {
		r := h.Run(strings.Fields(line)...)
		assert.Equal(t, 1, strings.Count(r.err, "warning: USHER_DATABSE_URL: did you mean USHER_DATABASE_URL?\n"), "%s: %s", line, r.err)
		assert.Equal(t, 1, strings.Count(r.err, "warning: CLERK_WEBHOOK_SECRET: did you mean CLERK_WEBHOOK_SIGNING_SECRET?\n"), "%s: %s", line, r.err)
		assert.NotContains(t, r.err+r.out, "hunter2", line)
		assert.NotContains(t, r.err, "PUBLISHABLE", line)
		assert.NotContains(t, r.err, "SERVICE_HOST", line)
	}
}

func TestServeSaysWhatItUses(t *testing.T) {
	t.Parallel()
	said := func(env ...string) map[string]string {
		s, err := config.Load(env, nil)
		require.NoError(t, err)
		texts := map[string]string{}
		for _, f := range uses(s) {
			texts[f.Key] = f.String
		}
		return texts
	}
	own := said("USHER_DATA_DIR=/var/lib/usher")
	assert.Equal(t, "sqlite:/var/lib/usher/usher.db", own["database"])
	assert.Equal(t, "embedded, in /var/lib/usher/nats", own["broker"])
	other := said("DATABASE_URL=postgres://joe:hunter2@db.example.com/app", "USHER_NATS_URL=nats://joe:hunter2@nats.example.com")
	assert.Equal(t, "postgres://joe:redacted@db.example.com/app", other["database"])
	assert.Equal(t, "DATABASE_URL", other["database_setting"])
	assert.Equal(t, "nats://joe:redacted@nats.example.com", other["broker"])
	assert.Equal(t, "usher", other["schema"])
}

func TestConfigBesideAServeShowsWhatThatRunsWith(t *testing.T) {
	t.Parallel()
	s, err := config.Load(config.Environ{"USHER_DATABASE_URL=postgres://joe:hunter2@db.example.com/app", "USHER_RETENTION=2w"}, map[string]string{"USHER_INGEST_ADDR": ":9999"})
	require.NoError(t, err)
	h := newHarness(t)
	h.pretendRunning(allinone.State{PID: 4711, Mode: "serve", NATSURL: "nats://usher:hunter2@127.0.0.1:4222", EmbeddedBroker: true, Settings: s.List()})
	shown := func(h *harness, args ...string) map[string]config.Setting {
		r := h.Run(append([]string{"config", "-o", "json"}, args...)...).want(exitOK)
		assert.Contains(t, r.err, "the running `usher serve` (process 4711)")
		assert.NotContains(t, r.out+r.err, "hunter2")
		byName := map[string]config.Setting{}
		for _, s := range into[listing[config.Setting]](r).Items {
			byName[s.Name] = s
		}
		return byName
	}
	is := shown(h)
	assert.Equal(t, "postgres://joe:redacted@db.example.com/app serve", is["USHER_DATABASE_URL"].Value+" "+is["USHER_DATABASE_URL"].Origin)
	assert.Equal(t, "336h0m0s serve", is["USHER_RETENTION"].Value+" "+is["USHER_RETENTION"].Origin)
	assert.Equal(t, ":9999 serve", is["USHER_INGEST_ADDR"].Value+" "+is["USHER_INGEST_ADDR"].Origin)
	assert.Equal(t, "nats://usher:redacted@127.0.0.1:4222 serve", is["USHER_NATS_URL"].Value+" "+is["USHER_NATS_URL"].Origin)
	assert.Equal(t, "default", is["USHER_STREAM_REPLICAS"].Origin)

	is = shown(h.with("USHER_RETENTION=1h", "USHER_DATABASE_URL=postgres://joe@other.example.com/app"), "--log-level", "debug")
	assert.Equal(t, "336h0m0s", is["USHER_RETENTION"].Value, "what is set here does not change it")
	assert.Equal(t, "postgres://joe@other.example.com/app environment", is["USHER_DATABASE_URL"].Value+" "+is["USHER_DATABASE_URL"].Origin, "which commands here take first")
	assert.Equal(t, "debug flag", is["USHER_LOG_LEVEL"].Value+" "+is["USHER_LOG_LEVEL"].Origin)
}
