package replay_test

import (
	"context"
	"fmt"
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
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/replay"
	"github.com/usherhq/usher/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

func TestSubjectsAreWhatBothWant(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		filters []string
		filter  string
		want    []string
	}{
		{nil, "clerk.evt.*.*.*.*", []string{"clerk.evt.*.*.*.*"}},
		{nil, "clerk.evt.clerk.user.created.user_1", []string{"clerk.evt.clerk.user.created.user_1"}},
		{[]string{"user.>"}, "clerk.evt.*.*.*.*", []string{"clerk.evt.*.user.*.*"}},
		{[]string{"user.>", "session.created.*"}, "clerk.evt.staging.*.created.*", []string{"clerk.evt.staging.user.created.*", "clerk.evt.staging.session.created.*"}},
		{[]string{"user.>"}, "clerk.evt.*.session.*.*", nil},
		{[]string{"user.created.*"}, "clerk.evt.*.user.*.user_1", []string{"clerk.evt.*.user.created.user_1"}},
		{[]string{"user"}, "clerk.evt.*.user.*.*", nil},
	} {
		assert.Equal(t, test.want, replay.Subjects(stream.HandlerSpec{Filters: test.filters}, test.filter), test)
	}
}

func TestASelectionIsReadInOrderAndOnce(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	_, js := natstest.New(t).Setup()
	var middle time.Time
	types := []string{"user.created", "session.created", "organization.created"}
	const n = 60
	for i := range n {
		if i == n/2 {
			middle = time.Now()
		}
		body := fmt.Appendf(nil, `{"type":%q,"data":{"id":"obj_%d"}}`, types[i%3], i)
		e, err := event.Decode(body)
		require.NoError(t, err)
		e.ID, e.Source, e.ReceivedAt = fmt.Sprint("msg_", i), "clerk", time.Now()
		_, err = js.PublishMsg(t.Context(), stream.Message(&e))
		require.NoError(t, err)
	}
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	from, err := replay.FirstAt(t.Context(), s, middle)
	require.NoError(t, err)
	assert.Equal(t, uint64(n/2+1), from)
	for at, want := range map[time.Time]uint64{{}: 1, time.Now().Add(time.Hour): n + 1} {
		first, err := replay.FirstAt(t.Context(), s, at)
		require.NoError(t, err)
		assert.Equal(t, want, first)
	}

	sel := replay.Selection{
		Handler: "mirror", Subjects: []string{"clerk.evt.*.user.>", "clerk.evt.*.organization.>"}, From: from, Last: n - 3, RunID: "r",
	}
	for _, want := range []replay.Progress{{Published: 18}, {Earlier: 18}} { // the second time the broker knows them all
		run := replay.New(js, db, replay.Options{StopAt: 1})
		require.NoError(t, run.Events(t.Context(), s, sel))
		assert.Equal(t, want, run.Progress())
	}
	counted, err := replay.Count(t.Context(), js, sel)
	require.NoError(t, err)
	assert.Equal(t, 18, counted, "without the two behind the last")
	last := uint64(0)
	for seq := uint64(n + 1); seq <= n+18; seq++ {
		msg, err := s.GetMsg(t.Context(), seq)
		require.NoError(t, err)
		var original uint64
		_, err = fmt.Sscanf(msg.Header.Get(stream.HeaderReplayID), "run:r:mirror:%d", &original)
		require.NoError(t, err)
		assert.Greater(t, original, last)
		last = original
		e, err := stream.Parse(msg.Header, msg.Data, seq)
		require.NoError(t, err)
		assert.NotEqual(t, event.Type("session.created"), e.Type)
		assert.Equal(t, event.OriginReplay, e.Origin)
	}
	info, err := s.Info(t.Context())
	require.NoError(t, err)
	assert.Equal(t, uint64(n+18), info.State.LastSeq)
}

// meter counts the bytes of events that were read and are not stored again yet.
type meter struct {
	jetstream.JetStream
	mu         sync.Mutex
	held, most int
}

func (m *meter) add(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held += n
	m.most = max(m.most, m.held)
}

func (m *meter) PublishMsgAsync(msg *nats.Msg, opts ...jetstream.PublishOpt) (jetstream.PubAckFuture, error) {
	inner, err := m.JetStream.PublishMsgAsync(msg, opts...)
	if err != nil {
		return nil, err
	}
	f := future{inner, make(chan *jetstream.PubAck, 1), make(chan error, 1)}
	go func() {
		select {
		case ack := <-inner.Ok():
			m.add(-len(msg.Data))
			f.ok <- ack
		case err := <-inner.Err():
			f.err <- err
		}
	}()
	return f, nil
}

type future struct {
	jetstream.PubAckFuture
	ok  chan *jetstream.PubAck
	err chan error
}

