package ingest

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// stall opens a connection of a stranger who announces a body and sends only its first bytes.
func (b *bundle) stall(announced, sent int) net.Conn {
	b.t.Helper()
	conn, err := net.Dial("tcp", b.Addr())
	require.NoError(b.t, err)
	b.t.Cleanup(func() { _ = conn.Close() })
	_, err = fmt.Fprintf(conn, "%sContent-Length: %d\r\n\r\n%s", unsigned(time.Now(), wellFormed), announced, make([]byte, sent))
	require.NoError(b.t, err)
	return conn
}

// held is what the bodies hold, and how many are being read.
func (b *bundle) held() (bytes int64, reading int) {
	b.bodies.mu.Lock()
	defer b.bodies.mu.Unlock()
	return b.bodies.used, len(b.bodies.reading)
}

// refusedWith waits for the answer on a connection.
func (b *bundle) refusedWith(conn net.Conn) string {
	b.t.Helper()
	require.NoError(b.t, conn.SetReadDeadline(time.Now().Add(time.Minute)))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(b.t, err)
	assert.True(b.t, resp.Close)
	return readAnswer(b.t, resp).body.Error.Code
}

func patient(c *Config, _ *Deps) { c.BodyTimeout, c.bodyPatience = 5*time.Minute, 5*time.Minute }

func TestMemoryIsTakenAsBodiesArrive(t *testing.T) {
	t.Parallel()
	b := setup(t, patient)
	for range 20 {
		b.stall(1<<20, 0)
	}
	b.eventually(func() bool { _, n := b.held(); return n == 20 }, "reading")
	used, _ := b.held()
	assert.EqualValues(t, 20*(firstRead+perRequest), used)
}

func TestTheSlowestBodyMakesRoom(t *testing.T) {
	t.Parallel()
	b := setup(t, patient, func(c *Config, _ *Deps) { c.MaxBodyBytesInFlight, c.roomWait = 640<<10, time.Minute })
	const each = 64<<10 + perRequest
	var slow []net.Conn
	for i := range 8 { // all of the memory; the last brought the most
		slow = append(slow, b.stall(64<<10, 33<<10+i<<10))
	}
	b.eventually(func() bool { used, _ := b.held(); return used == 8*each }, "full")
	for i := range 5 {
		a := b.send(delivery{id: fmt.Sprintf("msg_%d", i), body: make([]byte, 20<<10)})
		require.Equal(t, 202, a.status, a.body.Error.Code)
	}
	assert.Equal(t, string(overloaded), b.refusedWith(slow[0]))
	b.eventually(func() bool { _, n := b.held(); return n == 7 }, "one of them was enough")
	assert.EqualValues(t, 5, b.count())
}

func TestAStalledLargeBodyLosesItsPlace(t *testing.T) {
	t.Parallel()
	b := setup(t, patient, func(c *Config, _ *Deps) { c.MaxBodyBytesInFlight, c.roomWait = 8<<20, time.Minute })
	require.Equal(t, 3, b.bodies.places)
	var slow []net.Conn
	for range 3 {
		slow = append(slow, b.stall(1<<20, 70<<10))
	}
	b.eventually(func() bool { b.bodies.mu.Lock(); defer b.bodies.mu.Unlock(); return b.bodies.large == 3 }, "no place is left")
	require.Equal(t, 202, b.send(delivery{body: make([]byte, 900<<10)}).status)
	b.eventually(func() bool { _, n := b.held(); return n == 2 }, "one of them was enough")
	codes := make(chan string, 3)
	for _, c := range slow {
		go func() {
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				codes <- ""
				return
			}
			codes <- readAnswer(t, resp).body.Error.Code
		}()
	}
	assert.Equal(t, string(overloaded), <-codes)
	for _, c := range slow {
		_ = c.Close()
	}
	<-codes
	<-codes
}

func TestABodyBelowTheLeastRateIsCutOff(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *Deps) { c.BodyTimeout, c.bodyPatience = 5*time.Minute, 200*time.Millisecond })
	assert.Equal(t, string(bodyTimeout), b.refusedWith(b.stall(10, 0)))
	assert.Equal(t, string(bodyTimeout), b.refusedWith(b.stall(100<<10, 4<<10)))
}

func TestRefusalsNameTheSender(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.InfoLevel)
	b := setup(t, func(c *Config, d *Deps) {
		d.Logger, c.TrustedProxies = zap.New(core), []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	})
	require.Equal(t, 401, b.send(delivery{secret: euSecret, header: http.Header{"X-Forwarded-For": {"6.6.6.6, 192.0.2.7"}}}).status)
	require.Equal(t, 404, b.send(delivery{method: http.MethodGet, path: "/x"}).status)
	refused := logs.FilterMessage("request refused").All()
	require.Len(t, refused, 2)
	assert.Equal(t, "192.0.2.7", refused[0].ContextMap()["remote_addr"])
	assert.Equal(t, "127.0.0.1", refused[1].ContextMap()["remote_addr"])
	assert.Equal(t, "not_found", refused[1].ContextMap()["reason"])
}

// TestAWebhookAtAWrongPathIsLoggedWithTheRightOnes: whoever typed the URL into Clerk's dashboard reads here what is wrong with it.
func TestAWebhookAtAWrongPathIsLoggedWithTheRightOnes(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.InfoLevel)
	b := setup(t, func(_ *Config, d *Deps) { d.Logger = zap.New(core) })
	for range 100 { // a flood of other refusals hides it not
		b.send(delivery{method: http.MethodGet, path: "/"})
	}
	require.Equal(t, 404, b.send(delivery{path: "/api/webhooks?token=hush"}).status)
	require.Equal(t, 404, b.send(delivery{path: Path + "/us"}).status)
	require.Equal(t, 404, b.send(delivery{path: "/" + strings.Repeat("x", 4000)}).status)
	wrong := logs.FilterMessageSnippet("webhook at a wrong path").All()
	require.Len(t, wrong, 3)
	fields := wrong[0].ContextMap()
	assert.Equal(t, "/api/webhooks", fields["path"])
	assert.Equal(t, "127.0.0.1", fields["remote_addr"])
	assert.Equal(t, []any{Path, Path + "/eu"}, fields["right_paths"])
	assert.Equal(t, "unknown_source", wrong[1].ContextMap()["reason"])
	assert.Less(t, len(wrong[2].ContextMap()["path"].(string)), 200)
	for range 200 {
		b.send(delivery{path: "/api/webhooks"})
	}
	assert.Less(t, logs.FilterMessageSnippet("webhook at a wrong path").Len(), 150, "sampled")
}
