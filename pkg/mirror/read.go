package mirror

import (
	"strings"
	"time"

	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/jsondoc"
)

// value is what one column holds, without a box around it. The zero value is NULL.
type value struct {
	set  bool
	n    int64  // Bool: 0 or 1, Int, Time: ms
	text string // Text, JSON
}

// box is the value as the upsert wants it.
func (v value) box(kind Kind) any {
	switch {
	case !v.set:
		return nil
	case kind == Bool:
		return v.n != 0
	case kind == Int:
		return v.n
	case kind == Time:
		return time.UnixMilli(v.n).UTC()
	default:
		return v.text
	}
}

// read turns a JSON value into a column's, NULL where it has none that fits. Types are taken loosely, since neither
// Clerk's schema nor its examples agree with what is on the wire: a number is good as text, digits in quotes as a number.
// All spellings of a JSON value read the same, since PostgreSQL keeps them in its own.
func read(kind Kind, json gjson.Result) value {
	switch kind {
	case Text:
		switch {
		case json.Type == gjson.String && json.Str != "":
			return value{set: true, text: json.Str}
		case json.Type == gjson.Number:
			return value{set: true, text: jsondoc.Number(json.Raw)}
		}
	case Bool:
		if json.Type == gjson.True {
			return value{set: true, n: 1}
		}
	case Int:
		if n, ok := number(json); ok {
			return value{set: true, n: n}
		}
	case Time:
		return timeOf(event.Millis(integer(json)))
	case JSON:
		if json.Exists() && json.Type != gjson.Null {
			return value{set: true, text: json.Raw}
		}
	}
	return value{}
}

// number reads an integer: 12, 12.0, 1.2e1 and "12" are 12. Of a fraction the integer part counts.
func number(json gjson.Result) (int64, bool) {
	switch json.Type {
	case gjson.Number:
		return jsondoc.Int(json.Raw)
	case gjson.String:
		return jsondoc.Int(json.Str)
	default:
		return 0, false
	}
}

// integer is number with 0 for what is none.
func integer(json gjson.Result) int64 {
	n, _ := number(json)
	return n
}

// latest is the last ms of the year 9999, after which neither RFC 3339 nor SQLite can write a time.
const latest = 253402300799999

// timeOf is a time in ms as a column's value: NULL for none, and for one that no calendar holds.
func timeOf(ms int64) value {
	if ms <= 0 || ms > latest {
		return value{}
	}
	return value{set: true, n: ms}
}

// primaries finds the primary address and number of a user. The primary one is what the id says, not the first of the list;
// an id without its element, which Clerk does send, is no address at all.
type primaries struct {
	emailID, phoneID string
	emails, phones   gjson.Result
}

func (p *primaries) see(key string, json gjson.Result) {
	switch key {
	case "primary_email_address_id":
		p.emailID = json.Str
	case "primary_phone_number_id":
		p.phoneID = json.Str
	case "email_addresses":
		p.emails = json
	case "phone_numbers":
		p.phones = json
	}
}

func (p *primaries) columns() (email, verified, phone value) {
	address, verification := element(p.emails, p.emailID, "email_address")
	if email = read(Text, address); email.set && member(verification, "status").Str == "verified" {
		verified = value{set: true, n: 1}
	}
	number, _ := element(p.phones, p.phoneID, "phone_number")
	return email, verified, read(Text, number)
}

// element is one member of the object of that id in a list, and its verification.
func element(list gjson.Result, id, key string) (found, verification gjson.Result) {
	if id == "" || !list.IsArray() {
		return found, verification
	}
	list.ForEach(func(_, e gjson.Result) bool {
		is := false
		found, verification = gjson.Result{}, gjson.Result{}
		if e.IsObject() {
			e.ForEach(func(k, v gjson.Result) bool {
				switch k.Str {
				case "id":
					is = v.Str == id
				case key:
					found = v
				case "verification":
					verification = v
				}
				return true
			})
		}
		if !is {
			found, verification = gjson.Result{}, gjson.Result{}
		}
		return !is
	})
	return found, verification
}

// dig is what stands at a path, "a" or "a.b.c", of an object.
func dig(json gjson.Result, path string) gjson.Result {
	for more := true; more; {
		var key string
		key, path, more = strings.Cut(path, ".")
		json = member(json, key)
	}
	return json
}

// member is the value of a key; of one that is given twice the last, which is the one that PostgreSQL keeps.
func member(object gjson.Result, key string) (found gjson.Result) {
	if !object.IsObject() {
		return found
	}
	object.ForEach(func(k, v gjson.Result) bool {
		if k.Str == key {
			found = v
		}
		return true
	})
	return found
}
