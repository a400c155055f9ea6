package ingest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

func TestConfig(t *testing.T) {
	t.Parallel()
	good := Source{Name: "clerk", Secrets: []string{secret}}
	require.NoError(t, Config{Sources: []Source{good}}.Validate())
	require.NoError(t, Config{Sources: []Source{{Name: "clerk"}, {Name: "eu", Secrets: []string{secret}}}}.Validate())
	for field, bad := range map[string]Config{
		"CLERK_WEBHOOK_SIGNING_SECRET": {Sources: []Source{{Name: "clerk"}}},
		"Sources":                      {Sources: []Source{good, good}},
		"name":                         {Sources: []Source{{Name: "a/b", Secrets: []string{secret}}}},
		"MaxBody":                      {Sources: []Source{good}, MaxBody: -1},
		"Grace":                        {Sources: []Source{good}, Grace: time.Second},
	} {
		assert.ErrorContains(t, bad.Validate(), field)
	}
	// Every problem at once.
	err := Config{Sources: []Source{{Name: "clerk", Secrets: []string{"whsec_"}}, {Name: ""}}, MaxInFlight: -1}.Validate()
	var problems config.Problems
	require.ErrorAs(t, err, &problems)
	assert.Len(t, problems, 3)

	settings, err := config.Load(config.Environ{"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_SOURCE_EU_SIGNING_SECRET=" + euSecret, "USHER_INGEST_ADDR=:1"}, nil)
	require.NoError(t, err)
	c, err := ConfigFrom(settings)
	require.NoError(t, err)
	assert.Equal(t, Config{Addr: ":1", Sources: []Source{good, {Name: "eu", Secrets: []string{euSecret}}}}, c)
	assert.NotContains(t, fmt.Sprintf("%v %+v", c, c), "Y2xlcmst")
}

func TestTakenPortIsAnErrorOfNew(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	_, err = New(Config{Addr: l.Addr().String(), Sources: []Source{{Name: "clerk", Secrets: []string{secret}}}}, Deps{})
	require.ErrorContains(t, err, "address already in use")
}

func TestBrokerStoppedAndBack(t *testing.T) {
	t.Parallel()
	b := setup(t)
	require.Equal(t, 202, b.send(delivery{}).status)
	b.nats.Stop()
	b.eventually(func() bool { return b.health.Problems()["broker"] != "" }, "not ready")
	assert.Contains(t, b.health.Problems()["broker"], "not connected")
	a := b.send(delivery{id: "msg_later"})
	assert.Equal(t, 503, a.status)
	assert.Equal(t, string(brokerUnavailable), a.body.Error.Code)

	b.nats.Start()
	b.eventually(func() bool { return len(b.health.Problems()) == 0 }, "ready by itself")
	a = b.send(delivery{id: "msg_later"})
	assert.Equal(t, 202, a.status)
	assert.False(t, *a.body.Duplicate)
	assert.EqualValues(t, 2, b.count())
}

func TestMissingStreamSaysSetup(t *testing.T) {
	t.Parallel()
	b := setup(t)
	require.NoError(t, b.js.DeleteStream(t.Context(), stream.Events))
	b.eventually(func() bool { return strings.Contains(b.health.Problems()["broker"], "usher setup") }, "says usher setup")
	a := b.send(delivery{})
	assert.Equal(t, 503, a.status)
	assert.Equal(t, string(brokerUnavailable), a.body.Error.Code)
	_, err := stream.Topology{Replicas: 1, MaxBytes: 1 << 30}.Ensure(t.Context(), b.js)
	require.NoError(t, err)
	b.eventually(func() bool { return len(b.health.Problems()) == 0 }, "ready by itself")
	assert.Equal(t, 202, b.send(delivery{}).status)
}

