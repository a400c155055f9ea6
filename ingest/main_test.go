package ingest

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	svix "github.com/svix/svix-webhooks/go"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

func TestMain(m *testing.M) {
	// A nats-server that is stopped in the middle of an atomic batch leaves the staging store of that batch running.
	const server = "github.com/nats-io/nats-server/v2/server"
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction(server+".(*msgBlock).flushLoop"),
		goleak.IgnoreAnyFunction(server+".(*fileStore).flushStreamStateLoop"),
		goleak.IgnoreAnyFunction(server+"/ats.Register.func1"))
}

const (
	secret    = "whsec_Y2xlcmstbWlycm9yLXRlc3Qta2V5LTI0"
	oldSecret = "whsec_cHJldmlvdXMtc2lnbmluZy1rZXktMDI0"
	euSecret  = "whsec_ZXVyb3BlLXNpZ25pbmcta2V5LTAwMjQw"
)

// bundle is a running service with a real broker.
type bundle struct {
	*Service
	t         testing.TB
	nats      *natstest.Server
	nc        *nats.Conn
	js        jetstream.JetStream
	publisher *stream.Publisher
	health    *observe.Health
	registry  *prometheus.Registry
	client    *http.Client
	cancel    context.CancelFunc
	ended     chan error
}

// setup starts the service on a broker that syncs always; change may adapt what it is made of.
func setup(t testing.TB, change ...func(*Config, *Deps)) *bundle {
	t.Helper()
	return setupOn(t, natstest.New(t, natstest.WithSync), change...)
}

func setupOn(t testing.TB, server *natstest.Server, change ...func(*Config, *Deps)) *bundle {
	t.Helper()
	b := &bundle{t: t, nats: server, health: &observe.Health{}, registry: prometheus.NewRegistry(), ended: make(chan error, 1)}
	b.nc, b.js = server.Setup()
	b.publisher = stream.NewPublisher(b.js, 1)
	t.Cleanup(b.publisher.Close)
	cfg := Config{Addr: "127.0.0.1:0", Sources: []Source{
		{Name: "clerk", Secrets: []string{secret, oldSecret}}, {Name: "eu", Secrets: []string{euSecret}}, {Name: "silent"},
	}}
	deps := Deps{Publisher: b.publisher, JetStream: b.js, Registerer: b.registry, Health: b.health}
	for _, c := range change {
		c(&cfg, &deps)
	}
	var err error
	b.Service, err = New(cfg, deps)
	require.NoError(t, err)
	var ctx context.Context
	ctx, b.cancel = context.WithCancel(context.Background())
	go func() { b.ended <- b.Run(ctx) }()
	transport := &http.Transport{MaxIdleConnsPerHost: 512}
	b.client = &http.Client{Transport: transport, Timeout: 20 * time.Second}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		b.stop()
	})
	b.eventually(func() bool { return len(b.health.Problems()) == 0 }, "ready")
	return b
}

// stop ends the service; the second time it does nothing.
func (b *bundle) stop() {
	b.cancel()
	err, first := <-b.ended
	if first {
		close(b.ended)
		require.NoError(b.t, err)
	}
}

func (b *bundle) eventually(condition func() bool, what string) {
	b.t.Helper()
	require.Eventually(b.t, condition, 15*time.Second, 5*time.Millisecond, what)
}

// delivery is one request as Svix makes it.
type delivery struct {
	method, path, secret, id string
	at                       time.Time
	body                     []byte
	header                   http.Header // what is set here replaces what was made; nil values take a header away
}

func newID() string { return "msg_" + rand.Text() }

func sign(t testing.TB, secret, id string, at time.Time, body []byte) string {
	t.Helper()
	hook, err := svix.NewWebhook(secret)
	require.NoError(t, err)
	signature, err := hook.Sign(id, at, body)
	require.NoError(t, err)
	return signature
}

func (d delivery) request(t testing.TB, base string) *http.Request {
	t.Helper()
	if d.method == "" {
		d.method = http.MethodPost
	}
	if d.path == "" {
		d.path = Path
	}
	if d.secret == "" {
		d.secret = secret
	}
	if d.id == "" {
		d.id = newID()
	}
	if d.at.IsZero() {
		d.at = time.Now()
	}
	r, err := http.NewRequestWithContext(t.Context(), d.method, base+d.path, strings.NewReader(string(d.body)))
	require.NoError(t, err)
	r.Header.Set("svix-id", d.id)
	r.Header.Set("svix-timestamp", strconv.FormatInt(d.at.Unix(), 10))
	r.Header.Set("svix-signature", sign(t, d.secret, d.id, d.at, d.body))
	for name, values := range d.header {
		r.Header.Del(name)
		if values != nil {
			r.Header[name] = values
		}
	}
	return r
}

// answer is what came back.
type answer struct {
	status int
	header http.Header
	body   struct {
		ID        string
		Duplicate *bool
		Error     struct{ Code, Message string }
	}
}

func (b *bundle) send(d delivery) answer {
	b.t.Helper()
	return b.do(d.request(b.t, "http://"+b.Addr()))
}

func (b *bundle) do(r *http.Request) answer {
	b.t.Helper()
	resp, err := b.client.Do(r)
	require.NoError(b.t, err)
	return readAnswer(b.t, resp)
}

// readAnswer reads a response and checks what holds for every one.
func readAnswer(t testing.TB, resp *http.Response) answer {
	t.Helper()
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	a := answer{status: resp.StatusCode, header: resp.Header}
	if resp.Request == nil || resp.Request.Method != http.MethodHead {
		require.NoError(t, json.Unmarshal(raw, &a.body), "%s", raw)
		assert.Equal(t, a.status == http.StatusAccepted, a.body.Error.Code == "", "%s", raw)
		assert.Equal(t, a.status == http.StatusAccepted, a.body.Duplicate != nil, "%s", raw)
	}
	assert.Equal(t, a.status == http.StatusServiceUnavailable, resp.Header.Get("Retry-After") != "")
	assert.Equal(t, a.status == http.StatusMethodNotAllowed, resp.Header.Get("Allow") == "POST")
	for name := range resp.Header {
		assert.NotContains(t, strings.ToLower(name), "webhook-")
	}
	for _, s := range []string{secret, oldSecret, euSecret} {
		assert.NotContains(t, string(raw), strings.TrimPrefix(s, "whsec_"))
	}
	return a
}

// stored returns the message with this id, or fails.
func (b *bundle) stored(id string) *jetstream.RawStreamMsg {
	b.t.Helper()
	for _, m := range b.all() {
		if m.Header.Get(stream.HeaderEventID) == id {
			return m
		}
	}
	b.t.Fatalf("%s is not in the stream", id)
	return nil
}

// all returns every stored message.
func (b *bundle) all() []*jetstream.RawStreamMsg {
	b.t.Helper()
	s, err := b.js.Stream(b.t.Context(), stream.Events)
	require.NoError(b.t, err)
	var msgs []*jetstream.RawStreamMsg
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(b.t.Context(), seq)
		require.NoError(b.t, err)
		msgs = append(msgs, m)
	}
	return msgs
}

func (b *bundle) count() uint64 {
	b.t.Helper()
	s, err := b.js.Stream(b.t.Context(), stream.Events)
	require.NoError(b.t, err)
	return s.CachedInfo().State.Msgs
}

func (b *bundle) counted(res result) float64 { return testutil.ToFloat64(b.metrics.requests[res]) }

func itoa(at time.Time) string { return strconv.FormatInt(at.Unix(), 10) }

func newRecorder() *httptest.ResponseRecorder { return httptest.NewRecorder() }