func (f future) Ok() <-chan *jetstream.PubAck { return f.ok }
func (f future) Err() <-chan error            { return f.err }

type meterStream struct {
	jetstream.Stream
	meter *meter
}

func (s meterStream) GetMsg(ctx context.Context, seq uint64, opts ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	msg, err := s.Stream.GetMsg(ctx, seq, opts...)
	if err == nil {
		s.meter.add(len(msg.Data))
	}
	return msg, err
}

func TestLargeEventsAreHeldAFewAtATime(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	_, js := natstest.New(t).Setup()
	const n = 20 // of nearly 1 MiB
	places := make([]replay.Place, n)
	for i := range n {
		e, err := event.Decode(fmt.Appendf(nil, `{"type":"user.created","data":{"id":"user_%d","note":"%s"}}`, i, strings.Repeat("x", 1<<20-200)))
		require.NoError(t, err)
		e.ID, e.Source, e.ReceivedAt = fmt.Sprint("msg_", i), "clerk", time.Now()
		ack, err := js.PublishMsg(t.Context(), stream.Message(&e))
		require.NoError(t, err)
		places[i] = replay.Place{Source: e.Source, EventID: e.ID, Seq: ack.Sequence}
	}
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	for name, publish := range map[string]func(*replay.Run, jetstream.Stream) error{
		"Events": func(r *replay.Run, s jetstream.Stream) error {
			return r.Events(t.Context(), s, replay.Selection{Handler: "mirror", Subjects: []string{"clerk.evt.>"}, Last: n, RunID: "a"})
		},
		"Each": func(r *replay.Run, s jetstream.Stream) error {
			gone, err := r.Each(t.Context(), s, replay.Selection{Handler: "mirror", RunID: "b"}, places)
			assert.Zero(t, gone)
			return err
		},
	} {
		m := &meter{JetStream: js}
		run := replay.New(m, db, replay.Options{StopAt: 1})
		require.NoError(t, publish(run, meterStream{s, m}), name)
		assert.Equal(t, n, run.Progress().Published, name)
		t.Logf("%s: at most %.1f MiB at once, of %d", name, float64(m.most)/(1<<20), n)
		assert.LessOrEqual(t, m.most, replay.PageBytes, name)
		assert.Greater(t, m.most, replay.PageBytes/2, name)
		assert.Zero(t, m.held, name)
	}
}

// logged writes a row of the delivery log.
func logged(t *testing.T, db *gorm.DB, event, status, replayID string, attempts int, seq uint64, at time.Time) {
	t.Helper()
	var id any
	if replayID != "" {
		id = replayID
	}
	require.NoError(t, db.Exec(`INSERT INTO deliveries (handler, event_id, type, source, origin, status, attempts, received_at, processed_at, stream_seq, replay_id)
		VALUES ('mirror', ?, 'user.created', 'clerk', 'webhook', ?, ?, ?, ?, ?, ?) ON CONFLICT (handler, source, event_id) DO UPDATE SET status = excluded.status,
		attempts = excluded.attempts, processed_at = excluded.processed_at, stream_seq = excluded.stream_seq, replay_id = excluded.replay_id`,
		event, status, attempts, at.UTC(), at.UTC(), seq, id).Error)
}

// stored publishes so many events, msg_0 and so on, and returns the stream.
func stored(t *testing.T, js jetstream.JetStream, n int) jetstream.Stream {
	t.Helper()
	for i := range n {
		e, err := event.Decode(fmt.Appendf(nil, `{"type":"user.created","data":{"id":"user_%d"}}`, i))
		require.NoError(t, err)
		e.ID, e.Source, e.ReceivedAt = fmt.Sprint("msg_", i), "clerk", time.Now()
		_, err = js.PublishMsg(t.Context(), stream.Message(&e))
		require.NoError(t, err)
	}
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	return s
}

