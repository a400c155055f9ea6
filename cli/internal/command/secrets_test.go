package command

import (
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/usherhq/usher/pkg/emulator"
)

// TestNoOutputHoldsATailOfAPassword: whatever its characters, whether written as %XX or not, in whichever URL.
func TestNoOutputHoldsATailOfAPassword(t *testing.T) {
	t.Parallel()
	settings := map[string][]string{ // around the password
		"USHER_DATABASE_URL":     {"postgres://joe:", "@127.0.0.1:1/app"},
		"DATABASE_URL":           {"postgres://joe:", "@127.0.0.1:1/app?sslmode=disable"},
		"USHER_NATS_URL":         {"nats://joe:", "@127.0.0.1:1", "nats://", "@127.0.0.1:1", "nats://joe:", "@127.0.0.1:1,nats://127.0.0.1:2", "joe:", "@127.0.0.1:1", "", "@127.0.0.1:1,127.0.0.1:2"},
		"USHER_NATS_MONITOR_URL": {"http://joe:", "@127.0.0.1:1"},
		"USHER_SMTP_URL":         {"smtps://joe:", "@127.0.0.1:1"},
		"CLERK_API_URL":          {"http://joe:", "@127.0.0.1:1"},
	}
	rapid.Check(t, func(r *rapid.T) {
		password := rapid.StringOfN(rapid.OneOf(rapid.RuneFrom([]rune("XYZQ@:/?#,%&= [].\\+é")), rapid.RuneFrom([]rune("XYZQ"))), 5, 16, -1).Draw(r, "password")
		name := rapid.SampledFrom([]string{"USHER_DATABASE_URL", "DATABASE_URL", "USHER_NATS_URL", "USHER_NATS_MONITOR_URL", "USHER_SMTP_URL", "CLERK_API_URL"}).Draw(r, "setting")
		i := 2 * rapid.IntRange(0, len(settings[name])/2-1).Draw(r, "shape")
		written := password
		if rapid.Bool().Draw(r, "encoded") {
			written = url.PathEscape(password)
		}
		tails := []string{string([]rune(password)[len([]rune(password))-4:]), written[len(written)-4:]}
		h := newHarness(t, name+"="+settings[name][i]+written+settings[name][i+1])
		for _, line := range []string{"config", "config -o json", "events list", "setup --plan"} {
			r := h.Run(strings.Fields(line)...)
			for _, tail := range tails {
				if strings.ContainsAny(tail, "XYZQ") { // others are in any text
					require.NotContains(t, r.out+r.err, tail, "%s with %s=%s…", line, name, settings[name][i])
				}
			}
		}
	})
}

func TestASecretInAFlagIsWarnedAbout(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	for flag, value := range map[string]string{"database-url": "postgres://joe:hunter2@127.0.0.1:1/app", "nats-url": "nats://hunter2@127.0.0.1:1", "smtp-url": "smtp://joe:hunter2@h"} {
		r := h.Run("config", "--"+flag, value).want(exitOK)
		assert.Contains(t, r.err, "--"+flag)
		assert.Contains(t, r.err, "USHER_"+strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))+"_FILE")
		assert.NotContains(t, r.out+r.err, "hunter2")
	}
	assert.Empty(t, h.Run("config", "--database-url", "postgres://joe@127.0.0.1:1/app").want(exitOK).err)
	assert.Contains(t, h.Run("config", "--slack-webhook-url", "https://hooks.example.com/hunter2").want(exitUsage).err, "unknown flag")
}

func TestPortalPrintsTheLinkAndKeepsNone(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(emulator.New(emulator.Config{}).API(emulator.APIConfig{Key: "sk_live_emulator"}))
	t.Cleanup(server.Close)
	h := newHarness(t, "CLERK_SECRET_KEY=sk_live_emulator", "CLERK_API_URL="+server.URL)
	assert.Equal(t, "https://app.svix.com/login#key=emulated\n", h.Run("portal").want(exitOK).out)
	assert.Contains(t, h.Run("portal", "--from", "staging").want(exitUsage).err, "there is no such source")
	assert.Contains(t, newHarness(t).Run("portal").want(exitUsage).err, "CLERK_SECRET_KEY")
}
