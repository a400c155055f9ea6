package deadletter_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/replay"
	"github.com/usherhq/usher/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

// row is a row of the delivery log.
type row struct {
	Handler, EventID, Type, Source, Origin, Status string
	UserID, Error, Reason, Fingerprint, ReplayID   *string
	Attempts                                       int
	ReceivedAt                                     time.Time
	ProcessedAt, FirstFailedAt                     *time.Time
	StreamSeq                                      uint64
	LetterSeq                                      *uint64
}

func (row) TableName() string { return "deliveries" }

func ptr[T any](v T) *T { return &v }

var moment = time.Now().UTC().Truncate(time.Millisecond).Add(-time.Hour)

// dead is a row of a dead letter; change may change it.
func dead(id string, seq uint64, change ...func(*row)) row {
	r := row{
		Handler: "mirror", EventID: id, Type: "user.created", Source: "clerk", Origin: "webhook", Status: "dead", UserID: ptr("user_" + id),
		Error: ptr("no such thing 7"), Reason: ptr("handler_error"), Attempts: 10, ReceivedAt: moment, ProcessedAt: ptr(moment.Add(time.Minute)),
		FirstFailedAt: ptr(moment.Add(time.Second)), StreamSeq: seq, LetterSeq: ptr(seq),
	}
	for _, c := range change {
		c(&r)
	}
	r.Fingerprint = ptr(deadletter.Fingerprint(r.Handler, deadletter.Reason(*r.Reason), *r.Error))
	return r
}

func eventOf(id string) event.Event {
	body := fmt.Appendf(nil, `{"type":"user.created","timestamp":1768471200036,"data":{"id":"user_%s","object":"user"}}`, id)
	e, _ := event.Decode(body)
	e.ID, e.Source, e.Origin, e.ReceivedAt = id, "clerk", event.OriginWebhook, moment
	return e
}

// put writes a letter as the worker does.
func put(t *testing.T, js jetstream.JetStream, handler, id string, original uint64) uint64 {
	t.Helper()
	return putEvent(t, js, handler, eventOf(id), original)
}

func putEvent(t *testing.T, js jetstream.JetStream, handler string, e event.Event, original uint64) uint64 {
	t.Helper()
	seq, err := deadletter.Put(t.Context(), js, &deadletter.Record{
		Handler: handler, Event: e, Reason: deadletter.HandlerError, Error: "no such thing 7", Attempts: 10, FirstFailedAt: moment,
		LastFailedAt: moment.Add(time.Minute), Subject: stream.Subject(&e), Sequence: original,
		Header: nats.Header{"Usher-Type": {"user.created"}, "Usher-Source": {"clerk"}, "Usher-Origin": {"webhook"}, "Nats-Msg-Id": {"x"}, "traceparent": {"00-1"}},
	})
	require.NoError(t, err)
	return seq
}

func ids(entries []deadletter.Entry) []string {
	var list []string
	for _, e := range entries {
		list = append(list, e.EventID)
	}
	return list
}

