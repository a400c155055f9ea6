package worker_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/faults"
)

func (r *rig) streamState() jetstream.StreamState {
	r.t.Helper()
	s, err := r.js.Stream(r.t.Context(), stream.Events)
	require.NoError(r.t, err)
	return s.CachedInfo().State
}

func TestPurgeRemovesOnlyWhatIsOldAndSettled(t *testing.T) {
	t.Parallel()
	cfg := worker.Config{Retention: time.Second, PurgeInterval: 100 * time.Millisecond}
	var hold chan struct{}
	r := newRig(t, dbtest.SQLite(t), cfg, func(h worker.Handler) worker.Handler {
		hold = make(chan struct{})
		return faults.Fail(h, faults.Always, func(e *event.Event) bool {
			if e.ID != "stuck" {
				return false
			}
			select {
			case <-hold:
				return false
			default:
				return true
			}
		}, worker.RetryAfter(faults.ErrFault, 200*time.Millisecond))
	})
	r.cfg.Attempts = 1000
	// A developer's consumer sleeps at the first event and holds nothing up.
	_, err := r.js.CreateConsumer(t.Context(), stream.Events, jetstream.ConsumerConfig{Durable: "listen-ada", AckPolicy: jetstream.AckExplicitPolicy})
	require.NoError(t, err)
	r.work()
	sent := time.Now()
	r.send(ids("old", 300)...)
	r.send("stuck")
	r.send(ids("behind", 300)...)
	require.Eventually(t, func() bool { return r.streamState().FirstSeq == 301 }, 60*time.Second, 10*time.Millisecond, "everything before the event that is not settled goes")
	assert.Greater(t, time.Since(sent), 900*time.Millisecond, "nothing goes before its time")
	r.send(ids("young", 100)...)
	require.Never(t, func() bool { return r.streamState().FirstSeq != 301 }, 500*time.Millisecond, 50*time.Millisecond, "what is not settled stays, however old, and what came after it")
	close(hold)
	require.Eventually(t, func() bool { return r.streamState().Msgs == 0 }, 60*time.Second, 10*time.Millisecond)
	r.ledger(20 * time.Second)
	assert.NotZero(t, r.logs.FilterMessage("stream purged").Len())
}

// TestPurgeLeavesWhatAConsumerOfSomebodyElseNeeds: whoever runs Usher may read the stream with consumers of their own.
func TestPurgeLeavesWhatAConsumerOfSomebodyElseNeeds(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{Retention: time.Millisecond, PurgeInterval: 50 * time.Millisecond}, nil)
	const unsettled = "stream keeps events past their retention for a consumer that has not settled them: let it go on, or delete it"
	for name, change := range map[string]func(*jetstream.ConsumerConfig){
		"listen-bob": func(*jetstream.ConsumerConfig) {},
		"watcher":    func(c *jetstream.ConsumerConfig) { c.AckPolicy = jetstream.AckNonePolicy },
		"passing":    func(c *jetstream.ConsumerConfig) { c.Durable, c.InactiveThreshold = "", time.Hour },
		"billing":    func(c *jetstream.ConsumerConfig) { c.FilterSubject = "clerk.evt.*.user.>" },
	} {
		cfg := jetstream.ConsumerConfig{Name: name, Durable: name, AckPolicy: jetstream.AckExplicitPolicy}
		change(&cfg)
		_, err := r.js.CreateConsumer(t.Context(), stream.Events, cfg)
		require.NoError(t, err)
	}
	r.work()
	r.send(ids("event", 10)...)
	r.ledger(20 * time.Second)
	told := func() int {
		return r.logs.FilterMessage(unsettled).FilterField(zap.String("consumer", "billing")).Len()
	}
	require.Eventually(t, func() bool { return told() == 1 }, 60*time.Second, 10*time.Millisecond)
	assert.Equal(t, uint64(10), r.streamState().Msgs)

	billing, err := r.js.Consumer(t.Context(), stream.Events, "billing")
	require.NoError(t, err)
	for range 4 {
		msg, err := billing.Next()
		require.NoError(t, err)
		require.NoError(t, msg.DoubleAck(t.Context()))
	}
	require.Eventually(t, func() bool { return r.streamState().FirstSeq == 5 }, 60*time.Second, 10*time.Millisecond, "what it has settled goes")
	require.Never(t, func() bool { return r.streamState().FirstSeq != 5 || told() != 1 }, 500*time.Millisecond, 50*time.Millisecond, "what it has not stays, and that is told once")

	events, err := r.js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	tight := events.CachedInfo().Config
	tight.MaxBytes = int64(r.streamState().Bytes) * 11 / 10
	_, err = r.js.UpdateStream(t.Context(), tight)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return told() == 2 }, 60*time.Second, 10*time.Millisecond, "once more while there is still some room")

	require.NoError(t, r.js.DeleteConsumer(t.Context(), stream.Events, "billing"))
	require.Eventually(t, func() bool { return r.streamState().Msgs == 0 }, 60*time.Second, 10*time.Millisecond)
	assert.Equal(t, 2, r.logs.FilterMessage(unsettled).Len(), "of nobody else")
}

