package console_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

const secretKey = "sk_test_console"

// signUps is a console beside an emulated Clerk whose webhooks do not come by themselves, and a mirror.
type signUps struct {
	*running
	t        *testing.T
	clerk    *emulator.Clerk
	api      *emulator.API
	db       *gorm.DB
	js       jetstream.JetStream
	registry *prometheus.Registry
	idle     atomic.Bool // the mirror applies nothing
}

func newSignUps(t *testing.T, db *gorm.DB, cfg emulator.APIConfig) *signUps {
	t.Helper()
	s := &signUps{t: t, clerk: emulator.New(emulator.Config{Seed: 9}), db: db, registry: prometheus.NewRegistry()}
	cfg.Key = secretKey
	s.api = s.clerk.API(cfg)
	server := httptest.NewServer(s.api)
	t.Cleanup(server.Close)
	broker := natstest.New(t)
	_, s.js = broker.Setup(stream.HandlerSpec{Name: "mirror"})
	s.work()
	s.running = start(t, broker, console.Config{Source: "clerk", Sources: []clerk.Source{{Name: "clerk", APIURL: server.URL + "/v1", SecretKey: secretKey, Quota: -1}}},
		console.Deps{DB: db, Registerer: s.registry})
	return s
}

// work applies events as the worker does, until the test ends.
func (s *signUps) work() {
	consumer, err := s.js.Consumer(s.t.Context(), stream.Events, "mirror")
	require.NoError(s.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	s.t.Cleanup(func() { cancel(); group.Wait() })
	group.Go(func() {
		for ctx.Err() == nil {
			msg, err := consumer.Next(jetstream.FetchMaxWait(100 * time.Millisecond))
			if err != nil {
				continue
			}
			for s.idle.Load() && ctx.Err() == nil {
				<-time.After(time.Millisecond)
			}
			e, err := stream.Parse(msg.Headers(), msg.Data(), 1)
			assert.NoError(s.t, err)
			assert.NoError(s.t, s.apply(e))
			_ = msg.Ack()
		}
	})
}

func (s *signUps) apply(e event.Event) error {
	return database.InTx(context.Background(), s.db, func(tx *gorm.DB) error {
		err := tx.Exec(`INSERT INTO deliveries (handler, event_id, type, source, origin, status, received_at) VALUES ('mirror', ?, ?, ?, ?, 'processed', ?) ON CONFLICT DO NOTHING`,
			e.ID, e.Type, e.Source, e.Origin, time.Now().UTC()).Error
		if err != nil {
			return err
		}
		_, err = mirror.Apply(context.Background(), tx, []event.Event{e})
		return err
	})
}

// deliver applies Clerk's own events.
func (s *signUps) deliver(events ...emulator.Event) {
	s.t.Helper()
	for _, e := range events {
		decoded, err := event.Decode(e.Body)
		require.NoError(s.t, err)
		decoded.ID, decoded.Source, decoded.Origin, decoded.ReceivedAt = e.ID, "clerk", event.OriginWebhook, time.Now()
		require.NoError(s.t, s.apply(decoded))
	}
}

type ensured struct {
	status int
	header http.Header
	User   map[string]any
	Result string
	Error  struct{ Code, Message string }
}

func (s *signUps) ensure(id, query string) ensured {
	s.t.Helper()
	got := s.do(s.t, http.MethodGet, "/api/users/"+id+"/ensure"+query, nil)
	var e ensured
	require.NoError(s.t, json.Unmarshal([]byte(got.body), &e), got.body)
	e.status, e.header = got.status, got.header
	return e
}

func (s *signUps) asked() int { return s.api.Requests() }

func (s *signUps) stored() uint64 {
	s.t.Helper()
	events, err := s.js.Stream(s.t.Context(), stream.Events)
	require.NoError(s.t, err)
	return events.CachedInfo().State.Msgs
}

func TestUserWhoseWebhookHasNotComeIsFetchedFromClerk(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		s := newSignUps(t, db, emulator.APIConfig{})
		id, events := s.clerk.SignUp()
		got := s.ensure(id, "?wait=20ms")
		require.Equal(t, http.StatusOK, got.status, got.Error)
		assert.Equal(t, "fetched", got.Result)
		assert.Equal(t, id, got.User["id"])
		assert.NotContains(t, got.User, "raw")
		assert.IsType(t, map[string]any{}, got.User["public_metadata"])
		assert.Equal(t, "reconcile", got.User["origin"])
		assert.IsType(t, true, got.User["banned"])
		_, err := time.Parse(time.RFC3339, got.User["clerk_created_at"].(string))
		require.NoError(t, err)
		var rows int64
		require.NoError(t, db.Table("users").Where("id = ?", id).Count(&rows).Error)
		assert.EqualValues(t, 1, rows)

		before := s.asked()
		got = s.ensure(id, "")
		assert.Equal(t, "present", got.Result)
		assert.Equal(t, before, s.asked(), "the row is there: Clerk is not asked")

		s.deliver(events...) // late
		assert.Equal(t, "present", s.ensure(id, "").Result)
		assert.InDelta(t, 1, s.counted("fetched"), 0)
		assert.InDelta(t, 2, s.counted("present"), 0)
		assert.Zero(t, s.counted("unavailable"))
	})
}