func TestFilterSelectsAndPagesMissNothing(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		rows := []row{
			dead("a", 1), dead("b", 2, func(r *row) { r.Handler = "fraud" }), dead("c", 3, func(r *row) { r.Type = "session.created" }),
			dead("d", 4, func(r *row) { r.Reason, r.Error = ptr("panic"), ptr("nil") }), dead("e", 5, func(r *row) { r.Source = "staging" }),
			dead("f", 6, func(r *row) { r.ProcessedAt = ptr(moment.Add(time.Hour)) }), dead("g", 7, func(r *row) { r.UserID = nil; r.LetterSeq = nil }),
			dead("a", 8, func(r *row) { r.Handler = "fraud" }), dead("h", 9, func(r *row) { r.ReceivedAt = moment.Add(-time.Hour) }),
			dead("no1", 10, func(r *row) { r.Status = "processed" }), dead("no2", 11, func(r *row) { r.Status = "retrying" }), dead("no3", 12, func(r *row) { r.Status = "discarded" }),
			dead("i", 13, func(r *row) { r.Type = "users.created" }),
		}
		require.NoError(t, db.Create(&rows).Error)
		list := func(f deadletter.Filter) []string {
			t.Helper()
			entries, next, err := deadletter.List(t.Context(), db, f, "", 100)
			require.NoError(t, err)
			assert.Empty(t, next)
			n, err := deadletter.Total(t.Context(), db, f)
			require.NoError(t, err)
			assert.Equal(t, len(entries), n)
			counts, err := deadletter.Counts(t.Context(), db, f)
			require.NoError(t, err)
			groups, err := deadletter.Groups(t.Context(), db, f)
			require.NoError(t, err)
			for _, c := range counts {
				n -= c.Events
			}
			assert.Zero(t, n)
			for _, g := range groups {
				n += g.Events
			}
			assert.Len(t, entries, n)
			return ids(entries)
		}
		all := []string{"i", "g", "f", "e", "d", "c", "b", "a", "a", "h"}
		assert.Equal(t, all, list(deadletter.Filter{}))
		assert.Equal(t, []string{"b", "a"}, list(deadletter.Filter{Handler: "fraud"}))
		assert.Equal(t, []string{"c"}, list(deadletter.Filter{Type: "session.*"}))
		assert.NotContains(t, list(deadletter.Filter{Type: "user.*"}), "i")
		assert.Len(t, list(deadletter.Filter{Type: "*.created"}), 10)
		assert.Len(t, list(deadletter.Filter{Type: "*"}), 10)
		assert.Equal(t, []string{"i"}, list(deadletter.Filter{Type: "users.created"}))
		assert.Equal(t, []string{"d"}, list(deadletter.Filter{Reason: deadletter.Panic}))
		assert.Equal(t, []string{"d"}, list(deadletter.Filter{Fingerprint: deadletter.Fingerprint("mirror", deadletter.Panic, "nil")}))
		assert.Equal(t, []string{"e"}, list(deadletter.Filter{Source: "staging"}))
		assert.Equal(t, []string{"a", "a"}, list(deadletter.Filter{User: "user_a"}))
		assert.Equal(t, []string{"f"}, list(deadletter.Filter{Since: moment.Add(time.Hour)}))
		assert.Len(t, list(deadletter.Filter{Until: moment.Add(time.Hour)}), 9)
		assert.Equal(t, []string{"b", "a"}, list(deadletter.Filter{IDs: []string{"a", "b", "no1"}, Handler: "fraud"}))
		assert.Empty(t, list(deadletter.Filter{Handler: "nobody"}))

		for size := range 5 {
			var paged []string
			for cursor, pages := "", 0; cursor != "" || pages == 0; pages++ {
				entries, next, err := deadletter.List(t.Context(), db, deadletter.Filter{}, cursor, size+1)
				require.NoError(t, err)
				paged, cursor = append(paged, ids(entries)...), next
			}
			assert.Equal(t, all, paged, size+1)
		}
		for _, odd := range []string{"x", "!", "YSBi", "YSBiIGM"} {
			_, _, err := deadletter.List(t.Context(), db, deadletter.Filter{}, odd, 1)
			require.ErrorIs(t, err, deadletter.ErrCursor, odd)
		}

		groups, err := deadletter.Groups(t.Context(), db, deadletter.Filter{Handler: "mirror", Reason: deadletter.HandlerError})
		require.NoError(t, err)
		require.Len(t, groups, 2, "a source each")
		assert.Equal(t, "staging", groups[1].Source)
		assert.Equal(t, 1, groups[1].Events)
		assert.Equal(t, groups[0].Fingerprint, groups[1].Fingerprint)
		assert.Equal(t, deadletter.Group{
			Source: "clerk", Fingerprint: groups[0].Fingerprint, Handler: "mirror", Reason: "handler_error", Events: 6, Users: 5, FirstSeen: moment.Add(time.Second),
			LastSeen: moment.Add(time.Hour), ExampleID: "i", Example: "no such thing 7",
		}, groups[0])
	})
}

