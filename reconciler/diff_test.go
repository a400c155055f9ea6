package reconciler

import (
	"fmt"
	"iter"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/usherhq/usher/pkg/clerk"
)

func TestCompare(t *testing.T) {
	t.Parallel()
	const readAt = 2_000_000_000_000
	ada, eve := `{"id":"user_1","first_name":"Ada","last_active_at":1}`, `{"id":"user_1","first_name":"Eve","last_active_at":2}`
	for name, test := range map[string]struct {
		updated  int64
		raw      string
		row      *row
		want     Drift
		defeated bool
		held     bool
	}{
		"NoRow":                    {1_700_000_000_000, ada, nil, Missing, false, false},
		"OlderRow":                 {1_700_000_000_000, ada, &row{version: 1_600_000_000_000, raw: ada}, Stale, false, false},
		"Stub":                     {1_700_000_000_000, ada, &row{raw: ada}, Stale, false, false},
		"NewerRow":                 {1_700_000_000_000, ada, &row{version: 1_800_000_000_000, raw: eve}, "", false, true},
		"NewerRowSeenLater":        {1_700_000_000_000, ada, &row{version: 1_800_000_000_000, seenAt: readAt, raw: eve}, "", false, false},
		"NewerRowLikeTheObject":    {1_700_000_000_000, ada, &row{version: 1_800_000_000_000, raw: `{"id":"user_1","first_name":"Ada","updated_at":1800000000000}`}, "", false, false},
		"Same":                     {1_700_000_000_000, ada, &row{version: 1_700_000_000_000, raw: ada}, "", false, false},
		"OnlyVolatile":             {1_700_000_000_000, ada, &row{version: 1_700_000_000_000, raw: `{"last_active_at":9,"first_name":"A\u0064a","id":"user_1","x":null}`}, "", false, false},
		"OtherContent":             {1_700_000_000_000, ada, &row{version: 1_700_000_000_000, raw: eve}, Different, false, false},
		"OtherContentButSeenLater": {1_700_000_000_000, ada, &row{version: 1_700_000_000_000, seenAt: readAt + 1, raw: eve}, "", false, false},
		"SecondsInTheObject":       {1_700_000_000, ada, &row{version: 1_700_000_000_999, raw: ada}, "", false, false},
		"NewerTombstone":           {1_700_000_000_000, ada, &row{version: 1_800_000_000_000, deleted: true}, "", true, false},
		"OlderTombstone":           {1_700_000_000_000, ada, &row{version: 1_600_000_000_000, deleted: true}, Missing, false, false},
		"NoVersion":                {0, ada, &row{version: 1_600_000_000_000, raw: eve}, Different, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := &object{clerk.Object{ID: "user_1", UpdatedAt: test.updated, Raw: []byte(test.raw)}, time.UnixMilli(readAt)}
			got := compare("users", o, test.row)
			assert.Equal(t, test.want, got.drift)
			assert.Equal(t, test.defeated, got.defeated)
			assert.Equal(t, test.held, got.held)
		})
	}
}

func TestWhatTheMirrorForgotIsNoDrift(t *testing.T) {
	t.Parallel()
	object := []byte(`{"id":"i","email_address":"a@b.c","status":"accepted","user_id":"u"}`)
	assert.Empty(t, differences("organization_invitations", object, `{"id":"i","status":"accepted","user_id":"u"}`))
	assert.Len(t, differences("organization_invitations", object, `{"id":"i","status":"revoked","user_id":"u"}`), 2)
}

