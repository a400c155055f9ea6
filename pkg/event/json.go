package event

import (
	"bytes"
	"encoding/json"
	"iter"
	"unicode/utf8"

	"github.com/usherhq/usher/pkg/jsondoc"
)

// What follows reads JSON that is known to be valid, in one pass, without copying and without asking what lies
// deeper: decoding into structs took two to three times as long, which every event pays twice. It also matched
// names regardless of case, which the database does not.

// members walks the members of an object, in their order. A name is unquoted, a value is as it was written.
// Whatever is not an object has none.
func members(object []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(name, value []byte) bool) {
		if len(object) == 0 || object[0] != '{' {
			return
		}
		for i := skipSpace(object, 1); object[i] != '}'; {
			end := skipValue(object, i)
			name := object[i+1 : end-1]
			if bytes.IndexByte(name, '\\') >= 0 {
				name = []byte(text(object[i:end]))
			}
			i = skipSpace(object, skipSpace(object, end)+1) // behind the colon
			end = skipValue(object, i)
			if !yield(name, object[i:end:end]) {
				return
			}
			if i = skipSpace(object, end); object[i] == ',' {
				i = skipSpace(object, i+1)
			}
		}
	}
}

func skipSpace(b []byte, i int) int {
	for b[i] == ' ' || b[i] == '\n' || b[i] == '\t' || b[i] == '\r' {
		i++
	}
	return i
}

// skipValue returns where the value that begins at i ends.
func skipValue(b []byte, i int) int {
	switch b[i] {
	case '"':
		return skipString(b, i)
	case '{', '[':
		for depth := 0; ; i++ {
			switch b[i] {
			case '"':
				i = skipString(b, i) - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
	default:
		for i < len(b) && b[i] != ',' && b[i] != '}' && b[i] != ']' && b[i] > ' ' {
			i++
		}
		return i
	}
}

func skipString(b []byte, i int) int {
	for i++; ; i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
}

// text reads a string leniently: anything else is "".
func text(value []byte) string {
	if len(value) == 0 || value[0] != '"' {
		return ""
	}
	if inner := value[1 : len(value)-1]; bytes.IndexByte(inner, '\\') < 0 && utf8.Valid(inner) {
		return string(inner)
	}
	var s string
	if json.Unmarshal(value, &s) != nil {
		return ""
	}
	return s
}

// textIn reads a string of an object leniently: what is not an object has none.
func textIn(object []byte, want string) string { return text(valueIn(object, want)) }

// valueIn finds a member of an object, the last of a repeated name. What is not an object has none.
func valueIn(object []byte, want string) []byte {
	var found []byte
	for name, value := range members(object) {
		if string(name) == want {
			found = value
		}
	}
	return found
}

// number reads an integer leniently: 12, 12.0, 1.2e1 and "12" are 12, all else is 0.
func number(value []byte) int64 {
	n, _ := jsondoc.Int(string(bytes.Trim(value, `"`)))
	return n
}
