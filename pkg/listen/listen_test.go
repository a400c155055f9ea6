package listen

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bundle is a server of eight connections, four of one address.
type bundle struct {
	*Listener
	t       *testing.T
	entered chan struct{} // a value for each request to /hold
	leave   chan struct{}
}

func setup(t *testing.T, o Options) *bundle {
	t.Helper()
	o.Name, o.Share, o.Most, o.descriptors = "test", 3, 100, 24
	l, err := Open("127.0.0.1:0", o)
	require.NoError(t, err)
	b := &bundle{Listener: l, t: t, entered: make(chan struct{}, 100), leave: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/hold", func(_ http.ResponseWriter, r *http.Request) {
		Known(r)
		b.entered <- struct{}{}
		<-b.leave
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute, ErrorLog: zap.NewStdLog(zap.NewNop())}
	l.Attach(server)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	t.Cleanup(func() {
		require.NoError(t, server.Close())
		require.ErrorIs(t, <-ended, http.ErrServerClosed)
	})
	return b
}

// dial connects from a loopback address, by its last number.
func (b *bundle) dial(from byte) net.Conn {
	b.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, from)}}
	c, err := d.DialContext(b.t.Context(), "tcp", b.Addr().String())
	require.NoError(b.t, err)
	b.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (b *bundle) ask(c net.Conn, path string) {
	b.t.Helper()
	_, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
	require.NoError(b.t, err)
}

// answered reads an answer, which must come.
func (b *bundle) answered(c net.Conn) {
	b.t.Helper()
	require.NoError(b.t, c.SetReadDeadline(time.Now().Add(time.Minute)))
	begin := make([]byte, len("HTTP/1.1 200"))
	_, err := io.ReadFull(c, begin)
	require.NoError(b.t, err)
	assert.Equal(b.t, "HTTP/1.1 200", string(begin))
}

// closed reads from a connection, which the server must have closed.
func (b *bundle) closed(c net.Conn) {
	b.t.Helper()
	require.NoError(b.t, c.SetReadDeadline(time.Now().Add(time.Minute)))
	_, err := c.Read(make([]byte, 1))
	require.Error(b.t, err)
	require.NotErrorIs(b.t, err, os.ErrDeadlineExceeded)
}

func TestIdleStrangersMakeRoom(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.WarnLevel)
	reg := prometheus.NewRegistry()
	b := setup(t, Options{Log: zap.New(core), Registerer: reg})
	require.Equal(t, 8, b.Most())
	other := b.dial(2)
	var silent []net.Conn
	for range 40 {
		silent = append(silent, b.dial(1))
		assert.LessOrEqual(t, b.Connections(), 8)
	}
	c := b.dial(1)
	b.ask(c, "/")
	b.answered(c)
	for _, c := range silent[:36] {
		b.closed(c)
	}
	b.ask(other, "/") // the share of another address is its own
	b.answered(other)
	assert.LessOrEqual(t, b.Connections(), 5)
	assert.InDelta(t, 37, testutil.ToFloat64(b.dropped[droppedIdle]), 0)
	first := logs.All()[0].ContextMap()
	assert.Equal(t, "127.0.0.1", first["remote_addr"])
	assert.Equal(t, "idle", first["reason"])
	n, err := testutil.GatherAndCount(reg, "usher_connections", "usher_connections_max", "usher_connections_dropped_total")
	require.NoError(t, err)
	assert.Equal(t, 5, n)
}

func TestAKnownSendersRequestIsNeverDropped(t *testing.T) {
	t.Parallel()
	b := setup(t, Options{Trusted: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}})
	var held []net.Conn
	for range 8 { // of a trusted proxy's address, which has no share
		c := b.dial(1)
		b.ask(c, "/hold")
		<-b.entered
		held = append(held, c)
	}
	late := b.dial(1)
	b.closed(late) // there is no place for one more
	assert.InDelta(t, 1, testutil.ToFloat64(b.dropped[droppedFull]), 0)
	close(b.leave)
	for _, c := range held {
		b.answered(c)
	}
	require.Eventually(t, func() bool { // idle now, and so the last that go, but they go
		c := b.dial(1)
		b.ask(c, "/")
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		_, err := c.Read(make([]byte, 1))
		return err == nil
	}, time.Minute, 10*time.Millisecond)
	assert.Equal(t, 8, b.Connections())
}

