package jsondoc_test

import (
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/jsondoc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

func TestNumber(t *testing.T) {
	long := strings.Repeat("7", 5000)
	for text, want := range map[string]string{
		"0": "0", "-0": "0", "0.000": "0", "-0.0e5": "0", "0e999999999999999999999": "0",
		"1": "1", "-12": "-12", "1.0": "1", "1e2": "100", "1E+2": "100", "100e-2": "1", "1.50": "1.5", "-2.5e-3": "-0.0025",
		"1e+21": "1000000000000000000000", "12345678901234567890.5": "12345678901234567890.5", "123.456e1": "1234.56",
		"9007199254740993": "9007199254740993", "9007199254740993.0": "9007199254740993", "0.1": "0.1", "0.10000000000000000001": "0.10000000000000000001",
		"1e1000": "1" + strings.Repeat("0", 1000), "1e1001": "1e1001", "10e1001": "1e1002", "1.5e2000": "1.5e2000", "15e1999": "1.5e2000", "1e-2000": "1e-2000", "0.1e-1999": "1e-2000",
		"1e999999999": "1e999999999", "1e-999999999": "1e-999999999", "-12.50e99999999999999999999999": "-1.25e100000000000000000000000",
		long: long, long + ".0": long, "0." + long: "0." + long, "1e": "1e", "abc.": "abc.", "1.e5": "1.e5", ".5": ".5", "": "",
	} {
		assert.Equal(t, want, jsondoc.Number(text), "%.60s", text)
		assert.Equal(t, jsondoc.Number(text), jsondoc.Number(jsondoc.Number(text)), "%.60s", text)
	}
}

func TestInt(t *testing.T) {
	for text, want := range map[string]int64{
		"12": 12, "12.0": 12, "1.2e1": 12, "12.9": 12, "-12.9": -12, "-0": 0, "0.9": 0, "1e-999999999": 0, "+5": 5,
		"9223372036854775807": 9223372036854775807, "9223372036854775807.9": 9223372036854775807, "-9223372036854775808.0": -9223372036854775808, "9007199254740993.0": 9007199254740993, "2e18": 2e18,
	} {
		n, ok := jsondoc.Int(text)
		assert.True(t, ok, text)
		assert.Equal(t, want, n, text)
	}
	for _, text := range []string{"", "x", "1e19", "9223372036854775808", "9223372036854775808.0", "1e999999999999999999999", "NaN", "Inf", "0x10", "1_000.0", " 1.0", "1.", ".5"} {
		_, ok := jsondoc.Int(text)
		assert.False(t, ok, text)
	}
}

func TestEqual(t *testing.T) {
	for _, same := range [][2]string{
		{`{"a":1,"b":[true,null,"x"]}`, ` { "b" : [ true , null , "x" ] , "a" : 1.0 } `},
		{`{"n":1e+21,"small":1e2,"long":12345678901234567890.5}`, `{"n": 1000000000000000000000, "long": 12345678901234567890.5, "small": 100}`},
		{`{"a":1,"a":2}`, `{"a":2}`},
		{`"\u0141ukasz \ud83e\udd8a"`, `"Łukasz 🦊"`},
		{`"\/\b\f\n\r\t\u0022"`, `"/\u0008\u000c\u000a\u000d\u0009\""`},
		{`"\ud800"`, `"\ufffd"`},
		{`"\udc00x"`, "\"\xffx\""},
		{`{"\u0061":0}`, `{"a":-0.0}`},
		{`[1e999999999999]`, `[10e999999999998]`},
	} {
		assert.True(t, jsondoc.Equal([]byte(same[0]), []byte(same[1])), "%s %s", same[0], same[1])
		a, err := jsondoc.Canonical([]byte(same[0]))
		require.NoError(t, err)
		b, err := jsondoc.Canonical([]byte(same[1]))
		require.NoError(t, err)
		assert.Equal(t, string(a), string(b))
	}
	for _, differ := range [][2]string{
		{`{"a":null}`, `{}`},
		{`[1,2]`, `[2,1]`},
		{`1`, `"1"`},
		{`{}`, `[]`},
		{`null`, `false`},
		{`1`, `[1]`},
		{`[1]`, `1`},
		{`{"a":1}`, `{"b":1}`},
		{`12345678901234567890.5`, `12345678901234567890.25`},
		{`9007199254740993`, `9007199254740992`},
		{`0.1`, `0.10000000000000000001`},
		{`1e400`, `1e401`},
		{`{"a":1`, `{"a":1 `},
		{`1 2`, `1  2`},
		{``, ` `},
	} {
		assert.False(t, jsondoc.Equal([]byte(differ[0]), []byte(differ[1])), "%s %s", differ[0], differ[1])
	}
	_, err := jsondoc.Canonical([]byte(`{"a":1} {}`))
	require.Error(t, err)
}

func TestAnAbsurdExponentTakesNoMemory(t *testing.T) {
	for _, exponent := range []string{"999999999", "-999999999", "+" + strings.Repeat("9", 100000), "-" + strings.Repeat("9", 100000)} {
		doc := []byte(`{"n":1.5e` + exponent + `}`)
		out, err := jsondoc.Canonical(doc)
		require.NoError(t, err)
		assert.LessOrEqual(t, len(out), len(doc)+10)
	}
}

// number draws a JSON number within what PostgreSQL's jsonb and the mirror hold, and another spelling of the same.
func number(t *rapid.T) (text, respelled string) {
	digits := rapid.StringMatching(`0|[1-9][0-9]{0,25}`).Draw(t, "whole")
	fraction := rapid.StringMatching(`[0-9]{0,25}`).Draw(t, "fraction")
	exponent := rapid.IntRange(-400, 400).Draw(t, "exponent")
	sign := rapid.SampledFrom([]string{"", "-"}).Draw(t, "sign")
	shift := rapid.IntRange(0, 5).Draw(t, "shift")
	dot := func(whole, fraction string) string {
		if fraction == "" {
			return whole
		}
		return whole + "." + fraction
	}
	e := rapid.SampledFrom([]string{"e%d", "E%d", "e%+d", "E%+03d"}).Draw(t, "form")
	text = sign + dot(digits, fraction)
	if exponent != 0 {
		text += fmt.Sprintf(e, exponent)
	}
	zeros := strings.Repeat("0", shift)
	respelled = sign + dot(digits, fraction+zeros) + fmt.Sprintf(e, exponent)
	if digits != "0" && rapid.Bool().Draw(t, "shifted") {
		respelled = sign + dot(digits+(fraction + zeros)[:shift], (fraction + zeros)[shift:]) + fmt.Sprintf(e, exponent-shift)
	}
	return text, respelled
}

func value(t *rapid.T, depth int) string {
	kinds := 4
	if depth > 0 {
		kinds = 6
	}
	switch rapid.IntRange(0, kinds-1).Draw(t, "kind") {
	case 0:
		return rapid.SampledFrom([]string{"null", "true", "false"}).Draw(t, "word")
	case 1, 2:
		text, _ := number(t)
		return text
	case 3:
		out, _ := json.Marshal(strings.ReplaceAll(rapid.String().Draw(t, "string"), "\x00", ""))
		return string(out)
	case 4:
		items := make([]string, rapid.IntRange(0, 4).Draw(t, "items"))
		for i := range items {
			items[i] = value(t, depth-1)
		}
		return "[" + strings.Join(items, " ,\n") + "]"
	default:
		members := make([]string, rapid.IntRange(0, 5).Draw(t, "members"))
		for i := range members { // few names: some stand twice
			members[i] = rapid.SampledFrom([]string{`"a"`, `"b"`, `"\u0061"`, `"é"`, `""`, `"aa"`}).Draw(t, "key") + ": " + value(t, depth-1)
		}
		return "{" + strings.Join(members, ",") + " }"
	}
}

func TestNumbersAreEqualIfAndOnlyIfTheirValuesAre(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text, respelled := number(t)
		other, _ := number(t)
		assert.Equal(t, jsondoc.Number(text), jsondoc.Number(respelled), "%s %s", text, respelled)
		a, ok := new(big.Rat).SetString(text)
		require.True(t, ok)
		b, ok := new(big.Rat).SetString(other)
		require.True(t, ok)
		assert.Equal(t, a.Cmp(b) == 0, jsondoc.Number(text) == jsondoc.Number(other))
		back, ok := new(big.Rat).SetString(jsondoc.Number(text))
		require.True(t, ok)
		assert.Zero(t, a.Cmp(back), text)
		require.True(t, json.Valid([]byte(jsondoc.Number(text))))
	})
}

