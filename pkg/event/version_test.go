package event_test

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

const (
	created  = int64(1768471200000)
	updated  = int64(1768471260000)
	happened = int64(1768471260036)
	day      = int64(86_400_000)
)

func TestVersionOfAnEvent(t *testing.T) {
	t.Parallel()
	received := time.UnixMilli(1768471299999)
	for _, tc := range []struct {
		name  string
		event event.Event
		want  event.Version
	}{
		{
			"a full object takes its updated_at",
			event.Event{ID: "msg_1", Timestamp: happened, ReceivedAt: received, Object: event.Object{CreatedAt: created, UpdatedAt: updated}},
			event.Version{Version: updated, SeenAt: happened, EventID: "msg_1"},
		},
		{
			"without updated_at its created_at",
			event.Event{ID: "msg_1", Timestamp: happened, Object: event.Object{CreatedAt: created}},
			event.Version{Version: created, SeenAt: happened, EventID: "msg_1"},
		},
		{
			"without both the time of the event",
			event.Event{ID: "msg_1", Timestamp: happened},
			event.Version{Version: happened, SeenAt: happened, EventID: "msg_1"},
		},
		{
			"without any time the receipt",
			event.Event{ID: "msg_1", ReceivedAt: received},
			event.Version{Version: received.UnixMilli(), SeenAt: received.UnixMilli(), EventID: "msg_1"},
		},
		{
			"an event without a timestamp is seen at its updated_at, whenever it was received",
			event.Event{ID: "msg_1", ReceivedAt: received, Object: event.Object{CreatedAt: created, UpdatedAt: updated}},
			event.Version{Version: updated, SeenAt: updated, EventID: "msg_1"},
		},
		{
			"times a day ahead of the receipt are believed",
			event.Event{ID: "msg_1", Timestamp: received.UnixMilli() + day, ReceivedAt: received, Object: event.Object{UpdatedAt: received.UnixMilli() + day}},
			event.Version{Version: received.UnixMilli() + day, SeenAt: received.UnixMilli() + day, EventID: "msg_1"},
		},
		{
			"times more than a day ahead count as the receipt",
			event.Event{ID: "msg_1", Timestamp: received.UnixMilli() + day + 1, ReceivedAt: received, Object: event.Object{UpdatedAt: received.UnixMilli() + 3650*day}},
			event.Version{Version: received.UnixMilli(), SeenAt: received.UnixMilli(), EventID: "msg_1"},
		},
		{
			"each time by itself",
			event.Event{ID: "msg_1", Timestamp: received.UnixMilli() + 3650*day, ReceivedAt: received, Object: event.Object{CreatedAt: 2 * received.UnixMilli(), UpdatedAt: updated}},
			event.Version{Version: updated, SeenAt: received.UnixMilli(), EventID: "msg_1"},
		},
		{
			"created_at too, where it stands for updated_at",
			event.Event{ID: "msg_1", Timestamp: happened, ReceivedAt: received, Object: event.Object{CreatedAt: 2 * received.UnixMilli()}},
			event.Version{Version: received.UnixMilli(), SeenAt: happened, EventID: "msg_1"},
		},
		{
			"a delete ten years ahead",
			event.Event{ID: "msg_1", Timestamp: received.UnixMilli() + 3650*day, ReceivedAt: received, Object: event.Object{Deleted: true}},
			event.Version{Version: received.UnixMilli(), SeenAt: received.UnixMilli(), EventID: "msg_1"},
		},
		{
			"a delete takes the time of its event",
			event.Event{ID: "msg_1", Timestamp: happened, ReceivedAt: received, Object: event.Object{Deleted: true}},
			event.Version{Version: happened, SeenAt: happened, EventID: "msg_1"},
		},
		{
			"a full object in a delete takes the larger of both: the event",
			event.Event{ID: "msg_1", Timestamp: happened, Object: event.Object{UpdatedAt: updated, Deleted: true}},
			event.Version{Version: happened, SeenAt: happened, EventID: "msg_1"},
		},
		{
			"a full object in a delete takes the larger of both: the object",
			event.Event{ID: "msg_1", Timestamp: created, Object: event.Object{UpdatedAt: updated, Deleted: true}},
			event.Version{Version: updated, SeenAt: created, EventID: "msg_1"},
		},
		{
			"a delete without a timestamp takes the receipt",
			event.Event{ID: "msg_1", ReceivedAt: received, Object: event.Object{Deleted: true}},
			event.Version{Version: received.UnixMilli(), SeenAt: received.UnixMilli(), EventID: "msg_1"},
		},
		{
			"nothing at all is still newer than a stub",
			event.Event{ID: "msg_1"},
			event.Version{Version: 1, SeenAt: 0, EventID: "msg_1"},
		},
	} {
		assert.Equal(t, tc.want, tc.event.Version(), tc.name)
	}
}

