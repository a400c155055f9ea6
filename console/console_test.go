package console_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

const (
	token    = "a-token-for-tests"
	appToken = "an-application-token"
)

// running is a console on a free port that stops with the test.
type running struct {
	url    string
	health *observe.Health
	client *http.Client
}

func start(t *testing.T, broker *natstest.Server, cfg console.Config, deps console.Deps) *running {
	t.Helper()
	cfg.Addr, cfg.AdminToken, cfg.AppToken = "127.0.0.1:0", token, appToken
	r := &running{health: &observe.Health{}, client: &http.Client{Transport: &http.Transport{}, Timeout: 10 * time.Second}}
	_, deps.JetStream = broker.Connect()
	deps.Health = r.health
	if deps.Log == nil {
		deps.Log = zap.NewNop()
	}
	c, err := console.New(cfg, deps)
	require.NoError(t, err)
	r.url = "http://" + c.Addr()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		r.client.CloseIdleConnections()
		cancel()
		select {
		case err := <-done:
			assert.NoError(t, err)
		case <-time.After(15 * time.Second):
			t.Error("the console did not stop within 15 s")
		}
	})
	return r
}

type answer struct {
	status int
	header http.Header
	body   string
}

// do sends a request with the admin token, unless change takes it away.
func (r *running) do(t *testing.T, method, path string, change func(*http.Request)) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, r.url+path, nil)
	require.NoError(t, err)
	bearer("Bearer " + token)(req)
	if change != nil {
		change(req)
	}
	return r.send(t, req)
}

func (r *running) send(t *testing.T, req *http.Request) answer {
	t.Helper()
	res, err := r.client.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return answer{res.StatusCode, res.Header, string(body)}
}

func bearer(value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("Authorization", value) }
}

func TestConsumersAreListedWithTheirLag(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	_, js := broker.Setup(stream.HandlerSpec{Name: "mirror"}, stream.HandlerSpec{Name: "fraud", Filters: []string{"session.>"}})
	for range 3 {
		_, err := js.Publish(t.Context(), "clerk.evt.clerk.user.created.user_1", []byte("{}"))
		require.NoError(t, err)
	}
	c, err := js.Consumer(t.Context(), stream.Events, "mirror")
	require.NoError(t, err)
	_, err = c.Next(jetstream.FetchMaxWait(5 * time.Second)) // taken and not settled
	require.NoError(t, err)

	r := start(t, broker, console.Config{}, console.Deps{})
	got := r.do(t, http.MethodGet, "/api/consumers", nil)
	require.Equal(t, http.StatusOK, got.status, got.body)
	var list struct {
		Items []stream.Consumer `json:"items"`
		Next  *string           `json:"next"`
	}
	require.NoError(t, json.Unmarshal([]byte(got.body), &list))
	for _, name := range []string{"handler", "pending", "in_flight", "redelivered", "oldest_seconds"} {
		assert.Contains(t, got.body, `"`+name+`":`)
	}
	require.Len(t, list.Items, 2)
	assert.Equal(t, stream.Consumer{Handler: "fraud"}, list.Items[0])
	mirror := list.Items[1]
	assert.Positive(t, mirror.LagSeconds)
	mirror.LagSeconds = 0
	assert.Equal(t, stream.Consumer{Handler: "mirror", Pending: 2, AckPending: 1}, mirror)
	require.NotNil(t, list.Next)
	assert.Empty(t, *list.Next)

	page := r.do(t, http.MethodGet, "/admin", nil)
	assert.Equal(t, http.StatusOK, page.status)
	assert.Contains(t, page.header.Get("Content-Type"), "text/html")
	assert.Contains(t, page.body, "mirror")
	assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/admin/admin.css", nil).status)
}

func TestThePageShowsWhatWasNotProcessed(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		broker := natstest.New(t)
		broker.Setup()
		for i, status := range []string{"processed", "dead", "dead", "retrying"} {
			require.NoError(t, db.Exec(`INSERT INTO deliveries (handler, event_id, type, source, origin, status, received_at)
				VALUES ('mirror', ?, 'user.created', 'clerk', 'webhook', ?, ?)`, strconv.Itoa(i), status, time.Now().UTC()).Error)
		}
		r := start(t, broker, console.Config{}, console.Deps{DB: db})
		page := r.do(t, http.MethodGet, "/admin", nil)
		assert.Contains(t, page.body, `<th scope="row">mirror</th><td>dead</td><td>2</td>`)
		assert.Contains(t, page.body, `<th scope="row">mirror</th><td>retrying</td><td>1</td>`)
		assert.NotContains(t, page.body, "<td>processed</td>")
		assert.NotContains(t, page.body, `class="problem"`)

		require.NoError(t, db.Exec("DROP TABLE deliveries").Error)
		page = r.do(t, http.MethodGet, "/admin", nil)
		assert.Equal(t, http.StatusOK, page.status)
		assert.Contains(t, page.body, "Not known: the database does not answer, or `usher setup` was not run")
		assert.NotContains(t, page.body, "None.", "where it could not look")
	})
}

func TestThePageSaysWhatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	r := start(t, broker, console.Config{}, console.Deps{})
	page := func(want string) {
		t.Helper()
		got := r.do(t, http.MethodGet, "/admin", nil)
		assert.Equal(t, http.StatusOK, got.status)
		assert.Contains(t, got.body, want)
		assert.NotContains(t, got.body, "<p>None")
	}
	page("Not known: " + stream.ErrSetup.Error())
	page("Not known: the database does not answer, or `usher setup` was not run")
	broker.Stop()
	page("Not known: " + stream.ErrUnavailable.Error())
}

func TestAnswersOfUnknownPathsAndMethods(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	r := start(t, broker, console.Config{}, console.Deps{})

	got := r.do(t, http.MethodGet, "/api/unknown", nil)
	assert.Equal(t, http.StatusNotFound, got.status)
	assert.JSONEq(t, `{"error":{"code":"not_found","message":"there is no such resource"}}`, got.body)
	got = r.do(t, http.MethodPost, "/api/consumers", nil)
	assert.Equal(t, http.StatusMethodNotAllowed, got.status)
	assert.Equal(t, "GET, HEAD", got.header.Get("Allow"))
	for _, path := range []string{"/admin", "/api/consumers", "/nothing"} {
		h := r.do(t, http.MethodGet, path, nil).header
		assert.Equal(t, "nosniff", h.Get("X-Content-Type-Options"), path)
		assert.Equal(t, "DENY", h.Get("X-Frame-Options"), path)
		assert.Equal(t, "no-store", h.Get("Cache-Control"), path)
		assert.Contains(t, h.Get("Content-Security-Policy"), "default-src 'none'", path)
	}
}

func TestReadinessFollowsTheStreamsAndTheBroker(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	r := start(t, broker, console.Config{}, console.Deps{})
	problem := func() string { return r.health.Problems()[console.Name] }

	require.Eventually(t, func() bool { return problem() == "stream CLERK_EVENTS: "+stream.ErrSetup.Error() }, time.Minute, 10*time.Millisecond)
	got := r.do(t, http.MethodGet, "/api/consumers", nil)
	assert.Equal(t, http.StatusServiceUnavailable, got.status)
	assert.Contains(t, got.body, "usher setup")
	page := r.do(t, http.MethodGet, "/admin", nil)
	assert.Equal(t, http.StatusOK, page.status)
	assert.Contains(t, page.body, "usher setup")

	broker.Setup()
	require.Eventually(t, func() bool { return problem() == "" }, 60*time.Second, 10*time.Millisecond)

	broker.Stop()
	require.Eventually(t, func() bool { return problem() != "" }, 60*time.Second, 10*time.Millisecond)
	got = r.do(t, http.MethodGet, "/api/consumers", nil)
	assert.Equal(t, http.StatusServiceUnavailable, got.status)
	assert.Contains(t, got.body, "broker_unavailable")
	assert.Contains(t, got.body, stream.ErrUnavailable.Error())
	assert.NotContains(t, got.body, "nats: ")

	broker.Start()
	require.Eventually(t, func() bool { return problem() == "" }, 60*time.Second, 10*time.Millisecond)
}

func TestNewRefusesWhatIsNotSafe(t *testing.T) {
	t.Parallel()
	for _, addr := range []string{"0.0.0.0:0", ":0", ""} {
		_, err := console.New(console.Config{Addr: addr}, console.Deps{})
		require.ErrorAs(t, err, new(config.Problems), addr)
		assert.ErrorContains(t, err, "USHER_CONSOLE_ADDR", addr)
	}
}

func TestATakenPortIsAnErrorOfNew(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	r := start(t, broker, console.Config{}, console.Deps{})
	_, js := broker.Connect()
	_, err := console.New(console.Config{Addr: strings.TrimPrefix(r.url, "http://"), AdminToken: token}, console.Deps{JetStream: js, Log: zap.NewNop(), Health: &observe.Health{}})
	require.ErrorContains(t, err, "listen")
}