// TestPurgeCountsEveryHandler: the slowest handler decides, and the ack floor of one whose events are rare does not.
func TestPurgeCountsEveryHandler(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	srv := natstest.New(t)
	all, rare := faults.NewEffects(t, db, "all"), faults.NewEffects(t, db, "rare")
	specs := []stream.HandlerSpec{{Name: "all"}, {Name: "rare", Filters: []string{"session.>"}}, {Name: "asleep"}}
	_, js := srv.Setup(specs...)
	r := &rig{bundle: &bundle{t: t, db: db, js: js}, nats: srv, broker: faults.NewBroker(js), cfg: worker.Config{
		Handlers: []worker.Registration{{Handler: all}, {Handler: rare, Filters: specs[1].Filters}}, Retention: time.Millisecond, PurgeInterval: 50 * time.Millisecond,
	}}
	asleep := faults.NewEffects(t, db, "asleep")
	r.cfg.Handlers = append(r.cfg.Handlers, worker.Registration{Handler: asleep})
	require.NoError(t, js.DeleteConsumer(t.Context(), stream.Events, "asleep")) // not set up: nobody knows how far it is
	for i := range 100 {
		r.publish(fmt.Sprintf("msg_%d", i), user("user_1"))
	}
	r.work()
	require.Never(t, func() bool { return r.streamState().Msgs != 100 }, time.Second, 50*time.Millisecond)
	_, err := js.CreateConsumer(t.Context(), stream.Events, (stream.Topology{}).Consumer(specs[2]))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return r.streamState().Msgs == 0 }, 60*time.Second, 20*time.Millisecond)
	assert.Len(t, asleep.Count(t), 100)
	assert.Empty(t, rare.Count(t))
}

func TestFullStreamDrainsByItself(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{Retention: 500 * time.Millisecond, PurgeInterval: 100 * time.Millisecond}, nil)
	s, err := r.js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	tiny := s.CachedInfo().Config
	tiny.MaxBytes = 256 << 10
	_, err = r.js.UpdateStream(t.Context(), tiny)
	require.NoError(t, err)
	p := stream.NewPublisher(r.js, 1)
	t.Cleanup(p.Close)
	publish := func(id string) error {
		_, err := p.Publish(t.Context(), userEvent(id))
		return err
	}
	n := 0
	for ; err == nil; n++ {
		err = publish(fmt.Sprintf("fill_%d", n))
		if err == nil {
			r.accepted = append(r.accepted, fmt.Sprintf("fill_%d", n))
		}
	}
	require.ErrorIs(t, err, stream.ErrFull, "which ingest answers with 503 stream_full")
	r.work()
	require.Eventually(t, func() bool { return publish("after") == nil }, 60*time.Second, 20*time.Millisecond)
	r.accepted = append(r.accepted, "after")
	r.ledger(20 * time.Second)
}

