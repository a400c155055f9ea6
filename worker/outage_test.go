package worker_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/faults"
)

// rig is a worker whose handler counts its effects, with a broker and a database that can be made to fail.
type rig struct {
	*bundle
	nats     *natstest.Server
	broker   *faults.Broker
	effects  *faults.Effects
	registry *prometheus.Registry
	logs     *observer.ObservedLogs
	cfg      worker.Config

	accepted []string
}

// newRig starts a broker. wrap makes the worker's handler out of one that counts; nil: that one.
func newRig(t *testing.T, db *gorm.DB, cfg worker.Config, wrap func(worker.Handler) worker.Handler) *rig {
	t.Helper()
	r := &rig{nats: natstest.New(t), effects: faults.NewEffects(t, db, "effects"), cfg: cfg}
	var handler worker.Handler = r.effects
	if wrap != nil {
		handler = wrap(handler)
	}
	r.cfg.Handlers = []worker.Registration{{Handler: handler}}
	_, js := r.nats.Setup(stream.HandlerSpec{Name: "effects"})
	r.broker = faults.NewBroker(js)
	r.bundle = &bundle{t: t, db: db, js: r.broker}
	return r
}

// ackWait shortens how long the broker waits for an ack.
func (r *rig) ackWait(d time.Duration) {
	r.t.Helper()
	c := (stream.Topology{}).Consumer(stream.HandlerSpec{Name: "effects"})
	c.AckWait = d
	_, err := r.js.UpdateConsumer(r.t.Context(), stream.Events, c)
	require.NoError(r.t, err)
}

// work starts a worker on the rig. It may be called again once that was stopped.
func (r *rig) work() {
	r.t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	r.logs, r.health, r.registry = logs, &observe.Health{}, prometheus.NewRegistry()
	w, err := worker.New(r.cfg, worker.Deps{JetStream: r.broker, DB: r.db, Log: zap.New(core), Registerer: r.registry, Health: r.health})
	require.NoError(r.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		assert.NoError(r.t, <-done)
	})
	r.t.Cleanup(r.stop)
	r.t.Cleanup(r.report)
}

// send publishes events of users of their own; an event counts as accepted once the broker has it.
func (r *rig) send(ids ...string) {
	r.t.Helper()
	for chunk := range slices.Chunk(ids, 1000) {
		futures := make([]jetstream.PubAckFuture, len(chunk))
		for i, id := range chunk {
			futures[i], _ = r.js.PublishMsgAsync(stream.Message(userEvent(id)))
		}
		for i, f := range futures {
			if f != nil {
				select {
				case <-f.Ok():
					continue
				case <-f.Err():
				}
			}
			require.Eventually(r.t, func() bool { // as its sender would
				_, err := r.js.PublishMsg(context.Background(), stream.Message(userEvent(chunk[i])))
				return err == nil
			}, 60*time.Second, 20*time.Millisecond)
		}
	}
	r.accepted = append(r.accepted, ids...)
}

func userEvent(id string) *event.Event {
	e, _ := event.Decode(user("user_" + id))
	e.ID, e.Source, e.Origin, e.ReceivedAt = id, "clerk", event.OriginWebhook, time.Now()
	return &e
}

func ids(prefix string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("%s_%d", prefix, i)
	}
	return all
}

