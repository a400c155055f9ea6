package emulator_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func story(cfg emulator.Config, users int) (*emulator.Clerk, []emulator.Event) {
	clerk := emulator.New(cfg)
	return clerk, slices.Collect(clerk.Story(users))
}

func TestSameSeedTellsTheSameStoryToTheByte(t *testing.T) {
	t.Parallel()
	_, one := story(emulator.Config{Seed: 7}, 60)
	_, two := story(emulator.Config{Seed: 7}, 60)
	_, other := story(emulator.Config{Seed: 8}, 60)
	require.Equal(t, one, two)
	require.NotEqual(t, one[0].Body, other[0].Body)
}

func TestStoryGoesOnWhereItWasLeft(t *testing.T) {
	t.Parallel()
	_, whole := story(emulator.Config{Seed: 7}, 30)
	clerk := emulator.New(emulator.Config{Seed: 7})
	var parts []emulator.Event
	for e := range clerk.Story(30) {
		parts = append(parts, e)
		if len(parts) == 100 {
			break
		}
	}
	parts = slices.AppendSeq(parts, clerk.Story(0))
	require.Equal(t, whole, parts)
	require.NotEmpty(t, slices.Collect(clerk.Story(5)), "more people can come later")
}

func TestSmallStoriesCoverEveryType(t *testing.T) {
	t.Parallel()
	for seed := range uint64(25) {
		_, events := story(emulator.Config{Seed: seed}, 20)
		seen := map[string]bool{}
		for _, e := range events {
			seen[e.Type] = true
		}
		require.Equal(t, fixture.Types(), slices.Sorted(maps.Keys(seen)), "seed %d", seed)
	}
}

func TestEventsDecode(t *testing.T) {
	t.Parallel()
	_, events := story(emulator.Config{Seed: 3, NULs: true}, 200)
	ids := map[string]bool{}
	last := int64(0)
	for _, e := range events {
		got, err := event.Decode(e.Body)
		require.NoError(t, err)
		require.True(t, json.Valid(e.Body))
		assert.Equal(t, e.Type, string(got.Type))
		assert.Equal(t, e.ObjectID, got.Object.ID)
		assert.Equal(t, emulator.DefaultInstanceID, got.InstanceID)
		assert.Equal(t, e.At.UnixMilli(), got.Timestamp)
		assert.Greater(t, got.Timestamp, last, "the clock only goes on")
		assert.GreaterOrEqual(t, got.Timestamp, got.Object.UpdatedAt)
		assert.Regexp(t, `^msg_[0-9A-Za-z]{27}$`, e.ID)
		assert.False(t, ids[e.ID], "every event has its own id")
		ids[e.ID] = true
		last = got.Timestamp
	}
}

// shape is the set of all paths of a JSON value. Arrays count by their first element, and what people
// put into metadata is not a shape.
func shape(v gjson.Result, path string, into map[string]bool) {
	switch {
	case strings.HasSuffix(path, "_metadata"):
	case v.IsObject():
		v.ForEach(func(key, value gjson.Result) bool {
			into[path+"."+key.String()] = true
			shape(value, path+"."+key.String(), into)
			return true
		})
	case v.IsArray():
		if list := v.Array(); len(list) > 0 && list[0].IsObject() {
			shape(list[0], path+"[]", into)
		}
	}
}

func TestShapesAreThoseOfTheCanonicalPayloads(t *testing.T) {
	t.Parallel()
	// external_id is in a user's delete only where the user had one, user_id only in accepted invitations.
	optional := map[string]bool{"user.deleted/external_id": true, "organizationInvitation.revoked/user_id": true}
	known := map[string]bool{}
	keys := map[string][]string{}
	for _, typ := range fixture.Types() {
		body, _ := fixture.Event(typ)
		shape(gjson.GetBytes(body, "data"), strings.Split(typ, ".")[0], known)
		for key := range gjson.GetBytes(body, "data").Map() {
			keys[typ] = append(keys[typ], key)
		}
	}
	for _, name := range fixture.Variants() { // which have accounts and phones
		body, _ := fixture.Variant(name)
		shape(gjson.GetBytes(body, "data"), strings.Split(gjson.GetBytes(body, "type").String(), ".")[0], known)
	}
	for path := range maps.Clone(known) { // a user is the same everywhere
		if rest, ok := strings.CutPrefix(path, "user."); ok {
			known["session.user."+rest] = true
		}
	}
	known["paymentAttempt.failed_reason.code"] = true
	known["paymentAttempt.failed_reason.decline_code"] = true

	_, events := story(emulator.Config{Seed: 5}, 200)
	for _, e := range events {
		data := gjson.GetBytes(e.Body, "data")
		got := map[string]bool{}
		for key := range data.Map() {
			if !optional[e.Type+"/"+key] {
				got[key] = true
			}
		}
		want := map[string]bool{}
		for _, key := range keys[e.Type] {
			if !optional[e.Type+"/"+key] {
				want[key] = true
			}
		}
		require.Equal(t, want, got, e.Type)
		paths := map[string]bool{}
		shape(data, strings.Split(e.Type, ".")[0], paths)
		for path := range paths {
			require.True(t, known[path], "%s: %s is in no canonical payload", e.Type, path)
		}
	}
}

