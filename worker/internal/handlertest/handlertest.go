// Package handlertest holds a handler to the contract of worker.Handler. Every handler's tests call [Run]. Only tests
// import it.
package handlertest

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/faults"
)

// Run applies a corpus (each type of event, and a story in which objects change and go) in every way in which a worker
// may: any order, any repetition, any batch, with crashes between. Each must end in the same rows as applying it once, on
// both kinds of database. newHandler makes a handler on a fresh database; it may be called several times on one. Columns of
// the time at which a row was written are not compared: synced_at and those of ignore.
func Run(t *testing.T, newHandler func(t testing.TB, db *gorm.DB) worker.Handler, ignore ...string) {
	t.Helper()
	events := corpus(t)
	dbtest.Each(t, func(t *testing.T, first *gorm.DB) {
		open := func(t *testing.T) *gorm.DB {
			t.Helper()
			if database.IsPostgres(first) {
				return dbtest.Postgres(t)
			}
			return dbtest.SQLite(t)
		}
		s := &suite{events: events, newHandler: newHandler, open: open, ignore: append(ignore, "synced_at")}
		s.apply(t, first, newHandler(t, first), events, 100)
		s.want = s.dump(t, first)
		for name, check := range map[string]func(*testing.T){
			"EmptyBatch": s.emptyBatch, "Twice": s.twice, "Reordered": s.reordered, "BatchSizes": s.batchSizes, "CrashBeforeAck": s.crashBeforeAck,
			"CrashBeforeCommit": s.crashBeforeCommit, "Garbage": s.garbage, "CancelledContext": s.cancelled, "Concurrent": s.concurrent,
			"BatchIsReadOnly": s.readOnly, "ThroughTheWorker": s.throughTheWorker,
		} {
			t.Run(name, check)
		}
	})
}

type suite struct {
	events     []event.Event
	newHandler func(t testing.TB, db *gorm.DB) worker.Handler
	open       func(t *testing.T) *gorm.DB
	ignore     []string
	want       []string // the rows of the corpus applied once
}

// corpus is each documented type and the lives of some users.
func corpus(t testing.TB) []event.Event {
	t.Helper()
	var events []event.Event
	add := func(id string, body []byte) {
		e, err := event.Decode(body)
		require.NoError(t, err, id)
		e.ID, e.Source, e.Origin, e.ReceivedAt, e.Seq = id, "clerk", event.OriginWebhook, time.UnixMilli(1768471200000), uint64(len(events)+1)
		e.FirstOrigin = e.Origin
		events = append(events, e)
	}
	for _, typ := range fixture.Types() {
		body, _ := fixture.Event(typ)
		add("msg_"+typ, body)
	}
	for e := range emulator.New(emulator.Config{Seed: 7}).Story(8) {
		add(e.ID, e.Body)
	}
	return events
}

// once applies one batch in one transaction, as a worker does, again after a deadlock.
func once(ctx context.Context, db *gorm.DB, h worker.Handler, batch []event.Event) (err error) {
	for range 20 {
		err = database.InTx(ctx, db, func(tx *gorm.DB) (err error) {
			defer func() {
				if r := recover(); r != nil {
					err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
				}
			}()
			return h.Handle(ctx, tx, batch)
		})
		if err == nil || !database.IsInfrastructure(err) || ctx.Err() != nil {
			return err
		}
	}
	return err
}

func (s *suite) apply(t testing.TB, db *gorm.DB, h worker.Handler, events []event.Event, size int) {
	t.Helper()
	for batch := range slices.Chunk(slices.Clone(events), size) {
		require.NoError(t, once(t.Context(), db, h, batch))
	}
}

// dump is every row of every table but the worker's own, in a form that can be compared.
func (s *suite) dump(t testing.TB, db *gorm.DB) []string {
	t.Helper()
	list := "SELECT name FROM sqlite_master WHERE type = 'table'"
	if database.IsPostgres(db) {
		list = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
	}
	var tables, dump []string
	require.NoError(t, db.Raw(list).Scan(&tables).Error)
	for _, table := range tables {
		if table == "deliveries" || table == "audit_log" || table == "stream_watch" || strings.Contains(table, "goose") || strings.HasPrefix(table, "sqlite_") {
			continue
		}
		var rows []map[string]any
		require.NoError(t, db.Table(table).Find(&rows).Error)
		for _, row := range rows {
			for _, column := range s.ignore {
				delete(row, column)
			}
			text, err := json.Marshal(row)
			require.NoError(t, err)
			dump = append(dump, table+" "+string(text))
		}
	}
	slices.Sort(dump)
	return dump
}