// ledger waits for the end and holds it to the promise: accepted = applied + dead-lettered, no effect twice, and each dead letter
// once. It returns the rows and the ids that were dead-lettered.
func (r *rig) ledger(within time.Duration) (rows map[string]row, dead map[string]bool) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		var list []row // an error is of a connection that a fault has cut: the next look gets another
		if r.db.Table("deliveries").Where("handler = 'effects'").Find(&list).Error != nil {
			return false
		}
		rows = map[string]row{}
		for _, row := range list {
			rows[row.EventID] = row
		}
		for _, id := range r.accepted {
			if s := rows[id].Status; s != "processed" && s != "dead" {
				return false
			}
		}
		c, err := r.js.Consumer(context.Background(), stream.Events, "effects")
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	}, within, 20*time.Millisecond, "the backlog must go")
	letters := map[string]int{}
	for _, l := range r.deadLetters() {
		letters[l.Header.Get("Usher-Event-Id")]++
	}
	counted := r.effects.Count(r.t)
	dead = map[string]bool{}
	for _, id := range r.accepted {
		switch rows[id].Status {
		case "processed":
			assert.Equal(r.t, 1, counted[id], "effects of %s", id)
			assert.Zero(r.t, letters[id], "letters of %s", id)
		case "dead":
			dead[id] = true
			assert.Zero(r.t, counted[id], "effects of %s", id)
			assert.Equal(r.t, 1, letters[id], "letters of %s", id)
		}
	}
	assert.Len(r.t, rows, len(r.accepted))
	return rows, dead
}

// report says what a failed test left behind.
func (r *rig) report() {
	if !r.t.Failed() {
		return
	}
	var counts []struct {
		Status string
		N      int
	}
	r.db.Raw("SELECT status, count(*) AS n FROM deliveries GROUP BY status").Scan(&counts)
	r.t.Logf("accepted %d, deliveries %v", len(r.accepted), counts)
	if c, err := r.js.Consumer(context.Background(), stream.Events, "effects"); err == nil {
		i := c.CachedInfo()
		r.t.Logf("pending %d, ack pending %d, redelivered %d, ack floor %d", i.NumPending, i.NumAckPending, i.NumRedelivered, i.AckFloor.Stream)
	}
	for i, e := range r.logs.All() {
		if i > 30 {
			break
		}
		r.t.Log(e.Time.Format("15:04:05.000"), e.Level, e.Message, e.ContextMap())
	}
}

// untouched is the ledger after an outage: everything applied at its first counted attempt.
func (r *rig) untouched(within time.Duration) {
	r.t.Helper()
	rows, dead := r.ledger(within)
	assert.Empty(r.t, dead)
	for id, row := range rows {
		if !assert.Equal(r.t, 1, row.Attempts, "attempts of %s: %v", id, row.Error) {
			break
		}
	}
	require.Eventually(r.t, func() bool { return len(r.health.Problems()) == 0 }, 60*time.Second, 10*time.Millisecond)
	assert.Zero(r.t, r.paused())
}

// paused is the metric.
func (r *rig) paused() float64 { return r.gauge("usher_worker_paused") }

// notReady waits until readiness says something of an outage.
func (r *rig) notReady(want string) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		return strings.Contains(r.health.Problems()["worker effects"], want)
	}, 60*time.Second, 5*time.Millisecond, "readiness must say %q, says %v", want, r.health.Problems())
	assert.InDelta(r.t, 1, r.paused(), 0)
}

