package worker_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zapcore"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
	"github.com/usherhq/usher/worker/internal/faults"
)

// alteration is something that an operator does to the delivery log by hand.
type alteration struct {
	name       string
	alter, fix string
	says       string // readiness
}

func TestDeliveryLogThatTakesNoRowIsAPause(t *testing.T) {
	t.Parallel()
	postgres := []alteration{
		{"required column", "ALTER TABLE deliveries ADD COLUMN tenant int; UPDATE deliveries SET tenant = 1; ALTER TABLE deliveries ALTER COLUMN tenant SET NOT NULL", "ALTER TABLE deliveries DROP COLUMN tenant", "column tenant of table deliveries"},
		{"dropped column", "ALTER TABLE deliveries RENAME COLUMN fingerprint TO fp", "ALTER TABLE deliveries RENAME COLUMN fp TO fingerprint", `column "fingerprint"`},
		{"column that is read", "ALTER TABLE deliveries RENAME COLUMN reason TO why", "ALTER TABLE deliveries RENAME COLUMN why TO reason", `"reason"`},
		{"narrowed type", "ALTER TABLE deliveries ALTER COLUMN type TYPE varchar(5) USING left(type, 5)", "ALTER TABLE deliveries ALTER COLUMN type TYPE text", "character varying(5)"},
		{"other type", "ALTER TABLE deliveries ALTER COLUMN object_id TYPE int USING 1", "ALTER TABLE deliveries ALTER COLUMN object_id TYPE text", "object_id"},
		{"raising trigger", `CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';
			CREATE TRIGGER no BEFORE INSERT ON deliveries FOR EACH ROW EXECUTE FUNCTION no()`, "DROP TRIGGER no ON deliveries", "a trigger of table deliveries"},
		{"check", "ALTER TABLE deliveries ADD CONSTRAINT hand CHECK (attempts > 5) NOT VALID", "ALTER TABLE deliveries DROP CONSTRAINT hand", "constraint hand of table deliveries"},
		{"unique index", "CREATE UNIQUE INDEX hand ON deliveries (handler)", "DROP INDEX hand", "constraint hand of table deliveries"},
		{
			"foreign key", "ALTER TABLE deliveries ADD CONSTRAINT hand FOREIGN KEY (user_id) REFERENCES users (id) NOT VALID",
			"ALTER TABLE deliveries DROP CONSTRAINT hand", "constraint hand of table deliveries",
		},
		{"lost key", "ALTER TABLE deliveries DROP CONSTRAINT deliveries_pkey CASCADE", "", "ON CONFLICT"},
	}
	sqlite := []alteration{
		{"dropped column", "ALTER TABLE deliveries RENAME COLUMN fingerprint TO fp", "ALTER TABLE deliveries RENAME COLUMN fp TO fingerprint", "no column named fingerprint"},
		{"column that is read", "ALTER TABLE deliveries RENAME COLUMN reason TO why", "ALTER TABLE deliveries RENAME COLUMN why TO reason", "no such column: reason"},
		{"raising trigger", "CREATE TRIGGER no BEFORE INSERT ON deliveries BEGIN SELECT RAISE(ABORT, 'no by hand'); END", "DROP TRIGGER no", "no by hand"},
		{"unique index", "CREATE UNIQUE INDEX hand ON deliveries (handler)", "DROP INDEX hand", "UNIQUE constraint failed: deliveries.handler"},
	}
	run := func(open func(testing.TB) *gorm.DB, list []alteration) func(*testing.T) {
		return func(t *testing.T) {
			for _, a := range list {
				t.Run(strings.ReplaceAll(a.name, " ", "_"), func(t *testing.T) {
					t.Parallel()
					db := open(t)
					r := newRig(t, db, worker.Config{Attempts: 2}, func(h worker.Handler) worker.Handler {
						return faults.Fail(h, faults.Always, faults.IDs("bad"), worker.Permanent(faults.ErrFault))
					})
					r.send("first")
					r.work()
					r.settled("effects", 1)
					key := ""
					if a.fix == "" { // with all that makes the key
						require.NoError(t, db.Raw("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'deliveries_pkey'").Scan(&key).Error)
					}
					require.NoError(t, db.Exec(a.alter).Error)
					r.send(ids("while", 5)...)
					r.send("bad")
					r.notReady("paused")
					r.notReady(a.says)
					assert.Len(t, r.effects.Count(t), 1)
					errors := r.logs.FilterLevelExact(zapcore.ErrorLevel).Len() + r.logs.FilterLevelExact(zapcore.WarnLevel).Len()
					assert.LessOrEqual(t, errors, 2*2, "one line a loop: %v", r.logs.All())
					if a.fix == "" {
						a.fix = "ALTER TABLE deliveries ADD CONSTRAINT deliveries_pkey " + key
					}
					require.NoError(t, db.Exec(a.fix).Error)
					rows, dead := r.ledger(60 * time.Second)
					assert.Equal(t, map[string]bool{"bad": true}, dead)
					for id, row := range rows {
						assert.Equal(t, 1, row.Attempts, id)
					}
				})
			}
		}
	}
	t.Run("postgres", run(dbtest.Postgres, postgres))
	t.Run("sqlite", run(dbtest.SQLite, sqlite))
}

