package dbtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// errNoPostgres tells that the machine has no PostgreSQL to start.
var errNoPostgres = errors.New("PostgreSQL is not installed (searched PATH, pg_config --bindir and /usr/lib/postgresql/*/bin)")

const (
	password  = "dbtest"
	startTime = 30 * time.Second
)

// Server is a private PostgreSQL server on a folder and a loopback port of its own, which it keeps over Stop and Start. Commits are
// on disk when they return (fsync is on). It ends with the test process, however that ends. A Server is used by one goroutine.
type Server struct {
	bin   string
	dir   string
	port  int
	owner *syscall.Credential // nil: we are not root and need no other user

	postgres *os.Process   // nil while stopped
	exited   chan struct{} // closed when postgres has ended
	watchdog *exec.Cmd
	alive    *os.File // open as long as this process lives; the watchdog reads the other end
}

// NewServer starts a server for one test, which may stop and kill it. Where there is no PostgreSQL the test is skipped, or, in CI, fails.
func NewServer(t testing.TB) *Server {
	t.Helper()
	return NewServerIn(t, "")
}

// NewServerIn is [NewServer] with its data in a new folder below parent, as on a disk of its own.
func NewServerIn(t testing.TB, parent string) *Server {
	t.Helper()
	s, err := newServer(parent)
	need(t, err)
	t.Cleanup(s.remove)
	return s
}

// URL is the address of a database of the server. "postgres" always exists.
func (s *Server) URL(database string) string {
	return fmt.Sprintf("postgres://postgres:%s@127.0.0.1:%d/%s", password, s.port, database)
}

// Create makes an empty database and returns its URL.
func (s *Server) Create(t testing.TB, database string) string {
	t.Helper()
	if err := execOn(s.URL("postgres"), "CREATE DATABASE "+pgx.Identifier{database}.Sanitize()); err != nil {
		t.Fatalf("create database: %v", err)
	}
	return s.URL(database)
}

// Stop stops the server as an administrator does: connections are cut with SQLSTATE 57P01. It may be called twice.
func (s *Server) Stop() { s.end(syscall.SIGINT) }

// Kill stops the server as a crash does: no checkpoint, recovery at the next Start.
func (s *Server) Kill() { s.end(syscall.SIGQUIT) }

// PowerOff ends the server's processes at once, as when the machine loses its power: nothing is written any more when it returns.
func (s *Server) PowerOff(t testing.TB) {
	t.Helper()
	if s.postgres == nil {
		return
	}
	pid := s.postgres.Pid
	// Each has a session of its own, so a signal to the group would not reach them.
	list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatalf("list the processes of PostgreSQL: %v", err)
	}
	_ = s.postgres.Kill()
	var children []int
	for _, field := range strings.Fields(string(list)) {
		if child, err := strconv.Atoi(field); err == nil {
			children = append(children, child)
			_ = syscall.Kill(child, syscall.SIGKILL)
		}
	}
	<-s.exited
	s.postgres = nil
	for until := time.Now().Add(startTime); slices.ContainsFunc(children, lives); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("processes of PostgreSQL did not end within %s", startTime)
		}
	}
}

// lives says whether a process can still do something; one that only waits to be collected cannot.
func lives(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(state, "Z")
}

// Start starts the server again on the same folder and port, and waits until it answers.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	if err := s.start(); err != nil {
		t.Fatalf("start PostgreSQL: %v", err)
	}
}

// watchdog outlives us: when its stdin ends, because we closed the pipe or died in whatever way, it stops postgres and removes the folder.
const watchdog = `
trap '' INT TERM HUP
read -r _
if [ -f "$1/data/postmaster.pid" ]; then
	pid=$(head -n 1 "$1/data/postmaster.pid")
	kill -QUIT "$pid"
	n=0
	while [ -f "$1/data/postmaster.pid" ] && [ "$n" -lt 500 ]; do n=$((n + 1)); sleep 0.02; done
fi
rm -rf "$1"
`

func newServer(parent string) (*Server, error) {
	bin, err := binaries()
	if err != nil {
		return nil, err
	}
	s := &Server{bin: bin}
	if s.owner, err = owner(); err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp(parent, "dbtest-"); err != nil {
		return nil, fmt.Errorf("create folder: %w", err)
	}
	if s.owner != nil {
		if err := os.Chown(s.dir, int(s.owner.Uid), int(s.owner.Gid)); err != nil {
			return nil, fmt.Errorf("hand folder over: %w", err)
		}
	}
	if err := s.watch(); err != nil {
		_ = os.RemoveAll(s.dir)
		return nil, err
	}
	if err := s.init(); err != nil {
		s.remove()
		return nil, err
	}
	return s, nil
}