// TestAStreamThatLosesEventsIsNotReady: a stream in memory takes every event, and a restart of the broker loses them all.
func TestAStreamThatLosesEventsIsNotReady(t *testing.T) {
	t.Parallel()
	b := setup(t)
	require.NoError(t, b.js.DeleteStream(t.Context(), stream.Events))
	_, err := b.js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: stream.Events, Subjects: []string{"clerk.evt.>"}, Storage: jetstream.MemoryStorage, MaxAge: time.Hour,
	})
	require.NoError(t, err)
	for _, words := range []string{"stream CLERK_EVENTS: storage is Memory, want File", "max_age is 1h0m0s, want unlimited", "usher setup --apply"} {
		b.eventually(func() bool { return strings.Contains(b.health.Problems()["broker"], words) }, words)
	}
	require.NoError(t, b.js.DeleteStream(t.Context(), stream.Events))
	_, err = stream.Topology{Replicas: 1, MaxBytes: 1 << 30}.Ensure(t.Context(), b.js)
	require.NoError(t, err)
	b.eventually(func() bool { return len(b.health.Problems()) == 0 }, "ready by itself")
}

func TestFullStream(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, err := b.js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	cfg := s.CachedInfo().Config
	cfg.MaxBytes = 100_000
	_, err = b.js.UpdateStream(t.Context(), cfg)
	require.NoError(t, err)
	require.Equal(t, 202, b.send(delivery{body: make([]byte, 90_000)}).status)
	a := b.send(delivery{body: make([]byte, 20_000)})
	assert.Equal(t, 503, a.status)
	assert.Equal(t, string(streamFull), a.body.Error.Code)
	assert.Contains(t, b.health.Problems()["broker"], "full")
	b.broker.last.Store(nil)
	b.eventually(func() bool { return b.health.Problems()["broker"] != "" }, "the probe sees it too")
	require.NoError(t, s.Purge(t.Context()))
	b.eventually(func() bool { return len(b.health.Problems()) == 0 }, "ready by itself")
	assert.Equal(t, 202, b.send(delivery{body: make([]byte, 20_000)}).status)
}

// Ingest may publish and nothing else (docs/architecture.md); it is ready all the same.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t, natstest.WithSync, func(o *server.Options) {
		o.Users = []*server.User{
			{Username: "admin", Password: "admin"},
			{Username: "ingest", Password: "ingest", Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Allow: []string{"clerk.evt.>"}},
				Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX_ingest.>"}},
			}},
		}
	})
	as := func(user string) string {
		return strings.Replace(broker.URL(), "nats://", "nats://"+user+":"+user+"@", 1)
	}
	admin, err := stream.Connect(as("admin"), "", "admin", zap.NewNop())
	require.NoError(t, err)
	defer admin.Close()
	js, err := stream.JetStream(admin)
	require.NoError(t, err)
	_, err = stream.Topology{Replicas: 1, MaxBytes: 1 << 30}.Ensure(t.Context(), js)
	require.NoError(t, err)

	nc, err := stream.Connect(as("ingest"), "", "ingest", zap.NewNop())
	require.NoError(t, err)
	defer nc.Close()
	js, err = stream.JetStream(nc)
	require.NoError(t, err)
	publisher := stream.NewPublisher(js, 1)
	defer publisher.Close()
	health := &observe.Health{}
	s, err := New(Config{Addr: "127.0.0.1:0", Sources: []Source{{Name: "clerk", Secrets: []string{secret}}}},
		Deps{Publisher: publisher, JetStream: js, Health: health})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	require.Eventually(t, func() bool { return len(health.Problems()) == 0 }, 60*time.Second, 10*time.Millisecond)
	var group sync.WaitGroup
	for range 100 { // single publishes and batches
		group.Go(func() {
			w := newRecorder()
			s.ServeHTTP(w, delivery{}.request(t, "http://"+s.Addr()))
			assert.Equal(t, 202, w.Code)
		})
	}
	group.Wait()
	assert.Empty(t, health.Problems())
	cancel()
	require.NoError(t, <-ended)
}

// wellFormed is a signature that only a look at the body can refuse.
var wellFormed = "v1," + strings.Repeat("A", 43) + "="

// unsigned is the head of a stranger's request, without what says how long its body is.
func unsigned(at time.Time, signature string) string {
	return "POST " + Path + " HTTP/1.1\r\nHost: x\r\nsvix-id: msg_1\r\nsvix-timestamp: " + itoa(at) + "\r\nsvix-signature: " + signature + "\r\n"
}

