package reconciler_test

import (
	"context"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/reconciler"
)

// world is an emulated Clerk with its API, a broker, a database, and a hand that applies events as the worker does.
type world struct {
	t      *testing.T
	clerk  *emulator.Clerk
	api    *emulator.API
	server *httptest.Server
	nats   *natstest.Server
	js     jetstream.JetStream
	db     *gorm.DB
}

const (
	key = "sk_test_world"
	// page is how many objects a page of Clerk's has here: a tenth of the real ones, so that worlds of several pages are small.
	page = 50
)

func newWorld(t *testing.T, db *gorm.DB, cfg emulator.APIConfig) *world {
	t.Helper()
	w := &world{t: t, clerk: emulator.New(emulator.Config{Seed: 5}), nats: natstest.New(t), db: db}
	_, w.js = w.nats.Setup(stream.HandlerSpec{Name: "mirror"})
	w.serve(cfg)
	return w
}

// serve opens an API, in place of the one before.
func (w *world) serve(cfg emulator.APIConfig) {
	w.t.Helper()
	w.serveTo(key, cfg)
}

func (w *world) serveTo(key string, cfg emulator.APIConfig) {
	w.t.Helper()
	cfg.Key = key
	w.api = w.clerk.API(cfg)
	w.server = httptest.NewServer(w.api)
	w.t.Cleanup(w.server.Close)
}

func (w *world) source() clerk.Source {
	return clerk.Source{Name: "clerk", APIURL: w.server.URL + "/v1", SecretKey: key, Quota: -1, PageSize: page}
}

// sweeper is one as a process has it.
func (w *world) sweeper(change ...func(*reconciler.SweepConfig)) *reconciler.Sweeper {
	w.t.Helper()
	metrics := reconciler.NewMetrics(nil)
	client, err := reconciler.Client(w.source(), zap.NewNop(), metrics)
	require.NoError(w.t, err)
	w.t.Cleanup(client.Close)
	return w.sweeperOf(client, change...)
}

// loggingSweeper is one whose log is looked at.
func (w *world) loggingSweeper(log *zap.Logger, change ...func(*reconciler.SweepConfig)) *reconciler.Sweeper {
	w.t.Helper()
	client, err := reconciler.Client(w.source(), zap.NewNop(), reconciler.NewMetrics(nil))
	require.NoError(w.t, err)
	w.t.Cleanup(client.Close)
	return w.build(client, log, change...)
}

func (w *world) sweeperOf(api reconciler.API, change ...func(*reconciler.SweepConfig)) *reconciler.Sweeper {
	w.t.Helper()
	return w.build(api, zap.NewNop(), change...)
}

func (w *world) build(api reconciler.API, log *zap.Logger, change ...func(*reconciler.SweepConfig)) *reconciler.Sweeper {
	w.t.Helper()
	publisher := stream.NewPublisher(w.js, 1)
	w.t.Cleanup(publisher.Close)
	cfg := reconciler.SweepConfig{Source: "clerk", Pause: 20 * time.Millisecond}
	for _, f := range change {
		f(&cfg)
	}
	return reconciler.NewSweeper(cfg, reconciler.SweepDeps{API: api, DB: w.db, JS: w.js, Publisher: publisher, Log: log})
}

// tell tells a story and applies those of its events that keep says, of the tables that sweeps compare: they are less than half of it.
func (w *world) tell(users int, keep func(emulator.Event) bool) {
	w.t.Helper()
	var events []emulator.Event
	for e := range w.clerk.Story(users) {
		noun, _, _ := strings.Cut(e.Type, ".")
		if (compared[noun] || strings.HasPrefix(noun, "organization")) && keep(e) {
			events = append(events, e)
		}
	}
	w.deliver(events...)
}

var compared = map[string]bool{"user": true, "role": true, "permission": true, "waitlistEntry": true}

func all(emulator.Event) bool { return true }

