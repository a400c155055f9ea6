package worker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

// bundle is a worker with a real broker and a real database around it.
type bundle struct {
	t      *testing.T
	db     *gorm.DB
	js     jetstream.JetStream
	health *observe.Health
	stop   func() // stops the worker and waits for it
}

func start(t *testing.T, db *gorm.DB, cfg worker.Config) *bundle {
	t.Helper()
	srv := natstest.New(t)
	specs := worker.Specs()
	if cfg.Handlers != nil {
		specs = nil
		for _, r := range cfg.Handlers {
			specs = append(specs, stream.HandlerSpec{Name: r.Handler.Name(), Filters: r.Filters})
		}
	}
	_, js := srv.Setup(specs...)
	b := &bundle{t: t, db: db, js: js}
	b.run(cfg)
	return b
}

// run starts a worker on the bundle's broker and database.
func (b *bundle) run(cfg worker.Config) {
	b.t.Helper()
	b.health = &observe.Health{}
	w, err := worker.New(cfg, worker.Deps{JetStream: b.js, DB: b.db, Log: zaptest.NewLogger(b.t), Registerer: prometheus.NewRegistry(), Health: b.health})
	require.NoError(b.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		assert.NoError(b.t, <-done)
	})
	b.t.Cleanup(b.stop)
}

func (b *bundle) publish(id string, body []byte) {
	b.t.Helper()
	e, _ := event.Decode(body)
	e.ID, e.Raw, e.Source, e.Origin, e.ReceivedAt = id, body, "clerk", event.OriginWebhook, time.Now()
	_, err := b.js.PublishMsg(b.t.Context(), stream.Message(&e))
	require.NoError(b.t, err)
}

// user is a user.created of its own.
func user(id string) []byte {
	return fmt.Appendf(nil, `{"type":"user.created","object":"event","instance_id":"ins_1","timestamp":1768471200036,"data":{"id":%q,"object":"user","first_name":"Ada","created_at":1768471200000,"updated_at":1768471200018}}`, id)
}

type row struct {
	EventID  string
	Status   string
	Attempts int
	Error    *string
	Reason   *string
}

func (b *bundle) deliveries(handler string) map[string]row {
	b.t.Helper()
	var rows []row
	require.NoError(b.t, b.db.Table("deliveries").Where("handler = ?", handler).Find(&rows).Error)
	byID := map[string]row{}
	for _, r := range rows {
		byID[r.EventID] = r
	}
	return byID
}

func (b *bundle) count(table string) int {
	b.t.Helper()
	var n int64
	require.NoError(b.t, b.db.Table(table).Count(&n).Error)
	return int(n)
}

// settled waits until so many events of a handler have a final status and nothing is pending.
func (b *bundle) settled(handler string, want int) map[string]row {
	b.t.Helper()
	var rows map[string]row
	require.Eventually(b.t, func() bool {
		rows = b.deliveries(handler)
		n := 0
		for _, r := range rows {
			if r.Status == "processed" || r.Status == "dead" {
				n++
			}
		}
		if n < want {
			return false
		}
		c, err := b.js.Consumer(context.Background(), stream.Events, handler)
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	}, 60*time.Second, 10*time.Millisecond, "want %d settled events", want)
	return rows
}

func (b *bundle) deadLetters() []*jetstream.RawStreamMsg {
	b.t.Helper()
	s, err := b.js.Stream(b.t.Context(), stream.DeadLetters)
	require.NoError(b.t, err)
	info, err := s.Info(b.t.Context())
	require.NoError(b.t, err)
	var letters []*jetstream.RawStreamMsg
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq && info.State.Msgs > 0; seq++ {
		m, err := s.GetMsg(b.t.Context(), seq)
		require.NoError(b.t, err)
		letters = append(letters, m)
	}
	return letters
}