func TestEveryFaultOfAHandlerIsItsEventsOwn(t *testing.T) {
	t.Parallel()
	outside, cancel := context.WithTimeout(context.Background(), 0)
	cancel()
	foreign := &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		cfg := worker.Config{Attempts: 3, RetryInitial: 20 * time.Millisecond, RetryMax: 50 * time.Millisecond}
		r := newRig(t, db, cfg, func(h worker.Handler) worker.Handler {
			h = faults.Fail(h, 1, faults.IDs("fail_once"), faults.ErrFault)
			h = faults.Fail(h, 2, faults.IDs("fail_twice"), faults.ErrFault)
			h = faults.Fail(h, faults.Always, faults.IDs("fail_always"), faults.ErrFault)
			h = faults.Fail(h, faults.Always, faults.IDs("permanent"), worker.Permanent(faults.ErrFault))
			h = faults.Fail(h, 1, faults.IDs("later"), worker.RetryAfter(faults.ErrFault, 500*time.Millisecond))
			h = faults.Fail(h, faults.Always, faults.IDs("outside_timeout"), fmt.Errorf("ask somebody: %w", outside.Err()))
			h = faults.Fail(h, faults.Always, faults.IDs("outside_away"), fmt.Errorf("ask somebody: %w", foreign))
			h = faults.Panic(h, 1, faults.IDs("panic_once"))
			h = faults.Panic(h, faults.Always, faults.IDs("panic_always"))
			h = faults.Forget(h, 2, faults.IDs("forget"))
			h = faults.Hang(h, 1, faults.IDs("hang_once"))
			h = faults.Hang(h, faults.Always, faults.IDs("hang_always"))
			inner := h
			return faults.New("effects", func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
				for _, e := range batch {
					if e.ID == "constraint" {
						return tx.Exec("INSERT INTO effects (handler, event_id) VALUES (NULL, NULL)").Error
					}
				}
				return inner.Handle(ctx, tx, batch)
			})
		})
		r.send(ids("fine", 40)...)
		r.send("fail_once", "fail_twice", "fail_always", "permanent", "later", "outside_away", "panic_once", "panic_always", "forget", "constraint")
		r.send(ids("well", 40)...)
		r.work()
		r.ledger(30 * time.Second)
		assert.Zero(t, r.logs.FilterMessage("outage, handler pauses").Len(), "an event's own error pauses nobody")
		first := r.logs
		r.stop()
		r.cfg.HandleTimeout = time.Second
		r.work()
		r.send("hang_once", "hang_always", "outside_timeout") // by themselves, since what stands in a batch with them is tried again
		rows, dead := r.ledger(60 * time.Second)
		assert.Equal(t, map[string]bool{"fail_always": true, "permanent": true, "outside_timeout": true, "outside_away": true, "panic_always": true, "hang_always": true, "constraint": true}, dead)
		for id, want := range map[string]struct {
			attempts int
			reason   string
		}{
			"fine_0": {1, ""}, "well_39": {1, ""}, "fail_once": {2, ""}, "fail_twice": {3, ""}, "later": {2, ""}, "panic_once": {2, ""}, "forget": {3, ""}, "hang_once": {2, ""},
			"fail_always": {3, "handler_error"}, "permanent": {1, "rejected"}, "outside_timeout": {3, "timeout"}, "outside_away": {3, "handler_error"},
			"panic_always": {3, "panic"}, "hang_always": {3, "timeout"}, "constraint": {3, "constraint"},
		} {
			assert.Equal(t, want.attempts, rows[id].Attempts, "attempts of %s", id)
			if want.reason != "" && assert.NotNil(t, rows[id].Reason, id) {
				assert.Equal(t, want.reason, *rows[id].Reason, id)
			}
		}
		assert.NotEmpty(t, first.FilterMessage("handler panicked").All()[0].ContextMap()["stack"])
		if database.IsPostgres(db) { // who hangs on SQLite holds its only writer
			assert.Zero(t, r.logs.FilterMessage("outage, handler pauses").Len(), "an event's own error pauses nobody")
		}
		for _, e := range first.FilterMessage("event failed, will retry").All() {
			if e.ContextMap()["event_id"] == "later" {
				assert.Equal(t, 500*time.Millisecond, e.ContextMap()["delay"])
			}
		}
	})
}

func TestEventThatTheLogCannotHoldIsSettledAllTheSame(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{Attempts: 2, RetryInitial: time.Millisecond, RetryMax: time.Millisecond}, func(h worker.Handler) worker.Handler {
			return faults.Fail(h, faults.Always, faults.IDs("nul_fails"), errors.New("a \x00 and \xff"))
		})
		for _, id := range []string{"nul_fine", "nul_fails"} {
			body := []byte(`{"type":"user.\u0000created","object":"event","data":{"id":"user_\u0000","object":"user"}}`)
			r.publish(id, body)
			r.accepted = append(r.accepted, id)
		}
		r.send("fine")
		r.work()
		_, dead := r.ledger(30 * time.Second)
		assert.Equal(t, map[string]bool{"nul_fails": true}, dead)
	})
}

