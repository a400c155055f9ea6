package process_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/process"
)

func TestMain(m *testing.M) {
	if os.Getenv("PROCESS_CHILD") != "" {
		child := program(nil)
		child.Database = true
		process.Main(child)
	}
	goleak.VerifyTestMain(m)
}

// service runs until it is told to stop, and says on started that it does.
type service struct {
	started chan<- struct{}
	err     error // of Run
}

func (s service) Name() string { return "tester" }

func (s service) Run(ctx context.Context) error {
	if s.started != nil {
		s.started <- struct{}{}
	}
	if s.err == nil {
		<-ctx.Done()
	}
	return s.err
}

// program connects to the broker, hands the connection on and becomes ready with it.
func program(started chan<- struct{}, conns ...chan<- *nats.Conn) process.Program {
	return process.Program{Name: "tester", Start: func(_ context.Context, p *process.Process) (lifecycle.Service, error) {
		js, err := p.Connect()
		if err != nil {
			return nil, err
		}
		for _, c := range conns {
			c <- js.Conn()
		}
		p.Health.Add("broker", func() error {
			if !js.Conn().IsConnected() {
				return nats.ErrDisconnected
			}
			return nil
		})
		return service{started: started}, nil
	}}
}

// environ is good, with a broker that is away.
func environ(more ...string) config.Environ {
	return append(config.Environ{"USHER_NATS_URL=nats://127.0.0.1:1", "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=error"}, more...)
}

func TestEveryWrongSettingIsListedOnceAndNothingStarts(t *testing.T) {
	t.Parallel()
	own := config.Problems{"OWN_SETTING: too small", "USHER_CONSOLE_ADDR: said again by the service"}
	for name, c := range map[string]struct {
		environ config.Environ
		check   error
		want    []string // the settings named
	}{
		"nothing set":                 {nil, nil, []string{"USHER_NATS_URL"}},
		"an empty broker":             {config.Environ{"USHER_NATS_URL="}, nil, []string{"USHER_NATS_URL"}},
		"the service's own":           {environ(), own, []string{"OWN_SETTING", "USHER_CONSOLE_ADDR"}},
		"wrapped":                     {environ(), fmt.Errorf("check: %w", own), []string{"OWN_SETTING", "USHER_CONSOLE_ADDR"}},
		"another error":               {environ(), errors.New("BatchSize must be at least 1"), []string{"BatchSize must be at least 1"}},
		"everyone's and its own":      {config.Environ{"USHER_LOG_LEVEL=loud"}, own[:1], []string{"USHER_LOG_LEVEL", "USHER_NATS_URL", "OWN_SETTING"}},
		"not decoded and not valid":   {environ("USHER_ALERT_MIN_EVENTS=x", "USHER_STREAM_REPLICAS=2"), own[:1], []string{"USHER_ALERT_MIN_EVENTS", "USHER_STREAM_REPLICAS", "OWN_SETTING"}},
		"what both found":             {environ("USHER_CONSOLE_ADDR=:1"), own, []string{"USHER_CONSOLE_ADDR", "OWN_SETTING"}},
		"a database's other variable": {environ("DATABASE_URL=mysql://x"), own[:1], []string{"DATABASE_URL", "OWN_SETTING"}},
		"files of TLS":                {environ("USHER_NATS_CA=/nope", "USHER_NATS_CERT=/nope", "USHER_LOG_LEVEL=loud"), nil, []string{"USHER_NATS_CA", "USHER_NATS_CERT", "USHER_NATS_KEY", "USHER_LOG_LEVEL"}},
		"a source twice":              {environ("USHER_SOURCE_CLERK_SECRET_KEY=x"), own[:1], []string{"USHER_SOURCE_CLERK_…", "OWN_SETTING"}},
	} {
		var stderr bytes.Buffer
		code := process.Run(t.Context(), c.environ, &stderr, process.Program{
			Name: "tester",
			Check: func(s *config.Settings) error {
				require.NotNil(t, s, name)
				return c.check
			},
			Start: func(context.Context, *process.Process) (lifecycle.Service, error) {
				t.Errorf("%s: started", name)
				return nil, errors.New("started")
			},
		})
		assert.Equal(t, process.WrongSettings, code, name)
		lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
		assert.Equal(t, "tester: wrong settings:", lines[0], name)
		var named []string
		for _, line := range lines[1:] {
			setting, _, _ := strings.Cut(strings.TrimSpace(line), ": ")
			named = append(named, setting)
		}
		assert.ElementsMatch(t, c.want, named, name)
	}
}

