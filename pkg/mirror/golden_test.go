package mirror_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

// TestGolden holds the rows of every payload of the corpus, applied alone, and of all of them together. Both databases must
// give the same text. -update writes the files from PostgreSQL's rows and then compares SQLite's with them.
func TestGolden(t *testing.T) {
	t.Parallel()
	cases := map[string][]event.Event{}
	for _, typ := range fixture.Types() {
		body, _ := fixture.Event(typ)
		e := decode(t, "msg_"+typ, body)
		cases["event/"+typ], cases["all"] = []event.Event{e}, append(cases["all"], e)
	}
	for _, name := range fixture.Variants() {
		body, _ := fixture.Variant(name)
		cases["variant/"+name] = []event.Event{decode(t, "msg_"+name, body)}
	}
	require.Len(t, cases, 46+11+1)
	for _, kind := range databases { // one after the other, for -update
		t.Run(kind.name, func(t *testing.T) {
			db := kind.open(t)
			for name, events := range cases {
				got := rolledBack(t, db, events)
				file := filepath.Join("testdata", "golden", filepath.FromSlash(name)+".txt")
				if *update && kind.name == "postgres" {
					require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
					require.NoError(t, os.WriteFile(file, []byte(got), 0o644))
				}
				want, err := os.ReadFile(file)
				require.NoError(t, err, "run with -update")
				assert.Equal(t, string(want), got, name)
			}
		})
	}
}

// rolledBack is the dump after events, one batch each, of a database that is as before afterwards.
func rolledBack(t *testing.T, db *gorm.DB, events []event.Event) (text string) {
	t.Helper()
	tx := db.Begin()
	require.NoError(t, tx.Error)
	defer tx.Rollback()
	for _, e := range events {
		require.NoError(t, applyTo(t.Context(), tx, e), e.Type)
	}
	return dump(t, tx)
}
