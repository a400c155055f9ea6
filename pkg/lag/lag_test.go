package lag_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/lag"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

// gather is what a scrape would show: series by name{label}.
func gather(t require.TestingT, reg *prometheus.Registry) map[string]float64 {
	families, err := reg.Gather()
	require.NoError(t, err)
	series := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "{" + l.GetValue() + "}"
			}
			series[name] = m.GetGauge().GetValue()
		}
	}
	return series
}

func deliver(t *testing.T, db *gorm.DB, handler, status string, n int) {
	t.Helper()
	for i := range n {
		require.NoError(t, db.Table("deliveries").Create(map[string]any{
			"handler": handler, "event_id": fmt.Sprintf("%s_%s_%d", handler, status, i), "type": "user.created", "source": "clerk", "origin": "webhook",
			"object_id": "user_1", "status": status, "attempts": 1, "received_at": time.Now().UTC(),
		}).Error)
	}
}

func TestItShowsWhatEveryHandlerHasNotSettled(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		broker := natstest.New(t)
		_, js := broker.Setup(stream.HandlerSpec{Name: "mirror"}, stream.HandlerSpec{Name: "fraud", Filters: []string{"session.>"}})
		for name, cfg := range map[string]jetstream.ConsumerConfig{
			"listen-ada": {Durable: "listen-ada", AckPolicy: jetstream.AckExplicitPolicy},
			"passing":    {Name: "passing", AckPolicy: jetstream.AckExplicitPolicy, InactiveThreshold: time.Hour},
			"billing":    {Durable: "billing", AckPolicy: jetstream.AckExplicitPolicy, FilterSubject: "clerk.evt.*.user.>"},
		} {
			_, err := js.CreateConsumer(t.Context(), stream.Events, cfg)
			require.NoError(t, err, name)
		}
		for i := range 5 {
			_, err := js.Publish(t.Context(), fmt.Sprintf("clerk.evt.clerk.user.created.user_%d", i), []byte("{}"))
			require.NoError(t, err)
		}
		mirror, err := js.Consumer(t.Context(), stream.Events, "mirror")
		require.NoError(t, err)
		held, err := mirror.Fetch(3)
		require.NoError(t, err)
		n := 0
		for msg := range held.Messages() {
			if n++; n == 1 {
				require.NoError(t, msg.DoubleAck(t.Context()))
			}
		}
		deliver(t, db, "mirror", "processed", 4)
		deliver(t, db, "mirror", "discarded", 4)
		deliver(t, db, "mirror", "retrying", 2)
		deliver(t, db, "mirror", "dead", 3)
		deliver(t, db, "former", "dead", 1) // its consumer is gone, its dead letters are not

		reg := prometheus.NewPedanticRegistry()
		watch, err := lag.New(js, db, zap.NewNop(), reg)
		require.NoError(t, err)
		assert.Equal(t, map[string]float64{"usher_lag_last_success_timestamp_seconds{broker}": 0, "usher_lag_last_success_timestamp_seconds{database}": 0},
			gather(t, reg), "nothing is claimed before the first look")
		watch.Look(t.Context())
		got := gather(t, reg)
		assert.Positive(t, got["usher_consumer_oldest_seconds{mirror}"])
		assert.Positive(t, got["usher_consumer_oldest_seconds{billing}"])
		assert.Positive(t, got["usher_stream_bytes{CLERK_EVENTS}"])
		for _, from := range []string{"broker", "database"} {
			name := "usher_lag_last_success_timestamp_seconds{" + from + "}"
			assert.InDelta(t, time.Now().Unix(), got[name], 60)
			delete(got, name)
		}
		for _, name := range []string{"usher_consumer_oldest_seconds{mirror}", "usher_consumer_oldest_seconds{billing}", "usher_stream_bytes{CLERK_EVENTS}"} {
			delete(got, name)
		}
		assert.Equal(t, map[string]float64{
			"usher_consumer_pending{mirror}": 4, "usher_consumer_in_flight{mirror}": 2, "usher_consumer_retrying{mirror}": 2, "usher_dead_letters{mirror}": 3,
			"usher_consumer_pending{fraud}": 0, "usher_consumer_in_flight{fraud}": 0, "usher_consumer_oldest_seconds{fraud}": 0,
			"usher_consumer_retrying{fraud}": 0, "usher_dead_letters{fraud}": 0,
			"usher_consumer_pending{billing}": 5, "usher_consumer_in_flight{billing}": 0, "usher_consumer_retrying{billing}": 0, "usher_dead_letters{billing}": 0,
			"usher_consumer_retrying{former}": 0, "usher_dead_letters{former}": 1,
			"usher_stream_max_bytes{CLERK_EVENTS}": 1 << 30, "usher_stream_bytes{CLERK_DLQ}": 0, "usher_stream_max_bytes{CLERK_DLQ}": (1 << 30) / 10,
		}, got)
	})
}

func TestWhatCannotBeReadIsNotShownAsFresh(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	_, js := broker.Setup(stream.HandlerSpec{Name: "mirror"})
	db := dbtest.SQLite(t)
	reg := prometheus.NewPedanticRegistry()
	core, logs := observer.New(zap.InfoLevel)
	watch, err := lag.New(js, nil, zap.New(core), reg)
	require.NoError(t, err)
	watch.LookEvery(20 * time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- watch.Run(ctx) }()
	defer func() {
		cancel()
		require.NoError(t, <-done)
	}()
	shown := func(name string, want bool) {
		t.Helper()
		require.EventuallyWithT(t, func(c *assert.CollectT) {
			_, is := gather(c, reg)[name]
			assert.Equal(c, want, is, name)
		}, time.Minute, 10*time.Millisecond)
	}
	shown("usher_consumer_pending{mirror}", true)
	shown("usher_dead_letters{mirror}", false)
	watch.UseDatabase(db)
	shown("usher_dead_letters{mirror}", true)

	broker.Stop()
	shown("usher_consumer_pending{mirror}", false)
	shown("usher_stream_bytes{CLERK_EVENTS}", false)
	shown("usher_dead_letters{mirror}", true)
	assert.Positive(t, gather(t, reg)["usher_lag_last_success_timestamp_seconds{broker}"], "when it was last known stays known")
	broker.Start()
	shown("usher_consumer_pending{mirror}", true)
	told := logs.FilterMessage("lag cannot be read, and is not shown until it can").All()
	require.Len(t, told, 1, "an outage is told once")
	assert.Contains(t, told[0].ContextMap()["error"], stream.ErrUnavailable.Error())
	assert.NotContains(t, told[0].ContextMap()["error"], "nats: ")
	require.Eventually(t, func() bool { return logs.FilterMessage("lag can be read again").Len() == 1 }, time.Minute, 10*time.Millisecond)
	require.NoError(t, db.Exec("ALTER TABLE deliveries RENAME TO elsewhere").Error)
	shown("usher_dead_letters{mirror}", false)
	shown("usher_consumer_pending{mirror}", true)
}

func TestOneProcessHasOneWatch(t *testing.T) {
	t.Parallel()
	_, js := natstest.New(t).Connect()
	reg := prometheus.NewRegistry()
	_, err := lag.New(js, nil, zap.NewNop(), reg)
	require.NoError(t, err)
	_, err = lag.New(js, nil, zap.NewNop(), reg)
	require.ErrorAs(t, err, &prometheus.AlreadyRegisteredError{})
}