func TestGetReadsTheLetterAndSaysWhereItIsGone(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
	seq := put(t, js, "mirror", "a", 5)
	rows := []row{dead("a", seq), dead("gone", 77), dead("never", 3, func(r *row) { r.LetterSeq = nil }), dead("other", seq)}
	require.NoError(t, db.Create(&rows).Error)

	e, err := deadletter.Find(t.Context(), db, "mirror", event.Ref{Source: "clerk", ID: "a"})
	require.NoError(t, err)
	r, err := deadletter.Get(t.Context(), js, e)
	require.NoError(t, err)
	want := eventOf("a")
	assert.Equal(t, want.Raw, r.Event.Raw)
	assert.Equal(t, "user_a", r.Event.Object.UserID)
	assert.Equal(t, uint64(5), r.Sequence)
	assert.Equal(t, 10, r.Attempts)
	assert.Equal(t, moment, r.FirstFailedAt)
	assert.Equal(t, stream.Subject(&want), r.Subject)

	for _, id := range []string{"gone", "never", "other"} { // other: the letter is another event's, of a stream made anew
		e, err := deadletter.Find(t.Context(), db, "mirror", event.Ref{Source: "clerk", ID: id})
		require.NoError(t, err)
		_, err = deadletter.Get(t.Context(), js, e)
		require.ErrorIs(t, err, deadletter.ErrGone, id)
	}
	_, err = deadletter.Find(t.Context(), db, "mirror", event.Ref{Source: "clerk", ID: "unknown"})
	require.ErrorIs(t, err, deadletter.ErrNotFound)

	result, err := deadletter.Replay(t.Context(), js, db, deadletter.Filter{}, replay.Options{StopAt: 1}, nil)
	require.NoError(t, err)
	assert.Equal(t, deadletter.Result{Selected: 4, Replayed: 1, Gone: 3}, result)
}

// slow lets another run take a letter between its row and its body, or between its body and its replay.
type slow struct {
	jetstream.JetStream
	before func(seq uint64)
	after  func(seq uint64)
}

func (s slow) Stream(ctx context.Context, name string) (jetstream.Stream, error) {
	inner, err := s.JetStream.Stream(ctx, name)
	return slowStream{inner, s}, err
}

type slowStream struct {
	jetstream.Stream
	slow slow
}

func (s slowStream) GetMsg(ctx context.Context, seq uint64, opts ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	s.slow.before(seq)
	defer s.slow.after(seq)
	return s.Stream.GetMsg(ctx, seq, opts...)
}

func TestLettersThatAnotherRunTookAreItsOwn(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
	rows := make([]row, 4)
	for i := range rows {
		id := fmt.Sprint("e_", i)
		rows[i] = dead(id, put(t, js, "mirror", id, uint64(i+1)))
	}
	rows[3].LetterSeq = ptr(uint64(77)) // gone for good
	require.NoError(t, db.Create(&rows).Error)
	other := func(id string) {
		result, err := deadletter.Replay(context.WithoutCancel(t.Context()), js, db, deadletter.Filter{IDs: []string{id}}, replay.Options{StopAt: 1}, nil)
		assert.NoError(t, err)
		assert.Equal(t, 1, result.Replayed, id)
	}
	var before, after sync.Once
	result, err := deadletter.Replay(t.Context(), slow{js, func(seq uint64) {
		if seq == 1 {
			before.Do(func() { other("e_0") })
		}
	}, func(seq uint64) {
		if seq == 2 {
			after.Do(func() { other("e_1") })
		}
	}}, db, deadletter.Filter{}, replay.Options{StopAt: 1}, nil)
	require.NoError(t, err)
	assert.Equal(t, deadletter.Result{Selected: 4, Replayed: 1, Gone: 3, Taken: 2}, result)
}

func TestNoMoreAreDoneThanWereSelected(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
		// fill writes eight letters and the rows of all but the first two. Those are indexed by a sweep while a run reads its first
		// letter, when one more event dies as well.
		fill := func(run string) slow {
			t.Helper()
			var rows []row
			for i := range 8 {
				id := fmt.Sprintf("%s_%d", run, 8-i) // a run lists the last letter first
				rows = append(rows, dead(id, put(t, js, "mirror", id, uint64(i+1))))
			}
			rows = rows[2:]
			require.NoError(t, db.Create(&rows).Error)
			sweep := sync.OnceFunc(func() {
				sweeper := deadletter.NewSweeper(js, db)
				sweeper.MinAge = 0
				swept, err := sweeper.Sweep(context.WithoutCancel(t.Context()))
				assert.NoError(t, err)
				assert.Equal(t, 2, swept.Indexed)
				later := dead(run+"_9", put(t, js, "mirror", run+"_9", 9))
				assert.NoError(t, db.Create(&later).Error)
			})
			return slow{js, func(uint64) {}, func(uint64) { sweep() }}
		}
		check := func(r deadletter.Result) {
			assert.LessOrEqual(t, r.Replayed+r.Discarded+r.Gone, r.Selected)
		}
		result, err := deadletter.Replay(t.Context(), fill("replayed"), db, deadletter.Filter{}, replay.Options{StopAt: 1}, check)
		require.NoError(t, err)
		assert.Equal(t, deadletter.Result{Selected: 8, Replayed: 8}, result)
		require.NoError(t, db.Exec("DELETE FROM deliveries WHERE event_id = 'replayed_9'").Error)
		s, err := js.Stream(t.Context(), stream.DeadLetters)
		require.NoError(t, err)
		require.NoError(t, s.Purge(t.Context()))
		result, err = deadletter.Discard(t.Context(), fill("discarded"), db, deadletter.Filter{}, replay.Outage{}, check)
		require.NoError(t, err)
		assert.Equal(t, deadletter.Result{Selected: 8, Discarded: 8}, result)
	})
}

