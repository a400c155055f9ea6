package command

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/fixture"
)

func TestConfigMasksSecretsAndNamesOrigins(t *testing.T) {
	t.Parallel()
	h := newHarness(t, "CLERK_WEBHOOK_SIGNING_SECRET="+fixture.Secret, "CLERK_SECRET_KEY=sk_test_hunter2",
		"DATABASE_URL=postgres://joe:hunter2@db.example.com/app", "USHER_NATS_URL=nats://joe:hunter2@nats.example.com",
		"USHER_SOURCE_STAGING_SIGNING_SECRET="+stagingSecret, "USHER_SMTP_URL=smtp://joe:hunter2@mail.example.com", "USHER_ADMIN_TOKEN=hunter2-hunter2-hunter2", "USHER_APP_TOKEN=another-hunter2-token")
	for _, format := range []string{"table", "json", "ndjson"} {
		r := h.Run("config", "--ingest-addr", ":9999", "--output", format).want(exitOK)
		for _, secret := range []string{"hunter2", fixture.Secret, stagingSecret} {
			assert.NotContains(t, r.out+r.err, secret)
		}
	}
	list := into[listing[config.Setting]](h.Run("config", "--ingest-addr", ":9999", "--output", "json"))
	byName := map[string]config.Setting{}
	for _, s := range list.Items {
		byName[s.Name] = s
	}
	assert.Equal(t, "flag", byName["USHER_INGEST_ADDR"].Origin)
	assert.Equal(t, ":9999", byName["USHER_INGEST_ADDR"].Value)
	assert.Equal(t, ":8080", byName["USHER_INGEST_ADDR"].Default)
	assert.Equal(t, "DATABASE_URL", byName["USHER_DATABASE_URL"].Origin)
	assert.Equal(t, "environment", byName["CLERK_SECRET_KEY"].Origin)
	assert.Equal(t, "redacted", byName["CLERK_SECRET_KEY"].Value)
	assert.Equal(t, "default", byName["USHER_RETENTION"].Origin)
	assert.NotEmpty(t, byName["USHER_RETENTION"].Doc)
	assert.Contains(t, byName["USHER_NATS_URL"].Value, "nats.example.com")
	assert.Regexp(t, `USHER_INGEST_ADDR +:9999 +flag`, h.Run("config", "--ingest-addr", ":9999").out)
}

func TestConfigListsEveryProblem(t *testing.T) {
	t.Parallel()
	r := newHarness(t, "USHER_STREAM_REPLICAS=2", "USHER_LOG_LEVEL=loud", "CLERK_WEBHOOK_SIGNING_SECRET=whsec_").Run("config").want(exitUsage)
	for _, name := range []string{"USHER_STREAM_REPLICAS", "USHER_LOG_LEVEL", "CLERK_WEBHOOK_SIGNING_SECRET"} {
		assert.Contains(t, r.err, name)
	}
	assert.Empty(t, r.out)
}

func TestEveryCommandHasHelpWithAnExample(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	var walk func(cmd *cobra.Command, path []string)
	walk = func(cmd *cobra.Command, path []string) {
		if cmd.Name() == "help" || cmd.Name() == "completion" {
			return
		}
		assert.NotEmpty(t, cmd.Example, path)
		assert.NotEmpty(t, cmd.Short, path)
		r := h.Run(append(path, "--help")...).want(exitOK)
		assert.Contains(t, r.out, "Examples:", path)
		assert.Empty(t, r.err)
		for _, sub := range cmd.Commands() {
			walk(sub, append(path[:len(path):len(path)], sub.Name()))
		}
	}
	walk((&cli{flags: map[string]string{}}).root(), nil)
}

func TestWrongUseIsExitCode2AndLeavesStdoutEmpty(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	for _, line := range []string{
		"nonsense", "--nonsense", "events nonsense", "events list --output xml", "events list --limit 0", "events list --limit 1001",
		"events list --status lost", "events list --type user", "events list --type us*.created", "events list --since yesterday",
		"events list extra", "events show", "events tail --limit -1", "trigger", "trigger user.created --count 0", "trigger user.created --rate -1",
		"trigger user.created --parallel 0", "trigger user.created --set x", "trigger user.created --url ftp://x", "trigger user.created extra",
		"trigger --from-file /does/not/exist", "trigger user.created --from-file x", "setup extra", "config extra", "config --ingest-addr nowhere",
	} {
		r := h.Run(strings.Fields(line)...)
		require.Equal(t, exitUsage, r.code, "%s: %s", line, r.err)
		assert.Empty(t, r.out, line)
		assert.NotEmpty(t, r.err, line)
	}
}