func TestFullDeadLetterStreamKeepsTheEventAndStopsNobody(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{RetryMax: 300 * time.Millisecond, RetryInitial: time.Millisecond}, func(h worker.Handler) worker.Handler {
		return faults.Fail(h, faults.Always, func(e *event.Event) bool { return strings.HasPrefix(e.ID, "bad") }, worker.Permanent(faults.ErrFault))
	})
	s, err := r.js.Stream(t.Context(), stream.DeadLetters)
	require.NoError(t, err)
	cfg := s.CachedInfo().Config
	was := cfg.MaxBytes
	cfg.MaxBytes = 1
	_, err = r.js.UpdateStream(t.Context(), cfg)
	require.NoError(t, err)
	r.work()
	r.send(ids("bad", 20)...)
	r.send(ids("fine", 20)...)
	require.Eventually(t, func() bool {
		return len(r.effects.Count(t)) == 20 && strings.Contains(r.health.Problems()["dead letters"], "replay or discard dead letters") &&
			r.logs.FilterMessageSnippet("dead letter not stored").Len() > 0
	}, 60*time.Second, 10*time.Millisecond)
	assert.Empty(t, r.health.Problems()["worker effects"], "the handler still works")
	cfg.MaxBytes = was
	_, err = r.js.UpdateStream(t.Context(), cfg)
	require.NoError(t, err)
	_, dead := r.ledger(30 * time.Second)
	assert.Len(t, dead, 20)
}

func TestDeliveriesAreForgottenInSmallStepsAndNotTooSoon(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{Retention: time.Hour, PurgeInterval: 50 * time.Millisecond}, nil)
		day := 24 * time.Hour
		insert := func(id, status string, age time.Duration) {
			at := time.Now().Add(-age).UTC()
			require.NoError(t, db.Exec("INSERT INTO deliveries (handler, event_id, type, source, origin, status, received_at, processed_at) VALUES ('effects', ?, 't', 's', 'webhook', ?, ?, ?)", id, status, at, at).Error)
		}
		for i := range 2500 {
			insert(fmt.Sprintf("gone_%d", i), "processed", 91*day)
		}
		insert("gone_discarded", "discarded", 91*day)
		insert("gone_dead", "dead", 181*day)
		insert("stays_processed", "processed", 89*day)
		insert("stays_discarded", "discarded", 89*day)
		insert("stays_dead", "dead", 179*day)
		insert("stays_retrying", "retrying", 400*day)
		r.send("stays_new")
		r.work()
		require.Eventually(t, func() bool {
			var n int64
			return db.Table("deliveries").Where("event_id LIKE 'gone%'").Count(&n).Error == nil && n == 0
		}, 60*time.Second, 20*time.Millisecond)
		var left int64
		require.NoError(t, db.Table("deliveries").Where("event_id LIKE 'stays%'").Count(&left).Error)
		assert.EqualValues(t, 5, left)
	})
}

// TestDiskFullFreezesTheStreamUntilARestart holds what the operator's page says of a full disk to the broker's behaviour.
func TestDiskFullFreezesTheStreamUntilARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Skipf("skipped: cannot mount a small file system: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	srv := natstest.New(t, natstest.WithSync, func(o *server.Options) { o.StoreDir = filepath.Join(dir, "nats") })
	_, js := srv.Connect()
	_, err := (stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{{Name: "effects"}}}).Ensure(t.Context(), js)
	require.NoError(t, err)
	p := stream.NewPublisher(js, 1)
	t.Cleanup(p.Close)
	body := []byte(fmt.Sprintf(`{"type":"user.created","data":{"id":"user_1","pad":%q}}`, strings.Repeat("x", 200<<10)))
	var accepted []string
	publish := func(id string) error {
		e, err := event.Decode(body)
		require.NoError(t, err)
		e.ID, e.Source, e.ReceivedAt = id, "clerk", time.Now()
		if _, err = p.Publish(t.Context(), &e); err == nil {
			accepted = append(accepted, id)
		}
		return err
	}
	for i := 0; err == nil && i < 500; i++ {
		err = publish(fmt.Sprintf("fill_%d", i))
	}
	require.ErrorIs(t, err, stream.ErrUnavailable, "no ack, no 2xx")
	assert.NotEqual(t, "ok", srv.Server().Healthz(nil).Status, "the broker knows")

	// Room alone does not help; a restart does.
	require.NoError(t, syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=128m"))
	require.ErrorIs(t, publish("frozen"), stream.ErrUnavailable)
	srv.Stop()
	srv.Start()
	require.Eventually(t, js.Conn().IsConnected, 60*time.Second, 10*time.Millisecond)
	require.Eventually(t, func() bool { return publish("again") == nil }, 60*time.Second, 50*time.Millisecond)
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	state := s.CachedInfo().State
	assert.GreaterOrEqual(t, state.Msgs, uint64(len(accepted)))
	for seq := state.FirstSeq; seq <= state.LastSeq; seq++ {
		if _, err := s.GetMsg(t.Context(), seq); !errors.Is(err, jetstream.ErrMsgNotFound) {
			require.NoError(t, err)
		}
	}
}