// TestAMisspeltVariableIsNamedBesideWhatIsMissing: it is the cause.
func TestAMisspeltVariableIsNamedBesideWhatIsMissing(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	code := process.Run(t.Context(), config.Environ{"USHER_NATS_ULR=nats://joe:hunter2@nats.example.com", "CLERK_PUBLISHABLE_KEY=pk_test_x"}, &stderr, program(nil))
	assert.Equal(t, process.WrongSettings, code)
	assert.Contains(t, stderr.String(), "tester: warning: USHER_NATS_ULR: did you mean USHER_NATS_URL?\n")
	assert.Contains(t, stderr.String(), "USHER_NATS_URL: not set")
	assert.NotContains(t, stderr.String(), "hunter2")
	assert.NotContains(t, stderr.String(), "PUBLISHABLE")
}

// unusable is an error as of a database that no waiting makes good.
type unusable struct{ error }

func (unusable) WrongSettings() bool { return true }

func TestAStartThatNoWaitingCuresExitsWith2(t *testing.T) {
	t.Parallel()
	code := process.Run(t.Context(), environ(), &bytes.Buffer{}, process.Program{
		Name: "tester",
		Start: func(context.Context, *process.Process) (lifecycle.Service, error) {
			return nil, fmt.Errorf("open: %w", unusable{errors.New("LATIN1")})
		},
	})
	assert.Equal(t, process.WrongSettings, code)
}

func TestWhatFailsExitsWith1AndIsClosedInReverse(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	for name, c := range map[string]struct {
		environ         config.Environ
		start, run, end error
		want            []string
	}{
		"the start":           {environ(), broken, nil, nil, []string{"second", "first"}},
		"the service":         {environ(), nil, broken, nil, []string{"second", "first"}},
		"a closer":            {environ(), nil, broken, broken, []string{"second", "first"}},
		"a port that is used": {environ("USHER_OPS_ADDR=" + taken.Addr().String()), nil, nil, nil, nil},
	} {
		var closed []string
		code := process.Run(t.Context(), c.environ, &bytes.Buffer{}, process.Program{
			Name: "tester",
			Start: func(_ context.Context, p *process.Process) (lifecycle.Service, error) {
				if _, err := p.Connect(); err != nil {
					return nil, err
				}
				for _, s := range []string{"first", "second"} {
					p.Closers.Add(func() error { closed = append(closed, s); return c.end })
				}
				return service{err: c.run}, c.start
			},
		})
		assert.Equal(t, process.Failed, code, name)
		assert.Equal(t, c.want, closed, name)
	}
}

func TestAStopIsNoFailure(t *testing.T) {
	t.Parallel()
	t.Run("WhileItRuns", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		started, code := make(chan struct{}), make(chan int, 1)
		go func() { code <- process.Run(ctx, environ(), &bytes.Buffer{}, program(started)) }()
		<-started
		cancel()
		assert.Equal(t, process.Stopped, <-code)
	})
	t.Run("WhileItStarts", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		closed := false
		assert.Equal(t, process.Stopped, process.Run(ctx, environ(), &bytes.Buffer{}, process.Program{
			Name: "tester",
			Start: func(ctx context.Context, p *process.Process) (lifecycle.Service, error) {
				p.Closers.Add(func() error { closed = true; return nil })
				cancel() // as a signal does, while it waits for the database
				return nil, errors.New("unreachable")
			},
		}))
		assert.True(t, closed)
	})
	t.Run("ButAFailureToCloseIsOne", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		assert.Equal(t, process.Failed, process.Run(ctx, environ(), &bytes.Buffer{}, process.Program{
			Name: "tester",
			Start: func(_ context.Context, p *process.Process) (lifecycle.Service, error) {
				p.Closers.Add(func() error { return errors.New("broken") })
				return service{}, nil
			},
		}))
	})
}

