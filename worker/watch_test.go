package worker_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/outbox"
	"github.com/usherhq/usher/pkg/replay"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// says waits until the readiness of the stream holds all of want.
func (r *rig) says(want ...string) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		text := r.health.Problems()["stream of effects"]
		for _, w := range want {
			if !strings.Contains(text, w) {
				return false
			}
		}
		return true
	}, 60*time.Second, 20*time.Millisecond, "%v", func() string { return fmt.Sprint(r.health.Problems()) }())
	assert.Positive(r.t, r.gauge("usher_worker_stream_gap"))
}

// looks waits until the worker has compared broker and database once more after now, and found nothing.
func (r *rig) looksWell() {
	r.t.Helper()
	for range 2 {
		from := time.Now()
		require.Eventually(r.t, func() bool {
			var at []time.Time
			return r.db.Table("stream_watch").Where("handler = 'effects'").Pluck("seen_at", &at).Error == nil && len(at) == 1 && at[0].After(from)
		}, 60*time.Second, 20*time.Millisecond)
	}
	require.Eventually(r.t, func() bool { return len(r.health.Problems()) == 0 }, 60*time.Second, 20*time.Millisecond, "another look may be slower to begin")
	assert.Zero(r.t, r.gauge("usher_worker_stream_gap"))
}

func (r *rig) gauge(name string) float64 {
	families, err := r.registry.Gather()
	require.NoError(r.t, err)
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	r.t.Fatal("no metric " + name)
	return 0
}

// takenBack makes the database one that has settled nothing behind a sequence.
func (r *rig) takenBack(to int) {
	r.t.Helper()
	require.NoError(r.t, r.db.Exec("DELETE FROM effects WHERE event_id IN (SELECT event_id FROM deliveries WHERE stream_seq > ?)", to).Error)
	require.NoError(r.t, r.db.Exec("DELETE FROM deliveries WHERE stream_seq > ?", to).Error)
	require.NoError(r.t, r.db.Exec("UPDATE stream_watch SET last_seq = ?, floor_seq = ?", to, to).Error)
}

// replayed gives events to the handler again, as `usher replay --from-seq` does.
func (r *rig) replayed(from, to uint64) {
	r.t.Helper()
	s, err := r.js.Stream(r.t.Context(), stream.Events)
	require.NoError(r.t, err)
	for seq := from; seq <= to; seq++ {
		msg, err := s.GetMsg(r.t.Context(), seq)
		require.NoError(r.t, err)
		_, err = r.js.PublishMsg(r.t.Context(), replay.NewItem("effects", fmt.Sprintf("run:%d", seq), msg).Message)
		require.NoError(r.t, err)
	}
}

// swept is a full sweep that has succeeded.
func (r *rig) swept() {
	r.t.Helper()
	now := time.Now().UTC().Add(time.Second)
	require.NoError(r.t, r.db.Table("reconcile_runs").Create(map[string]any{
		"id": "run_1", "source": "clerk", "kind": "full", "status": "succeeded", "holder": "x", "lease_rev": 1,
		"started_at": now, "updated_at": now, "state": "{}", "checked": "{}",
	}).Error)
}

func (r *rig) all(n int) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		c, err := r.js.Consumer(context.Background(), stream.Events, "effects")
		return len(r.effects.Count(r.t)) == n && err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	}, 60*time.Second, 20*time.Millisecond)
}

func TestADatabaseThatIsBehindTheBrokerIsNoticed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		running bool
		back    func(*rig)
		from    uint64
	}{
		"a backup":                     {false, func(r *rig) { r.takenBack(12) }, 13},
		"a backup, under a worker":     {true, func(r *rig) { r.takenBack(12) }, 13},
		"an empty one":                 {false, func(r *rig) { r.takenBack(0); require.NoError(r.t, r.db.Exec("DELETE FROM stream_watch").Error) }, 1},
		"an empty one, under a worker": {true, func(r *rig) { r.takenBack(0); require.NoError(r.t, r.db.Exec("DELETE FROM stream_watch").Error) }, 1},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
				r := newRig(t, db, worker.Config{}, nil)
				r.send(ids("before", 30)...)
				r.work()
				r.all(30)
				r.looksWell()
				if !c.running {
					r.stop()
				}
				c.back(r)
				r.send(ids("after", 5)...)
				if !c.running {
					r.work()
				}
				r.says("the database lacks events that were settled", fmt.Sprintf("usher replay --from-seq %d --handler effects", c.from))
				r.stop()
				r.work() // it is remembered
				r.says(fmt.Sprintf("--from-seq %d ", c.from))
				r.replayed(c.from, 30)
				r.all(35)
				r.looksWell()
			})
		})
	}
}