func TestStallPastAckWaitAndLostAcksHappenOnce(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{Concurrency: 2, BatchSize: 10, Attempts: 2, RetryInitial: time.Millisecond, RetryMax: time.Millisecond}, func(h worker.Handler) worker.Handler {
			h = faults.Stall(h, 1, faults.IDs("slow_0"), 1500*time.Millisecond)
			return faults.Fail(h, faults.Always, faults.IDs("bad_0", "bad_1", "bad_2"), faults.ErrFault)
		})
		r.ackWait(400 * time.Millisecond)
		r.broker.LoseAcks.Store(50)
		r.broker.LoseTerms.Store(2)
		r.send("slow_0")
		r.send(ids("fine", 200)...)
		r.send("bad_0", "bad_1", "bad_2")
		r.work()
		rows, dead := r.ledger(60 * time.Second)
		assert.Len(t, dead, 3)
		for id := range dead {
			assert.Equal(t, 2, rows[id].Attempts, id)
		}
	})
}

func TestCrashBetweenLetterAndRowEndsInOneLetter(t *testing.T) {
	t.Parallel()
	base := dbtest.PostgresURL(t)
	proxy, address := through(t, base)
	r := newRig(t, dbtest.Open(t, address), worker.Config{Attempts: 1}, func(h worker.Handler) worker.Handler {
		return faults.Fail(h, faults.Always, faults.IDs("bad_0", "bad_1", "bad_2"), faults.ErrFault)
	})
	r.broker.AfterLetter = sync.OnceFunc(func() { proxy.Refuse(true) })
	r.send("fine_0", "bad_0", "bad_1", "bad_2")
	r.work()
	r.notReady("paused")
	r.stop() // it dies with the letters written and nothing else
	proxy.Refuse(false)
	r.work()
	_, dead := r.ledger(90 * time.Second)
	assert.Len(t, dead, 3)
}

// through puts a proxy before a PostgreSQL.
func through(t *testing.T, address string) (*faults.Proxy, string) {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	proxy := faults.NewProxy(t, u.Host)
	u.Host = proxy.Addr()
	return proxy, u.String()
}

