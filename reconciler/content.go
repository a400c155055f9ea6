package reconciler

import (
	"bytes"
	"encoding/json"
	"hash/maphash"
	"maps"
	"math/bits"
	"slices"

	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/pkg/jsondoc"
	"github.com/usherhq/usher/pkg/mirror"
)

// volatile are the fields of each table's objects that change without being a change: times of activity, counters,
// and copies of other objects, which are as old as the event that brought them.
var volatile = map[string][]string{
	"users":                    {"last_active_at", "last_sign_in_at", "lockout_expires_in_seconds", "verification_attempts_remaining"},
	"organizations":            {"members_count", "pending_invitations_count", "missing_member_with_elevated_permissions", "last_active_at"},
	"organization_memberships": {"organization", "public_user_data"},
	"organization_invitations": {"public_inviter_data", "public_organization_data", "url"},
	"organization_domains":     {"total_pending_invitations", "total_pending_suggestions", "public_organization_data"},
	"waitlist_entries":         {"invitation"},
}

// Field is one field in which an object differs: what the mirror has and what Clerk has, as JSON. Where the object is the same and
// the row's columns are not what it says, it is a column, with its time as RFC 3339.
type Field struct {
	Field  string          `json:"field"`
	Mirror json.RawMessage `json:"mirror"` // null where it has none
	Clerk  json.RawMessage `json:"clerk"`
}

// differences compares an object with its row, leaving out what is volatile. Null and absent are the same, and so are all
// spellings of a value. The result is sorted by field; none means the same.
func differences(table string, object []byte, row string) []Field {
	skip := volatile[table]
	clean := string(mirror.Clean(object))
	if clean == row || digest(clean, skip) == digest(row, skip) {
		return nil
	}
	if slices.ContainsFunc(mirror.Nameless(table, clean), func(form string) bool { return digest(form, skip) == digest(row, skip) }) {
		return nil // the mirror forgot a user who is deleted
	}
	theirs, ours := decode(clean), decode(row)
	var fields []Field
	names := slices.Sorted(maps.Keys(theirs))
	for name := range ours {
		if _, both := theirs[name]; !both {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if slices.Contains(skip, name) {
			continue
		}
		a, b := jsondoc.Encode(ours[name]), jsondoc.Encode(theirs[name])
		if !bytes.Equal(a, b) {
			fields = append(fields, Field{Field: name, Mirror: a, Clerk: b})
		}
	}
	return fields
}

var seed = maphash.MakeSeed()

// digest is the same for all spellings of a document: order of keys, white space, escapes. It is only compared within one
// process. Where two digests differ the documents may still be the same (a name given twice).
func digest(doc string, skip []string) uint64 {
	var sum uint64
	gjson.Parse(doc).ForEach(func(key, value gjson.Result) bool {
		if value.Type != gjson.Null && !slices.Contains(skip, key.Str) {
			sum += member(key, value)
		}
		return true
	})
	return sum
}

func member(key, value gjson.Result) uint64 {
	return mix(maphash.String(seed, key.Str), digestValue(value))
}

func digestValue(value gjson.Result) uint64 {
	switch value.Type {
	case gjson.String:
		return mix(1, maphash.String(seed, value.Str))
	case gjson.Number:
		return mix(2, maphash.String(seed, jsondoc.Number(value.Raw)))
	case gjson.True:
		return 3
	case gjson.False:
		return 4
	case gjson.JSON:
		sum := uint64(5)
		if value.IsArray() {
			value.ForEach(func(_, v gjson.Result) bool {
				sum = mix(sum, digestValue(v))
				return true
			})
			return mix(6, sum)
		}
		value.ForEach(func(k, v gjson.Result) bool {
			if v.Type != gjson.Null {
				sum += member(k, v)
			}
			return true
		})
		return sum
	default:
		return 7
	}
}

func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^0x9e3779b97f4a7c15, b^0xd1b54a32d192ed03)
	return hi ^ lo ^ a
}

// decode reads the fields of an object, without those that are null, at any depth.
func decode(doc string) map[string]any {
	value, err := jsondoc.Decode([]byte(doc))
	if err != nil {
		return nil
	}
	object, _ := withoutNulls(value).(map[string]any) // what is no object has no fields
	return object
}

func withoutNulls(value any) any {
	switch v := value.(type) {
	case map[string]any:
		for key, inner := range v {
			if inner == nil {
				delete(v, key)
			} else {
				v[key] = withoutNulls(inner)
			}
		}
	case []any:
		for i := range v {
			v[i] = withoutNulls(v[i])
		}
	}
	return value
}

// essence is the canonical form of an object without what is volatile, for ids that two runs must agree on.
func essence(table string, object []byte) []byte {
	fields := decode(string(mirror.Clean(object)))
	for _, name := range volatile[table] {
		delete(fields, name)
	}
	return jsondoc.Encode(fields)
}