// alerts are the kinds of the alerts, each of which holds text.
func (r *rig) alerts(text string) []string {
	r.t.Helper()
	var rows []outbox.Notification
	require.NoError(r.t, r.db.Order("created_at, kind").Find(&rows).Error)
	var kinds []string
	for _, n := range rows {
		assert.Contains(r.t, n.Body, text)
		kinds = append(kinds, n.Kind)
	}
	return kinds
}

// TestWhatTheLogDoesNotTakeIsMissedAllTheSame: the newest events are lost while nothing could be compared, and an operator accepts that.
func TestWhatTheLogDoesNotTakeIsMissedAllTheSame(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{}, nil)
		r.send(ids("before", 10)...)
		r.work()
		r.all(10)
		r.looksWell()
		require.NoError(t, db.Exec("ALTER TABLE deliveries RENAME TO elsewhere").Error)
		r.send(ids("lost", 20)...)
		require.Eventually(t, func() bool {
			var last []int64
			return db.Table("stream_watch").Pluck("last_seq", &last).Error == nil && len(last) == 1 && last[0] == 30
		}, 60*time.Second, 20*time.Millisecond)
		r.stop()
		require.NoError(t, db.Exec("ALTER TABLE elsewhere RENAME TO deliveries").Error)
		require.NoError(t, r.js.DeleteStream(t.Context(), stream.Events))
		_, err := (stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{{Name: "effects"}}}).Ensure(t.Context(), r.js)
		require.NoError(t, err)
		r.work()
		r.says("20 of its events had not been settled", "usher setup --accept-loss")
		accepted, err := worker.AcceptLoss(t.Context(), db, outbox.Alerts{})
		require.NoError(t, err)
		require.Len(t, accepted, 1)
		assert.Contains(t, accepted[0], "handler effects: the stream was recreated")
		require.Eventually(t, func() bool { return len(r.health.Problems()) == 0 }, 60*time.Second, 20*time.Millisecond)
		r.looksWell()
		assert.Equal(t, []string{"stalled", "stalled_over"}, r.alerts("20 of its events had not been settled"))
		accepted, err = worker.AcceptLoss(t.Context(), db, outbox.Alerts{})
		require.NoError(t, err)
		assert.Empty(t, accepted)
	})
}

// TestAStopRemembersHowFarTheStreamHasCome: what came just before it is missed when the broker loses it.
func TestAStopRemembersHowFarTheStreamHasCome(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{}, nil)
	r.work()
	r.looksWell()
	r.send(ids("late", 30)...)
	r.all(30)
	r.stop()
	var last []int64
	require.NoError(t, r.db.Table("stream_watch").Pluck("last_seq", &last).Error)
	assert.Equal(t, []int64{30}, last)
}

func TestEventsThatTheStreamHasLostAreNoticed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		lose func(*rig)
		says string
	}{
		"a hole": {func(r *rig) {
			s, err := r.js.Stream(r.t.Context(), stream.Events)
			require.NoError(r.t, err)
			for seq := uint64(20); seq < 30; seq++ {
				require.NoError(r.t, s.DeleteMsg(r.t.Context(), seq))
			}
		}, "10 events between the sequences 20 and 29 are gone from the stream"},
		"the first ones": {func(r *rig) {
			s, err := r.js.Stream(r.t.Context(), stream.Events)
			require.NoError(r.t, err)
			for seq := uint64(1); seq < 20; seq++ {
				require.NoError(r.t, s.DeleteMsg(r.t.Context(), seq))
			}
		}, "9 events up to sequence 19 are gone from the stream"},
		"the last ones": {func(r *rig) { // the database has seen a later state of the broker
			require.NoError(r.t, r.db.Exec("UPDATE stream_watch SET last_seq = last_seq + 40").Error)
		}, "the stream went back"},
		"all": {func(r *rig) {
			require.NoError(r.t, r.js.DeleteStream(r.t.Context(), stream.Events))
			_, err := (stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{{Name: "effects"}}}).Ensure(r.t.Context(), r.js)
			require.NoError(r.t, err)
		}, "the stream was recreated, and 20 of its events had not been settled"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, dbtest.SQLite(t), worker.Config{}, nil)
			r.send(ids("before", 10)...)
			r.work()
			r.all(10)
			r.looksWell()
			r.stop()
			r.send(ids("lost", 20)...)
			// Another worker has seen them, and died.
			require.NoError(t, r.db.Exec("UPDATE stream_watch SET last_seq = 30").Error)
			c.lose(r)
			r.work()
			r.says(c.says, "usher reconcile --full")
			assert.Equal(t, []string{"stalled"}, r.alerts(c.says))
			r.swept()
			require.Eventually(t, func() bool { return len(r.health.Problems()) == 0 }, 60*time.Second, 20*time.Millisecond)
			r.send("after")
			require.Eventually(t, func() bool { return r.effects.Count(t)["after"] == 1 }, 60*time.Second, 20*time.Millisecond)
			r.looksWell()
			assert.Equal(t, []string{"stalled", "stalled_over"}, r.alerts(c.says))
		})
	}
}