// What a closer that was added later still sends reaches the broker: the connection is drained, not cut.
func TestTheConnectionIsDrained(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	nc, _ := broker.Connect()
	sub, err := nc.SubscribeSync("last.words")
	require.NoError(t, err)
	require.NoError(t, nc.Flush())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started, code := make(chan struct{}), make(chan int, 1)
	go func() {
		code <- process.Run(ctx, environ("USHER_NATS_URL="+broker.URL()), &bytes.Buffer{}, process.Program{
			Name: "tester",
			Start: func(_ context.Context, p *process.Process) (lifecycle.Service, error) {
				js, err := p.Connect()
				if err != nil {
					return nil, err
				}
				p.Closers.Add(func() error { return js.Conn().Publish("last.words", nil) })
				return service{started: started}, nil
			},
		})
	}()
	<-started
	require.Eventually(t, func() bool { return broker.Server().NumClients() == 2 }, 60*time.Second, 5*time.Millisecond)
	cancel()
	assert.Equal(t, process.Stopped, <-code)
	_, err = sub.NextMsg(5 * time.Second)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return broker.Server().NumClients() == 1 }, 60*time.Second, 5*time.Millisecond)
}

// TestTheConnectionHasItsCertificates: the broker speaks TLS only, and wants to see a certificate.
func TestTheConnectionHasItsCertificates(t *testing.T) {
	t.Parallel()
	files := natstest.NewCertificates(t)
	broker := natstest.New(t, files.WithTLS(true))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	conns, started, code := make(chan *nats.Conn, 1), make(chan struct{}, 1), make(chan int, 1)
	go func() {
		code <- process.Run(ctx, environ("USHER_NATS_URL=tls://"+broker.Server().Addr().String(), "USHER_NATS_CA="+files.CA, "USHER_NATS_CERT="+files.ClientCert,
			"USHER_NATS_KEY="+files.ClientKey), io.Discard, program(started, conns))
	}()
	require.Eventually(t, (<-conns).IsConnected, time.Minute, 5*time.Millisecond)
	<-started
	cancel()
	assert.Equal(t, process.Stopped, <-code)
}

// The client library closes a connection for good now and then; nothing in the process would open it again.
func TestAConnectionThatIsClosedEndsTheProcess(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	conns := make(chan *nats.Conn, 1)
	code := make(chan int, 1)
	go func() {
		code <- process.Run(t.Context(), environ("USHER_NATS_URL="+server.URL()), io.Discard, program(nil, conns))
	}()
	(<-conns).Close()
	assert.Equal(t, process.Failed, <-code)
}

func TestABrokerThatHangsHoldsNoStop(t *testing.T) {
	t.Parallel()
	for _, full := range []bool{false, true} { // the socket to it
		t.Run(fmt.Sprint("full ", full), func(t *testing.T) {
			t.Parallel()
			broker := natstest.New(t)
			ops := freeAddr(t)
			proxy, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer proxy.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			started, code, conns := make(chan struct{}), make(chan int, 1), make(chan *nats.Conn, 1)
			go func() {
				code <- process.Run(ctx, environ("USHER_NATS_URL=nats://"+proxy.Addr().String(), "USHER_OPS_ADDR="+ops), &bytes.Buffer{}, program(started, conns))
			}()
			client, err := proxy.Accept()
			require.NoError(t, err)
			defer client.Close()
			server, err := net.Dial("tcp", strings.TrimPrefix(broker.URL(), "nats://"))
			require.NoError(t, err)
			defer server.Close()
			copied := make(chan struct{})
			go func() {
				defer close(copied)
				_, _ = io.Copy(server, client) // until the process closes, or nobody reads any more
			}()
			answers := make(chan struct{})
			go func() {
				defer close(answers)
				_, _ = io.Copy(client, server) // until the server is silenced
			}()
			<-started
			require.Eventually(t, func() bool { return ready(t, ops) }, 60*time.Second, 20*time.Millisecond)
			require.NoError(t, server.SetReadDeadline(time.Now()))
			<-answers
			published := make(chan struct{})
			close(published)
			if full {
				require.NoError(t, client.SetReadDeadline(time.Now()))
				<-copied
				published = make(chan struct{})
				nc, sent := <-conns, make(chan struct{}, 1)
				go func() {
					defer close(published)
					for nc.Publish("a", make([]byte, 64<<10)) == nil {
						select {
						case sent <- struct{}{}:
						default:
						}
					}
				}()
				for fits := true; fits; {
					select {
					case <-sent:
					case <-time.After(300 * time.Millisecond):
						fits = false
					}
				}
			}
			asked := time.Now()
			cancel()
			assert.Equal(t, process.Stopped, <-code)
			t.Logf("it stopped within %s", time.Since(asked))
			assert.Less(t, time.Since(asked), 30*time.Second)
			<-copied
			<-published
		})
	}
}