func TestEveryTypeOfEventIsApplied(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		b := start(t, db, worker.Config{})
		for _, typ := range fixture.Types() {
			body, _ := fixture.Event(typ)
			b.publish("msg_"+typ, body)
		}
		for id, r := range b.settled("mirror", len(fixture.Types())) {
			assert.Equal(t, "processed", r.Status, id)
			assert.Equal(t, 1, r.Attempts, id)
		}
		for _, table := range []string{"users", "sessions", "organizations", "organization_memberships", "subscriptions"} {
			assert.NotZero(t, b.count(table), table)
		}
		assert.Empty(t, b.deadLetters())
	})
}

func TestRepeatedEventIsAppliedOnce(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		counter := counting(t, db, &countingHandler{})
		b := start(t, db, worker.Config{Handlers: []worker.Registration{{Handler: counter}}})
		e, err := event.Decode(user("user_1"))
		require.NoError(t, err)
		e.ID, e.Source, e.ReceivedAt = "msg_1", "clerk", time.Now()
		for n := range 20 { // past the stream's own dedupe, as after its window
			msg := stream.Message(&e)
			msg.Header.Set(stream.HeaderMsgID, fmt.Sprint("publish ", n))
			_, err := b.js.PublishMsg(t.Context(), msg)
			require.NoError(t, err)
		}
		b.settled("counting", 1)
		assert.Equal(t, []string{"msg_1"}, b.counted())
	})
}

func TestReplayOfALetterDoesNotRepeatWhatWasAppliedMeanwhile(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		counter := counting(t, db, &countingHandler{})
		b := start(t, db, worker.Config{Handlers: []worker.Registration{{Handler: counter}}})
		e, err := event.Decode(user("user_1"))
		require.NoError(t, err)
		e.ID, e.Source, e.ReceivedAt = "msg_1", "clerk", time.Now()
		replay := func(id string) {
			msg := stream.Message(&e)
			msg.Subject = stream.ReplaySubject("counting", &e)
			msg.Header.Set(stream.HeaderMsgID, id)
			msg.Header.Set(stream.HeaderReplayID, id)
			_, err := b.js.PublishMsg(t.Context(), msg)
			require.NoError(t, err)
			b.settled("counting", 1)
		}
		b.publish("msg_1", user("user_1"))
		b.settled("counting", 1)
		replay(stream.LetterReplay + "7:x")
		assert.Len(t, b.counted(), 1)
		replay("run:1") // on purpose
		require.Eventually(t, func() bool { return len(b.counted()) == 2 }, 60*time.Second, 10*time.Millisecond)
	})
}

func TestReplayOfALetterThatWasDiscardedMeanwhileIsSettled(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		counter := counting(t, db, &countingHandler{})
		b := start(t, db, worker.Config{Handlers: []worker.Registration{{Handler: counter}}})
		require.NoError(t, db.Exec(`INSERT INTO deliveries (handler, event_id, type, source, origin, status, attempts, received_at, processed_at, stream_seq)
			VALUES ('counting', 'msg_1', 'user.created', 'clerk', 'webhook', 'discarded', 1, ?, ?, 1)`, time.Now().UTC(), time.Now().UTC()).Error)
		e, err := event.Decode(user("user_1"))
		require.NoError(t, err)
		e.ID, e.Source, e.ReceivedAt = "msg_1", "clerk", time.Now()
		msg := stream.Message(&e)
		msg.Subject = stream.ReplaySubject("counting", &e)
		msg.Header.Set(stream.HeaderReplayID, stream.LetterReplay+"7:x")
		_, err = b.js.PublishMsg(t.Context(), msg)
		require.NoError(t, err)
		b.publish("msg_2", user("user_2")) // continues behind it
		rows := b.settled("counting", 1)
		assert.Equal(t, "discarded", rows["msg_1"].Status)
		assert.Equal(t, "processed", rows["msg_2"].Status)
		assert.Len(t, b.counted(), 1)
	})
}