func TestAReplayIsTheOriginalAndNothingOfTheLetter(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
	require.NoError(t, db.Create(ptr(dead("a", put(t, js, "mirror", "a", 5)))).Error)
	_, err := deadletter.Replay(t.Context(), js, db, deadletter.Filter{}, replay.Options{StopAt: 1}, nil)
	require.NoError(t, err)
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	msg, err := s.GetMsg(t.Context(), 1)
	require.NoError(t, err)
	e := eventOf("a")
	assert.Equal(t, stream.ReplaySubject("mirror", &e), msg.Subject)
	assert.Equal(t, e.Raw, msg.Data)
	var names []string
	for name := range msg.Header {
		if !slices.Contains([]string{"Nats-Sequence", "Nats-Stream", "Nats-Subject", "Nats-Time-Stamp"}, name) { // of the reading
			names = append(names, name)
		}
	}
	slices.Sort(names)
	assert.Equal(t, []string{"Nats-Msg-Id", "Usher-Event-Id", "Usher-First-Origin", "Usher-First-Sequence", "Usher-Origin", "Usher-Replay-Id", "Usher-Source", "Usher-Type", "traceparent"}, names)
	assert.Equal(t, "replay", msg.Header.Get("Usher-Origin"))
	assert.Equal(t, "webhook", msg.Header.Get("Usher-First-Origin"))
	assert.Equal(t, "5", msg.Header.Get("Usher-First-Sequence"))
	assert.Equal(t, msg.Header.Get("Nats-Msg-Id"), msg.Header.Get("Usher-Replay-Id"))
	var r row
	require.NoError(t, db.Take(&r).Error)
	assert.Equal(t, "retrying", r.Status)
	assert.Equal(t, msg.Header.Get("Usher-Replay-Id"), *r.ReplayID)
	assert.Zero(t, r.Attempts)
	assert.Nil(t, r.LetterSeq)
}

func TestPutTwiceIsOneLetterUnlessItWasTakenAway(t *testing.T) {
	t.Parallel()
	_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
	first := put(t, js, "mirror", "a", 5)
	assert.Equal(t, first, put(t, js, "mirror", "a", 5))
	assert.NotEqual(t, first, put(t, js, "mirror", "b", 5), "another event at the same sequence, of a stream made anew")
	s, err := js.Stream(t.Context(), stream.DeadLetters)
	require.NoError(t, err)
	require.NoError(t, s.DeleteMsg(t.Context(), first))
	again := put(t, js, "mirror", "a", 5)
	_, err = s.GetMsg(t.Context(), again)
	require.NoError(t, err, "the letter is there")
}

// meter counts the bytes of letters that were read and neither deleted nor let go.
type meter struct {
	jetstream.JetStream
	mu         sync.Mutex
	sizes      map[uint64]int
	held, most int
}

func (m *meter) Stream(ctx context.Context, name string) (jetstream.Stream, error) {
	s, err := m.JetStream.Stream(ctx, name)
	return meterStream{s, m}, err
}

func (m *meter) letGo(seq uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held -= m.sizes[seq]
	delete(m.sizes, seq)
}

type meterStream struct {
	jetstream.Stream
	meter *meter
}

func (s meterStream) GetMsg(ctx context.Context, seq uint64, opts ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	msg, err := s.Stream.GetMsg(ctx, seq, opts...)
	if err == nil {
		s.meter.mu.Lock()
		defer s.meter.mu.Unlock()
		s.meter.sizes[seq] = len(msg.Data)
		s.meter.held += len(msg.Data)
		s.meter.most = max(s.meter.most, s.meter.held)
	}
	return msg, err
}