func TestSignalsStopTheProcessWith0(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			ops := freeAddr(t)
			child := exec.CommandContext(t.Context(), os.Args[0])
			child.Env = environ("PROCESS_CHILD=1", "USHER_NATS_URL="+strings.Replace(broker.URL(), "://", "://usher:hidden@", 1), "USHER_OPS_ADDR="+ops,
				"USHER_LOG_LEVEL=info", "USHER_LOG_FORMAT=json")
			var stderr bytes.Buffer
			child.Stderr = &stderr
			require.NoError(t, child.Start())
			require.Eventually(t, func() bool { return ready(t, ops) }, 60*time.Second, 20*time.Millisecond)
			require.NoError(t, child.Process.Signal(sig))
			require.NoError(t, child.Wait(), stderr.String())
			assert.Contains(t, stderr.String(), `"addr":"`+ops+`"`)
			assert.Contains(t, stderr.String(), `"database":"sqlite:usher-data/usher.db","database_setting":"default"`, "what nobody set is named")
			assert.NotContains(t, stderr.String(), "hidden")
		})
	}
}

func TestReadinessSaysWhatAStartWaitsFor(t *testing.T) {
	t.Parallel()
	ops := freeAddr(t)
	proceed, code := make(chan struct{}), make(chan int, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		code <- process.Run(ctx, environ("USHER_OPS_ADDR="+ops), io.Discard, process.Program{
			Name: "tester", Start: func(_ context.Context, p *process.Process) (lifecycle.Service, error) {
				p.WaitingForDatabase(errors.New("it sleeps"))
				<-proceed
				return service{}, nil
			},
		})
	}()
	require.Eventually(t, func() bool { return strings.Contains(readyz(t, ops), "waiting for the database: it sleeps") }, time.Minute, 20*time.Millisecond)
	close(proceed)
	require.Eventually(t, func() bool { return ready(t, ops) }, time.Minute, 20*time.Millisecond)
	cancel()
	assert.Equal(t, process.Stopped, <-code)
}

func TestOperationsListenWhereTheServiceSaysUnlessTheSettingDoes(t *testing.T) {
	t.Parallel()
	own, set := freeAddr(t), freeAddr(t)
	for want, environ := range map[string]config.Environ{
		own: {"USHER_NATS_URL=nats://127.0.0.1:1", "USHER_LOG_LEVEL=error"}, set: environ("USHER_OPS_ADDR=" + set),
	} {
		ctx, cancel := context.WithCancel(t.Context())
		code := make(chan int, 1)
		one := program(nil)
		one.OpsAddr = own
		go func() { code <- process.Run(ctx, environ, io.Discard, one) }()
		require.Eventually(t, func() bool { return readyz(t, want) != "" }, time.Minute, 20*time.Millisecond)
		cancel()
		assert.Equal(t, process.Stopped, <-code)
	}
}

func readyz(t *testing.T, ops string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ops+"/readyz", nil)
	require.NoError(t, err)
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return ""
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return string(body)
}

func ready(t *testing.T, ops string) bool {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ops+"/readyz", nil)
	require.NoError(t, err)
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_ = res.Body.Close()
	return res.StatusCode == http.StatusOK
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}
