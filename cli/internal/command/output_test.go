package command

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
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

// TestListingsAreWhole: a script that reads lines has no other way to know that it did not get all of them.
func TestListingsAreWhole(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		const n = 2345
		db := openDatabase(t, url)
		_, err := database.Migrate(t.Context(), db)
		require.NoError(t, err)
		moment := time.Now().UTC().Truncate(time.Second)
		rows := make([]map[string]any, n)
		for i := range rows {
			at := moment.Add(time.Duration(i/10) * time.Millisecond)
			rows[i] = map[string]any{
				"handler": "mirror", "event_id": fmt.Sprintf("msg_%04d", i), "type": "user.created", "source": "clerk", "origin": "webhook", "status": "dead",
				"attempts": 1, "received_at": at, "processed_at": at, "duration_ms": 1.0, "stream_seq": i + 1, "error": "no", "reason": "rejected",
				"fingerprint": []string{"common", "rare"}[min(i/2000, 1)],
			}
		}
		require.NoError(t, db.Table("deliveries").CreateInBatches(rows, 100).Error)
		h := newHarness(t, "USHER_DATABASE_URL="+url)
		type item struct {
			ID string `json:"id"`
		}
		for _, command := range []string{"events list", "dlq list"} {
			list := func(args ...string) result {
				t.Helper()
				return h.Run(append(strings.Fields(command), args...)...).want(exitOK)
			}
			r := list("-o", "ndjson")
			all := lines[item](r)
			require.Len(t, all, n, command)
			assert.Empty(t, r.err)
			for i, one := range all {
				require.Equal(t, fmt.Sprintf("msg_%04d", n-1-i), one.ID)
			}
			rest := lines[item](list("-o", "ndjson", "--since", moment.Add(100*time.Millisecond).Format(time.RFC3339Nano)))
			assert.Len(t, rest, n-1000, "with a filter")

			// With a limit it says where it stopped, and what it says can be pasted.
			first := list("-o", "ndjson", "--limit", "700")
			assert.Equal(t, all[:700], lines[item](first))
			more, ok := strings.CutPrefix(strings.TrimSpace(first.err), "more: ")
			require.True(t, ok, first.err)
			second := list(append([]string{"-o", "ndjson", "--limit", "700"}, strings.Fields(more)...)...)
			assert.Equal(t, all[700:1400], lines[item](second))
			assert.Equal(t, all[1400:], lines[item](list("-o", "ndjson", "--cursor", strings.Fields(second.err)[2])), "from a cursor on, all")
			last := list("-o", "ndjson", "--limit", "1000", "--cursor", strings.Fields(second.err)[2])
			assert.Len(t, lines[item](last), 945)
			assert.Empty(t, last.err)

			table := list()
			assert.Equal(t, 51, strings.Count(table.out, "\n"))
			assert.Regexp(t, `^more: --cursor \S+\n$`, table.err)
			page := list("-o", "json")
			assert.Empty(t, page.err, "it has the cursor in itself")
			assert.NotEmpty(t, into[listing[item]](page).Next)
		}

		for _, what := range []string{"--group", "--count"} {
			assert.Contains(t, h.Run("dlq", "list", what, "--cursor", "xx").want(exitUsage).err, "--cursor")
		}
		assert.Len(t, lines[deadletter.Group](h.Run("dlq", "list", "--group", "-o", "ndjson").want(exitOK)), 2)
		for _, format := range []string{"ndjson", "table"} {
			r := h.Run("dlq", "list", "--group", "--limit", "1", "-o", format).want(exitOK)
			assert.Contains(t, r.out, "common")
			assert.NotContains(t, r.out, "rare")
			assert.Equal(t, "1 of 2 are shown; without --limit all are\n", r.err)
		}
	})
}
