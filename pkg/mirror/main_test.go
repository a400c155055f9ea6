package mirror_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/jsondoc"
	"github.com/usherhq/usher/pkg/mirror"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

// decode makes an event of a body as ingest would store it.
func decode(t testing.TB, id string, body []byte) event.Event {
	t.Helper()
	e, err := event.Decode(body)
	require.NoError(t, err)
	e.ID, e.Source, e.Origin, e.ReceivedAt = id, "clerk", event.OriginWebhook, time.UnixMilli(1_780_000_000_000).UTC()
	return e
}

// bodyOf is the body of an event with an object of these fields.
func bodyOf(t testing.TB, typ string, timestamp int64, data map[string]any) []byte {
	t.Helper()
	body, err := json.Marshal(map[string]any{"type": typ, "timestamp": timestamp, "object": "event", "instance_id": "ins_1", "data": data})
	require.NoError(t, err)
	return body
}

func apply(t testing.TB, db *gorm.DB, batch ...event.Event) {
	t.Helper()
	require.NoError(t, tryApply(t.Context(), db, batch...))
}

func tryApply(ctx context.Context, db *gorm.DB, batch ...event.Event) error {
	return database.InTx(ctx, db, func(tx *gorm.DB) error { return applyTo(ctx, tx, batch...) })
}

// applyTo is Apply where nobody asks for the effects.
func applyTo(ctx context.Context, tx *gorm.DB, batch ...event.Event) error {
	_, err := mirror.Apply(ctx, tx, batch)
	return err
}

// dump is every row of every table as text: times as RFC 3339 with ms, JSON with sorted keys, synced_at left out. It is the same for
// both databases. On the way it asserts that the columns of every row are what its raw says.
func dump(t testing.TB, db *gorm.DB) string {
	t.Helper()
	require.Empty(t, misfits(t, db))
	var out strings.Builder
	for _, table := range mirror.Tables() {
		kinds := map[string]mirror.Kind{
			"clerk_created_at": mirror.Time, "clerk_updated_at": mirror.Time, "deleted_at": mirror.Time,
			"version": mirror.Int, "seen_at": mirror.Int, "raw": mirror.JSON,
		}
		columns := []string{"id", "source"}
		for _, c := range table.Columns {
			columns, kinds[c.Name] = append(columns, c.Name), c.Kind
		}
		for _, name := range mirror.Common()[2:] {
			if name != "synced_at" {
				columns = append(columns, name)
			}
		}
		switch table.Name {
		case "organization_memberships", "organization_invitations", "organization_domains", "sessions":
			columns = append(columns, "deleted_with")
		case "users", "organizations":
			var unsettled int64
			require.NoError(t, db.Table(table.Name).Where("deleted_at IS DISTINCT FROM children_deleted_at").Count(&unsettled).Error)
			require.Zero(t, unsettled, table.Name)
		}
		out.WriteString(dumpTable(t, db, table.Name, columns, kinds))
	}
	return out.String()
}

func dumpTable(t testing.TB, db *gorm.DB, table string, columns []string, kinds map[string]mirror.Kind) string {
	t.Helper()
	rows, err := db.Raw("SELECT " + strings.Join(columns, ", ") + " FROM " + table + " ORDER BY id").Rows()
	require.NoError(t, err)
	defer func() { _ = rows.Close() }()
	var out strings.Builder
	for rows.Next() {
		values, targets := make([]any, len(columns)), make([]any, len(columns))
		for i := range values {
			targets[i] = &values[i]
		}
		require.NoError(t, rows.Scan(targets...))
		fmt.Fprintf(&out, "%s %s\n", table, values[0])
		for i, name := range columns[1:] {
			fmt.Fprintf(&out, "  %s: %s\n", name, show(t, kinds[name], values[i+1]))
		}
	}
	require.NoError(t, rows.Err())
	return out.String()
}

func show(t testing.TB, kind mirror.Kind, value any) string {
	t.Helper()
	if bytes, ok := value.([]byte); ok {
		value = string(bytes)
	}
	switch {
	case value == nil:
		return "null"
	case kind == mirror.Time:
		at, ok := value.(time.Time)
		require.True(t, ok, "%T %v is no time", value, value)
		require.Equal(t, time.UTC, at.Location())
		return at.Format("2006-01-02T15:04:05.000Z07:00")
	case kind == mirror.Bool:
		if n, ok := value.(int64); ok {
			value = n != 0
		}
		return fmt.Sprint(value)
	case kind == mirror.JSON:
		text, ok := value.(string)
		require.True(t, ok)
		canonical, err := jsondoc.Canonical([]byte(text))
		require.NoError(t, err, text)
		return string(canonical)
	case kind == mirror.Int:
		return fmt.Sprint(value)
	default:
		return fmt.Sprintf("%q", value)
	}
}

// databases are the two kinds, for tests that are more than one subtest each.
var databases = []struct {
	name string
	open func(testing.TB) *gorm.DB
}{{"postgres", dbtest.Postgres}, {"sqlite", dbtest.SQLite}}

// misfits are the differences between the columns of all rows that are judged and their raw, as "table id column have want".
func misfits(t testing.TB, db *gorm.DB) (found []string) {
	t.Helper()
	for _, table := range mirror.Tables() {
		found = append(found, misfitsOf(t, db, table.Name)...)
	}
	return found
}

func misfitsOf(t testing.TB, db *gorm.DB, table string) (found []string) {
	t.Helper()
	check, err := mirror.NewCheck(db, table)
	require.NoError(t, err)
	rows, err := db.Raw("SELECT id, raw, " + check.Columns() + " FROM " + table + " WHERE deleted_at IS NULL AND version > 0 ORDER BY id").Rows()
	require.NoError(t, err)
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var id, raw string
		require.NoError(t, rows.Scan(append([]any{&id, &raw}, check.Targets()...)...))
		for _, d := range check.Differences(raw) {
			require.True(t, json.Valid(d.Have) && json.Valid(d.Want), "%s %s", d.Have, d.Want)
			found = append(found, fmt.Sprint(table, " ", id, " ", d.Column, " ", string(d.Have), " ", string(d.Want)))
		}
	}
	require.NoError(t, rows.Err())
	return found
}

func effectsOf(t testing.TB, db *gorm.DB, batch ...event.Event) (effects []event.Effect) {
	t.Helper()
	require.NoError(t, database.InTx(t.Context(), db, func(tx *gorm.DB) (err error) {
		effects, err = mirror.Apply(t.Context(), tx, batch)
		return err
	}))
	return effects
}