func TestSlowSendersAreCutOff(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *Deps) {
		c.HeaderTimeout, c.BodyTimeout, c.IdleTimeout = 200*time.Millisecond, 400*time.Millisecond, 300*time.Millisecond
	})
	head := func(length string) string {
		return unsigned(time.Now(), wellFormed) + length + "\r\n\r\n"
	}
	talk := func(first, drop string) (string, time.Duration) {
		conn, err := net.Dial("tcp", b.Addr())
		require.NoError(t, err)
		defer conn.Close()
		start := time.Now()
		_, err = io.WriteString(conn, first)
		require.NoError(t, err)
		done := make(chan struct{})
		var group sync.WaitGroup
		if drop != "" {
			group.Go(func() {
				for {
					select {
					case <-done:
						return
					case <-time.After(20 * time.Millisecond):
						if _, err := io.WriteString(conn, drop); err != nil {
							return
						}
					}
				}
			})
		}
		_ = conn.SetReadDeadline(time.Now().Add(2 * time.Minute))
		answer, err := io.ReadAll(conn)
		close(done)
		group.Wait()
		var timeout net.Error
		if errors.As(err, &timeout) {
			require.False(t, timeout.Timeout(), "the connection stays open")
		}
		return string(answer), time.Since(start)
	}
	for name, c := range map[string]struct{ first, drop, want string }{
		"silent from the start":        {"", "", ""},
		"header never ends":            {"POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\n", "", ""},
		"header dripping":              {"POST /webhooks/clerk HTTP/1.1\r\n", "a: b\r\n", ""},
		"body never comes":             {head("Content-Length: 10"), "", "408"},
		"body dripping":                {head("Content-Length: 100000"), "x", "408"},
		"chunked body without end":     {head("Transfer-Encoding: chunked"), "1\r\nx\r\n", "408"},
		"body is no chunk":             {head("Transfer-Encoding: chunked") + "zz\r\n", "", "400"},
		"idle after an answer":         {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "", "404"},
		"header over 16 KiB":           {"POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\na: " + strings.Repeat("b", 17<<10) + "\r\n\r\n", "", "431"},
		"not HTTP":                     {"\x16\x03\x01\x02\x00\r\n\r\n", "", "400"},
		"refused before a slow body":   {strings.Replace(head("Content-Length: 10"), Path, "/", 1), "", "404"},
		"old before a slow body":       {unsigned(time.Now().Add(-time.Hour), wellFormed) + "Content-Length: 10\r\n\r\n", "", "401"},
		"forged before a slow body":    {unsigned(time.Now(), "v1,x") + "Content-Length: 10\r\n\r\n", "x", "401"},
		"two lengths":                  {head("Content-Length: 1\r\nContent-Length: 2"), "", "400"},
		"announced larger than it may": {head("Content-Length: 99999999999"), "", "413"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			answer, took := talk(c.first, c.drop)
			assert.Less(t, took, time.Minute)
			if c.want == "" {
				assert.Empty(t, answer)
				return
			}
			status, _, _ := strings.Cut(strings.TrimPrefix(answer, "HTTP/1.1 "), " ")
			assert.Equal(t, c.want, status, answer)
		})
	}
}

// blocker is a publisher that answers when it is told to.
type blocker struct {
	entered chan struct{}
	leave   chan struct{}
}

func newBlocker() *blocker {
	return &blocker{entered: make(chan struct{}, 1000), leave: make(chan struct{})}
}

func (p *blocker) Publish(ctx context.Context, _ *event.Event) (stream.Ack, error) {
	p.entered <- struct{}{}
	select {
	case <-p.leave:
		return stream.Ack{}, nil
	case <-ctx.Done():
		return stream.Ack{}, fmt.Errorf("%w: %w", stream.ErrUnavailable, ctx.Err())
	}
}

func TestOverload(t *testing.T) {
	t.Parallel()
	p := newBlocker()
	b := setup(t, func(c *Config, d *Deps) { c.MaxInFlight, d.Publisher = 4, p })
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() { assert.Equal(t, 202, b.send(delivery{}).status) })
	}
	for range 4 {
		<-p.entered
	}
	a := b.send(delivery{})
	assert.Equal(t, 503, a.status)
	assert.Equal(t, string(overloaded), a.body.Error.Code)
	// Strangers do not need a place to be refused.
	assert.Equal(t, 401, b.send(delivery{secret: euSecret}).status)
	assert.Equal(t, 400, b.send(delivery{header: http.Header{"Svix-Id": nil}}).status)
	close(p.leave)
	group.Wait()
	assert.Equal(t, 202, b.send(delivery{}).status)
}