func TestVersionOfFixtures(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		read    func(string) ([]byte, bool)
		version event.Version
	}{
		{"user.deleted.no-external-id", fixture.Variant, event.Version{Version: 1771927200000, SeenAt: 1771927200000}},
		{"role.deleted.full-object", fixture.Variant, event.Version{Version: 1768039200000, SeenAt: 1768039200000}},
		{"session.created.documented-2022-sample", fixture.Variant, event.Version{Version: 1654014318503, SeenAt: 1654014318503}},
	} {
		body, ok := tc.read(tc.name)
		require.True(t, ok, tc.name)
		e, err := event.Decode(body)
		require.NoError(t, err)
		assert.Equal(t, tc.version, e.Version(), tc.name)
	}
	body, _ := fixture.Variant("user.created.timestamp-in-seconds")
	e, err := event.Decode(body)
	require.NoError(t, err)
	assert.EqualValues(t, 999, e.Version().SeenAt%1000, "seconds count as their last millisecond")
	assert.GreaterOrEqual(t, e.Version().SeenAt, e.Object.UpdatedAt/1000*1000)
}

func TestALateUpdateLosesAgainstTheTombstone(t *testing.T) {
	t.Parallel()
	late := event.Event{ID: "msg_z", Timestamp: happened, Object: event.Object{UpdatedAt: updated}}
	deletedEvent := event.Event{ID: "msg_a", Timestamp: happened, Object: event.Object{Deleted: true}}
	after := event.Event{ID: "msg_a", Timestamp: happened + 2, Object: event.Object{UpdatedAt: happened + 1}}
	assert.Negative(t, late.Version().Compare(deletedEvent.Version()))
	assert.Positive(t, after.Version().Compare(deletedEvent.Version()), "an object that changed after the delete heals a wrong one")
}

func TestAStubLosesAgainstEverythingButAnOlderStub(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		full := anyEvent().Draw(t, "event")
		stubber := anyEvent().Draw(t, "stubber")
		stub := stubber.StubVersion(anyTime().Draw(t, "stub's updated_at"))
		if full.Version().Compare(stub) <= 0 {
			t.Fatalf("%+v does not beat the stub %+v", full.Version(), stub)
		}
	})
	e := event.Event{ID: "msg_1"}
	assert.Equal(t, event.Version{SeenAt: updated, EventID: "msg_1"}, e.StubVersion(updated))
	assert.Equal(t, event.Version{SeenAt: 1716883200999, EventID: "msg_1"}, e.StubVersion(1716883200))
	assert.Negative(t, e.StubVersion(created).Compare(e.StubVersion(updated)))
}

func TestVersionsAreTotallyOrdered(t *testing.T) {
	t.Parallel()
	// Few values, so that ties are common.
	version := rapid.Custom(func(t *rapid.T) event.Version {
		return event.Version{
			Version: rapid.Int64Range(0, 2).Draw(t, "version"), SeenAt: rapid.Int64Range(0, 2).Draw(t, "seen_at"),
			EventID: rapid.SampledFrom([]string{"", "a", "B", "ä", "aa"}).Draw(t, "event_id"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := version.Draw(t, "a"), version.Draw(t, "b"), version.Draw(t, "c")
		if a.Compare(b) != -b.Compare(a) {
			t.Fatal("not antisymmetric")
		}
		if (a.Compare(b) == 0) != (a == b) {
			t.Fatal("only the same are equal")
		}
		if a.Compare(b) <= 0 && b.Compare(c) <= 0 && a.Compare(c) > 0 {
			t.Fatal("not transitive")
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		history := rapid.SliceOfN(version, 1, 8).Draw(t, "history")
		shuffled := rapid.Permutation(history).Draw(t, "shuffled")
		newest := func(versions []event.Version) event.Version {
			return slices.MaxFunc(versions, event.Version.Compare)
		}
		if newest(history) != newest(shuffled) {
			t.Fatal("the order of arrival decides")
		}
	})
}

func TestVersionDoesNotDependOnRedelivery(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		first := anyEvent().Draw(t, "event")
		again := first
		again.Seq++
		again.Origin = event.OriginReplay
		newest := max(first.Timestamp, first.Object.UpdatedAt, first.Object.CreatedAt)
		if newest != 0 && !event.Ahead(newest, first.ReceivedAt) {
			again.ReceivedAt = first.ReceivedAt.Add(time.Hour)
		}
		if first.Version() != again.Version() {
			t.Fatalf("%+v, then %+v", first.Version(), again.Version())
		}
	})
}

func anyTime() *rapid.Generator[int64] {
	return rapid.OneOf(rapid.Just(int64(0)), rapid.Int64Range(1, 2_000_000_000), rapid.Int64Range(1_600_000_000_000, 1_800_000_000_000))
}

func anyEvent() *rapid.Generator[event.Event] {
	return rapid.Custom(func(t *rapid.T) event.Event {
		return event.Event{
			ID: rapid.StringMatching(`msg_[a-zA-Z0-9]{1,4}`).Draw(t, "id"), Timestamp: event.Millis(anyTime().Draw(t, "timestamp")),
			ReceivedAt: time.UnixMilli(rapid.Int64Range(1_600_000_000_000, 1_800_000_000_000).Draw(t, "received_at")),
			Object: event.Object{
				CreatedAt: event.Millis(anyTime().Draw(t, "created_at")), UpdatedAt: event.Millis(anyTime().Draw(t, "updated_at")),
				Deleted: rapid.Bool().Draw(t, "deleted"),
			},
		}
	})
}
