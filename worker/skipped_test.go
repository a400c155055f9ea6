package worker_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/faults"
)

// damaged flips a bit in the record of an event while the broker is stopped.
func (r *rig) damaged(ids ...string) {
	r.t.Helper()
	r.nats.Stop()
	for _, id := range ids {
		r.nats.Damage(stream.Events, `"user_`+id+`"`)
	}
	r.nats.Start()
}

// TestADamagedRecordIsNoticed: the broker skips it, and counts it among the stored ones all the same.
func TestADamagedRecordIsNoticed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		lost   int // of 20
		fetch  bool
		failed bool
		runs   bool
	}{
		"one that no worker had":         {lost: 5},
		"the last one":                   {lost: 19},
		"one that a killed worker had":   {lost: 5, fetch: true},
		"one that waits":                 {lost: 5, failed: true},
		"one that waits, under a worker": {lost: 5, failed: true, runs: true},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, dbtest.SQLite(t), worker.Config{}, func(inner worker.Handler) worker.Handler {
				if !c.failed {
					return inner
				}
				return faults.Fail(inner, 1, faults.IDs(ids("lost", 20)...), worker.RetryAfter(assert.AnError, 5*time.Second))
			})
			r.ackWait(2 * time.Second)
			r.send(ids("before", 10)...)
			r.work()
			r.all(10)
			r.looksWell()
			if !c.failed {
				r.stop()
			}
			r.send(ids("lost", 20)...)
			if c.failed {
				require.Eventually(t, func() bool {
					var n int64
					return r.db.Table("deliveries").Where("status = 'retrying'").Count(&n).Error == nil && n == 20
				}, 60*time.Second, 10*time.Millisecond)
			}
			if c.fetch {
				consumer, err := r.js.Consumer(t.Context(), stream.Events, "effects")
				require.NoError(t, err)
				batch, err := consumer.Fetch(20)
				require.NoError(t, err)
				for range batch.Messages() {
				}
			}
			if c.failed && !c.runs {
				r.stop()
			}
			r.damaged(fmt.Sprintf("lost_%d", c.lost))
			if !c.runs {
				r.work()
			}
			says := fmt.Sprintf("1 events between the sequences %[1]d and %[1]d were skipped by the broker", 11+c.lost)
			r.says(says, "usher reconcile --full")
			r.all(29)
			assert.Equal(t, []string{"stalled"}, r.alerts(says))
			r.swept()
			require.Eventually(t, func() bool { return len(r.health.Problems()) == 0 }, 60*time.Second, 20*time.Millisecond)
			r.send("after")
			r.all(30)
			r.looksWell()
			r.stop()
			r.work()
			r.looksWell()
			assert.Equal(t, []string{"stalled", "stalled_over"}, r.alerts(says))
		})
	}
}

// TestWhatTheBrokerSkipsOnPurposeIsNoLoss: a replay for another handler, redeliveries, two workers, what was erased or purged, a record that is
// damaged and settled, and a restarted broker are no reason for an alarm.
func TestWhatTheBrokerSkipsOnPurposeIsNoLoss(t *testing.T) {
	t.Parallel()
	failing := append(ids("third", 40)[:20], ids("first", 20)[:5]...)
	r := newRig(t, dbtest.SQLite(t), worker.Config{}, func(inner worker.Handler) worker.Handler {
		return faults.Fail(inner, 1, faults.IDs(failing...), worker.RetryAfter(assert.AnError, 100*time.Millisecond))
	})
	r.send(ids("first", 20)...)
	r.work()
	r.all(20)
	r.looksWell()
	elsewhere := func(n int) {
		var last jetstream.PubAckFuture
		for i := range n {
			msg := stream.Message(userEvent(fmt.Sprint(i)))
			msg.Subject = strings.Replace(msg.Subject, "clerk.evt.", "clerk.replay.other.", 1)
			msg.Header.Del("Nats-Msg-Id")
			var err error
			last, err = r.js.PublishMsgAsync(msg)
			require.NoError(t, err)
		}
		select {
		case <-last.Ok():
		case err := <-last.Err():
			require.NoError(t, err)
		}
	}
	elsewhere(700)
	r.send(ids("second", 20)...)
	r.all(40)
	elsewhere(10)
	r.looksWell()
	stopFirst := r.stop
	r.work()
	r.send(ids("third", 40)...)
	r.all(80)
	r.looksWell()
	s, err := r.js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	for _, seq := range []uint64{3, 25, 30, 725} {
		require.NoError(t, s.DeleteMsg(t.Context(), seq))
	}
	require.NoError(t, s.Purge(t.Context(), jetstream.WithPurgeSequence(15)))
	r.damaged("third_3")
	r.send(ids("fourth", 20)...)
	r.all(100)
	r.looksWell()
	stopFirst()
	r.stop()
	r.work()
	r.send(ids("fifth", 20)...)
	r.all(120)
	r.looksWell()
	assert.Empty(t, r.alerts(""))
}

// TestARecordThatIsDamagedAtOneOfThreeBrokersIsNoticed: the server that leads the consumer skips its own copy, and others still have the event.
func TestARecordThatIsDamagedAtOneOfThreeBrokersIsNoticed(t *testing.T) {
	t.Parallel()
	cluster := natstest.NewCluster(t, 3)
	nc, js := cluster.Setup(stream.HandlerSpec{Name: "effects"})
	db := dbtest.SQLite(t)
	r := &rig{nats: cluster.Servers[0], effects: faults.NewEffects(t, db, "effects"), broker: faults.NewBroker(js)}
	r.cfg = worker.Config{Handlers: []worker.Registration{{Handler: r.effects}}}
	r.bundle = &bundle{t: t, db: db, js: r.broker}
	r.send(ids("before", 10)...)
	r.work()
	r.all(10)
	r.looksWell()
	r.stop()
	r.send(ids("lost", 20)...)
	const damaged = "n1"
	leads := func() bool {
		c, err := r.js.Consumer(t.Context(), stream.Events, "effects")
		return err == nil && c.CachedInfo().Cluster.Leader == damaged
	}
	cluster.Servers[0].Stop()
	cluster.Servers[0].Damage(stream.Events, `"user_lost_5"`)
	cluster.Servers[0].Start()
	require.Eventually(t, func() bool {
		if leads() {
			return true
		}
		_, _ = nc.Request("$JS.API.CONSUMER.LEADER.STEPDOWN."+stream.Events+".effects", []byte(`{"placement":{"preferred":"`+damaged+`"}}`), time.Second)
		return false
	}, 60*time.Second, 200*time.Millisecond)
	r.work()
	const says = "1 events between the sequences 16 and 16 were skipped by the broker"
	r.says(says)
	assert.Equal(t, []string{"stalled"}, r.alerts(says))
}
