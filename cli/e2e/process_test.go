// Package e2e tests the usher program from the outside: the command typed, the webhook posted, the process killed.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/cli/e2e/internal/powercut"
	"github.com/usherhq/usher/cli/e2e/internal/strangers"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
)

const diskEnv = "USHER_E2E_DISK" // folder at which a process of the tests serves a disk

const secret = "whsec_MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0"

// newClerk is a Clerk of any seed whose story may last long: its clock runs ahead of ours, and what is dated after tomorrow is applied by the
// time of its receipt.
func newClerk() *emulator.Clerk {
	return emulator.New(emulator.Config{Seed: rand.Uint64(), Start: time.Now().AddDate(-10, 0, 0)})
}

// binary is the usher program, built once for all tests.
var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "usher-e2e-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "usher")
	out, err := exec.Command("go", "build", "-o", path, "../cmd/usher").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build usher: %w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	if dir := os.Getenv(diskEnv); dir != "" { // this process is a disk
		if err := powercut.Serve(dir, os.Stdin, os.Stdout); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(strangersEnv) != "" { // this process is a flood
		if err := strangers.Run(os.Stdin); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	if path, err := binary(); err == nil {
		_ = os.RemoveAll(filepath.Dir(path))
	}
	if code == 0 {
		if err := goleak.Find(dbtest.IgnoreLeaks()...); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// process is a running usher.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	stdout bytes.Buffer
	stderr bytes.Buffer
	done   chan error
}

// start runs usher with an environment of its own: nothing of the machine's settings comes in.
func start(t testing.TB, env []string, args ...string) *process {
	t.Helper()
	path, err := binary()
	require.NoError(t, err)
	return startProgram(t, env, path, args...)
}

// startProgram runs a program that runs usher.
func startProgram(t testing.TB, env []string, path string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(path, args...), done: make(chan error, 1)}
	p.cmd.Env = append([]string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH")}, env...)
	p.cmd.Dir = t.TempDir()
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // never outlives the test
	require.NoError(t, p.cmd.Start())
	go func() { p.done <- p.cmd.Wait() }()
	t.Cleanup(func() { p.kill() })
	return p
}

// run runs a command to its end and returns its exit code.
func run(t *testing.T, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	p := start(t, env, args...)
	code = p.wait(2 * time.Minute)
	return code, p.stdout.String(), p.stderr.String()
}

// wait waits for the end and returns the exit code.
func (p *process) wait(limit time.Duration) int {
	p.t.Helper()
	select {
	case err := <-p.done:
		p.done <- err
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return exit.ExitCode()
		}
		require.NoError(p.t, err)
		return 0
	case <-time.After(limit):
		p.kill()
		require.Failf(p.t, "usher did not end", "after %s; stderr:\n%s", limit, p.stderr.String())
		return -1
	}
}

// kill ends the process as a power switch would.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	p.done <- <-p.done
}

// stop asks for the usual end.
func (p *process) stop() int {
	p.t.Helper()
	require.NoError(p.t, p.cmd.Process.Signal(syscall.SIGTERM))
	return p.wait(30 * time.Second)
}

// state is what the commands find a running instance by.
type state struct {
	IngestURL     string `json:"ingest_url"`
	OpsURL        string `json:"ops_url"`
	ConsoleURL    string `json:"console_url"`
	AdminToken    string `json:"admin_token"`
	SigningSecret string `json:"signing_secret"`
	PID           int    `json:"pid"`
}

// ready waits until the instance of a data folder says that it can do its work.
func (p *process) ready(dataDir string) state {
	p.t.Helper()
	var s state
	require.Eventually(p.t, func() bool {
		select {
		case err := <-p.done:
			p.done <- err
			p.t.Fatalf("usher ended: %v\n%s", err, p.stderr.String())
		default:
		}
		body, err := os.ReadFile(filepath.Join(dataDir, "usher.json"))
		if err != nil || json.Unmarshal(body, &s) != nil || s.PID != p.cmd.Process.Pid {
			return false
		}
		return get(s.OpsURL+"/readyz") == http.StatusOK
	}, 60*time.Second, 5*time.Millisecond)
	return s
}

func get(url string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return 0
	}
	_ = res.Body.Close()
	return res.StatusCode
}

// freeAddr is a loopback address that nobody listens on now.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}