// counted is how often `ensure` ended so.
func (s *signUps) counted(result string) float64 {
	s.t.Helper()
	families, err := s.registry.Gather()
	require.NoError(s.t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "usher_ensure_requests_total" && m.GetLabel()[0].GetValue() == result {
				return m.GetCounter().GetValue()
			}
		}
	}
	s.t.Fatalf("no result %s is counted", result)
	return 0
}

// TestPrivateMetadataIsLeftOutUnlessAskedFor: also where the webhook's row is shared by those who ask for more and for less.
func TestPrivateMetadataIsLeftOutUnlessAskedFor(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		s := newSignUps(t, db, emulator.APIConfig{})
		id, events := s.clerk.SignUp()
		answers := make(chan ensured, 2)
		go func() { answers <- s.ensure(id, "?wait=5s") }()
		go func() { answers <- s.ensure(id, "?wait=5s") }()
		s.deliver(events...)
		for range 2 {
			got := <-answers
			assert.Equal(t, http.StatusOK, got.status, got.Error)
			assert.NotContains(t, got.User, "private_metadata")
			assert.Contains(t, got.User, "public_metadata")
		}
		assert.Contains(t, s.ensure(id, "?include=private_metadata").User, "private_metadata")
		for _, query := range []string{"?include=raw", "?include=", "?include=private_metadata&include=raw"} {
			got := s.ensure(id, query)
			assert.Equal(t, http.StatusBadRequest, got.status, query)
			assert.Equal(t, "invalid_include", got.Error.Code)
		}
	})
}

func TestWebhookThatComesInTimeSparesClerkTheQuestion(t *testing.T) {
	t.Parallel()
	s := newSignUps(t, dbtest.SQLite(t), emulator.APIConfig{})
	id, events := s.clerk.SignUp()
	answers := make(chan ensured, 1)
	go func() { answers <- s.ensure(id, "?wait=5s") }()
	<-time.After(100 * time.Millisecond) // the webhook is late
	s.deliver(events...)
	got := <-answers
	assert.Equal(t, http.StatusOK, got.status)
	assert.Equal(t, "arrived", got.Result)
	assert.Zero(t, s.asked())
	assert.Zero(t, s.stored())
}

func TestOnlyClerkSaysThatThereIsNoSuchUser(t *testing.T) {
	t.Parallel()
	s := newSignUps(t, dbtest.SQLite(t), emulator.APIConfig{})
	got := s.ensure("user_nobody", "?wait=0s")
	assert.Equal(t, http.StatusNotFound, got.status)
	assert.Equal(t, "user_not_found", got.Error.Code)

	id, events := s.clerk.SignUp()
	for mood, code := range map[emulator.Mood]string{emulator.Empty: "clerk_unavailable", emulator.Redirect: "clerk_unavailable", emulator.BadGateway: "clerk_timeout", emulator.Limited: "clerk_timeout"} {
		s.api.SetMoods(map[emulator.Mood]float64{mood: 1})
		got = s.ensure(id, "?wait=0s")
		assert.Equal(t, http.StatusServiceUnavailable, got.status, mood)
		assert.Equal(t, code, got.Error.Code, mood)
		assert.Equal(t, "1", got.header.Get("Retry-After"))
	}
	s.api.SetMoods(nil)

	s.deliver(events...)
	gone, ok := s.clerk.Leave(id)
	require.True(t, ok)
	s.deliver(gone...)
	assert.Equal(t, http.StatusNotFound, s.ensure(id, "?wait=0s").status, "deleted here, and Clerk says so too")

	alive, events := s.clerk.SignUp()
	s.deliver(events...)
	require.NoError(t, s.db.Exec("UPDATE users SET deleted_at = ?, version = version + 1000000 WHERE id = ?", time.Now().UTC(), alive).Error)
	got = s.ensure(alive, "?wait=0s")
	assert.Equal(t, http.StatusServiceUnavailable, got.status)
	assert.Equal(t, "deleted_later", got.Error.Code)
	assert.Zero(t, s.stored(), "an event that the mirror would not apply is not published")
}

