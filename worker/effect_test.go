package worker_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/worker"
)

// effects are the values of usher_worker_effects_total of the handler mirror.
func effects(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	found := map[string]float64{}
	for _, f := range families {
		if f.GetName() != "usher_worker_effects_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "effect" {
					found[l.GetValue()] = m.GetCounter().GetValue()
				}
			}
		}
	}
	return found
}

func TestTheLogSaysWhatAnEventChanged(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		_, js := natstest.New(t).Setup(worker.Specs()...)
		reg := prometheus.NewRegistry()
		w, err := worker.New(worker.Config{}, worker.Deps{JetStream: js, DB: db, Log: zaptest.NewLogger(t), Registerer: reg, Health: &observe.Health{}})
		require.NoError(t, err)
		none := map[string]float64{}
		for _, effect := range event.Effects() {
			none[string(effect)] = 0
		}
		assert.Equal(t, none, effects(t, reg), "registered from the start")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx) }()
		b := &bundle{t: t, db: db, js: js}
		for i, e := range []struct{ id, body string }{
			{"msg_applied", `{"type":"user.created","timestamp":1768471200036,"data":{"id":"user_1","object":"user","updated_at":1768471200018}}`},
			{"msg_verb", `{"type":"user.banned","timestamp":1768471200037,"data":{"id":"user_1","object":"user","banned":true,"updated_at":1768471200020}}`},
			{"msg_older", `{"type":"user.updated","timestamp":1768471200038,"data":{"id":"user_1","object":"user","updated_at":1768471200019}}`},
			{"msg_unknown", `{"type":"user.noticed","timestamp":1768471200039,"data":{"id":"user_1","updated_at":1768471299999}}`},
			{"msg_mail", `{"type":"email.created","timestamp":1768471200039,"data":{"id":"ema_1"}}`},
			{"msg_deleted", `{"type":"user.deleted","timestamp":1768471200040,"data":{"id":"user_1","object":"user","deleted":true}}`},
			{"msg_child", `{"type":"session.created","timestamp":1768471200041,"data":{"id":"sess_1","user_id":"user_1","updated_at":1768471200041}}`},
		} {
			b.publish(e.id, []byte(e.body))
			b.settled("mirror", i+1)
		}
		b.publish("msg_bad", []byte(`{"type":"user.created","data":{}}`))
		b.settled("mirror", 8)
		var rows []struct {
			EventID string
			Effect  *string
		}
		require.NoError(t, db.Table("deliveries").Find(&rows).Error)
		said := map[string]string{}
		for _, r := range rows {
			if said[r.EventID] = "-"; r.Effect != nil {
				said[r.EventID] = *r.Effect
			}
		}
		assert.Equal(t, map[string]string{
			"msg_applied": "applied", "msg_verb": "applied", "msg_older": "older", "msg_unknown": "unknown_type", "msg_mail": "unchanged", "msg_deleted": "deleted",
			"msg_child": "deleted", "msg_bad": "-",
		}, said)
		want := map[string]float64{"applied": 2, "older": 1, "unchanged": 1, "deleted": 2, "unknown_type": 1, "stub": 0}
		require.Eventually(t, func() bool { return fmt.Sprint(effects(t, reg)) == fmt.Sprint(want) }, time.Minute, 10*time.Millisecond)
		cancel()
		require.NoError(t, <-done)
	})
}
