// Package jsondoc is the one place that says when two JSON documents mean the same.
//
// It guarantees that the order of keys, white space, escapes and the spelling of a number make no difference, that of a key that is
// given twice the last counts, as in PostgreSQL's jsonb, and that numbers are exact: 12345678901234567890.5 and 12345678901234567890.25
// differ, 1e+21 and 1000000000000000000000 do not. It spends no more memory than some times the document, whatever exponents
// stand in it. It refuses to judge what no document is: halves of surrogate pairs and bytes that are not UTF-8 all read as U+FFFD.
package jsondoc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Equal reports whether two documents mean the same. What is not valid JSON is equal only to the same bytes.
func Equal(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	x, err := Decode(a)
	if err != nil {
		return false
	}
	y, err := Decode(b)
	return err == nil && same(x, y)
}

func same(a, b any) bool {
	switch x := a.(type) {
	case map[string]any:
		y, ok := b.(map[string]any)
		return ok && maps.EqualFunc(x, y, same)
	case []any:
		y, ok := b.([]any)
		return ok && slices.EqualFunc(x, y, same)
	default: // comparable, all of them
		switch b.(type) {
		case map[string]any, []any:
			return false
		}
		return a == b
	}
}

// Canonical is the one spelling of a document: keys sorted by their bytes, no white space, numbers as [Number] writes them. Two documents
// are [Equal] if and only if their canonical forms are the same bytes. The error says that doc is not valid JSON.
func Canonical(doc []byte) ([]byte, error) {
	value, err := Decode(doc)
	if err != nil {
		return nil, err
	}
	return Encode(value), nil
}

// Decode reads one document: nil, bool, string, [json.Number] as [Number] writes it, []any or map[string]any.
func Decode(doc []byte) (any, error) {
	if !json.Valid(doc) { // a decoder stops after the first value
		return nil, errors.New("read JSON: not valid, or nested too deep")
	}
	decoder := json.NewDecoder(bytes.NewReader(doc))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, fmt.Errorf("read JSON: %w", err)
	}
	return numbers(value), nil
}

// numbers gives the numbers in a decoded value their one spelling.
func numbers(value any) any {
	switch v := value.(type) {
	case json.Number:
		return json.Number(Number(string(v)))
	case map[string]any:
		for key, inner := range v {
			v[key] = numbers(inner)
		}
	case []any:
		for i, inner := range v {
			v[i] = numbers(inner)
		}
	}
	return value
}

// Encode is the canonical form of a value that [Decode] made.
func Encode(value any) []byte { return encode(nil, value) }

func encode(dst []byte, value any) []byte {
	switch v := value.(type) {
	case bool:
		return strconv.AppendBool(dst, v)
	case json.Number:
		return append(dst, v...)
	case string:
		return quote(dst, v)
	case []any:
		dst = append(dst, '[')
		for i, inner := range v {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = encode(dst, inner)
		}
		return append(dst, ']')
	case map[string]any:
		dst = append(dst, '{')
		for i, key := range slices.Sorted(maps.Keys(v)) {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = encode(append(quote(dst, key), ':'), v[key])
		}
		return append(dst, '}')
	default:
		return append(dst, "null"...)
	}
}

const hex = "0123456789abcdef"

func quote(dst []byte, s string) []byte {
	dst = append(dst, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			dst = append(dst, '\\', byte(r))
		case r < 0x20:
			dst = append(dst, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		default:
			dst = utf8.AppendRune(dst, r)
		}
	}
	return append(dst, '"')
}

// maxZeros is how many zeros Number writes out on account of an exponent.
const maxZeros = 1000

// Number is the one spelling of a JSON number, exact whatever its size: 1e2, 100.0 and 100 are 100, -0 is 0. What would take more than
// 1,000 zeros that stand for nothing but its size is written with an exponent, as 1.5e2000. What is no JSON number is returned as it is.
func Number(text string) string {
	if !strings.ContainsAny(text, ".eE") && text != "-0" {
		return text
	}
	n, ok := parse(text)
	if !ok {
		return text
	}
	if n.digits == "" {
		return "0"
	}
	sign := ""
	if n.negative {
		sign = "-"
	}
	// The value is 0.DIGITS * 10^point.
	digits, size := n.digits, len(n.digits)
	if !n.point.IsInt64() || n.point.Int64() > int64(size)+maxZeros || n.point.Int64() < -maxZeros {
		exponent := new(big.Int).Sub(n.point, big.NewInt(1))
		if size > 1 {
			digits = digits[:1] + "." + digits[1:]
		}
		return sign + digits + "e" + exponent.String()
	}
	switch point := int(n.point.Int64()); {
	case point >= size:
		return sign + digits + strings.Repeat("0", point-size)
	case point > 0:
		return sign + digits[:point] + "." + digits[point:]
	default:
		return sign + "0." + strings.Repeat("0", -point) + digits
	}
}

// Int is the integer part of a number in decimal, with or without fraction and exponent: 12, 12.9 and 1.2e1 are 12. It is false for
// what is no number, or one that an int64 cannot hold.
func Int(text string) (int64, bool) {
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		return n, true
	}
	n, ok := parse(text)
	if !ok {
		return 0, false
	}
	if n.digits == "" || n.point.Sign() <= 0 {
		return 0, true
	}
	const most = 19 // digits of an int64
	if n.point.Cmp(big.NewInt(most)) > 0 {
		return 0, false
	}
	point := int(n.point.Int64())
	whole := n.digits[:min(point, len(n.digits))] + strings.Repeat("0", max(0, point-len(n.digits)))
	if n.negative {
		whole = "-" + whole
	}
	i, err := strconv.ParseInt(whole, 10, 64)
	return i, err == nil
}

// decimal is 0.digits * 10^point; digits neither begins nor ends with a zero, and is empty for zero.
type decimal struct {
	negative bool
	digits   string
	point    *big.Int
}

func parse(text string) (decimal, bool) {
	var n decimal
	text, n.negative = strings.CutPrefix(text, "-")
	mantissa, exponent := text, "0"
	if i := strings.IndexAny(text, "eE"); i >= 0 {
		mantissa, exponent = text[:i], strings.TrimPrefix(text[i+1:], "+")
	}
	whole, fraction, dotted := strings.Cut(mantissa, ".")
	if !isDigits(whole) || dotted && !isDigits(fraction) || !isDigits(strings.TrimPrefix(exponent, "-")) {
		return n, false
	}
	var ok bool
	if n.point, ok = new(big.Int).SetString(exponent, 10); !ok {
		return n, false
	}
	digits := whole + fraction
	significant := strings.TrimLeft(digits, "0")
	n.point.Add(n.point, big.NewInt(int64(len(whole)-(len(digits)-len(significant)))))
	n.digits = strings.TrimRight(significant, "0")
	return n, true
}

func isDigits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}