// TestDeliveryLogThatRefusesOneEventDefersItAlone: by a rule that was made by hand and that other rows keep.
func TestDeliveryLogThatRefusesOneEventDefersItAlone(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		open       func(testing.TB) *gorm.DB
		alter, fix string
	}{
		"postgres": {dbtest.Postgres, "ALTER TABLE deliveries ADD CONSTRAINT hand CHECK (event_id NOT LIKE '%odd%')", "ALTER TABLE deliveries DROP CONSTRAINT hand"},
		"sqlite":   {dbtest.SQLite, "CREATE TRIGGER hand BEFORE INSERT ON deliveries WHEN NEW.event_id LIKE '%odd%' BEGIN SELECT RAISE(ABORT, 'hand'); END", "DROP TRIGGER hand"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := c.open(t)
			r := newRig(t, db, worker.Config{Attempts: 2, RetryInitial: time.Millisecond, RetryMax: 2 * time.Second}, func(h worker.Handler) worker.Handler {
				return faults.Fail(h, faults.Always, faults.IDs("bad", "bad_odd"), worker.Permanent(faults.ErrFault))
			})
			require.NoError(t, db.Exec(c.alter).Error)
			r.send(ids("fine", 5)...)
			r.send("odd", "bad", "bad_odd")
			r.send(ids("later", 5)...)
			r.work()
			require.Eventually(t, func() bool {
				rows := r.deliveries("effects")
				return len(rows) == 11 && rows["bad"].Status == "dead"
			}, 60*time.Second, 10*time.Millisecond)
			require.Eventually(t, func() bool {
				for _, e := range r.logs.All() {
					if e.Level == zapcore.WarnLevel && e.ContextMap()["event_id"] == "odd" && strings.Contains(fmt.Sprint(e.ContextMap()["error"]), "hand") {
						return true
					}
				}
				return false
			}, 60*time.Second, 10*time.Millisecond, "the log names the event")
			require.NoError(t, db.Exec(c.fix).Error)
			_, dead := r.ledger(60 * time.Second)
			assert.Equal(t, map[string]bool{"bad": true, "bad_odd": true}, dead)
		})
	}
}

// TestIdsThatAreTooLongAreDeadLettered: they are keys of tables, and no index takes 8 KB.
func TestIdsThatAreTooLongAreDeadLettered(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		b := start(t, db, worker.Config{})
		var long strings.Builder // does not compress
		for i := 0; long.Len() < 8<<10; i++ {
			fmt.Fprintf(&long, "%x", i*i*2654435761)
		}
		id := "user_" + long.String()
		b.publish("msg_user", user(id))
		b.publish("msg_org", fmt.Appendf(nil, `{"type":"organization.created","object":"event","data":{"id":"org_1","created_by":%q,"object":"organization"}}`, id))
		body, err := json.Marshal(map[string]any{"type": "user." + long.String(), "object": "event", "data": map[string]any{"id": "user_1", "object": "user"}})
		require.NoError(t, err)
		b.publish("msg_type", body)
		b.publish("msg_"+long.String(), user("user_of_a_long_event"))
		b.publish("msg_fine", user("user_fine"))
		rows := b.settled("mirror", 5)
		for _, id := range []string{"msg_user", "msg_org", "msg_type"} {
			assert.Equal(t, "dead", rows[id].Status, id)
			require.NotNil(t, rows[id].Reason, id)
			assert.Equal(t, "undecodable", *rows[id].Reason, id)
			require.NotNil(t, rows[id].Error, id)
			assert.Contains(t, *rows[id].Error, "at most 255", id)
		}
		assert.Equal(t, "processed", rows["msg_fine"].Status)
		assert.Len(t, b.deadLetters(), 3)
		assert.Equal(t, 2, b.count("users"), "a long id of an event is cut")
		assert.Empty(t, b.health.Problems())
	})
}

