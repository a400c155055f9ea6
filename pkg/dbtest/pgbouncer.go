package dbtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

var errNoPgBouncer = errors.New("PgBouncer is not installed (searched PATH, /usr/sbin and /usr/local/sbin)")

// bouncer ends with its own stdin, which is a pipe that we hold open for as long as we live.
const bouncer = `
exec 3<&0
"$1" "$2" >/dev/null 2>&1 &
pid=$!
{ read -r _ <&3; kill -KILL "$pid" 2>/dev/null; } &
wait "$pid"
`

// PgBouncer starts a real one in front of the database of address, and returns the address to use it by, whose user the pooler does not
// ask for a password. settings are lines of its [pgbouncer] section, such as "pool_mode = transaction". It ends with the test.
func PgBouncer(t testing.TB, address string, settings ...string) string {
	t.Helper()
	binary, err := findPgBouncer()
	need(t, err)
	who, err := owner()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "pgbouncer-") // t.TempDir is below a folder that another user may not enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if who != nil {
		if err := os.Chown(dir, int(who.Uid), int(who.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal("the address is not a URL")
	}
	for range 5 { // between finding a free port and listening on it another may take it
		port, err := freePort()
		if err != nil {
			t.Fatal(err)
		}
		if startBouncer(t, binary, dir, u, port, settings) {
			u.Host, u.User = net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), url.User(u.User.Username())
			return u.String()
		}
	}
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	t.Fatalf("PgBouncer does not start: %s", log)
	return ""
}

func startBouncer(t testing.TB, binary, dir string, server *url.URL, port int, settings []string) bool {
	t.Helper()
	who, err := owner()
	if err != nil {
		t.Fatal(err)
	}
	serverPort := server.Port()
	if serverPort == "" {
		serverPort = "5432"
	}
	password, _ := server.User.Password()
	ini := filepath.Join(dir, "pgbouncer.ini")
	text := fmt.Sprintf("[databases]\n* = host=%s port=%s user=%s password=%s\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = %d\nunix_socket_dir =\nauth_type = any\nlogfile = %s\n%s\n",
		server.Hostname(), serverPort, server.User.Username(), password, port, filepath.Join(dir, "log"), strings.Join(settings, "\n"))
	if err := os.WriteFile(ini, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	stdin, alive, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", bouncer, "pgbouncer", binary, ini)
	cmd.Dir, cmd.Stdin, cmd.SysProcAttr = dir, stdin, (&Server{owner: who}).attributes()
	err = cmd.Start()
	_ = stdin.Close()
	if err != nil {
		t.Fatalf("start PgBouncer: %v", err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() { _ = alive.Close(); <-ended })
	for deadline := time.Now().Add(startTime); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		select {
		case <-ended:
			return false
		default:
		}
		conn, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return conn.Close() == nil
		}
	}
	return false
}

func findPgBouncer() (string, error) {
	if path, err := exec.LookPath("pgbouncer"); err == nil {
		return path, nil
	}
	for _, path := range []string{"/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer"} {
		if executable(path) {
			return path, nil
		}
	}
	return "", errNoPgBouncer
}