// TestWhoGoesFirst is the order in which connections are dropped.
func TestWhoGoesFirst(t *testing.T) {
	t.Parallel()
	type at struct {
		group int
		ago   time.Duration
	}
	for name, c := range map[string]struct {
		conns []at
		want  int // index; -1: none
	}{
		"nobody":                                   {nil, -1},
		"the one that waits before a request":      {[]at{{activeStranger, 9 * time.Second}, {waitingStranger, 2 * time.Second}}, 1},
		"the longest wait":                         {[]at{{waitingStranger, 3 * time.Second}, {waitingStranger, 2 * time.Second}}, 0},
		"a long request before a wait just begun":  {[]at{{activeStranger, 2 * time.Second}, {waitingStranger, time.Millisecond}}, 0},
		"of what is young the oldest, a wait":      {[]at{{activeStranger, 10 * time.Millisecond}, {waitingStranger, 20 * time.Millisecond}}, 1},
		"of what is young the oldest, a request":   {[]at{{activeStranger, 20 * time.Millisecond}, {waitingStranger, 10 * time.Millisecond}}, 0},
		"a stranger's request before known idling": {[]at{{waitingKnown, time.Minute}, {activeStranger, time.Millisecond}}, 1},
		"known idling before known at work":        {[]at{{activeKnown, time.Minute}, {waitingKnown, time.Millisecond}}, 1},
		"nobody who is known and at work":          {[]at{{activeKnown, time.Minute}}, -1},
	} {
		l := &Listener{}
		var conns []*conn
		for _, a := range c.conns {
			one := &conn{listener: l, group: a.group, since: time.Now().Add(-a.ago)}
			one.place = l.groups[a.group].PushBack(one)
			conns = append(conns, one)
		}
		got := l.victim(netip.Addr{})
		if c.want < 0 {
			assert.Nil(t, got, name)
			continue
		}
		assert.Same(t, conns[c.want], got, name)
	}
}

func TestRemote(t *testing.T) {
	t.Parallel()
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	for _, c := range []struct {
		peer      string
		forwarded []string
		want      string
	}{
		{"192.0.2.1:5", nil, "192.0.2.1"},
		{"192.0.2.1:5", []string{"198.51.100.1"}, "192.0.2.1"}, // a stranger may say what it likes
		{"10.0.0.1:5", []string{"198.51.100.1"}, "198.51.100.1"},
		{"10.0.0.1:5", []string{"6.6.6.6, 198.51.100.1, 10.0.0.2"}, "198.51.100.1"},
		{"10.0.0.1:5", []string{"6.6.6.6", "198.51.100.1"}, "198.51.100.1"},
		{"10.0.0.1:5", []string{"nonsense"}, "10.0.0.1"},
		{"10.0.0.1:5", []string{"6.6.6.6, 198.51.100.1:61000"}, "198.51.100.1"},
		{"10.0.0.1:5", []string{"[2001:db8::1]:61000, [::1]:5"}, "2001:db8::1"},
		{"10.0.0.1:5", nil, "10.0.0.1"},
		{"[::1]:5", []string{"2001:db8::1"}, "2001:db8::1"},
		{"[::ffff:10.0.0.1]:5", []string{"198.51.100.1"}, "198.51.100.1"},
		{"@", nil, ""},
	} {
		r := &http.Request{RemoteAddr: c.peer, Header: http.Header{"X-Forwarded-For": c.forwarded}}
		assert.Equal(t, c.want, Remote(r, trusted), "%s %v", c.peer, c.forwarded)
	}
}

func TestAnIPv6NetworkIsOneAddress(t *testing.T) {
	t.Parallel()
	a, b := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2:1")
	assert.Equal(t, network(a), network(b))
	assert.NotEqual(t, network(a), network(netip.MustParseAddr("2001:db8:0:1::1")))
	assert.NotEqual(t, network(netip.MustParseAddr("192.0.2.1")), network(netip.MustParseAddr("192.0.2.2")))
}

func TestATakenPortIsAnError(t *testing.T) {
	t.Parallel()
	l, err := Open("127.0.0.1:0", Options{Name: "test", Share: 3, Most: 8})
	require.NoError(t, err)
	defer l.Close()
	_, err = Open(l.Addr().String(), Options{Name: "test", Share: 3, Most: 8})
	require.ErrorContains(t, err, "address already in use")
}