// TestLettersThatAreRefusedStopNobody: whatever keeps letters from being stored concerns the events that they are of.
func TestLettersThatAreRefusedStopNobody(t *testing.T) {
	t.Parallel()
	update := func(change func(*jetstream.StreamConfig)) func(*rig) func() {
		return func(r *rig) func() {
			s, err := r.js.Stream(r.t.Context(), stream.DeadLetters)
			require.NoError(r.t, err)
			was := s.CachedInfo().Config
			cfg := was
			change(&cfg)
			_, err = r.js.UpdateStream(r.t.Context(), cfg)
			require.NoError(r.t, err)
			return func() {
				_, err := r.js.UpdateStream(r.t.Context(), was)
				require.NoError(r.t, err)
			}
		}
	}
	recreate := func(r *rig) {
		ctx := r.t.Context()
		_ = r.js.DeleteStream(ctx, stream.DeadLetters)
		for _, cfg := range (stream.Topology{Replicas: 1, MaxBytes: 1 << 30}).Streams() {
			if cfg.Name == stream.DeadLetters {
				_, err := r.js.CreateStream(ctx, cfg)
				require.NoError(r.t, err)
			}
		}
	}
	for name, c := range map[string]struct {
		brk  func(*rig) (fix func())
		says string
	}{
		"missing": {func(r *rig) func() {
			require.NoError(r.t, r.js.DeleteStream(r.t.Context(), stream.DeadLetters))
			return func() { recreate(r) }
		}, "run `usher setup`"},
		"max_msg_size":   {update(func(c *jetstream.StreamConfig) { c.MaxMsgSize = 64 }), "max_msg_size"},
		"full":           {update(func(c *jetstream.StreamConfig) { c.MaxBytes = 1 }), "replay or discard dead letters"},
		"other subjects": {update(func(c *jetstream.StreamConfig) { c.Subjects = []string{"elsewhere.>"} }), "run `usher setup`"},
		"sealed": {func(r *rig) func() {
			s, err := r.js.Stream(r.t.Context(), stream.DeadLetters)
			require.NoError(r.t, err)
			cfg := s.CachedInfo().Config
			cfg.Sealed, cfg.Discard = true, jetstream.DiscardNew
			cfg.MaxAge = 0
			_, err = r.js.UpdateStream(r.t.Context(), cfg)
			require.NoError(r.t, err)
			return func() { recreate(r) }
		}, "is sealed"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, dbtest.SQLite(t), worker.Config{RetryMax: 500 * time.Millisecond, RetryInitial: time.Millisecond}, func(h worker.Handler) worker.Handler {
				return faults.Fail(h, faults.Always, func(e *event.Event) bool { return strings.HasPrefix(e.ID, "bad") }, worker.Permanent(faults.ErrFault))
			})
			fix := c.brk(r)
			r.work()
			r.send(ids("bad", 40)...)
			r.send(ids("fine", 40)...)
			require.Eventually(t, func() bool {
				return len(r.effects.Count(t)) == 40 && strings.Contains(r.health.Problems()["dead letters"], c.says)
			}, 60*time.Second, 10*time.Millisecond, "%v", r.health.Problems())
			require.Eventually(t, func() bool { return r.deliveries("effects")["bad_0"].Status == "retrying" }, 60*time.Second, 10*time.Millisecond)
			assert.Zero(t, r.paused())
			assert.Equal(t, 1, r.logs.FilterMessageSnippet("dead letter not stored").Len(), "one line a minute")
			fix()
			_, dead := r.ledger(60 * time.Second)
			assert.Len(t, dead, 40)
			require.Eventually(t, func() bool { return len(r.health.Problems()) == 0 }, 60*time.Second, 10*time.Millisecond)
		})
	}
}

