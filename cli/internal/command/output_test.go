package command

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

func TestPrintableWritesWhatSteersATerminalAsJSONDoes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"plain, é 漢字 😀 «»":          "plain, é 漢字 😀 «»",
		"a\x1b[2Jb\x07":             `a\u001b[2Jb\u0007`,
		"one\ntwo\r\tthree":         `one\ntwo\r\tthree`,
		"\u009b31m \u202egnp.exe":   `\u009b31m \u202egnp.exe`,
		"\U000e0041tag":             `\udb40\udc41tag`,
		"\xff and \x00":             "\uFFFD and " + `\u0000`,
		`it stays: \u001b "quoted"`: `it stays: \u001b "quoted"`,
	} {
		assert.Equal(t, want, printable(text))
		assert.Equal(t, want, printable(printable(text)))
	}
	assert.Equal(t, "one\n"+`two\u001b`, printableLines("one\ntwo\x1b"))
}

// TestNothingFromOutsideSteersTheTerminal: types, ids and errors come from senders and from databases.
func TestNothingFromOutsideSteersTheTerminal(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		const nasty = "\x1b]0;pwned\x07 \u009b31m \u202ered"
		c := &counter{fail: func(event.Event) error { return worker.Permanent(errors.New("it said " + nasty)) }}
		handlers := []worker.Registration{{Handler: c}}
		y := newYard(t, url, handlers...)
		stop := y.work(worker.Config{Handlers: handlers})
		body, err := json.Marshal(map[string]any{"type": "user.new\n\tline" + nasty, "data": map[string]any{"id": "user_1" + nasty, "note": nasty}})
		require.NoError(t, err)
		e, err := event.Decode(body)
		require.NoError(t, err)
		e.ID, e.Source, e.Origin = "msg_1", "clerk", event.OriginWebhook
		_, err = y.js.PublishMsg(t.Context(), stream.Message(&e))
		require.NoError(t, err)
		y.wait("counter", "dead", 1)
		stop()
		require.NoError(t, y.db.Exec("UPDATE deliveries SET handler = 'mirror'").Error) // whose rows are the list of events

		for _, args := range []string{
			"dlq list", "dlq list --group", "dlq list --count", "dlq show msg_1", "events list", "events show msg_1",
			"events tail --since 1h --limit 1", "dlq replay --all --dry-run", "dlq show msg_2\x1b",
		} {
			r := y.Run(strings.Split(args, " ")...)
			for _, text := range []string{r.out, r.err} {
				odd := strings.IndexFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsGraphic(r) })
				assert.Equal(t, -1, odd, "%s: %q", args, text)
			}
			if strings.Contains(args, "list") {
				assert.Len(t, strings.Split(strings.TrimSpace(r.out), "\n"), 2, "a row a line: %s", r.out)
			}
		}
		list := into[listing[deadletter.Entry]](y.Run("dlq", "list", "-o", "json").want(exitOK))
		assert.Equal(t, e.Type, event.Type(list.Items[0].Type), "JSON stays JSON")
	})
}

func TestARefusalFromOutsideDoesNotSteerTheTerminal(t *testing.T) {
	t.Parallel()
	r := newHarness(t, "USHER_DATABASE_URL=sqlite:"+filepath.Join(t.TempDir(), "no\x1bsuch.db")).Run("events", "list").want(exitUsage)
	assert.NotContains(t, r.err, "\x1b")
}
