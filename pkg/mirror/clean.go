package mirror

import (
	"bytes"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/tidwall/gjson"
)

// What a value of Clerk's may be before it is stored as text. PostgreSQL's jsonb fails at some 6,000 levels, SQLite's JSON functions at
// 1,000, and then the views fail with every row; a number beyond 10^400 no float can hold, and jsonb writes out all its zeros.
const (
	maxDepth    = 500
	maxExponent = 400
	maxDigits   = 1000
)

// Clean makes a valid JSON document one that PostgreSQL and SQLite can both store and read. NUL characters, halves of
// surrogate pairs and bytes that are not UTF-8 become U+FFFD; a number of absurd size, and what is nested deeper than
// 500 levels, becomes a string of its text. All else stays byte for byte; where nothing is to be done, the result is raw itself.
func Clean(raw []byte) []byte {
	if utf8.Valid(raw) && isClean(raw) {
		return raw
	}
	return rewrite(raw)
}

// CleanText is what [Clean] does to a string: NUL and bytes that are not UTF-8 become U+FFFD.
func CleanText(s string) string {
	if strings.IndexByte(s, 0) < 0 && utf8.ValidString(s) {
		return s
	}
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

func isClean(raw []byte) bool {
	depth := 0
	for i := 0; i < len(raw); {
		switch c := raw[i]; {
		case c == '"':
			end := endOfString(raw, i)
			if body := raw[i:end]; bytes.IndexByte(body, '\\') >= 0 && !escapesAreClean(body) {
				return false
			}
			i = end
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return false
			}
			i++
		case c == '}' || c == ']':
			depth--
			i++
		case c == '-' || c >= '0' && c <= '9':
			end := endOfNumber(raw, i)
			if !numberIsClean(raw[i:end]) {
				return false
			}
			i = end
		default:
			i++
		}
	}
	return true
}

// endOfString is the index after the closing quote of the string that begins at start.
func endOfString(raw []byte, start int) int {
	for i := start + 1; i < len(raw); {
		quote := bytes.IndexByte(raw[i:], '"')
		if quote < 0 {
			break
		}
		quote += i
		backslashes := 0
		for quote-backslashes-1 > start && raw[quote-backslashes-1] == '\\' {
			backslashes++
		}
		if backslashes%2 == 0 {
			return quote + 1
		}
		i = quote + 1
	}
	return len(raw)
}

func endOfNumber(raw []byte, start int) int {
	i := start
	for i < len(raw) && (raw[i] >= '0' && raw[i] <= '9' || raw[i] == '-' || raw[i] == '+' || raw[i] == '.' || raw[i] == 'e' || raw[i] == 'E') {
		i++
	}
	return i
}

func numberIsClean(number []byte) bool {
	if len(number) > maxDigits {
		return false
	}
	e := bytes.IndexAny(number, "eE")
	if e < 0 {
		return true
	}
	exponent, err := strconv.Atoi(string(number[e+1:]))
	return err == nil && exponent >= -maxExponent && exponent <= maxExponent
}

func escapesAreClean(body []byte) bool {
	for i := 0; i < len(body); {
		if body[i] != '\\' {
			i++
			continue
		}
		size, ok := escape(body[i:])
		if !ok {
			return false
		}
		i += size
	}
	return true
}

// escape is the size of the escape sequence at the beginning of b, and whether it stands for a character that can be stored.
func escape(b []byte) (size int, ok bool) {
	if len(b) < 2 || b[1] != 'u' {
		return min(2, len(b)), true
	}
	switch code := hex4(b); {
	case code <= 0: // NUL, or not hex at all
		return min(6, len(b)), false
	case code >= 0xDC00 && code <= 0xDFFF:
		return 6, false
	case code >= 0xD800 && code <= 0xDBFF:
		if low := hex4(b[6:]); low >= 0xDC00 && low <= 0xDFFF {
			return 12, true
		}
		return 6, false
	default:
		return 6, true
	}
}

// hex4 is the code of "\uXXXX" at the beginning of b, -1 where there is none.
func hex4(b []byte) int64 {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return -1
	}
	code, err := strconv.ParseUint(string(b[2:6]), 16, 32)
	if err != nil {
		return -1
	}
	return int64(code)
}

// replacement stands for what cannot be stored.
const replacement = "\uFFFD"

func rewrite(raw []byte) []byte {
	out := make([]byte, 0, len(raw)+64)
	depth := 0
	for i := 0; i < len(raw); {
		switch c := raw[i]; {
		case c == '"':
			end := endOfString(raw, i)
			out = appendString(out, raw[i:end])
			i = end
		case (c == '{' || c == '[') && depth == maxDepth:
			end := endOfContainer(raw, i)
			out = gjson.AppendJSONString(out, CleanText(string(raw[i:end])))
			i = end
		case c == '{' || c == '[':
			depth++
			out = append(out, c)
			i++
		case c == '}' || c == ']':
			depth--
			out = append(out, c)
			i++
		case c == '-' || c >= '0' && c <= '9':
			end := endOfNumber(raw, i)
			if number := raw[i:end]; numberIsClean(number) {
				out = append(out, number...)
			} else {
				out = append(append(append(out, '"'), number...), '"')
			}
			i = end
		default:
			out = append(out, c)
			i++
		}
	}
	return out
}

// appendString appends a string with its quotes.
func appendString(out, body []byte) []byte {
	for i := 0; i < len(body); {
		size, ok := escape(body[i:])
		if body[i] != '\\' {
			var r rune
			r, size = utf8.DecodeRune(body[i:])
			ok = r != 0 && (r != utf8.RuneError || size > 1)
		}
		if ok {
			out = append(out, body[i:i+size]...)
		} else {
			out = append(out, replacement...)
		}
		i += size
	}
	return out
}

// endOfContainer is the index after the bracket that closes the one at start.
func endOfContainer(raw []byte, start int) int {
	depth := 0
	for i := start; i < len(raw); {
		switch raw[i] {
		case '"':
			i = endOfString(raw, i)
			continue
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1
			}
		}
		i++
	}
	return len(raw)
}