// deliver applies events as if they had come by webhook.
func (w *world) deliver(events ...emulator.Event) {
	w.t.Helper()
	batch := make([]event.Event, len(events))
	for i, e := range events {
		decoded, err := event.Decode(e.Body)
		require.NoError(w.t, err)
		decoded.ID, decoded.Source, decoded.Origin, decoded.ReceivedAt = e.ID, "clerk", event.OriginWebhook, time.Now()
		batch[i] = decoded
	}
	require.NoError(w.t, apply(w.t.Context(), w.db, batch))
}

// apply is the worker's transaction.
func apply(ctx context.Context, db *gorm.DB, batch []event.Event) error {
	return database.InTx(ctx, db, func(tx *gorm.DB) error {
		for events := range slices.Chunk(batch, 500) {
			rows := make([]map[string]any, len(events))
			for i := range events {
				rows[i] = map[string]any{
					"handler": "mirror", "event_id": events[i].ID, "type": events[i].Type, "source": events[i].Source, "origin": events[i].Origin,
					"status": "processed", "received_at": time.Now().UTC(),
				}
			}
			if err := tx.Table("deliveries").Clauses(clause.OnConflict{DoNothing: true}).Create(rows).Error; err != nil {
				return err
			}
		}
		_, err := mirror.Apply(ctx, tx, batch)
		return err
	})
}

// settle applies and acks what lies in the stream, and returns it.
func (w *world) settle() []event.Event {
	w.t.Helper()
	consumer, err := w.js.Consumer(w.t.Context(), stream.Events, "mirror")
	require.NoError(w.t, err)
	var applied []event.Event
	for {
		batch, err := consumer.FetchNoWait(500)
		require.NoError(w.t, err)
		var events []event.Event
		var messages []jetstream.Msg
		for msg := range batch.Messages() {
			meta, err := msg.Metadata()
			require.NoError(w.t, err)
			e, err := stream.Parse(msg.Headers(), msg.Data(), meta.Sequence.Stream)
			require.NoError(w.t, err)
			events = append(events, e)
			messages = append(messages, msg)
		}
		if len(events) == 0 {
			return applied
		}
		require.NoError(w.t, apply(w.t.Context(), w.db, events))
		for _, msg := range messages[1:] {
			require.NoError(w.t, msg.Ack())
		}
		require.NoError(w.t, messages[0].DoubleAck(w.t.Context())) // acks are taken in their order
		applied = append(applied, events...)
	}
}

func (w *world) verify() *reconciler.Report {
	w.t.Helper()
	report, err := w.sweeper().Verify(w.t.Context(), reconciler.Options{})
	require.NoError(w.t, err)
	return report
}

func (w *world) full(opts reconciler.Options) (*reconciler.Report, error) {
	w.t.Helper()
	opts.Kind = reconciler.Full
	return w.sweeper().Reconcile(w.t.Context(), opts)
}

// living are the ids of the rows that live.
func (w *world) living(table string) map[string]bool {
	w.t.Helper()
	var ids []string
	require.NoError(w.t, w.db.Table(table).Where("deleted_at IS NULL").Pluck("id", &ids).Error)
	living := map[string]bool{}
	for _, id := range ids {
		living[id] = true
	}
	return living
}

// nobodyWronged asserts that every living object that was mirrored still is.
func (w *world) nobodyWronged(before map[string]bool) {
	w.t.Helper()
	now := w.living("users")
	for o := range w.clerk.Objects("users") {
		if before[o.ID] {
			require.True(w.t, now[o.ID], "%s lives at Clerk and was deleted", o.ID)
		}
	}
}

var _ reconciler.API = (*clerk.Client)(nil)

// publishWebhook stores an event as ingest does.
func publishWebhook(t *testing.T, w *world, e emulator.Event) {
	t.Helper()
	decoded, err := event.Decode(e.Body)
	require.NoError(t, err)
	decoded.ID, decoded.Source, decoded.Origin, decoded.ReceivedAt = e.ID, "clerk", event.OriginWebhook, time.Now()
	_, err = w.js.PublishMsg(t.Context(), stream.Message(&decoded))
	require.NoError(t, err)
}
