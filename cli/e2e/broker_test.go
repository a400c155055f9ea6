package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/dbtest"
)

// TestServeWaitsForABrokerThatStartsLater: a machine starts, and its nats-server after it. Webhooks are refused in words meanwhile, so that
// their sender tries again.
func TestServeWaitsForABrokerThatStartsLater(t *testing.T) {
	t.Parallel()
	dir, err := programs()
	require.NoError(t, err)
	dataDir, conf := t.TempDir(), filepath.Join(t.TempDir(), "nats.conf")
	broker, monitor, address, ops := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	databaseURL := "sqlite:" + filepath.Join(dataDir, "usher.db")
	env := []string{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + databaseURL, "USHER_NATS_URL=nats://" + broker,
		"USHER_NATS_MONITOR_URL=http://" + monitor, "USHER_INGEST_ADDR=" + address, "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=" + ops,
	}
	begin := func() *process {
		p := start(t, env, "serve")
		require.Eventually(t, func() bool { return get("http://"+address+"/webhooks/clerk") == http.StatusMethodNotAllowed }, time.Minute, 5*time.Millisecond)
		status, err := postOne("http://" + address + "/webhooks/clerk")
		require.NoError(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		requireProblem(t, "http://"+ops, "the broker does not answer")
		assert.NoFileExists(t, filepath.Join(dataDir, "usher.json"), "it is not ready")
		return p
	}
	p := begin()
	assert.Equal(t, 0, p.stop(), p.stderr.String())
	assertInWords(t, p)

	p = begin()
	require.NoError(t, os.WriteFile(conf, fmt.Appendf(nil, "listen: %q\nhttp: %q\njetstream { store_dir: %q, sync_interval: always }\n", broker, monitor, t.TempDir()), 0o600))
	server := exec.Command(filepath.Join(dir, "nats-server"), "-c", conf)
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(t, server.Start())
	t.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait()
	})
	p.ready(dataDir)
	status, err := postOne("http://" + address + "/webhooks/clerk")
	require.NoError(t, err)
	assert.Equal(t, http.StatusAccepted, status)
	assert.Equal(t, 0, p.stop(), p.stderr.String())
	assert.Contains(t, p.stderr.String(), "broker is unavailable, waiting for it")
	assert.Contains(t, p.stderr.String(), "broker is available")
	assertInWords(t, p)
}

// TestEveryServiceSurvivesItsBroker: a password that is rotated and rotated back, and an end without the broker.
func TestEveryServiceSurvivesItsBroker(t *testing.T) {
	t.Parallel()
	url := dbtest.EmptyPostgresURL(t)
	c := newClusterOf(t, clusterConfig{databaseURL: url, ackWait: 5 * time.Second, services: []string{"reconciler", "console"}, env: []string{"USHER_ADMIN_TOKEN=0123456789abcdef"}})
	services := slices.Sorted(maps.Keys(c.ops))
	require.Equal(t, []string{"console", "ingest", "reconciler", "worker"}, services)
	ready := func() {
		for _, name := range services {
			require.Eventually(t, func() bool { return c.problems(name) == nil }, time.Minute, 20*time.Millisecond, "%s is not ready", name)
		}
	}
	ready()
	conf := c.args["nats-server"][1]
	right, err := os.ReadFile(conf)
	require.NoError(t, err)
	for _, rotated := range []bool{true, false} {
		text := string(right)
		if rotated {
			text = strings.Replace(text, `"right"`, `"other"`, 1)
		}
		require.NoError(t, os.WriteFile(conf, []byte(text), 0o600))
		require.NoError(t, c.processes["nats-server"].cmd.Process.Signal(syscall.SIGHUP))
		if !rotated {
			break
		}
		for _, name := range services {
			requireProblem(t, "http://"+c.ops[name], "the broker refuses the login")
		}
	}
	ready()

	c.processes["nats-server"].kill()
	for range 2 { // the broker goes while they run, and they start without it
		for _, name := range services {
			requireProblem(t, "http://"+c.ops[name], "the broker does not answer")
		}
		for _, name := range services {
			p := c.processes[name]
			assert.Equal(t, 0, p.stop(), "%s: %s", name, &p.stderr)
			assertInWords(t, p)
			c.start(name)
		}
	}
}

// requireProblem waits until a service's readiness names a problem.
func requireProblem(t *testing.T, ops, words string) {
	t.Helper()
	var last strings.Builder
	require.Eventually(t, func() bool {
		last.Reset()
		_, _ = fmt.Fprint(&last, problemsAt(ops))
		return strings.Contains(last.String(), words)
	}, time.Minute, 20*time.Millisecond, "want %q, last %s", words, &last)
	require.NotContains(t, last.String(), "nats: ")
}

// assertInWords: what the broker's client library says for itself is in no line.
func assertInWords(t *testing.T, p *process) {
	t.Helper()
	for _, raw := range []string{"nats: ", "outbound buffer", "headers not supported", "no responders"} {
		assert.NotContains(t, p.stderr.String(), raw)
	}
}
