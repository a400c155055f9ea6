package stream_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

// daemon is a nats-server process whose configuration can be changed while it runs.
type daemon struct {
	t      *testing.T
	config string
	port   int
	cmd    *exec.Cmd
}

func startDaemon(t *testing.T, config string) *daemon {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "nats-server")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "github.com/nats-io/nats-server/v2").CombinedOutput()
	require.NoError(t, err, "%s", out)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	tcp, ok := l.Addr().(*net.TCPAddr)
	require.True(t, ok)
	require.NoError(t, l.Close())
	d := &daemon{t: t, config: filepath.Join(dir, "nats.conf"), port: tcp.Port}
	d.write(config)
	d.cmd = exec.Command(binary, "-c", d.config)
	require.NoError(t, d.cmd.Start())
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait()
	})
	return d
}

func (d *daemon) write(config string) {
	d.t.Helper()
	text := fmt.Sprintf("listen: 127.0.0.1:%d\njetstream { store_dir: %q, sync_interval: always }\n%s\n", d.port, filepath.Join(filepath.Dir(d.config), "store"), config)
	require.NoError(d.t, os.WriteFile(d.config, []byte(text), 0o600))
}

// reload makes the server take another configuration, as `nats-server --signal reload` does.
func (d *daemon) reload(config string) {
	d.t.Helper()
	d.write(config)
	require.NoError(d.t, d.cmd.Process.Signal(syscall.SIGHUP))
}

// TestARefusedLoginIsWaitedFor: the client library closes a connection for good whose login was refused twice.
func TestARefusedLoginIsWaitedFor(t *testing.T) {
	t.Parallel()
	const right, wrong = `authorization { user: usher, password: "right" }`, `authorization { user: usher, password: "other" }`
	for name, refused := range map[string]string{
		"password rotated": wrong,
		"user taken away":  `authorization { user: nobody, password: "right" }`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t, right)
			nc, err := stream.Connect(fmt.Sprintf("nats://usher:right@127.0.0.1:%d", d.port), "", "test", nop())
			require.NoError(t, err)
			defer nc.Close()
			require.Eventually(t, nc.IsConnected, time.Minute, 10*time.Millisecond)
			guarded := make(chan error, 1)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			go func() { guarded <- stream.Guard{Conn: nc}.Run(ctx) }()
			d.reload(refused)
			require.Eventually(t, func() bool {
				err := stream.Connected(nc)
				return err != nil && strings.Contains(err.Error(), "refuses the login")
			}, time.Minute, time.Millisecond)
			require.ErrorIs(t, stream.Connected(nc), stream.ErrUnavailable)
			before := nc.Stats().Reconnects
			require.Eventually(t, func() bool { return nc.Stats().Reconnects >= before+4 }, time.Minute, 10*time.Millisecond, "it tries again and again")
			d.reload(right)
			require.Eventually(t, nc.IsConnected, time.Minute, 10*time.Millisecond)
			stop()
			require.NoError(t, <-guarded, "a stop is no failure")
		})
	}
	t.Run("refused at the start", func(t *testing.T) {
		t.Parallel()
		d := startDaemon(t, wrong)
		nc, err := stream.Connect(fmt.Sprintf("nats://usher:right@127.0.0.1:%d", d.port), "", "test", nop())
		require.NoError(t, err)
		defer nc.Close()
		require.Eventually(t, func() bool {
			err := stream.Connected(nc)
			return err != nil && strings.Contains(err.Error(), "refuses the login")
		}, time.Minute, time.Millisecond)
		d.reload(right)
		require.Eventually(t, nc.IsConnected, time.Minute, 10*time.Millisecond)
	})
}

func TestAClosedConnectionEndsItsGuard(t *testing.T) {
	t.Parallel()
	nc, _ := natstest.New(t).Connect()
	require.Eventually(t, nc.IsConnected, time.Minute, 10*time.Millisecond)
	guarded := make(chan error, 1)
	go func() { guarded <- stream.Guard{Conn: nc}.Run(t.Context()) }()
	nc.Close()
	require.ErrorContains(t, <-guarded, "closed for good")
	require.ErrorContains(t, stream.Guard{Conn: nc}.Run(t.Context()), "closed for good", "also where it was closed before")
	assert.Error(t, stream.Connected(nc))
}

// TestADeniedSubjectIsToldOnce: ingest asks once a minute for what its user may not see, and says so in the log once, not for ever.
func TestADeniedSubjectIsToldOnce(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t, func(o *server.Options) {
		o.Users = []*server.User{{Username: "ingest", Password: "secret", Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: []string{"allowed"}},
			Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX_test.>"}},
		}}}
	})
	core, logs := observer.New(zap.WarnLevel)
	nc, err := stream.Connect(strings.Replace(broker.URL(), "://", "://ingest:secret@", 1), "", "test", zap.New(core))
	require.NoError(t, err)
	defer nc.Close()
	require.Eventually(t, nc.IsConnected, time.Minute, 10*time.Millisecond)
	for _, subject := range []string{"denied.1", "denied.1", "denied.1", "denied.2"} {
		require.NoError(t, nc.Publish(subject, nil))
	}
	told := func(subject string) int {
		return logs.Filter(func(e observer.LoggedEntry) bool {
			return strings.Contains(fmt.Sprint(e.ContextMap()["error"]), subject)
		}).Len()
	}
	require.Eventually(t, func() bool { return told("denied.2") > 0 }, time.Minute, 10*time.Millisecond, "the last one is told")
	assert.Equal(t, 1, told("denied.1"))
}