func TestBadEventStandsAloneAndTheOthersCommit(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		const n = 100
		handler := counting(t, db, &countingHandler{bad: map[string]error{"msg_37": worker.Permanent(errors.New("cannot be")), "msg_38": worker.Permanent(errors.New("neither"))}})
		b := start(t, db, worker.Config{Handlers: []worker.Registration{{Handler: handler}}})
		for i := range n {
			b.publish(fmt.Sprintf("msg_%d", i), user(fmt.Sprintf("user_%d", i)))
		}
		rows := b.settled("counting", n)
		for id, r := range rows {
			if id == "msg_37" || id == "msg_38" {
				assert.Equal(t, "dead", r.Status)
				require.NotNil(t, r.Reason)
				assert.Equal(t, "rejected", *r.Reason)
				continue
			}
			assert.Equal(t, "processed", r.Status, id)
		}
		assert.Len(t, rows, n)
		assert.Len(t, b.counted(), n-2)
		letters := b.deadLetters()
		require.Len(t, letters, 2)
		ids := []string{letters[0].Header.Get("Usher-Event-Id"), letters[1].Header.Get("Usher-Event-Id")}
		slices.Sort(ids)
		assert.Equal(t, []string{"msg_37", "msg_38"}, ids)
		assert.Equal(t, "rejected", letters[0].Header.Get("Usher-Reason"))
		assert.Equal(t, "counting", letters[0].Header.Get("Usher-Handler"))
	})
}

func TestFailingEventIsRetriedOnTheScheduleAndThenDeadLettered(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		handler := counting(t, db, &countingHandler{bad: map[string]error{"msg_never": errors.New("never\nworks"), "msg_panic": errBoom}, failures: map[string]int{"msg_twice": 2}})
		b := start(t, db, worker.Config{Handlers: []worker.Registration{{Handler: handler}}, Attempts: 3, RetryInitial: 20 * time.Millisecond, RetryMax: 50 * time.Millisecond})
		for _, id := range []string{"msg_never", "msg_panic", "msg_twice", "msg_fine"} {
			b.publish(id, user("user_"+id))
		}
		rows := b.settled("counting", 4)
		assert.Equal(t, "dead", rows["msg_never"].Status)
		assert.Equal(t, 3, rows["msg_never"].Attempts)
		assert.Equal(t, "never works", *rows["msg_never"].Error)
		assert.Equal(t, "dead", rows["msg_panic"].Status)
		assert.Equal(t, "panic", *rows["msg_panic"].Reason)
		assert.Equal(t, "processed", rows["msg_twice"].Status)
		assert.Equal(t, 3, rows["msg_twice"].Attempts)
		assert.Equal(t, "processed", rows["msg_fine"].Status)
		assert.Len(t, b.deadLetters(), 2)
	})
}

func TestUndecodableAndForeignEventsAreDeadLettered(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		b := start(t, db, worker.Config{Instances: map[string]string{"clerk": "ins_1"}})
		b.publish("msg_empty", nil)
		b.publish("msg_text", []byte("hello"))
		b.publish("msg_array", []byte(`[1]`))
		b.publish("msg_notype", []byte(`{"data":{}}`))
		b.publish("msg_noid", []byte(`{"type":"user.deleted","instance_id":"ins_1","data":{"deleted":true}}`))
		b.publish("msg_foreign", []byte(strings.ReplaceAll(string(user("user_f")), "ins_1", "ins_2")))
		b.publish("msg_fine", user("user_1"))
		rows := b.settled("mirror", 7)
		reasons := map[string]string{}
		for id, r := range rows {
			if r.Reason != nil {
				reasons[id] = *r.Reason
			}
		}
		assert.Equal(t, map[string]string{
			"msg_empty": "undecodable", "msg_text": "undecodable", "msg_array": "undecodable", "msg_notype": "undecodable",
			"msg_noid": "rejected", "msg_foreign": "wrong_instance",
		}, reasons)
		assert.Len(t, b.deadLetters(), 6)
		assert.Equal(t, 1, b.count("users"))
		for _, letter := range b.deadLetters() {
			if letter.Header.Get("Usher-Event-Id") == "msg_text" {
				assert.Equal(t, "hello", string(letter.Data))
			}
		}
	})
}