func (s meterStream) DeleteMsg(ctx context.Context, seq uint64) error {
	err := s.Stream.DeleteMsg(ctx, seq)
	s.meter.letGo(seq)
	return err
}

func TestLargeLettersAreHeldAFewAtATime(t *testing.T) {
	t.Parallel()
	const n = 20 // of nearly 1 MiB
	setup := func(t *testing.T) (*gorm.DB, *meter) {
		t.Helper()
		db := dbtest.SQLite(t)
		_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
		rows := make([]row, n)
		for i := range rows {
			id := fmt.Sprintf("e_%02d", i)
			e := eventOf(id)
			e.Raw = fmt.Appendf(nil, `{"type":"user.created","data":{"id":"user_%s","note":"%s"}}`, id, strings.Repeat("x", 1<<20-200))
			rows[i] = dead(id, putEvent(t, js, "mirror", e, uint64(i+1)))
		}
		require.NoError(t, db.Create(&rows).Error)
		return db, &meter{JetStream: js, sizes: map[uint64]int{}}
	}
	bounded := func(t *testing.T, m *meter) {
		t.Helper()
		t.Logf("at most %.1f MiB at once, of %d", float64(m.most)/(1<<20), n)
		assert.LessOrEqual(t, m.most, replay.PageBytes)
		assert.Greater(t, m.most, replay.PageBytes/2, "several at a time")
		assert.Zero(t, m.held)
	}
	t.Run("Replay", func(t *testing.T) { //nolint:paralleltest // each holds some 20 MiB at the broker
		db, m := setup(t)
		result, err := deadletter.Replay(t.Context(), m, db, deadletter.Filter{}, replay.Options{StopAt: 1}, nil)
		require.NoError(t, err)
		assert.Equal(t, deadletter.Result{Selected: n, Replayed: n}, result)
		bounded(t, m)
		s, err := m.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		assert.EqualValues(t, n, s.CachedInfo().State.Msgs)
	})
	t.Run("Discard", func(t *testing.T) { //nolint:paralleltest // each holds some 20 MiB at the broker
		db, m := setup(t)
		result, err := deadletter.Discard(t.Context(), m, db, deadletter.Filter{}, replay.Outage{}, nil)
		require.NoError(t, err)
		assert.Equal(t, deadletter.Result{Selected: n, Discarded: n}, result)
		bounded(t, m)
	})
	t.Run("Each", func(t *testing.T) { //nolint:paralleltest // each holds some 20 MiB at the broker
		db, m := setup(t)
		var seen []string
		require.NoError(t, deadletter.Each(t.Context(), m, db, deadletter.Filter{}, func(e deadletter.Entry, r *deadletter.Record) error {
			require.NotNil(t, r)
			seen = append(seen, e.EventID)
			m.letGo(e.LetterSeq)
			return nil
		}))
		assert.Len(t, seen, n)
		assert.True(t, slices.IsSorted(seen))
		bounded(t, m)
	})
}