func TestCanonicalIsValidAndStays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		doc := []byte(value(t, 3))
		once, err := jsondoc.Canonical(doc)
		require.NoError(t, err)
		twice, err := jsondoc.Canonical(once)
		require.NoError(t, err)
		assert.Equal(t, string(once), string(twice))
		assert.True(t, jsondoc.Equal(doc, once))
		other := []byte(value(t, 3))
		otherOnce, err := jsondoc.Canonical(other)
		require.NoError(t, err)
		assert.Equal(t, string(once) == string(otherOnce), jsondoc.Equal(doc, other))
	})
}

// PostgreSQL rewrites a document when it stores it as jsonb; that changes nothing of its meaning, and what PostgreSQL
// takes for equal is equal here.
func TestPostgresKeepsTheMeaning(t *testing.T) {
	db := dbtest.Postgres(t)
	big, err := os.ReadFile("testdata/big_number.json")
	require.NoError(t, err)
	stored := func(t require.TestingT, doc string) string {
		var out string
		require.NoError(t, db.Raw("SELECT ?::jsonb::text", doc).Scan(&out).Error)
		return out
	}
	assert.True(t, jsondoc.Equal(big, []byte(stored(t, string(big)))))
	rapid.Check(t, func(rt *rapid.T) {
		doc, other := value(rt, 3), value(rt, 3)
		assert.True(rt, jsondoc.Equal([]byte(doc), []byte(stored(rt, doc))), "%s", doc)
		var same bool
		require.NoError(rt, db.Raw("SELECT ?::jsonb = ?::jsonb", doc, other).Scan(&same).Error)
		assert.Equal(rt, same, jsondoc.Equal([]byte(doc), []byte(other)), "%s %s", doc, other)
	})
}
