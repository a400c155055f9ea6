package mirror

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"gorm.io/gorm"
)

// UnknownSources says of which sources the mirror has living users or organizations that names does not have, and how many: one text a source.
// No event of a source that is set up changes them. It reads an index, and counts only what it names.
func UnknownSources(ctx context.Context, db *gorm.DB, names []string) ([]string, error) {
	counted := map[string][]string{}
	for _, table := range []string{"users", "organizations"} {
		sources, err := sourcesOf(ctx, db, table)
		if err != nil {
			return nil, err
		}
		for _, source := range sources {
			if slices.Contains(names, source) {
				continue
			}
			var n int64
			if err := db.WithContext(ctx).Table(table).Where("source = ? AND deleted_at IS NULL", source).Count(&n).Error; err != nil {
				return nil, fmt.Errorf("count %s of source %q: %w", table, source, err)
			}
			counted[source] = append(counted[source], fmt.Sprintf("%d %s", n, table))
		}
	}
	var texts []string
	for _, source := range slices.Sorted(maps.Keys(counted)) {
		texts = append(texts, fmt.Sprintf("rows of source %q, which is not configured: %s; if it was renamed, see \"Sources\" in docs/architecture.md",
			source, strings.Join(counted[source], ", ")))
	}
	return texts, nil
}

// sourcesOf are the sources of a table's living rows, each found by one step into the index.
func sourcesOf(ctx context.Context, db *gorm.DB, table string) ([]string, error) {
	var sources []string
	for {
		q := db.WithContext(ctx).Table(table).Where("deleted_at IS NULL")
		if len(sources) > 0 {
			q = q.Where("source > ?", sources[len(sources)-1])
		}
		var next []string
		if err := q.Order("source").Limit(1).Pluck("source", &next).Error; err != nil {
			return nil, fmt.Errorf("read the sources of %s: %w", table, err)
		}
		if len(next) == 0 {
			return sources, nil
		}
		sources = append(sources, next[0])
	}
}