func TestBodiesInMemoryAreBounded(t *testing.T) {
	t.Parallel()
	p := newBlocker()
	b := setup(t, func(c *Config, d *Deps) { c.MaxBodyBytesInFlight, d.Publisher = 2<<20, p })
	var group sync.WaitGroup
	group.Go(func() { assert.Equal(t, 202, b.send(delivery{body: make([]byte, 1<<20)}).status) })
	<-p.entered
	a := b.send(delivery{body: make([]byte, 1<<20)})
	assert.Equal(t, 503, a.status)
	assert.Equal(t, string(overloaded), a.body.Error.Code)
	group.Go(func() { assert.Equal(t, 202, b.send(delivery{body: []byte("small")}).status) })
	<-p.entered
	close(p.leave)
	group.Wait()
	assert.Zero(t, b.bodies.used)
}

func TestABurstOfLargeBodiesWaitsForRoom(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *Deps) {
		c.MaxBodyBytesInFlight, c.roomWait, c.BodyTimeout = 4<<20, time.Minute, time.Minute
	})
	var group sync.WaitGroup
	for i := range 20 {
		group.Go(func() {
			assert.Equal(t, 202, b.send(delivery{id: fmt.Sprintf("msg_large_%d", i), body: make([]byte, 1<<20)}).status)
		})
	}
	group.Wait()
	assert.EqualValues(t, 20, b.count())
	assert.Zero(t, b.bodies.used)
	assert.Zero(t, b.bodies.large)
}

func TestSlowBrokerIsAnsweredInTime(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, d *Deps) { c.PublishTimeout, d.Publisher = 100*time.Millisecond, newBlocker() })
	a := b.send(delivery{})
	assert.Equal(t, 503, a.status)
	assert.Equal(t, string(brokerUnavailable), a.body.Error.Code)
	assert.Contains(t, b.health.Problems()["broker"], "did not confirm the last event")
}

func TestErrorsOfThePublisher(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]result{
		stream.ErrFull: streamFull, stream.ErrTooLarge: bodyTooLarge, stream.ErrClosed: shuttingDown,
		stream.ErrUnavailable: brokerUnavailable, errors.New("odd"): brokerUnavailable,
	} {
		assert.Equal(t, want, publishFailure(fmt.Errorf("publish msg_1: %w", err)))
	}
}

func TestStopAnswersWhatWasTaken(t *testing.T) {
	t.Parallel()
	p := newBlocker()
	b := setup(t, func(_ *Config, d *Deps) { d.Publisher = p })
	// One connection idles, one has its event at the broker, one has sent half of its body.
	require.Equal(t, 404, b.send(delivery{path: "/"}).status)
	var group sync.WaitGroup
	group.Go(func() {
		a := b.send(delivery{})
		assert.Equal(t, 202, a.status)
	})
	<-p.entered
	body := []byte(userCreated)
	conn, err := net.Dial("tcp", b.Addr())
	require.NoError(t, err)
	defer conn.Close()
	r := delivery{body: body}.request(t, "http://"+b.Addr())
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n", Path, len(body))
	require.NoError(t, r.Header.Write(conn))
	fmt.Fprintf(conn, "\r\n%s", body[:10])
	b.eventually(func() bool { b.bodies.mu.Lock(); defer b.bodies.mu.Unlock(); return len(b.bodies.reading) == 1 }, "reading")

	b.cancel()
	b.eventually(func() bool { return b.health.Problems()["ingest"] != "" }, "not ready at once")
	_, err = conn.Write(body[10:])
	require.NoError(t, err)
	<-p.entered
	// A new connection is refused, or answered with 503.
	resp, err := http.Post("http://"+b.Addr()+Path, "", nil)
	if err == nil {
		a := readAnswer(t, resp)
		assert.Equal(t, string(shuttingDown), a.body.Error.Code)
	}
	b.eventually(func() bool { // from here on an answer closes its connection
		late, err := net.Dial("tcp", b.Addr())
		if err == nil {
			_ = late.Close()
		}
		return err != nil
	}, "the listener closes")
	close(p.leave)
	group.Wait()
	resp, err = http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	assert.True(t, resp.Close, "Connection: close")
	assert.Equal(t, 202, readAnswer(t, resp).status)
	b.stop()
}