// TestOneLetterThatIsTooLargeStopsNobody: the broker takes less than it did when the event came.
func TestOneLetterThatIsTooLargeStopsNobody(t *testing.T) {
	t.Parallel()
	r := newRig(t, dbtest.SQLite(t), worker.Config{RetryMax: 500 * time.Millisecond, RetryInitial: time.Millisecond}, func(h worker.Handler) worker.Handler {
		return faults.Fail(h, faults.Always, func(e *event.Event) bool { return strings.HasPrefix(e.ID, "bad") }, worker.Permanent(faults.ErrFault))
	})
	large := userEvent("bad_large")
	large.Raw = fmt.Appendf(nil, `{"type":"user.created","data":{"id":"user_large","object":"user","first_name":%q}}`, strings.Repeat("x", 300<<10))
	_, err := r.js.PublishMsg(t.Context(), stream.Message(large))
	require.NoError(t, err)
	r.accepted = append(r.accepted, large.ID)
	r.send("bad_small")
	r.send(ids("fine", 20)...)
	r.nats.Stop()
	r.nats.MaxPayload(256 << 10)
	r.nats.Start()
	require.Eventually(t, r.js.Conn().IsConnected, 60*time.Second, 10*time.Millisecond)
	r.work()
	require.Eventually(t, func() bool {
		rows := r.deliveries("effects")
		return len(r.effects.Count(t)) == 20 && rows["bad_small"].Status == "dead" && rows["bad_large"].Status == "retrying" &&
			strings.Contains(r.health.Problems()["dead letters"], "raise its max_payload")
	}, 60*time.Second, 10*time.Millisecond)
	assert.Zero(t, r.paused())
	r.stop()
	r.nats.Stop()
	r.nats.MaxPayload(2 << 20)
	r.nats.Start()
	require.Eventually(t, r.js.Conn().IsConnected, 60*time.Second, 10*time.Millisecond)
	r.work()
	_, dead := r.ledger(60 * time.Second)
	assert.Equal(t, map[string]bool{"bad_small": true, "bad_large": true}, dead)
}

// TestDeadEventIsNotSwallowedAfterTheBrokerWasRecreated: the sender sends it again, and it gets the sequence that it had before.
func TestDeadEventIsNotSwallowedAfterTheBrokerWasRecreated(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{Attempts: 1}, func(h worker.Handler) worker.Handler {
			return faults.Fail(h, 1, faults.IDs("bad"), faults.ErrFault)
		})
		r.send("bad")
		r.work()
		r.settled("effects", 1)
		r.stop()
		ctx := t.Context()
		require.NoError(t, r.js.DeleteStream(ctx, stream.Events))
		topology := stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{{Name: "effects"}}}
		_, err := topology.Ensure(ctx, r.js)
		require.NoError(t, err)
		r.send("bad")
		r.work()
		require.Eventually(t, func() bool { return r.deliveries("effects")["bad"].Status == "processed" }, 60*time.Second, 10*time.Millisecond)
		assert.Equal(t, map[string]int{"bad": 1}, r.effects.Count(t))
	})
}

// TestDeadRowWhoseLetterIsGoneIsNotSettled: a crash came between the row and the end of the original, and meanwhile the letters were lost.
func TestDeadRowWhoseLetterIsGoneIsNotSettled(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		r := newRig(t, db, worker.Config{Attempts: 1}, func(h worker.Handler) worker.Handler {
			return faults.Fail(h, faults.Always, faults.IDs("bad", "bad_kept"), faults.ErrFault)
		})
		r.ackWait(300 * time.Millisecond)
		r.broker.LoseTerms.Store(1 << 30)
		r.broker.LoseAcks.Store(1 << 30)
		r.send("bad")
		r.work()
		require.Eventually(t, func() bool { return r.deliveries("effects")["bad"].Status == "dead" }, 60*time.Second, 10*time.Millisecond)
		r.stop()
		require.NoError(t, r.js.DeleteStream(t.Context(), stream.DeadLetters))
		_, err := (stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{{Name: "effects"}}}).Ensure(t.Context(), r.js)
		require.NoError(t, err)
		r.broker.LoseTerms.Store(0)
		r.broker.LoseAcks.Store(0)
		r.work()
		_, dead := r.ledger(60 * time.Second)
		assert.Equal(t, map[string]bool{"bad": true}, dead)
	})
}