// TestOutageOfTheDatabaseCostsNoAttempt makes one fault of PostgreSQL after the other, each in the middle of work.
func TestOutageOfTheDatabaseCostsNoAttempt(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	address := server.Create(t, "usher")
	direct := dbtest.Open(t, address)
	_, err := database.Migrate(t.Context(), direct)
	require.NoError(t, err)
	proxy, address := through(t, address)

	var inTx atomic.Pointer[func()] // called once, in the middle of a transaction
	r := newRig(t, dbtest.Open(t, address), worker.Config{HandleTimeout: 1500 * time.Millisecond, BatchSize: 20}, func(h worker.Handler) worker.Handler {
		return faults.New("effects", func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
			if err := h.Handle(ctx, tx, batch); err != nil {
				return err
			}
			if do := inTx.Swap(nil); do != nil {
				(*do)()
			}
			return nil
		})
	})
	r.work()
	exec := func(sql string) { // on connections that the faults have cut, too
		err := direct.Exec(sql).Error
		for range 10 {
			if err != nil {
				err = direct.Exec(sql).Error
			}
		}
		assert.NoError(t, err)
	}
	terminate := "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
	for _, fault := range []struct {
		name       string
		begin, end func()
		says       string // readiness; empty: over before anybody could look
	}{
		{"stopped", server.Stop, func() { server.Start(t) }, "paused"},
		{"killed", server.Kill, func() { server.Start(t) }, "paused"},
		{"connections terminated", func() { exec(terminate) }, func() {}, ""},
		{"connections cut", proxy.Cut, func() {}, ""},
		{"network refuses", func() { proxy.Refuse(true) }, func() { proxy.Refuse(false) }, "paused"},
		{"network silent", func() { proxy.Silence(true) }, func() { proxy.Silence(false) }, "paused"},
		{"read-only", func() {
			exec("ALTER DATABASE usher SET default_transaction_read_only = on")
			exec(terminate)
		}, func() {
			exec("BEGIN READ WRITE; ALTER DATABASE usher RESET default_transaction_read_only; COMMIT")
			exec(terminate)
		}, "read-only"},
		{"table away", func() { exec("ALTER TABLE usher.effects RENAME TO gone") }, func() { exec("ALTER TABLE usher.gone RENAME TO effects") }, "effects"},
		{"table locked", nil, nil, "paused"},
	} {
		t.Run(fault.name, func(t *testing.T) {
			prefix := strings.ReplaceAll(fault.name, " ", "")
			if fault.begin == nil {
				locker := direct.Begin()
				fault.begin = func() { require.NoError(t, locker.Exec("LOCK TABLE usher.deliveries IN ACCESS EXCLUSIVE MODE").Error) }
				fault.end = func() { require.NoError(t, locker.Rollback().Error) }
			}
			began := make(chan struct{})
			// A lock and a renaming must come between transactions: they would wait for this one.
			if fault.name == "table locked" || fault.name == "table away" {
				r.ledger(30 * time.Second)
				fault.begin()
				close(began)
			} else {
				do := func() { fault.begin(); close(began) }
				inTx.Store(&do)
			}
			r.send(ids(prefix, 100)...)
			<-began
			if fault.says != "" {
				r.notReady(fault.says)
			}
			r.send(ids(prefix+"_meanwhile", 100)...)
			fault.end()
			r.untouched(60 * time.Second)
		})
	}
	assert.Less(t, r.logs.FilterMessage("outage, handler pauses").Len(), 60, "an outage is told of once, not at every try")
}

func TestOutageIsSeenWhileNothingHappens(t *testing.T) {
	t.Parallel()
	proxy, address := through(t, dbtest.PostgresURL(t))
	r := newRig(t, dbtest.Open(t, address), worker.Config{}, nil)
	r.work()
	r.send("first")
	r.ledger(30 * time.Second)
	proxy.Refuse(true)
	r.notReady("no PostgreSQL answers at")
	proxy.Refuse(false)
	r.untouched(30 * time.Second)
}

// TestOutageOfSQLiteCostsNoAttempt: another process holds the file's only writer.
func TestOutageOfSQLiteCostsNoAttempt(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{HandleTimeout: 500 * time.Millisecond}, nil)
	r.work()
	holder := r.db.Begin()
	require.NoError(t, holder.Error)
	r.send(ids("held", 100)...)
	r.notReady("paused")
	require.NoError(t, holder.Rollback().Error)
	r.untouched(60 * time.Second)
}

// TestMissingTableOfSQLiteCostsNoAttempt: the handler's table is away, then the delivery log, as while a file is restored.
func TestMissingTableOfSQLiteCostsNoAttempt(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{Attempts: 2, RetryInitial: 10 * time.Millisecond, RetryMax: 20 * time.Millisecond, BatchSize: 20}, nil)
	r.work()
	for _, table := range []string{"effects", "deliveries"} {
		r.send(ids("before_"+table, 100)...)
		gone := table + "_gone" // another name each time: a connection may not know yet that the last one is free again
		require.NoError(t, r.db.Exec("ALTER TABLE "+table+" RENAME TO "+gone).Error)
		r.send(ids("meanwhile_"+table, 100)...)
		r.notReady("no such table: " + table)
		require.NoError(t, r.db.Exec("ALTER TABLE "+gone+" RENAME TO "+table).Error)
		r.untouched(60 * time.Second)
	}
}