// TestWhatIsRemovedOnPurposeIsNoLoss: false alarms are worse than none.
func TestWhatIsRemovedOnPurposeIsNoLoss(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{Retention: time.Millisecond, PurgeInterval: 50 * time.Millisecond}, nil)
		r.send(ids("first", 100)...)
		r.work()
		r.all(100)
		require.Eventually(t, func() bool { return r.streamState().Msgs == 0 }, 60*time.Second, 20*time.Millisecond)
		r.looksWell()
		r.stop()
		r.cfg.Retention, r.cfg.PurgeInterval = 0, 0
		r.work()
		r.send(ids("second", 50)...)
		r.all(150)
		s, err := r.js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		for _, seq := range []uint64{110, 111, 120} { // one person's, erased
			require.NoError(t, s.DeleteMsg(t.Context(), seq))
		}
		r.looksWell()
		require.NoError(t, s.Purge(t.Context())) // by hand, all of it settled
		r.send("third")
		r.all(151)
		r.looksWell()
		require.NoError(t, r.js.DeleteStream(t.Context(), stream.Events)) // an operator begins again
		_, err = (stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{{Name: "effects"}}}).Ensure(t.Context(), r.js)
		require.NoError(t, err)
		r.send(ids("fourth", 3)...)
		r.all(154)
		r.looksWell()
		r.stop()
		r.work()
		r.looksWell()
	})
}

// TestTwoBrokersOnOneDatabase: one Usher works, the other says why it does not, and takes over when the first has ended.
func TestTwoBrokersOnOneDatabase(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		first := newRig(t, db, worker.Config{}, nil)
		first.send(ids("first", 5)...)
		first.work()
		first.all(5)
		second := newRig(t, db, worker.Config{}, nil)
		second.send(ids("second", 5)...)
		second.work()
		second.notReady("this database belongs to another broker, which is at work")
		assert.Empty(t, first.health.Problems())
		assert.Equal(t, 1.0, second.gauge("usher_worker_paused")) //nolint:testifylint // exact
		first.send("first_more")
		first.all(6)
		assert.Len(t, first.effects.Count(t), 6, "nothing of the second")
		assert.Equal(t, 1, second.logs.FilterLevelExact(zap.WarnLevel).Len()+second.logs.FilterLevelExact(zap.ErrorLevel).Len(), "said once: %v", second.logs.All())
		first.stop()
		require.Eventually(t, func() bool { return len(second.effects.Count(t)) == 11 }, 60*time.Second, 20*time.Millisecond)
		require.Eventually(t, func() bool { return len(second.health.Problems()) == 0 }, 60*time.Second, 20*time.Millisecond)
	})
}

// TestWorkersOfOneBrokerShareTheDatabase: any number of them is normal, and so is one that ends.
func TestWorkersOfOneBrokerShareTheDatabase(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{}, nil)
		r.work()
		stopFirst, health := r.stop, []*observe.Health{r.health}
		r.work()
		health = append(health, r.health)
		r.send(ids("fine", 50)...)
		r.all(50)
		r.looksWell()
		stopFirst()
		r.looksWell()
		for _, h := range health {
			assert.Empty(t, h.Problems())
		}
	})
}