func TestDifferencesAreOfValuesNotOfSpellings(t *testing.T) {
	t.Parallel()
	for _, same := range [][2]string{
		{`{"a":1,"b":[1,{"c":null}]}`, `{"b":[1,{}],"a":1}`},
		{`{"a":1e2,"b":100.0,"c":-0}`, `{"a":100,"b":1e2,"c":0}`},
		{`{"a":"\u00e9\/"}`, `{"a":"é/"}`},
		{`{"a":1,"a":2}`, `{"a":2}`},
		{`{"a":"x\u0000y"}`, `{"a":"x\ufffdy"}`},
		{`{"a":12345678901234567890}`, `{"a": 12345678901234567890}`},
		{`{"a":1e+21,"b":1e2,"c":12345678901234567890.5,"d":1.0}`, `{"a":1000000000000000000000,"b":100,"c":12345678901234567890.50,"d":1}`},
	} {
		assert.Empty(t, differences("roles", []byte(same[0]), same[1]), same)
	}
	got := differences("roles", []byte(`{"a":1,"b":[1,2],"c":{"d":"x"},"e":12345678901234567891}`), `{"a":2,"b":[2,1],"c":{"d":"y"},"e":12345678901234567890,"f":true}`)
	var names []string
	for _, f := range got {
		names = append(names, f.Field)
	}
	assert.Equal(t, []string{"a", "b", "c", "e", "f"}, names)
	assert.JSONEq(t, `2`, string(got[0].Mirror))
	assert.JSONEq(t, `1`, string(got[0].Clerk))
	assert.JSONEq(t, `null`, string(got[4].Clerk))
}

func seq[T any](list []T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for _, v := range list {
			if !yield(v, nil) {
				return
			}
		}
	}
}

// Whatever stands on the two sides, however many share a time: every object is emitted once, with its row where there is one of that
// time, and every row without an object once.
func TestMergeMeetsEveryPair(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var objects []object
		var rows []row
		want := map[string][2]bool{}
		for i := range rapid.IntRange(0, 40).Draw(t, "n") {
			id := fmt.Sprintf("user_%02d", rapid.IntRange(0, 99).Draw(t, "id")*100+i)
			created := rapid.Int64Range(1_700_000_000_000, 1_700_000_000_009).Draw(t, "created")
			side := rapid.IntRange(0, 2).Draw(t, "side")
			if side != 1 {
				objects = append(objects, object{Object: clerk.Object{ID: id, CreatedAt: created}})
			}
			if side != 0 {
				rows = append(rows, row{id: id, created: created})
			}
			want[id] = [2]bool{side != 1, side != 0}
		}
		objects = rapid.Permutation(objects).Draw(t, "order") // within one time any order will do
		slices.SortStableFunc(objects, func(a, b object) int { return int(a.CreatedAt - b.CreatedAt) })
		slices.SortStableFunc(rows, func(a, b row) int { return int(a.created - b.created) })
		got := map[string][2]bool{}
		err := merge(seq(objects), seq(rows), func(o *object, r *row) error {
			id := ""
			if o != nil {
				id = o.ID
			}
			if r != nil {
				if o != nil {
					require.Equal(t, o.ID, r.id)
				}
				id = r.id
			}
			_, twice := got[id]
			require.False(t, twice, id)
			got[id] = [2]bool{o != nil, r != nil}
			return nil
		})
		require.NoError(t, err)
		require.Equal(t, want, got)
	})
}

func TestTheShareOfRowsThatMayGoUnasked(t *testing.T) {
	t.Parallel()
	c := SweepConfig{}.withDefaults()
	for rows, want := range map[int64]int64{1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 10: 3, 100: 5, 1000: 50, 2000: 100, 1_000_000: 100} {
		assert.Equal(t, want, c.limit(rows), rows)
	}
}

func TestSilenceBeginsWithAChangeAndEndsWithAnEvent(t *testing.T) {
	t.Parallel()
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	d := detector{}
	since := func(s int, newest, count int64, heard bool) int64 {
		d.observe(at(s), newest, count, heard)
		return d.Since / 1000
	}
	assert.Zero(t, since(0, 100, 5, false), "the first look knows nothing")
	assert.Zero(t, since(60, 100, 5, false), "nothing happened")
	assert.Zero(t, since(120, 200, 5, true), "heard of it")
	assert.EqualValues(t, 180, since(180, 300, 5, false))
	assert.EqualValues(t, 180, since(240, 300, 5, false))
	assert.EqualValues(t, 180, since(300, 400, 6, false))
	assert.EqualValues(t, 200, d.Newest, "what is missing is counted from when events still came")
	assert.Zero(t, since(360, 400, 6, true))
	assert.EqualValues(t, 420, since(420, 400, 5, false), "a delete shows in the count only")
}