func TestOutageOfTheBrokerCostsNoAttempt(t *testing.T) {
	t.Parallel()
	t.Run("up to three seconds", func(t *testing.T) {
		t.Parallel()
		dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
			r := newRig(t, db, worker.Config{BatchSize: 20}, nil)
			r.ackWait(3 * time.Second) // what the broker had handed out when it went comes again after this time
			r.work()
			for round, away := range []time.Duration{0, time.Second, 3 * time.Second} {
				r.brokerAway(fmt.Sprint(round), away)
			}
		})
	})
	// Ten minutes are ten seconds here, and the times that such an outage passes through are a sixtieth, too: how long the broker waits
	// for an ack (60 s) and knows an event id (72 h), the client's pings (5 s) and its pause before it dials again (250 ms and up to
	// 500 ms), and how often the stream is cleaned (5 min). A pull (30 s) and its heartbeat (5 s) are as short as the client library
	// takes them: 1 s and 0.5 s. Not shortened is what bounds a single piece of work (a dial, a publish, a transaction), which takes
	// what it takes, and the pauses between probes (100 ms to 5 s), which nobody can set.
	t.Run("ten minutes, shortened", func(t *testing.T) {
		t.Parallel()
		const short = 60
		dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
			r := newRig(t, db, worker.Config{BatchSize: 20, PurgeInterval: 5 * time.Minute / short}, nil)
			s, err := r.js.Stream(t.Context(), stream.Events)
			require.NoError(t, err)
			events := s.CachedInfo().Config
			events.Duplicates = stream.DedupeWindow / short
			_, err = r.js.UpdateStream(t.Context(), events)
			require.NoError(t, err)
			r.ackWait(stream.AckWait / short)
			_, js := r.nats.Connect(nats.PingInterval(5*time.Second/short), nats.ReconnectWait(250*time.Millisecond/short),
				nats.ReconnectJitter(100*time.Millisecond/short, 500*time.Millisecond/short))
			r.broker = faults.NewBroker(js)
			r.broker.Pull = []jetstream.PullMessagesOpt{jetstream.PullExpiry(time.Second), jetstream.PullHeartbeat(500 * time.Millisecond)}
			r.js = r.broker
			r.work()
			r.brokerAway("long", 10*time.Minute/short)
		})
	})
}

// brokerAway stops the broker in the middle of work for so long, and holds the ledger to it.
func (r *rig) brokerAway(name string, away time.Duration) {
	r.t.Helper()
	r.send(ids("before_"+name, 200)...)
	r.nats.Stop()
	if away > 0 {
		r.notReady("broker")
		over := time.After(away) // the outage itself
		for waiting := true; waiting; {
			select {
			case <-over:
				waiting = false
			case <-time.After(50 * time.Millisecond):
				problems := fmt.Sprint(r.health.Problems())
				require.Contains(r.t, problems, "the broker does not answer", "it does not get ready while the broker is unavailable")
				require.NotContains(r.t, problems, "nats: ")
			}
		}
	}
	r.nats.Start()
	require.Eventually(r.t, r.js.Conn().IsConnected, 60*time.Second, 10*time.Millisecond)
	r.send(ids("after_"+name, 200)...)
	r.untouched(60 * time.Second)
}