func (s *Server) watch() error {
	stdin, alive, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	s.alive = alive
	s.watchdog = exec.Command("/bin/sh", "-c", watchdog, "dbtest", s.dir)
	s.watchdog.Dir, s.watchdog.Stdin = "/", stdin
	s.watchdog.SysProcAttr = s.attributes()
	err = s.watchdog.Start()
	_ = stdin.Close()
	if err != nil {
		_ = alive.Close()
		return fmt.Errorf("start watchdog: %w", err)
	}
	return nil
}

// attributes: as the owner, and in a group of its own, so that an interrupt at the terminal is the test's alone.
func (s *Server) attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: s.owner, Setpgid: true}
}

// remove ends the server for good.
func (s *Server) remove() {
	_ = s.alive.Close()
	_ = s.watchdog.Wait()
	if s.exited != nil {
		<-s.exited
	}
}

func (s *Server) init() error {
	secret := filepath.Join(s.dir, "password")
	if err := os.WriteFile(secret, []byte(password), 0o644); err != nil {
		return fmt.Errorf("write password: %w", err)
	}
	initdb := exec.Command(filepath.Join(s.bin, "initdb"), "-D", filepath.Join(s.dir, "data"), "-U", "postgres", "--pwfile", secret,
		"--auth-host", "scram-sha-256", "--auth-local", "trust", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync")
	initdb.Dir = s.dir
	initdb.SysProcAttr = s.attributes()
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, out)
	}
	var err error
	for range 5 { // between finding a free port and listening on it another may take it
		if s.port, err = freePort(); err != nil {
			return err
		}
		if err = s.start(); err == nil {
			return nil
		}
	}
	return err
}

func (s *Server) start() error {
	if s.postgres != nil {
		return nil
	}
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("create log: %w", err)
	}
	cmd := exec.Command(filepath.Join(s.bin, "postgres"), "-D", filepath.Join(s.dir, "data"), "-h", "127.0.0.1", "-p", strconv.Itoa(s.port), "-k", s.dir,
		"-c", "fsync=on", "-c", "max_connections=200", "-c", "shared_buffers=128MB", "-c", "max_wal_size=2GB", "-c", "log_min_messages=warning")
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = s.dir, log, log, s.attributes()
	err = cmd.Start()
	_ = log.Close()
	if err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	s.postgres, s.exited = cmd.Process, exited
	deadline := time.After(startTime)
	for {
		if err = execOn(s.URL("postgres"), "SELECT 1"); err == nil {
			return nil
		}
		select {
		case <-exited:
			s.postgres = nil
			return fmt.Errorf("postgres ended: %s", s.log())
		case <-deadline:
			s.Kill()
			return fmt.Errorf("postgres does not answer: %w: %s", err, s.log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *Server) end(signal syscall.Signal) {
	if s.postgres == nil {
		return
	}
	_ = s.postgres.Signal(signal)
	<-s.exited
	s.postgres = nil
}

func (s *Server) log() string {
	text, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// binaries is the folder of the newest initdb and postgres.
func binaries() (string, error) {
	var folders []string
	if path, err := exec.LookPath("initdb"); err == nil {
		folders = append(folders, filepath.Dir(path))
	}
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		folders = append(folders, strings.TrimSpace(string(out)))
	}
	versions, _ := filepath.Glob("/usr/lib/postgresql/*/bin") // the pattern is a good one
	slices.SortFunc(versions, func(a, b string) int { return major(b) - major(a) })
	for _, folder := range append(folders, versions...) {
		if executable(filepath.Join(folder, "initdb")) && executable(filepath.Join(folder, "postgres")) {
			return folder, nil
		}
	}
	return "", errNoPostgres
}

func major(bin string) int {
	n, _ := strconv.Atoi(filepath.Base(filepath.Dir(bin)))
	return n
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.IsDir() && info.Mode()&0o111 != 0
}

// owner is whom PostgreSQL runs as, which refuses to run as root.
func owner() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil //nolint:nilnil // no other user is needed
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.ParseUint(u.Uid, 10, 32)
		gid, gidErr := strconv.ParseUint(u.Gid, 10, 32)
		if uidErr == nil && gidErr == nil {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
		}
	}
	return nil, errors.New("PostgreSQL does not run as root, and there is no user postgres or nobody")
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	port := l.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // of "tcp"
	return port, l.Close()
}

// execOn runs one statement on a connection of its own.
func execOn(url, statement string) error {
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer func() { _ = conn.Close(ctx) }()
	if _, err := conn.Exec(ctx, statement); err != nil {
		return fmt.Errorf("%s: %w", statement, err)
	}
	return nil
}