func TestSweepMakesLettersAndIndexAgree(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
		s, err := js.Stream(t.Context(), stream.DeadLetters)
		require.NoError(t, err)
		seq := map[string]uint64{}
		for _, id := range []string{"right", "missing", "applied", "discarded", "replayed", "reapplied", "superseded", "older", "restored", "inwork"} {
			seq[id] = put(t, js, "mirror", id, 10)
		}
		msg, err := s.GetMsg(t.Context(), seq["replayed"])
		require.NoError(t, err)
		now := ptr(time.Now().UTC().Add(time.Second))
		with := func(status string, streamSeq, letter uint64, at *time.Time) func(*row) {
			return func(r *row) {
				r.Status, r.StreamSeq, r.LetterSeq, r.ProcessedAt = status, streamSeq, ptr(letter), at
				if letter == 0 {
					r.LetterSeq = nil
				}
			}
		}
		rows := []row{
			dead("right", 0, with("dead", 10, seq["right"], now)),
			dead("applied", 0, with("processed", 10, 0, now)),      // the original came again and passed
			dead("discarded", 0, with("discarded", 10, 0, now)),    // killed before the letter was deleted
			dead("reapplied", 0, with("processed", 20, 0, now)),    // a later replay of the event passed
			dead("superseded", 0, with("dead", 20, 99, now)),       // its replay died: another letter
			dead("older", 0, with("dead", 10, 1, now)),             // the log names an older letter
			dead("restored", 0, with("processed", 10, 0, &moment)), // applied before the letter was written: a backup, or a stream made anew
			dead("inwork", 0, with("retrying", 20, 0, now)),        // on another way
			dead("replayed", 0, with("retrying", 10, 0, &moment), func(r *row) { r.ReplayID = ptr(deadletter.ReplayID(seq["replayed"], msg.Time)) }),
			dead("expired", 0, with("dead", 10, 5000, now)),
		}
		require.NoError(t, db.Create(&rows).Error)

		sweeper := deadletter.NewSweeper(js, db)
		swept, err := sweeper.Sweep(t.Context())
		require.NoError(t, err)
		assert.Equal(t, deadletter.Swept{}, swept, "too young to be judged")
		sweeper = deadletter.NewSweeper(js, db)
		sweeper.MinAge = 0
		swept, err = sweeper.Sweep(t.Context())
		require.NoError(t, err)
		assert.Equal(t, deadletter.Swept{Read: 10, Indexed: 3, Deleted: 5}, swept)

		have := map[string]row{}
		var all []row
		require.NoError(t, db.Find(&all).Error)
		for _, r := range all {
			have[r.EventID] = r
		}
		for _, id := range []string{"right", "missing", "older", "restored"} {
			r := have[id]
			assert.Equal(t, "dead", r.Status, id)
			require.NotNil(t, r.LetterSeq, id)
			assert.Equal(t, seq[id], *r.LetterSeq, id)
			assert.Equal(t, "user_"+id, *r.UserID)
			assert.Equal(t, "handler_error", *r.Reason)
		}
		assert.Equal(t, 10, have["missing"].Attempts)
		assert.Equal(t, "expired", have["expired"].EventID, "a row without a letter stays")
		for _, id := range []string{"applied", "discarded", "reapplied", "superseded", "replayed"} {
			_, err := s.GetMsg(t.Context(), seq[id])
			assert.ErrorIs(t, err, jetstream.ErrMsgNotFound, id)
			assert.NotEqual(t, "user_", have[id].Status)
		}
		for _, id := range []string{"right", "missing", "older", "restored", "inwork"} {
			_, err := s.GetMsg(t.Context(), seq[id])
			assert.NoError(t, err, id)
		}
		swept, err = sweeper.Sweep(t.Context())
		require.NoError(t, err)
		assert.Zero(t, swept.Indexed+swept.Deleted, "once is enough")
	})
}

func TestSweepIsCheapWhereNothingIsMissing(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
	sweeper := deadletter.NewSweeper(js, db)
	sweeper.MinAge = 0
	swept, err := sweeper.Sweep(t.Context())
	require.NoError(t, err)
	assert.Zero(t, swept)
	require.NoError(t, db.Create(ptr(dead("a", put(t, js, "mirror", "a", 5)))).Error)
	for _, read := range []int{1, 0, 0} { // all of them the first time
		swept, err = sweeper.Sweep(t.Context())
		require.NoError(t, err)
		assert.Equal(t, deadletter.Swept{Read: read}, swept)
	}
	put(t, js, "mirror", "b", 6)
	swept, err = sweeper.Sweep(t.Context())
	require.NoError(t, err)
	assert.Equal(t, deadletter.Swept{Read: 2, Indexed: 1}, swept)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = deadletter.NewSweeper(js, db).Sweep(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

func TestFingerprintIgnoresWhatDiffersInTheSameFailure(t *testing.T) {
	t.Parallel()
	of := func(text string) string { return deadletter.Fingerprint("mirror", deadletter.Constraint, text) }
	assert.Equal(t, of(`duplicate key "user_2g7np7Hrk0SN6kj5EDMLDaKNL0S" (23505) at 0xc0001`), of(`duplicate key "x" (23506) at 0xff`))
	assert.NotEqual(t, of("duplicate key"), of("not null"))
	assert.NotEqual(t, of("x"), deadletter.Fingerprint("fraud", deadletter.Constraint, "x"))
	assert.NotEqual(t, of("x"), deadletter.Fingerprint("mirror", deadletter.Panic, "x"))
}