func TestStopGivesTheRestBackAtOnce(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		entered, release := make(chan struct{}), make(chan struct{})
		blocking := counting(t, db, &countingHandler{before: func() { entered <- struct{}{}; <-release }})
		cfg := worker.Config{Handlers: []worker.Registration{{Handler: blocking}}, BatchSize: 5}
		b := start(t, db, cfg)
		const n = 200
		for i := range n {
			b.publish(fmt.Sprintf("msg_%d", i), user(fmt.Sprintf("user_%d", i)))
		}
		<-entered
		stopped := make(chan struct{})
		go func() { b.stop(); close(stopped) }()
		close(release)
		go func() {
			for range entered { // a batch that was in the loop's hands already
			}
		}()
		<-stopped
		close(entered)

		// Far below AckWait (60 s): what was given back is there at once.
		started := time.Now()
		blocking.before = nil
		b.run(cfg)
		b.settled("counting", n)
		assert.Less(t, time.Since(started), 55*time.Second)
		ids := b.counted()
		assert.Len(t, ids, n, "each exactly once")
	})
}

func TestTwoWorkersShareOneConsumer(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		b := start(t, db, worker.Config{BatchSize: 50, Concurrency: 2})
		const n = 600
		for i := range n {
			b.publish(fmt.Sprintf("msg_%d", i), user(fmt.Sprintf("user_%d", i%10)))
		}
		for id, r := range b.settled("mirror", n) {
			require.Equal(t, "processed", r.Status, id)
		}
		assert.Equal(t, 10, b.count("users"))
	})
}

func TestWorkerWaitsForSetup(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	srv := natstest.New(t)
	_, js := srv.Connect()
	b := &bundle{t: t, db: db, js: js}
	b.run(worker.Config{})
	require.Eventually(t, func() bool {
		return strings.Contains(b.health.Problems()["worker mirror"], "usher setup")
	}, 60*time.Second, 10*time.Millisecond)
	srv.Setup(worker.Specs()...)
	b.publish("msg_1", user("user_1"))
	b.settled("mirror", 1)
	require.Eventually(t, func() bool { return len(b.health.Problems()) == 0 }, 60*time.Second, 10*time.Millisecond)
}

var errBoom = errors.New("boom")

// countingHandler writes what it applies into a table of its own, so that what is rolled back does not count: two lanes may
// work on one event at once, and only one of them commits.
type countingHandler struct {
	bad      map[string]error // fails every time
	before   func()
	mu       sync.Mutex
	failures map[string]int // fails so often
}

// counting readies the table of a handler.
func counting(t *testing.T, db *gorm.DB, h *countingHandler) *countingHandler {
	t.Helper()
	require.NoError(t, db.Exec("CREATE TABLE counted (event_id text NOT NULL)").Error)
	return h
}

func (h *countingHandler) Name() string { return "counting" }

func (h *countingHandler) Handle(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
	if h.before != nil {
		h.before()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range batch {
		if err := h.bad[e.ID]; errors.Is(err, errBoom) {
			panic("boom")
		} else if err != nil {
			return err
		}
		if h.failures[e.ID] > 0 {
			if len(batch) == 1 {
				h.failures[e.ID]--
			}
			return errors.New("not yet")
		}
	}
	for _, e := range batch {
		if err := tx.WithContext(ctx).Exec("INSERT INTO counted (event_id) VALUES (?)", e.ID).Error; err != nil {
			return err
		}
	}
	return nil
}

// counted are the events whose effect was committed, once for each time.
func (b *bundle) counted() []string {
	b.t.Helper()
	var ids []string
	require.NoError(b.t, b.db.Table("counted").Order("event_id").Pluck("event_id", &ids).Error)
	return ids
}
