package command

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// program is the usher command as a process of its own.
type program struct {
	*harness
	path string
}

func (h *harness) build() program {
	h.t.Helper()
	path := filepath.Join(h.t.TempDir(), "usher")
	out, err := exec.Command("go", "build", "-o", path, "../../cmd/usher").CombinedOutput()
	require.NoError(h.t, err, string(out))
	return program{h, path}
}

// atTerminal runs a command with a terminal as all of its streams, types the answer once it is asked, and returns the exit code and all that
// was on the screen.
func (p program) atTerminal(answer string, args ...string) (code int, screen string) {
	p.t.Helper()
	cmd := exec.Command(p.path, args...)
	cmd.Env = p.env
	terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 120})
	require.NoError(p.t, err)
	defer func() { _ = terminal.Close() }()
	var shown lockedBuffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(&shown, terminal) // ends with an error once the process has left the terminal
	}()
	if answer != "" {
		asked := assert.Eventually(p.t, func() bool { return strings.HasSuffix(shown.String(), "? [y/N] ") }, 60*time.Second, 5*time.Millisecond)
		if asked {
			_, err = terminal.WriteString(answer)
			require.NoError(p.t, err)
		} else {
			_ = cmd.Process.Kill()
		}
	}
	err = cmd.Wait()
	<-done
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(p.t, err)
	}
	return cmd.ProcessState.ExitCode(), shown.String()
}

// without runs a command with pipes for its streams.
func (p program) without(stdin string, args ...string) result {
	p.t.Helper()
	return p.run(strings.NewReader(stdin), args...)
}

// unseen runs a command with a terminal to type at and nothing to see.
func (p program) unseen(args ...string) result {
	p.t.Helper()
	terminal, tty, err := pty.Open()
	require.NoError(p.t, err)
	defer func() { _, _ = terminal.Close(), tty.Close() }()
	_, err = terminal.WriteString("y\n")
	require.NoError(p.t, err)
	return p.run(tty, args...)
}

// withScreen runs a command whose data goes to a pipe and everything else to a terminal.
func (p program) withScreen(args ...string) (screen, data string) {
	p.t.Helper()
	cmd := exec.Command(p.path, args...)
	var out bytes.Buffer
	cmd.Env, cmd.Stdout = p.env, &out
	terminal, err := pty.Start(cmd)
	require.NoError(p.t, err)
	defer func() { _ = terminal.Close() }()
	shown, _ := io.ReadAll(terminal) // until the process has left the terminal, which is an error
	require.NoError(p.t, cmd.Wait())
	return string(shown), out.String()
}

func (p program) run(stdin io.Reader, args ...string) result {
	p.t.Helper()
	cmd := exec.Command(p.path, args...)
	var out, stderr bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = p.env, stdin, &out, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(p.t, err)
	}
	return result{p.t, cmd.ProcessState.ExitCode(), out.String(), stderr.String()}
}

// TestBulkChangesAskAtATerminal answers the question of each command that changes many events at once.
func TestBulkChangesAskAtATerminal(t *testing.T) {
	t.Parallel()
	const n = 6
	y, c, cfg := newCounting(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"), n)
	c.set(nil)
	usher := y.build()
	before := y.lastSeq()
	state := func() string {
		return fmt.Sprintf("%d letters, %d dead rows, %d events, %d audits", y.letters(), y.count("deliveries", "status = 'dead'"), y.lastSeq()-before, y.count("audit_log", "true"))
	}
	discard := []string{"dlq", "discard", "msg_u000", "msg_u001"}
	replayLetters := []string{"dlq", "replay", "--handler", "counter"}
	replayEvents := []string{"replay", "--all", "--stop-at", "100"} // no worker for the mirror here, so nothing to wait for
	untouched := fmt.Sprintf("%d letters, %d dead rows, 0 events, 0 audits", n, n)
	for _, command := range [][]string{discard, replayLetters, replayEvents} {
		for _, answer := range []struct {
			name, typed string
			code        int
			says        string
		}{
			{"no", "n\n", exitNo, "Nothing was changed."},
			{"nothing", "\n", exitNo, "Nothing was changed."},
			{"something else", "yess\n", exitNo, "Nothing was changed."},
			{"end of input", "\x04", exitNo, "Nothing was changed."},
			{"Ctrl-C", "\x03", exitInterrupted, "interrupted"},
		} {
			code, screen := usher.atTerminal(answer.typed, command...)
			assert.Equal(t, answer.code, code, "%v %s: %s", command, answer.name, screen)
			assert.Contains(t, screen, answer.says, "%v %s", command, answer.name)
			assert.Equal(t, untouched, state(), "%v %s", command, answer.name)
		}
		// Nobody to ask, also where a yes is piped in, or typed by somebody who does not see the question.
		for _, refused := range []result{usher.without("", command...), usher.without("y\n", command...), usher.unseen(command...)} {
			refused.want(exitUsage)
			assert.Contains(t, refused.err, "No terminal to ask at: --yes goes ahead, --dry-run changes nothing")
			assert.Empty(t, refused.out)
			assert.Equal(t, untouched, state(), command)
		}
	}

	y.work(cfg)
	code, screen := usher.atTerminal("y\n", discard...)
	assert.Equal(t, exitOK, code, screen)
	assert.Contains(t, screen, "Discard 2 dead letters for good? [y/N]")
	assert.Contains(t, screen, "discarded 2 of 2")
	assert.Contains(t, screen, "discarding   0%", "a bar")
	assert.Equal(t, n-2, y.letters())
	code, screen = usher.atTerminal("YES\n", append(replayLetters, "msg_u002", "msg_u003", "--rate", "1")...)
	assert.Equal(t, exitOK, code, screen)
	assert.Contains(t, screen, "replayed 2 of 2: 2 applied")
	assert.Contains(t, screen, "replaying   0%")
	assert.Contains(t, screen, "replaying  50%", "it moves")
	code, screen = usher.atTerminal("y\n", replayEvents...)
	assert.Equal(t, exitOK, code, screen)
	assert.Contains(t, screen, fmt.Sprintf("replayed %d of %d", n, n))
	assert.Contains(t, screen, "replaying   0%")

	// Without a terminal --yes goes ahead, and there is no bar.
	quiet := usher.without("", "dlq", "replay", "msg_u004", "--yes").want(exitOK)
	assert.Equal(t, "replayed 1 of 1: 1 applied\n", quiet.out)
	assert.Equal(t, "1 dead letter selected.\n", quiet.err)
	// Where only the data is redirected, the bar is not among it.
	screen, data := usher.withScreen("dlq", "replay", "msg_u005", "--yes", "-o", "json")
	assert.Contains(t, screen, "replaying   0%")
	assert.Equal(t, bulkResult{Selected: 1, Replayed: 1, Applied: 1}, into[bulkResult](result{t: t, out: data}))
	y.appliedOnce(n - 2)
	assert.Zero(t, y.letters())
	assert.Equal(t, 5, y.count("audit_log", "detail = ''"))
}