// TestABrokerThatHangsHoldsNoStop: a supervisor gives a process 30 s or fewer, and the worker is only the first that stops.
func TestABrokerThatHangsHoldsNoStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		busy bool
	}{{"with events in its hands", true}, {"noticed meanwhile", false}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			entered, release := make(chan struct{}), make(chan struct{})
			first := sync.OnceFunc(func() { close(entered); <-release })
			r := newRig(t, dbtest.SQLite(t), worker.Config{BatchSize: 5}, func(h worker.Handler) worker.Handler {
				return faults.New(h.Name(), func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
					first()
					return h.Handle(ctx, tx, batch)
				})
			})
			r.ackWait(10 * time.Second) // what it holds comes again after this time
			direct := r.broker
			proxy := faults.NewProxy(t, strings.TrimPrefix(r.nats.URL(), "nats://"))
			nc, err := stream.Connect("nats://"+proxy.Addr(), "", "test", zap.NewNop())
			require.NoError(t, err)
			t.Cleanup(nc.Close)
			js, err := stream.JetStream(nc)
			require.NoError(t, err)
			r.send(ids("held", 200)...)
			r.broker = faults.NewBroker(js)
			r.work()
			<-entered // by now the client library holds more
			if c.busy {
				proxy.Silence(true)
			} else {
				close(release)
				r.ledger(30 * time.Second)
				proxy.Silence(true)
				r.notReady("broker")
			}
			asked := time.Now()
			stopped := make(chan struct{})
			go func() { r.stop(); close(stopped) }()
			if c.busy {
				close(release)
			}
			<-stopped
			took := time.Since(asked)
			t.Logf("it stopped within %s", took)
			assert.Less(t, took, 30*time.Second)
			nc.Close()
			proxy.Silence(false)

			r.broker = direct
			r.work()
			r.untouched(60 * time.Second)
		})
	}
}

func TestWorkerRestartedBeforeARetryLosesNone(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		const n = 300
		r := newRig(t, db, worker.Config{}, func(h worker.Handler) worker.Handler {
			return faults.Fail(h, 1, faults.Any, worker.RetryAfter(faults.ErrFault, 4*time.Second))
		})
		r.send(ids("later", n)...)
		r.work()
		started := time.Now()
		require.Eventually(t, func() bool {
			rows := r.deliveries("effects")
			for _, row := range rows {
				if row.Status != "retrying" {
					return false
				}
			}
			return len(rows) == n
		}, 60*time.Second, 10*time.Millisecond)
		r.stop()
		r.nats.Stop()
		r.nats.Start()
		// An operator who sets the consumer back brings everything again at once; its time is in the delivery log. He tries until the
		// connection has noticed the restart.
		require.Eventually(t, func() bool {
			_, err := r.js.ResetConsumer(t.Context(), stream.Events, "effects")
			return err == nil
		}, 60*time.Second, 20*time.Millisecond)
		r.work()
		rows, dead := r.ledger(60 * time.Second)
		assert.Empty(t, dead)
		for id, row := range rows {
			require.Equal(t, 2, row.Attempts, id)
		}
		assert.Greater(t, time.Since(started), 3800*time.Millisecond, "no retry came before its time")
	})
}

// TestClockThatWasSetBackHoldsNoRetryUp: the row was written by a clock that was a year ahead.
func TestClockThatWasSetBackHoldsNoRetryUp(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{}, nil)
		ahead := time.Now().Add(365 * 24 * time.Hour).UTC()
		require.NoError(t, db.Exec(`INSERT INTO deliveries (handler, event_id, type, source, origin, status, attempts, received_at, processed_at, next_attempt_at)
			VALUES ('effects', 'late', 't', 'clerk', 'webhook', 'retrying', 1, ?, ?, ?)`, ahead, ahead, ahead.Add(time.Second)).Error)
		r.send("late")
		r.work()
		rows, dead := r.ledger(20 * time.Second)
		assert.Empty(t, dead)
		assert.Equal(t, 2, rows["late"].Attempts)
	})
}

