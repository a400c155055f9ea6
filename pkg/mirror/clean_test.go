package mirror_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/mirror"
)

var odd = []string{
	`"\u0000"`, `"\\u0000"`, `"\\\u0000"`, `"\uD800"`, `"\udc00\ud800"`, `"\ud83d\ude00"`, `"\ud83d\ud83d\ude00"`, `"\ud83d\\ude00"`, "\"\xff\"", `{"\u0000":1,"\u0000":2}`,
	`1e401`, `1e400`, `-1.5E-401`, `[0,-0,1e5]`, strings.Repeat("1", 1001), "0." + strings.Repeat("3", 1000), `{}`, ` [ ] `, `"a\"b"`, `"\\"`, `"\\\""`, `null`, `true`,
	strings.Repeat("[", 501) + `"\u0000\ud800<\"` + "\xff\"" + strings.Repeat("]", 501), strings.Repeat("[", 500) + strings.Repeat("]", 500), strings.Repeat(`{"a":`, 600) + "1" + strings.Repeat("}", 600),
}

func TestCleanChangesOnlyWhatCannotBeStored(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		`{"a":"\u0000\ud800x"}`:              "{\"a\":\"\uFFFD\uFFFDx\"}",
		` {"a" : "\\u0000\u00e9" , "b":1.0}`: ` {"a" : "\\u0000\u00e9" , "b":1.0}`,
		`[1e999,2]`:                          `["1e999",2]`,
		strings.Repeat("[", 501) + `"<"` + strings.Repeat("]", 501): strings.Repeat("[", 500) + `"[\"\u003c\"]"` + strings.Repeat("]", 500),
	} {
		assert.Equal(t, want, string(mirror.Clean([]byte(in))))
	}
	body, _ := fixture.Event("user.created")
	assert.Same(t, &body[0], &mirror.Clean(body)[0], "nothing to do, nothing copied")
	assert.Equal(t, "a\uFFFDb\uFFFD", mirror.CleanText("a\x00b\xff"))
}

// TestBothDatabasesTakeWhatCleanGives asks the databases themselves.
func TestBothDatabasesTakeWhatCleanGives(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		query := "SELECT json_valid(?)"
		if database.IsPostgres(db) {
			query = "SELECT (?::jsonb)::text <> ''"
		}
		for _, in := range odd {
			var ok bool
			require.NoError(t, db.Raw(query, string(mirror.Clean([]byte(in)))).Row().Scan(&ok), in)
			assert.True(t, ok, in)
		}
	})
}

func FuzzClean(f *testing.F) {
	for _, seed := range odd {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if !json.Valid(raw) {
			mirror.Clean(raw) // must end, and not panic
			return
		}
		before := bytes.Clone(raw)
		clean := mirror.Clean(raw)
		assert.Equal(t, before, raw, "the input is not touched")
		assert.True(t, json.Valid(clean), "%q", clean)
		assert.True(t, utf8.Valid(clean), "%q", clean)
		assert.Equal(t, clean, mirror.Clean(clean), "cleaning twice changes nothing")
	})
}