func TestCallsForOneUserShareOneQuestion(t *testing.T) {
	t.Parallel()
	s := newSignUps(t, dbtest.Postgres(t), emulator.APIConfig{Moods: map[emulator.Mood]float64{emulator.Slow: 1}, Delay: 300 * time.Millisecond})
	id, _ := s.clerk.SignUp()
	var group sync.WaitGroup
	results := make([]ensured, 50)
	for i := range results {
		group.Go(func() { results[i] = s.ensure(id, "?wait=10ms") })
	}
	group.Wait()
	for _, r := range results {
		assert.Equal(t, http.StatusOK, r.status, r.Error)
	}
	assert.Equal(t, 1, s.asked())
	assert.EqualValues(t, 1, s.stored())
}

func TestManyUsersAreEnsuredAtOnce(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		s := newSignUps(t, db, emulator.APIConfig{})
		var group sync.WaitGroup
		for range 30 {
			id, _ := s.clerk.SignUp()
			group.Go(func() {
				got := s.ensure(id, "?wait=10ms")
				assert.Equal(t, http.StatusOK, got.status, got.Error)
				assert.Equal(t, id, got.User["id"])
			})
		}
		group.Wait()
		assert.Equal(t, 30, s.asked())
	})
}

func TestWorkerThatIsBehindIsNoVerdict(t *testing.T) {
	t.Parallel()
	s := newSignUps(t, dbtest.SQLite(t), emulator.APIConfig{})
	s.idle.Store(true)
	id, _ := s.clerk.SignUp()
	got := s.ensure(id, "?wait=0s")
	assert.Equal(t, http.StatusServiceUnavailable, got.status)
	assert.Equal(t, "not_applied", got.Error.Code)
	_ = s.ensure(id, "?wait=0s")
	assert.EqualValues(t, 1, s.stored(), "the same event, however often it is asked for")
	s.idle.Store(false)
	assert.Equal(t, http.StatusOK, s.ensure(id, "?wait=5s").status)
}

func TestRowThatWasLostIsFetchedAgain(t *testing.T) {
	t.Parallel()
	s := newSignUps(t, dbtest.SQLite(t), emulator.APIConfig{})
	id, _ := s.clerk.SignUp()
	for range 3 {
		got := s.ensure(id, "?wait=0s")
		require.Equal(t, http.StatusOK, got.status, got.Error)
		require.Equal(t, "fetched", got.Result)
		require.NoError(t, s.db.Exec("DELETE FROM users WHERE id = ?", id).Error)
	}
}

func TestDeadLetteredUserIsNotPublishedAgain(t *testing.T) {
	t.Parallel()
	s := newSignUps(t, dbtest.SQLite(t), emulator.APIConfig{})
	id, _ := s.clerk.SignUp()
	require.Equal(t, http.StatusOK, s.ensure(id, "?wait=0s").status)
	require.NoError(t, s.db.Exec("DELETE FROM users").Error)
	require.NoError(t, s.db.Exec("UPDATE deliveries SET status = 'dead'").Error)
	for range 3 {
		got := s.ensure(id, "?wait=0s")
		assert.Equal(t, http.StatusServiceUnavailable, got.status)
		assert.Equal(t, "dead_lettered", got.Error.Code)
	}
	assert.EqualValues(t, 1, s.stored())
}

