package mirror

import (
	"math"
	"strconv"
	"time"

	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/pkg/event"
)

// read turns a JSON value into a column's, nil where it has none that fits. Types are taken loosely, since neither
// Clerk's schema nor its examples agree with what is on the wire: a number is good as text, digits in quotes as a number.
func read(kind Kind, value gjson.Result) any {
	switch kind {
	case Text:
		switch {
		case value.Type == gjson.String && value.Str != "":
			return value.Str
		case value.Type == gjson.Number:
			return value.Raw
		}
	case Bool:
		if value.Type == gjson.True {
			return true
		}
	case Int:
		if n, ok := number(value); ok {
			return n
		}
	case Time:
		return timeOf(event.Millis(integer(value)))
	case JSON:
		if value.Exists() && value.Type != gjson.Null {
			return value.Raw
		}
	}
	return nil
}

// number reads an integer: 12, 12.0, 1.2e1 and "12" are 12.
func number(value gjson.Result) (int64, bool) {
	text := value.Raw
	switch value.Type {
	case gjson.Number:
	case gjson.String:
		text = value.Str
	default:
		return 0, false
	}
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		return n, true
	}
	if f, err := strconv.ParseFloat(text, 64); err == nil && math.Abs(f) < 1e18 {
		return int64(f), true
	}
	return 0, false
}

// integer is number with 0 for what is none.
func integer(value gjson.Result) int64 {
	n, _ := number(value)
	return n
}

// latest is the last ms of the year 9999, after which neither RFC 3339 nor SQLite can write a time.
const latest = 253402300799999

// timeOf is a time in ms as a column's value: nil for none, and for one that no calendar holds.
func timeOf(ms int64) any {
	if ms <= 0 || ms > latest {
		return nil
	}
	return time.UnixMilli(ms).UTC()
}

// primaries finds the primary address and number of a user. The primary one is what the id says, not the first of the list;
// an id without its element, which Clerk does send, is no address at all.
type primaries struct {
	emailID, phoneID string
	emails, phones   gjson.Result
}

func (p *primaries) see(key string, value gjson.Result) {
	switch key {
	case "primary_email_address_id":
		p.emailID = value.Str
	case "primary_phone_number_id":
		p.phoneID = value.Str
	case "email_addresses":
		p.emails = value
	case "phone_numbers":
		p.phones = value
	}
}

func (p *primaries) columns() (email, verified, phone any) {
	if e := element(p.emails, p.emailID); e.Exists() {
		if email = read(Text, e.Get("email_address")); email != nil {
			verified = e.Get("verification.status").Str == "verified"
		}
	}
	if e := element(p.phones, p.phoneID); e.Exists() {
		phone = read(Text, e.Get("phone_number"))
	}
	return email, verified, phone
}

// element is the object of that id in a list.
func element(list gjson.Result, id string) (found gjson.Result) {
	if id == "" || !list.IsArray() {
		return found
	}
	list.ForEach(func(_, e gjson.Result) bool {
		if e.IsObject() && e.Get("id").Str == id {
			found = e
		}
		return !found.Exists()
	})
	return found
}
