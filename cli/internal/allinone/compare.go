package allinone

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/jsondoc"
	"github.com/usherhq/usher/pkg/mirror"
)

// Compare says in which objects the mirror differs from the emulator's own state, at most limit of
// them, one line each: every living object must be there, whole and alive, every deleted one a tombstone. Rows
// of objects that the emulator never had are not looked at, since the database may be shared.
func Compare(ctx context.Context, db *gorm.DB, clerk *emulator.Clerk, limit int) ([]string, error) {
	diffs := []string{}
	for _, table := range emulator.Tables() {
		rows, err := db.WithContext(ctx).Table(table).Select("id, CASE WHEN deleted_at IS NULL THEN 0 ELSE 1 END, raw").Rows()
		if err != nil {
			return nil, fmt.Errorf("compare %s: %w", table, err)
		}
		type row struct {
			deleted bool
			raw     []byte
		}
		found := map[string]row{}
		for rows.Next() {
			var id string
			var deleted int
			var raw []byte
			if err = rows.Scan(&id, &deleted, &raw); err != nil {
				break
			}
			if _, known := clerk.Object(table, id); known {
				found[id] = row{deleted: deleted == 1, raw: bytes.Clone(raw)}
			}
		}
		if err = firstError(err, rows.Err(), rows.Close()); err != nil {
			return nil, fmt.Errorf("compare %s: %w", table, err)
		}
		for object := range clerk.Objects(table) {
			switch r, ok := found[object.ID]; {
			case !ok:
				diffs = append(diffs, fmt.Sprintf("%s %s is missing", table, object.ID))
			case r.deleted:
				diffs = append(diffs, fmt.Sprintf("%s %s is deleted, and lives at Clerk", table, object.ID))
			case !same(table, r.raw, mirror.Clean(object.JSON)):
				diffs = append(diffs, fmt.Sprintf("%s %s has other content", table, object.ID))
			}
		}
		for object := range clerk.Deleted(table) {
			if r, ok := found[object.ID]; !ok || !r.deleted {
				diffs = append(diffs, fmt.Sprintf("%s %s lives, and is deleted at Clerk", table, object.ID))
			}
		}
	}
	slices.Sort(diffs)
	return diffs[:min(len(diffs), limit)], nil
}

// same reports whether a row holds an object, but for the names of users who are deleted.
func same(table string, row, object []byte) bool {
	return jsondoc.Equal(row, object) || slices.ContainsFunc(mirror.Nameless(table, string(object)), func(form string) bool { return jsondoc.Equal(row, []byte(form)) })
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