// TestUserOfAnotherSourceIsNotPublished: its row is not shown, and the event could only be dead-lettered.
func TestUserOfAnotherSourceIsNotPublished(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		s := newSignUps(t, db, emulator.APIConfig{})
		id, _ := s.clerk.SignUp()
		require.Equal(t, http.StatusOK, s.ensure(id, "?wait=0s").status)
		for _, deleted := range []any{nil, time.Now().UTC()} { // a tombstone is theirs as much
			require.NoError(t, db.Exec("UPDATE users SET source = 'staging', deleted_at = ? WHERE id = ?", deleted, id).Error)
			got := s.ensure(id, "?wait=0s")
			assert.Equal(t, http.StatusServiceUnavailable, got.status)
			assert.Equal(t, "wrong_source", got.Error.Code)
			assert.Nil(t, got.User)
		}
		assert.EqualValues(t, 1, s.stored())
	})
}

// TestDatabaseThatHasForgottenIsFilledAgain: the broker still knows the event, the database was made anew.
func TestDatabaseThatHasForgottenIsFilledAgain(t *testing.T) {
	t.Parallel()
	s := newSignUps(t, dbtest.SQLite(t), emulator.APIConfig{})
	id, _ := s.clerk.SignUp()
	require.Equal(t, "fetched", s.ensure(id, "?wait=0s").Result)
	require.NoError(t, s.db.Exec("DELETE FROM users").Error)
	require.NoError(t, s.db.Exec("DELETE FROM deliveries").Error)
	got := s.ensure(id, "?wait=0s")
	assert.Equal(t, http.StatusOK, got.status, got.Error)
	assert.EqualValues(t, 2, s.stored())
}

func TestEnsureRefusesWhatItCannotDo(t *testing.T) {
	t.Parallel()
	s := newSignUps(t, dbtest.SQLite(t), emulator.APIConfig{})
	for _, path := range []string{"user_1?wait=soon", "user_1?wait=-1s", "user_1?wait=6s", "user%201?", "count?", "abc?", "org_1?", "user_?", "%2e%2e?", strings.Repeat("u", 129) + "?"} {
		id, query, _ := strings.Cut(path, "?")
		assert.Equal(t, http.StatusBadRequest, s.ensure(id, "?"+query).status, path)
	}
	got := s.ensure("user_1", "?wait=0s&source=staging")
	assert.Equal(t, http.StatusServiceUnavailable, got.status)
	assert.Equal(t, "no_secret_key", got.Error.Code)
	post := s.do(t, http.MethodPost, "/api/users/user_1/ensure", nil)
	assert.Equal(t, http.StatusMethodNotAllowed, post.status)
	assert.Zero(t, s.asked())

	require.NoError(t, s.db.Exec("ALTER TABLE users RENAME TO away").Error)
	got = s.ensure("user_1", "?wait=0s")
	assert.Equal(t, http.StatusServiceUnavailable, got.status)
	assert.Equal(t, "database_unavailable", got.Error.Code)
}

func TestEnsureSpendsAShareOfTheQuota(t *testing.T) {
	t.Parallel()
	clk := emulator.New(emulator.Config{Seed: 3})
	api := clk.API(emulator.APIConfig{Key: "sk_test_console"})
	server := httptest.NewServer(api)
	t.Cleanup(server.Close)
	broker := natstest.New(t)
	broker.Setup(stream.HandlerSpec{Name: "mirror"})
	r := start(t, broker, console.Config{Source: "clerk", Sources: []clerk.Source{{Name: "clerk", APIURL: server.URL + "/v1", SecretKey: "sk_test_console"}}},
		console.Deps{DB: dbtest.SQLite(t)})
	// A tenth of a development instance's 100 in 10 s: of 30 who ask at once, most are told to come again.
	var group sync.WaitGroup
	codes := make([]int, 30)
	for i := range codes {
		group.Go(func() {
			codes[i] = r.do(t, http.MethodGet, fmt.Sprintf("/api/users/user_%d/ensure?wait=0s", i), nil).status
		})
	}
	group.Wait()
	slices.Sort(codes)
	assert.Equal(t, http.StatusNotFound, codes[0])
	assert.Equal(t, http.StatusServiceUnavailable, codes[29])
	assert.LessOrEqual(t, api.Requests(), 8)
}
