package worker_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// publishOf stores an event of a source.
func (b *bundle) publishOf(source, id string, body []byte) {
	b.t.Helper()
	e, err := event.Decode(body)
	require.NoError(b.t, err)
	e.ID, e.Source, e.Origin, e.ReceivedAt = id, source, event.OriginWebhook, time.Now()
	ack, err := b.js.PublishMsg(b.t.Context(), stream.Message(&e))
	require.NoError(b.t, err)
	assert.False(b.t, ack.Duplicate)
}

// TestAnEqualIDOfAnotherSourceSuppressesNothing: whoever has the secret of one source may choose its ids.
func TestAnEqualIDOfAnotherSourceSuppressesNothing(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		b := start(t, db, worker.Config{})
		b.publishOf("staging", "msg_1", user("user_s"))
		b.publishOf("clerk", "msg_1", user("user_c"))
		b.publishOf("clerk", "msg_last", user("user_last"))
		b.settled("mirror", 2) // msg_1 and msg_last
		var owners []string
		require.Eventually(t, func() bool {
			require.NoError(t, db.Table("users").Order("id").Pluck("id || ' ' || source", &owners).Error)
			return len(owners) == 3
		}, time.Minute, 10*time.Millisecond)
		assert.Equal(t, []string{"user_c clerk", "user_last clerk", "user_s staging"}, owners)
		assert.Equal(t, 3, b.count("deliveries"))
		assert.Empty(t, b.deadLetters())
	})
}

// TestAnEventAboutAnotherSourcesObjectIsDeadLettered at once, while the others of its batch are applied.
func TestAnEventAboutAnotherSourcesObjectIsDeadLettered(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		b := start(t, db, worker.Config{})
		b.publishOf("clerk", "msg_1", user("user_1"))
		b.settled("mirror", 1)
		b.publishOf("staging", "msg_2", []byte(strings.ReplaceAll(string(user("user_1")), "Ada", "Eve")))
		b.publishOf("staging", "msg_3", []byte(`{"type":"user.deleted","timestamp":2000000000000,"data":{"id":"user_1","deleted":true}}`))
		b.publishOf("clerk", "msg_4", user("user_2"))
		rows := b.settled("mirror", 4)
		for id, status := range map[string]string{"msg_1": "processed", "msg_2": "dead", "msg_3": "dead", "msg_4": "processed"} {
			assert.Equal(t, status, rows[id].Status, id)
			if status == "dead" {
				assert.Equal(t, "wrong_source", *rows[id].Reason)
				assert.Equal(t, 1, rows[id].Attempts)
			}
		}
		var name string
		require.NoError(t, db.Table("users").Where("id = 'user_1' AND source = 'clerk' AND deleted_at IS NULL").Pluck("first_name", &name).Error)
		assert.Equal(t, "Ada", name)
		assert.Len(t, b.deadLetters(), 2)
	})
}
