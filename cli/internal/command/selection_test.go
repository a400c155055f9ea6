package command

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// TestIdsWithoutALetterAreNamed: a typo must not look like success, and must not hold up the others.
func TestIdsWithoutALetterAreNamed(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y, c, cfg := newCounting(t, url, 4)
		c.set(nil)
		y.work(cfg)
		const none = "No such dead letter: msg_nope msg_typo\n"
		for _, command := range []string{"replay", "discard"} {
			for _, mode := range []string{"--yes", "--dry-run"} {
				r := y.Run("dlq", command, "msg_typo", "msg_nope", "msg_typo", mode).want(exitNo)
				assert.Contains(t, r.err, none)
				assert.Contains(t, r.err, "0 dead letters selected")
			}
		}
		assert.Contains(t, y.Run("dlq", "discard", "msg_u000", "msg_nope", "msg_typo", "--dry-run").want(exitNo).out, "would discard 1 dead letter")
		r := y.Run("dlq", "discard", "msg_u000", "msg_nope", "msg_typo", "--yes").want(exitNo)
		assert.Contains(t, r.err, none)
		assert.Contains(t, r.out, "discarded 1 of 1")
		r = y.Run("dlq", "replay", "msg_nope", "msg_u001", "msg_typo", "--yes", "-o", "json").want(exitNo)
		assert.Contains(t, r.err, none)
		assert.Equal(t, bulkResult{Selected: 1, Replayed: 1, Applied: 1}, into[bulkResult](r))
		r = y.Run("dlq", "replay", "msg_u002", "--reason", "panic", "--yes").want(exitNo)
		assert.Contains(t, r.err, "No such dead letter: msg_u002\n", "none that all selectors choose")
		r = y.Run("dlq", "replay", "msg_u002", "msg_u003", "--yes").want(exitOK)
		assert.Equal(t, "2 dead letters selected.\n", r.err)
	})
}

func TestUnknownHandlersAreRefused(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y, c, cfg := newCounting(t, url, 1)
		c.set(nil)
		stop := y.work(cfg)
		stop()
		_, err := y.js.CreateConsumer(t.Context(), stream.Events, (stream.Topology{}).Consumer(stream.HandlerSpec{Name: "fraud"}))
		assert.NoError(t, err)
		commands := []string{
			"dlq list", "dlq list --group", "dlq list --count", "dlq replay --yes", "dlq replay --dry-run", "dlq discard --yes", "dlq show msg_u000", "events list",
		}
		for _, command := range commands {
			r := y.Run(append(strings.Fields(command), "--handler", "mirorr")...).want(exitUsage)
			assert.Contains(t, r.err, `--handler "mirorr": there is no such handler; want one of counter, fraud, mirror`, command)
			assert.Empty(t, r.out)
		}
		// Known, and without rows; by the broker alone, too.
		y.Run("dlq", "list", "--handler", "mirror").want(exitOK)
		y.Run("events", "list", "--handler", "fraud").want(exitOK)
		y.Run("dlq", "discard", "--handler", "fraud", "--yes").want(exitOK)

		// Lists need no broker for what the log knows.
		y.nats.Stop()
		y.Run("dlq", "list", "--handler", "counter").want(exitOK)
		r := y.Run("events", "list", "--handler", "mirorr").want(exitUsage)
		assert.Contains(t, r.err, "want one of counter, mirror (the broker could not be asked for more: ")
	})
}

// TestEventsShowTellsTheSequenceToReplayFrom: a replay has a sequence of its own, which is no event's to be replayed.
func TestEventsShowTellsTheSequenceToReplayFrom(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y := newYard(t, url)
		repair := y.broken("bad")
		y.work(worker.Config{Attempts: 1})
		y.publish("one", "bad", "two")
		y.wait("mirror", "processed", 2)
		y.wait("mirror", "dead", 1)
		y.Run("dlq", "replay", "msg_bad", "--yes").want(exitNo) // its next letter is that of a replay
		y.wait("mirror", "dead", 1)
		repair()
		y.Run("dlq", "replay", "msg_bad", "--yes").want(exitOK)
		y.Run("replay", "--event", "msg_bad", "--event", "msg_two", "--yes").want(exitOK)
		y.Run("replay", "--event", "msg_bad", "--yes").want(exitOK)
		y.wait("mirror", "processed", 3)

		for id, want := range map[string]struct {
			seq, copied uint64
			from        int
		}{"msg_one": {1, 1, 3}, "msg_bad": {2, 8, 2}, "msg_two": {3, 7, 1}} {
			e := into[shownEvent](y.Run("events", "show", id, "-o", "json").want(exitOK))
			assert.Equal(t, want.seq, e.OriginalSeq, id)
			assert.Equal(t, want.copied, e.StreamSeq, id)
			from := into[bulkResult](y.Run("replay", "--from-seq", fmt.Sprint(e.OriginalSeq), "--dry-run", "-o", "json").want(exitOK))
			assert.Equal(t, want.from, from.Selected, id)
		}
		assert.Regexp(t, `stream sequence +1\n`, y.Run("events", "show", "msg_one").want(exitOK).out)
		assert.Regexp(t, `stream sequence +2, replayed as 8\n`, y.Run("events", "show", "msg_bad").want(exitOK).out)
		s, err := y.js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		require.NoError(t, s.DeleteMsg(t.Context(), 7))
		assert.Regexp(t, `stream sequence +not known, replayed as 7\n`, y.Run("events", "show", "msg_two").want(exitOK).out)
	})
}
