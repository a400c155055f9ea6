package ingest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const fsyncHelper = "USHER_TEST_FSYNC_HELPER"

// TestFsyncHelper is the process that the next test watches: a broker that syncs always, and ingest.
func TestFsyncHelper(t *testing.T) {
	if os.Getenv(fsyncHelper) == "" {
		t.Skip("runs only as a helper of TestNo202BeforeAnFsync")
	}
	fmt.Println("addr=" + benchSetup(t, true, true))
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
}

// TestNo202BeforeAnFsync reads from the system calls that every 202 was written after a whole sync of the
// stream's file that began after its request was read, and that a crowd shares its syncs.
func TestNo202BeforeAnFsync(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil && os.Getenv("CI") == "" {
		t.Skip("strace is not installed (apt-get install strace)")
	}
	require.NoError(t, err)
	for _, c := range []struct {
		name                  string
		connections, requests int
		most                  int // syncs
	}{
		{"OneAfterAnother", 1, 40, 1000},
		{"Crowd", 256, 2048, 2048 / 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			trace := filepath.Join(t.TempDir(), "trace")
			cmd := exec.Command(strace, "-f", "-y", "-s", "16", "-e", "trace=fsync,fdatasync,read,write", "-o", trace,
				os.Args[0], "-test.run=^TestFsyncHelper$")
			cmd.Env = append(os.Environ(), fsyncHelper+"=1")
			stdin, err := cmd.StdinPipe()
			require.NoError(t, err)
			stdout, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			var addr string
			lines := bufio.NewScanner(stdout)
			for addr == "" && lines.Scan() {
				addr, _ = strings.CutPrefix(lines.Text(), "addr=")
				if addr == lines.Text() {
					addr = ""
				}
			}
			require.NotEmpty(t, addr, "the helper starts")
			senders := dial(t, addr, c.connections)
			each(senders, func(s *sender) []time.Duration {
				for range c.requests / c.connections {
					s.send(t, []byte(userCreated))
				}
				return nil
			})
			require.NoError(t, stdin.Close())
			_, _ = io.Copy(io.Discard, stdout)
			require.NoError(t, cmd.Wait())
			got := readTrace(t, trace)
			t.Logf("%d answers, %d syncs of the stream, %d syncs in all", got.answers, got.streamSyncs, got.syncs)
			assert.Equal(t, c.requests, got.answers)
			assert.Zero(t, got.early, "answers without a sync after their request")
			assert.Less(t, got.syncs, c.most)
			if c.connections == 1 {
				assert.GreaterOrEqual(t, got.streamSyncs, c.requests)
			}
		})
	}
}

type traced struct{ answers, early, syncs, streamSyncs int }

var (
	traceLine = regexp.MustCompile(`^(\d+) +(.*)$`)
	traceCall = regexp.MustCompile(`^(read|write|fsync|fdatasync)\((\d+)<([^>]*)>`)
)

// readTrace follows the system calls in their order. A read or write counts where its data shows, which for a read is
// its end and for a write its beginning: both are the cautious side.
func readTrace(t *testing.T, file string) traced {
	t.Helper()
	f, err := os.Open(file)
	require.NoError(t, err)
	defer f.Close()
	var (
		got        traced
		unfinished = map[string]string{} // by thread
		began      = map[string]int{}    // line, by thread
		syncedAt   int                   // line where the latest sync of the stream began that has ended
		readAt     = map[string]int{}    // by connection
	)
	scanner := bufio.NewScanner(f)
	for n := 1; scanner.Scan(); n++ {
		m := traceLine.FindStringSubmatch(scanner.Text())
		if m == nil {
			continue
		}
		thread, call := m[1], m[2]
		begins, ends, begin := true, true, n
		if rest, ok := strings.CutSuffix(call, "<unfinished ...>"); ok {
			unfinished[thread], began[thread], call, ends = rest, n, rest, false
		} else if strings.HasPrefix(call, "<... ") {
			_, rest, _ := strings.Cut(call, "resumed>")
			call, begins, begin = unfinished[thread]+rest, false, began[thread]
		}
		c := traceCall.FindStringSubmatch(call)
		if c == nil {
			continue
		}
		switch name, fd, path := c[1], c[2], c[3]; {
		case name == "read" && ends && strings.Contains(call, `"POST /webhooks`):
			readAt[fd] = n
		case name == "write" && begins && strings.Contains(call, `"HTTP/1.1 202`):
			got.answers++
			if at, ok := readAt[fd]; !ok || syncedAt < at {
				got.early++
			}
		case strings.HasSuffix(name, "sync") && ends:
			if !strings.HasSuffix(call, "= 0") {
				continue
			}
			got.syncs++
			if strings.Contains(path, "/CLERK_EVENTS/msgs/") && strings.HasSuffix(path, ".blk") {
				got.streamSyncs++
				syncedAt = max(syncedAt, begin)
			}
		}
	}
	require.NoError(t, scanner.Err())
	return got
}