// TestDeadlocksAreRetriedAndReachNobody: two workers whose transactions lock ten rows in any order.
func TestDeadlocksAreRetriedAndReachNobody(t *testing.T) {
	t.Parallel()
	const n = 2_000
	db := dbtest.Postgres(t)
	var name string
	require.NoError(t, db.Raw("SELECT current_database()").Scan(&name).Error)
	require.NoError(t, db.Exec("ALTER DATABASE "+name+" SET deadlock_timeout = '20ms'").Error)
	require.NoError(t, db.Exec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()").Error)
	require.NoError(t, db.Exec("SET deadlock_timeout = '20ms'").Error)
	require.NoError(t, db.Exec("CREATE TABLE tally (id text PRIMARY KEY, n bigint NOT NULL)").Error)
	for i := range 10 {
		require.NoError(t, db.Exec("INSERT INTO tally VALUES (?, 0)", fmt.Sprint(i)).Error)
	}
	var entered atomic.Int64
	both := make(chan struct{})
	r := newRig(t, db, worker.Config{BatchSize: 50, Concurrency: 2}, func(h worker.Handler) worker.Handler {
		return faults.New("effects", func(ctx context.Context, tx *gorm.DB, batch []event.Event) error {
			if turn := entered.Add(1); turn <= 2 { // the first two surely wait for each other
				if err := tx.Exec("UPDATE tally SET n = n + 1 WHERE id = ?", fmt.Sprint(turn-1)).Error; err != nil {
					return err
				}
				if turn == 2 {
					close(both)
				}
				select {
				case <-both:
				case <-ctx.Done():
					return ctx.Err()
				}
				if err := tx.Exec("UPDATE tally SET n = n + 1 WHERE id = ?", fmt.Sprint(2-turn)).Error; err != nil {
					return err
				}
			}
			for _, id := range rand.Perm(10)[:4] {
				if err := tx.Exec("UPDATE tally SET n = n + 1 WHERE id = ?", fmt.Sprint(id)).Error; err != nil {
					return err
				}
				if err := tx.Exec("SELECT pg_sleep(0.001)").Error; err != nil {
					return err
				}
			}
			return h.Handle(ctx, tx, batch)
		})
	})
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("e_%05d", i*7919%n)
	}
	r.send(all...)
	r.work()
	_, dead := r.ledger(120 * time.Second)
	assert.Empty(t, dead)
	var deadlocks int
	require.Eventually(t, func() bool {
		require.NoError(t, db.Raw("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").Scan(&deadlocks).Error)
		return deadlocks > 0
	}, 60*time.Second, 100*time.Millisecond, "the test makes deadlocks")
	for id, row := range r.deliveries("effects") {
		require.Equal(t, 1, row.Attempts, id)
	}
	t.Logf("%d deadlocks, %d pauses logged", deadlocks, r.logs.FilterMessage("outage, handler pauses").Len())
}

// TestTwoWorkersOnTenUsers is the mirror under the same load.
func TestTwoWorkersOnTenUsers(t *testing.T) {
	t.Parallel()
	const n = 2_000
	db := dbtest.Postgres(t)
	srv := natstest.New(t)
	_, js := srv.Setup(worker.Specs()...)
	r := &rig{bundle: &bundle{t: t, db: db, js: js}, nats: srv, broker: faults.NewBroker(js), cfg: worker.Config{BatchSize: 100}}
	futures := make([]jetstream.PubAckFuture, n)
	for i := range n {
		e, _ := event.Decode(fmt.Appendf(nil, `{"type":"user.updated","object":"event","timestamp":%d,"data":{"id":"user_%d","object":"user","first_name":"Ada","updated_at":%d}}`, 1768471200000+i, i%10, 1768471200000+i))
		e.ID, e.Source, e.Origin, e.ReceivedAt = fmt.Sprintf("msg_%d", i), "clerk", event.OriginWebhook, time.Now()
		var err error
		futures[i], err = js.PublishMsgAsync(stream.Message(&e))
		require.NoError(t, err)
	}
	<-js.PublishAsyncComplete()
	r.work()
	r.work() // a second one
	rows := r.settled("mirror", n)
	for id, row := range rows {
		require.Equal(t, "processed", row.Status, id)
		require.Equal(t, 1, row.Attempts, id)
	}
	assert.Empty(t, r.deadLetters())
	assert.Equal(t, 10, r.count("users"))
}