func TestStopAnswersASlowBodyWithinTheGracePeriod(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *Deps) { c.PublishTimeout, c.Grace = 29*time.Second, 30*time.Second })
	conn, err := net.Dial("tcp", b.Addr())
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, unsigned(time.Now(), wellFormed)+"Content-Length: 5\r\n\r\nx")
	require.NoError(t, err)
	b.eventually(func() bool { b.bodies.mu.Lock(); defer b.bodies.mu.Unlock(); return len(b.bodies.reading) == 1 }, "reading")
	start := time.Now()
	b.cancel()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	a := readAnswer(t, resp)
	assert.Equal(t, string(shuttingDown), a.body.Error.Code)
	b.stop()
	assert.Less(t, time.Since(start), 29*time.Second)
}

// Everything that was answered 202 is in the stream, and everything that was taken is answered.
func TestStopUnderLoad(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var (
		mu       sync.Mutex
		said     []string
		answered atomic.Int64
		group    sync.WaitGroup
	)
	stopped := make(chan struct{})
	for range 64 {
		group.Go(func() {
			for {
				id := newID()
				resp, err := b.client.Do(delivery{id: id, body: []byte(userCreated)}.request(t, "http://"+b.Addr()))
				if err != nil { // refused
					select {
					case <-stopped:
						return
					default:
						b.cancelledOnly(err)
						continue
					}
				}
				a := readAnswer(t, resp)
				answered.Add(1)
				switch a.status {
				case 202:
					mu.Lock()
					said = append(said, id)
					mu.Unlock()
				case 503:
					assert.Equal(t, string(shuttingDown), a.body.Error.Code)
					assert.True(t, resp.Close)
				default:
					assert.Fail(t, "unexpected", "%d", a.status)
				}
			}
		})
	}
	b.eventually(func() bool { return answered.Load() > 1000 }, "load")
	b.stop()
	close(stopped)
	group.Wait()
	b.publisher.Close()
	var counted float64
	for res := range b.metrics.requests {
		counted += b.counted(res)
	}
	// net/http may close a connection on which nothing was read; what the handler took is answered.
	assert.InDelta(t, answered.Load(), counted, 0)
	in := map[string]bool{}
	for _, m := range b.all() {
		in[m.Header.Get(stream.HeaderEventID)] = true
	}
	for _, id := range said {
		assert.True(t, in[id], id)
	}
	assert.GreaterOrEqual(t, len(said), 1000)
}

// cancelledOnly fails for errors that a stopping server does not explain.
func (b *bundle) cancelledOnly(err error) {
	if !b.stopping.Load() {
		assert.NoError(b.t, err, "while running")
	}
}

func TestNothingPersonalIsLogged(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.DebugLevel)
	b := setup(t, func(_ *Config, d *Deps) { d.Logger = zap.New(core) })
	body := []byte(`{"type":"user.created","data":{"id":"user_1","email":"ada@example.org"}}`)
	require.Equal(t, 202, b.send(delivery{body: body}).status)
	require.Equal(t, 401, b.send(delivery{body: body, secret: euSecret, id: "msg_forged"}).status)
	require.Equal(t, 202, b.send(delivery{body: []byte("ada@example.org")}).status)
	for _, entry := range logs.All() {
		line := fmt.Sprint(entry.Message, entry.ContextMap())
		for _, hidden := range []string{"ada@", "whsec", "v1,", "msg_forged", "127.0.0.1:5"} {
			assert.NotContains(t, line, hidden)
		}
	}
	assert.Equal(t, 1, logs.FilterMessage("event stored").FilterField(zap.String("event_type", "user.created")).Len())
	assert.Equal(t, 1, logs.FilterMessage("request refused").FilterField(zap.String("reason", "signature_mismatch")).Len())
}

func TestLogIsSampledUnderAttack(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.InfoLevel)
	b := setup(t, func(_ *Config, d *Deps) { d.Logger = zap.New(core) })
	for range 500 {
		b.ServeHTTP(newRecorder(), delivery{secret: euSecret}.request(t, "http://"+b.Addr()))
	}
	assert.Less(t, logs.Len(), 250)
	assert.InDelta(t, 500, b.counted(signatureMismatch), 0)
}