// TestAStreamFullOfSettledEventsMakesRoom: whatever their age, and no more than is needed.
func TestAStreamFullOfSettledEventsMakesRoom(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{}, nil)
	s, err := r.js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	tiny := s.CachedInfo().Config
	tiny.MaxBytes = 256 << 10
	_, err = r.js.UpdateStream(t.Context(), tiny)
	require.NoError(t, err)
	var full error
	for i := 0; full == nil; i++ {
		id := fmt.Sprintf("fill_%d", i)
		if _, full = r.js.PublishMsg(t.Context(), stream.Message(userEvent(id))); full == nil {
			r.accepted = append(r.accepted, id)
		}
	}
	r.work()
	// To 70% where that much is settled at the time; a first look in the midst of the work may find less, and below 80% nothing more goes.
	require.Eventually(t, func() bool {
		return r.streamState().Bytes <= 8*uint64(tiny.MaxBytes)/10 && r.logs.FilterMessageSnippet("removed before their retention").Len() > 0
	}, 60*time.Second, 10*time.Millisecond)
	assert.Greater(t, r.streamState().Bytes, uint64(tiny.MaxBytes)/2, "what there is room for stays")
	r.send(ids("after", 10)...)
	r.ledger(time.Minute)
	assert.Empty(t, r.health.Details())
	r.looksWell()

	// What a consumer has not settled is never removed: then its name is logged.
	_, err = r.js.CreateConsumer(t.Context(), stream.Events, jetstream.ConsumerConfig{Durable: "billing", AckPolicy: jetstream.AckExplicitPolicy})
	require.NoError(t, err)
	first := r.streamState().FirstSeq
	for i := 0; float64(r.streamState().Bytes) < 0.85*float64(tiny.MaxBytes); i++ {
		r.send(fmt.Sprintf("more_%d", i))
	}
	require.Eventually(t, func() bool { return strings.Contains(r.health.Details()["stream"], "consumer billing has not settled") }, 60*time.Second, 10*time.Millisecond)
	assert.Empty(t, r.health.Problems(), "it still works")
	assert.Equal(t, first, r.streamState().FirstSeq)
	require.NoError(t, r.js.DeleteConsumer(t.Context(), stream.Events, "billing"))
	require.Eventually(t, func() bool { return r.health.Details()["stream"] == "" && r.streamState().FirstSeq > first }, 60*time.Second, 10*time.Millisecond)
	r.ledger(time.Minute)
}

func TestALargeWriteAheadLogIsToldOf(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{}, nil)
	r.send("event")
	r.work()
	r.ledger(time.Minute)
	var path string
	require.NoError(t, r.db.Raw("SELECT file FROM pragma_database_list WHERE name = 'main'").Scan(&path).Error)
	require.NoError(t, os.Truncate(path+"-wal", database.LargeWAL+1)) // as if a reader had held it
	told := func() int { return r.logs.FilterMessageSnippet("write-ahead log is above 256 MiB").Len() }
	require.Eventually(t, func() bool { return told() == 1 }, 60*time.Second, 10*time.Millisecond)
	assert.InDelta(t, database.LargeWAL+1, r.gauge("usher_sqlite_wal_bytes"), 0)
}