func (s *suite) same(t testing.TB, db *gorm.DB, how string) {
	t.Helper()
	got := s.dump(t, db)
	if slices.Equal(s.want, got) {
		return
	}
	for _, row := range s.want {
		if !slices.Contains(got, row) {
			t.Errorf("%s: missing %.300s", how, row)
		}
	}
	for _, row := range got {
		if !slices.Contains(s.want, row) {
			t.Errorf("%s: extra %.300s", how, row)
		}
	}
	if len(s.want) != len(got) && !t.Failed() {
		t.Errorf("%s: %d rows, want %d", how, len(got), len(s.want))
	}
}

func (s *suite) emptyBatch(t *testing.T) {
	db := s.open(t)
	require.NoError(t, once(t.Context(), db, s.newHandler(t, db), nil))
}

func (s *suite) twice(t *testing.T) {
	db := s.open(t)
	h := s.newHandler(t, db)
	s.apply(t, db, h, s.events, 100)
	s.apply(t, db, h, s.events, 30)
	s.same(t, db, "applied again")
	var doubled []event.Event
	for _, e := range s.events {
		doubled = append(doubled, e, e)
	}
	db = s.open(t)
	s.apply(t, db, s.newHandler(t, db), doubled, 100)
	s.same(t, db, "twice in one batch")
}

func (s *suite) reordered(t *testing.T) {
	for seed := range uint64(4) {
		events := slices.Clone(s.events)
		if seed == 0 {
			slices.Reverse(events)
		} else {
			rand.New(rand.NewPCG(seed, 0)).Shuffle(len(events), func(i, j int) { events[i], events[j] = events[j], events[i] })
		}
		db := s.open(t)
		s.apply(t, db, s.newHandler(t, db), events, 64)
		s.same(t, db, fmt.Sprintf("order %d", seed))
	}
}

func (s *suite) batchSizes(t *testing.T) {
	for _, size := range []int{1, 7, len(s.events)} {
		db := s.open(t)
		s.apply(t, db, s.newHandler(t, db), s.events, size)
		s.same(t, db, fmt.Sprintf("batches of %d", size))
	}
}

// crashBeforeAck: the batch is committed and comes again, to a new process.
func (s *suite) crashBeforeAck(t *testing.T) {
	db := s.open(t)
	for batch := range slices.Chunk(slices.Clone(s.events), 50) {
		s.apply(t, db, s.newHandler(t, db), batch, 50)
		s.apply(t, db, s.newHandler(t, db), batch, 50)
	}
	s.same(t, db, "each batch again by a new process")
}

// crashBeforeCommit: nothing of it may be left.
func (s *suite) crashBeforeCommit(t *testing.T) {
	db := s.open(t)
	h := s.newHandler(t, db)
	empty := s.dump(t, db)
	err := database.InTx(t.Context(), db, func(tx *gorm.DB) error {
		if err := h.Handle(t.Context(), tx, slices.Clone(s.events)); err != nil {
			return err
		}
		return faults.ErrFault
	})
	require.ErrorIs(t, err, faults.ErrFault)
	assert.Equal(t, empty, s.dump(t, db), "the handler wrote past its transaction")
	s.apply(t, db, h, s.events, 100)
	s.same(t, db, "after a rollback")
}

// garbage: whatever comes, the handler neither panics nor blames the database.
func (s *suite) garbage(t *testing.T) {
	db := s.open(t)
	h := s.newHandler(t, db)
	data := []string{
		`{}`, `{"id":null}`, `{"id":1}`, `{"id":""}`, `{"id":"user_\u0000"}`, `{"id":["x"],"updated_at":"yesterday"}`,
		`{"id":"x_1","created_at":-1,"updated_at":99999999999999999999,"deleted":"no"}`, `{"id":"x_2","email_addresses":{},"phone_numbers":7,"organization":"o","user":[],"public_user_data":null}`,
		`{"id":"` + strings.Repeat("x", 70_000) + `"}`, `{"id":"x_3","first_name":` + strings.Repeat("[", 500) + strings.Repeat("]", 500) + `}`,
	}
	types := append(fixture.Types(), "user.renamed", "nobody.knows", "x", "user.", ".created", "\x00.\xff")
	for _, typ := range types {
		for i, d := range data {
			name, err := json.Marshal(typ)
			require.NoError(t, err)
			e, err := event.Decode(fmt.Appendf(nil, `{"type":%s,"object":"event","timestamp":1,"data":%s}`, name, d))
			if err != nil {
				continue
			}
			e.ID, e.Source, e.ReceivedAt = fmt.Sprintf("msg_%s_%d", typ, i), "clerk", time.Now()
			if err := once(t.Context(), db, h, []event.Event{e}); err != nil {
				assert.NotContains(t, err.Error(), "panic:", "%s %.80s", typ, d)
				assert.False(t, database.IsInfrastructure(err), "%s %.80s: a bad event would stop the handler for ever: %v", typ, d, err)
			}
		}
	}
	good := s.open(t)
	h = s.newHandler(t, good)
	s.apply(t, good, h, s.events, 100)
	s.same(t, good, "after garbage")
}

