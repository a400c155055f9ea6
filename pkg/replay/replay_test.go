package replay_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

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
	for range 2 { // the second time the broker knows them all
		run := replay.New(js, db, replay.Options{StopAt: 1})
		require.NoError(t, run.Events(t.Context(), s, sel))
		assert.Equal(t, 18, run.Progress().Published)
	}
	counted, err := replay.Count(t.Context(), js, sel)
	require.NoError(t, err)
	assert.Equal(t, 20, counted, "with those behind the last")
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