func TestWhatAnotherRunSettledIsSettled(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
		s := stored(t, js, 5)
		hour, now := time.Now().Add(-time.Hour), time.Now()
		for i := range 5 { // applied once, and dead by another's doing
			logged(t, db, fmt.Sprint("msg_", i), []string{"processed", "processed", "dead", "dead", "retrying"}[i], "", 1, uint64(i+1), hour)
		}
		run := replay.New(js, db, replay.Options{Patience: 300 * time.Millisecond})
		require.NoError(t, run.Events(t.Context(), s, replay.Selection{Handler: "mirror", Subjects: []string{"clerk.evt.>"}, Last: 5, RunID: "mine"}))
		assert.Equal(t, replay.Progress{Published: 5, Open: 5}, run.Progress(), "what the log said before is no outcome")
		logged(t, db, "msg_1", "processed", "run:other:mirror:2", 1, 12, now)
		logged(t, db, "msg_2", "processed", "run:other:mirror:3", 1, 13, now)
		logged(t, db, "msg_3", "dead", "run:other:mirror:4", 1, 14, now) // stored behind mine, which has failed then
		logged(t, db, "msg_4", "retrying", "", 2, 5, now)                // the original's next attempt: mine is yet to come
		err := run.Finish(t.Context())
		require.ErrorIs(t, err, replay.ErrStalled)
		assert.Contains(t, err.Error(), "no news of 2 within 300ms; is a worker running with handler mirror, and what does its /readyz say?")
		assert.Equal(t, replay.Progress{Published: 5, Applied: 2, Failed: 1, Open: 2}, run.Progress())
		logged(t, db, "msg_0", "processed", "run:mine:mirror:1", 1, 6, now)
		logged(t, db, "msg_4", "processed", "run:mine:mirror:5", 1, 10, now)
		require.NoError(t, run.Finish(t.Context()))
		assert.Equal(t, replay.Progress{Published: 5, Applied: 4, Failed: 1}, run.Progress())
	})
}

func TestARunWhoseConsumerIsGoneSaysSo(t *testing.T) {
	t.Parallel()
	db := dbtest.SQLite(t)
	_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
	s := stored(t, js, 1)
	require.NoError(t, replay.Ready(t.Context(), js, "mirror"))
	err := replay.Ready(t.Context(), js, "mirror", "nobody")
	require.ErrorIs(t, err, stream.ErrSetup)
	assert.Contains(t, err.Error(), "handler nobody has no consumer")
	run := replay.New(js, db, replay.Options{Patience: 100 * time.Millisecond})
	require.NoError(t, run.Events(t.Context(), s, replay.Selection{Handler: "mirror", Subjects: []string{"clerk.evt.>"}, Last: 1, RunID: "r"}))
	require.NoError(t, js.DeleteConsumer(t.Context(), stream.Events, "mirror"))
	require.ErrorIs(t, run.Finish(t.Context()), stream.ErrSetup)
}

func TestARunThatGoesOnTriesAgainWhatFailed(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		_, js := natstest.New(t).Setup(stream.HandlerSpec{Name: "mirror"})
		const n = 40
		s := stored(t, js, n)
		hour := time.Now().Add(-time.Hour)
		sel := replay.Selection{Handler: "mirror", Subjects: []string{"clerk.evt.>"}, Last: n - 10, RunID: "r"}
		first := replay.New(js, db, replay.Options{StopAt: 1})
		require.NoError(t, first.Events(t.Context(), s, sel)) // all but the last ten, before it was broken off
		for i := range n {
			status, id := "processed", fmt.Sprint("run:r:mirror:", i+1)
			switch {
			case i < 5: // discarded, at any time
				status, id = "discarded", ""
			case i < 15:
				status = "retrying"
			case i < 20:
				status = "dead"
			case i >= n-10: // not published by the run
				id = ""
			case i >= n-15: // another run has applied it since
				id = fmt.Sprint("run:other:mirror:", i+1)
			}
			logged(t, db, fmt.Sprint("msg_", i), status, id, 1, uint64(n+i+1), hour)
		}
		sel.Last, sel.Again = n, "a"
		for _, again := range []string{"a", "b"} {
			sel.Again = again
			run := replay.New(js, db, replay.Options{Patience: 200 * time.Millisecond})
			require.NoError(t, run.Events(t.Context(), s, sel), "old failures do not stop it")
			require.ErrorIs(t, run.Finish(t.Context()), replay.ErrStalled)
			want := replay.Progress{Published: 15 + 10, Earlier: 10, LeftOut: 5, Applied: 10, Open: 15 + 10}
			if again == "b" { // the others wait in the stream
				want = replay.Progress{Published: 15, Earlier: 20, LeftOut: 5, Applied: 10, Open: 15 + 10}
			}
			assert.Equal(t, want, run.Progress(), again)
			msg, err := s.GetLastMsgForSubject(t.Context(), "clerk.replay.mirror.clerk.user.created.user_5")
			require.NoError(t, err)
			assert.Equal(t, "run:r:mirror:6:"+again, msg.Header.Get(stream.HeaderReplayID), "at once, and not when its next attempt is due")
			assert.Equal(t, "run:r:mirror:6:"+again, msg.Header.Get(stream.HeaderMsgID))
		}
		sel.Discarded, sel.Last, sel.Again = true, 5, ""
		run := replay.New(js, db, replay.Options{StopAt: 1})
		require.NoError(t, run.Events(t.Context(), s, sel))
		assert.Equal(t, replay.Progress{Earlier: 5}, run.Progress(), "they are left out no more; the first part had published them")
	})
}