func TestNewestEventsGiveTheState(t *testing.T) {
	t.Parallel()
	for seed := range uint64(3) {
		clerk, events := story(emulator.Config{Seed: seed}, 150)
		type row struct {
			version event.Version
			deleted bool
			data    json.RawMessage
		}
		mirror := map[string]map[string]row{}
		for _, name := range emulator.Tables() {
			mirror[name] = map[string]row{}
		}
		// From the last to the first: the order of arrival must not matter.
		for _, e := range slices.Backward(events) {
			got, err := event.Decode(e.Body)
			require.NoError(t, err)
			got.ID = e.ID
			table := emulator.TableOf(e.Type)
			if table == "" {
				continue
			}
			old, ok := mirror[table][got.Object.ID]
			if !ok || got.Version().Compare(old.version) > 0 {
				mirror[table][got.Object.ID] = row{got.Version(), got.Object.Deleted, got.Data}
			}
		}
		// Children go with their parents, and keep what was last said of them.
		for name, parents := range map[string]map[string]string{
			"sessions": {"users": "user_id"}, "organization_memberships": {"users": "public_user_data.user_id", "organizations": "organization.id"},
			"organization_invitations": {"organizations": "organization_id"}, "organization_domains": {"organizations": "organization_id"},
		} {
			for id, r := range mirror[name] {
				for parent, path := range parents {
					r.deleted = r.deleted || mirror[parent][gjson.GetBytes(r.data, path).Str].deleted
				}
				mirror[name][id] = r
			}
		}
		for name, state := range clerk.State() {
			live, gone := 0, 0
			for id, row := range mirror[name] {
				want := state.Live[id]
				if row.deleted {
					want = state.Deleted[id]
					gone++
				} else {
					live++
				}
				require.Equal(t, string(want), string(row.data), "seed %d: %s %s", seed, name, id)
			}
			require.Len(t, state.Live, live, name)
			require.Len(t, state.Deleted, gone, name)
			countLive, countGone := clerk.Count(name)
			require.Equal(t, [2]int{live, gone}, [2]int{countLive, countGone})
		}
	}
}

func TestEveryChangeRaisesUpdatedAt(t *testing.T) {
	t.Parallel()
	_, events := story(emulator.Config{Seed: 11}, 150)
	type seen struct {
		updated int64
		data    []byte
	}
	last := map[string]seen{}
	for _, e := range events {
		got, err := event.Decode(e.Body)
		require.NoError(t, err)
		before, ok := last[got.Object.ID]
		if ok && got.Object.UpdatedAt != 0 && !got.Object.Deleted {
			if bytes.Equal(before.data, got.Data) {
				assert.Equal(t, before.updated, got.Object.UpdatedAt)
			} else {
				assert.Greater(t, got.Object.UpdatedAt, before.updated, e.Type)
			}
		}
		last[got.Object.ID] = seen{got.Object.UpdatedAt, got.Data}
	}
}

func TestEmbeddedCopiesAreThoseOfThen(t *testing.T) {
	t.Parallel()
	_, events := story(emulator.Config{Seed: 12}, 150)
	now := map[string]string{}
	sessions, memberships := 0, 0
	for _, e := range events {
		data := gjson.GetBytes(e.Body, "data")
		switch resource, _, _ := strings.Cut(e.Type, "."); resource {
		case "user", "organization":
			now[e.ObjectID] = data.Raw
		case "session":
			sessions++
			require.Equal(t, now[data.Get("user_id").String()], data.Get("user").Raw)
		case "organizationMembership":
			memberships++
			require.Equal(t, now[data.Get("organization.id").String()], data.Get("organization").Raw)
		}
	}
	assert.Positive(t, sessions)
	assert.Positive(t, memberships)
}

func TestAccessorsShowTheObjects(t *testing.T) {
	t.Parallel()
	clerk, _ := story(emulator.Config{Seed: 1}, 50)
	live, deleted := clerk.Count("users")
	assert.Equal(t, 50, live+deleted)
	assert.Positive(t, deleted)
	assert.Len(t, slices.Collect(clerk.Objects("users")), live)
	assert.Len(t, slices.Collect(clerk.Deleted("users")), deleted)
	created := int64(0)
	for o := range clerk.Objects("users") {
		assert.GreaterOrEqual(t, o.CreatedAt, created, "in the order of their creation")
		created = o.CreatedAt
		same, ok := clerk.Object("users", o.ID)
		assert.True(t, ok)
		assert.Equal(t, o, same)
		assert.Equal(t, o.UpdatedAt, gjson.GetBytes(o.JSON, "updated_at").Int())
		assert.Equal(t, o.CreatedAt, gjson.GetBytes(o.JSON, "created_at").Int())
	}
	_, ok := clerk.Object("users", "user_none")
	assert.False(t, ok)

	forgetful, events := story(emulator.Config{Seed: 1, Forget: true}, 50)
	assert.NotEmpty(t, events)
	live, deleted = forgetful.Count("users")
	assert.Zero(t, live+deleted)
}

func TestStateCanBeReadWhileTheStoryIsTold(t *testing.T) {
	t.Parallel()
	clerk := emulator.New(emulator.Config{Seed: 2, Start: time.Now()})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range clerk.Story(40) {
		}
	}()
	for range 50 {
		clerk.Count("users")
		clerk.State()
		clerk.Now()
	}
	<-done
}

func BenchmarkStory(b *testing.B) {
	b.ReportAllocs()
	clerk := emulator.New(emulator.Config{Forget: true})
	n, size := 0, 0
	for b.Loop() {
		e, ok := clerk.Next()
		for !ok {
			for e = range clerk.Story(10_000) {
				break
			}
			ok = true
		}
		n++
		size += len(e.Body)
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "events/s")
	b.ReportMetric(float64(size)/float64(n), "body-bytes")
}