func (s *suite) cancelled(t *testing.T) {
	db := s.open(t)
	h := s.newHandler(t, db)
	for _, after := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		done := make(chan error, 1)
		go func() { done <- once(ctx, db, h, slices.Clone(s.events)) }()
		select {
		case err := <-done: // an error, or done in time: both are fine
			_ = err
		case <-time.After(10 * time.Second):
			cancel()
			t.Fatal("the handler goes on although its context has ended")
		}
		cancel()
	}
	s.apply(t, db, h, s.events, 100)
	s.same(t, db, "after contexts that ended")
}

// concurrent: two workers with one handler each, and every event at both.
func (s *suite) concurrent(t *testing.T) {
	db := s.open(t)
	var group sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		h, events := s.newHandler(t, db), slices.Clone(s.events)
		if i == 1 {
			slices.Reverse(events)
		}
		group.Go(func() {
			for batch := range slices.Chunk(events, 20) {
				if err := once(t.Context(), db, h, batch); err != nil {
					errs[i] = err
				}
			}
		})
	}
	group.Wait()
	require.NoError(t, errs[0])
	require.NoError(t, errs[1])
	s.same(t, db, "two at once")
}

func (s *suite) readOnly(t *testing.T) {
	db := s.open(t)
	batch := slices.Clone(s.events)
	require.NoError(t, once(t.Context(), db, s.newHandler(t, db), batch))
	assert.Equal(t, s.events, batch, "the worker may give the same batch again")
}

// throughTheWorker: crashes, panics, lost acks and repetition, with a real worker and a real broker.
func (s *suite) throughTheWorker(t *testing.T) {
	db := s.open(t)
	h := s.newHandler(t, db)
	name := h.Name()
	srv := natstest.New(t)
	_, js := srv.Setup(stream.HandlerSpec{Name: name})
	consumer := (stream.Topology{}).Consumer(stream.HandlerSpec{Name: name})
	consumer.AckWait = 500 * time.Millisecond
	_, err := js.UpdateConsumer(t.Context(), stream.Events, consumer)
	require.NoError(t, err)
	broker := faults.NewBroker(js)
	broker.LoseAcks.Store(20)
	for i := range s.events {
		for n := range 2 { // past the stream's dedupe
			msg := stream.Message(&s.events[i])
			msg.Header.Set(stream.HeaderMsgID, fmt.Sprint(i, "/", n))
			_, err := js.PublishMsg(t.Context(), msg)
			require.NoError(t, err)
		}
	}
	third := func(n int) faults.When {
		return func(e *event.Event) bool { return e.Seq%3 == uint64(n) }
	}
	wrapped := faults.Panic(faults.Forget(faults.Fail(h, 1, third(0), faults.ErrFault), 1, third(1)), 1, third(2))
	w, err := worker.New(worker.Config{Handlers: []worker.Registration{{Handler: wrapped}}, RetryInitial: 10 * time.Millisecond, RetryMax: 20 * time.Millisecond, BatchSize: 40},
		worker.Deps{JetStream: broker, DB: db, Log: zap.NewNop(), Registerer: prometheus.NewRegistry(), Health: &observe.Health{}})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	require.Eventually(t, func() bool {
		var n int64
		if db.Table("deliveries").Where("status = 'processed'").Count(&n).Error != nil || n < int64(len(s.events)) {
			return false
		}
		c, err := js.Consumer(context.Background(), stream.Events, name)
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	}, 60*time.Second, 20*time.Millisecond)
	cancel()
	require.NoError(t, <-done)
	s.same(t, db, "through the worker")
}
