package reconciler

import (
	"context"
	"database/sql"
	"fmt"
	"iter"
	"time"

	"gorm.io/gorm"
)

// rowPage is how many rows are read at once.
const rowPage = 500

const rowColumns = "id, clerk_created_at, version, seen_at, deleted_at, raw"

// books reads the mirror's rows of one source. Table names come from clerk.Resources only.
type books struct {
	db     *gorm.DB
	source string
}

// livingPages goes through the living rows that have a time of creation from the given one (ms) on, in that order, a page
// at a time, so that no transaction is held.
func (b books) livingPages(ctx context.Context, table string, from int64) iter.Seq2[[]row, error] {
	return func(yield func([]row, error) bool) {
		at, id := time.UnixMilli(from).UTC(), ""
		for {
			page, err := b.query(ctx, table, "SELECT "+rowColumns+" FROM "+table+
				" WHERE deleted_at IS NULL AND source = ? AND (clerk_created_at, id) > (?, ?) ORDER BY clerk_created_at, id LIMIT ?", b.source, at, id, rowPage)
			if !yield(page, err) || err != nil || len(page) < rowPage {
				return
			}
			last := page[len(page)-1]
			at, id = time.UnixMilli(last.created).UTC(), last.id
		}
	}
}

// heads goes through all living rows in the order of their ids, without what is in them; undated, only those without a time of
// creation, which stubs may lack.
func (b books) heads(ctx context.Context, table string, undated bool) iter.Seq2[row, error] {
	where := ""
	if undated {
		where = " AND clerk_created_at IS NULL"
	}
	return func(yield func(row, error) bool) {
		after := ""
		for {
			page, err := b.query(ctx, table, "SELECT id, clerk_created_at, version, seen_at, deleted_at, '' FROM "+table+
				" WHERE deleted_at IS NULL AND source = ? AND id > ?"+where+" ORDER BY id LIMIT ?", b.source, after, rowPage)
			if err != nil {
				yield(row{}, err)
				return
			}
			for _, r := range page {
				if !yield(r, nil) {
					return
				}
			}
			if len(page) < rowPage {
				return
			}
			after = page[len(page)-1].id
		}
	}
}

// byID finds rows, tombstones and those of other sources included.
func (b books) byID(ctx context.Context, table string, ids []string) (map[string]*row, error) {
	found := make(map[string]*row, len(ids))
	for len(ids) > 0 {
		n := min(len(ids), rowPage)
		page, err := b.query(ctx, table, "SELECT "+rowColumns+" FROM "+table+" WHERE id IN ?", ids[:n])
		if err != nil {
			return nil, err
		}
		for i := range page {
			found[page[i].id] = &page[i]
		}
		ids = ids[n:]
	}
	return found, nil
}

// ends are some ids of the oldest and the newest living rows.
func (b books) ends(ctx context.Context, table string, each int) ([]string, error) {
	var ids []string
	for _, order := range []string{"DESC", "ASC"} {
		var some []string
		err := b.db.WithContext(ctx).Raw("SELECT id FROM "+table+" WHERE deleted_at IS NULL AND source = ? AND version > 0 AND clerk_created_at IS NOT NULL ORDER BY clerk_created_at "+
			order+", id "+order+" LIMIT ?", b.source, each).Scan(&some).Error
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", table, err)
		}
		ids = append(ids, some...)
	}
	return ids, nil
}

// count is how many rows live.
func (b books) count(ctx context.Context, table string) (int64, error) {
	var n int64
	err := b.db.WithContext(ctx).Table(table).Where("deleted_at IS NULL AND source = ?", b.source).Count(&n).Error
	if err != nil {
		return 0, fmt.Errorf("count %s: %w", table, err)
	}
	return n, nil
}

func (b books) query(ctx context.Context, table, query string, args ...any) ([]row, error) {
	rows, err := b.db.WithContext(ctx).Raw(query, args...).Rows()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", table, err)
	}
	defer func() { _ = rows.Close() }()
	var page []row
	for rows.Next() {
		var r row
		var created, deleted sql.NullTime
		if err := rows.Scan(&r.id, &created, &r.version, &r.seenAt, &deleted, &r.raw); err != nil {
			return nil, fmt.Errorf("read %s: %w", table, err)
		}
		if created.Valid {
			r.created = created.Time.UnixMilli()
		}
		r.deleted = deleted.Valid
		page = append(page, r)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", table, err)
	}
	return page, nil
}

// settled tells which events the mirror has in one of the states.
func (b books) settled(ctx context.Context, ids []string, states ...string) (map[string]bool, error) {
	done := make(map[string]bool, len(ids))
	for len(ids) > 0 {
		n := min(len(ids), rowPage)
		var some []string
		err := b.db.WithContext(ctx).Table("deliveries").Where("handler = ? AND event_id IN ? AND status IN ?", mirrorHandler, ids[:n], states).Pluck("event_id", &some).Error
		if err != nil {
			return nil, fmt.Errorf("read deliveries: %w", err)
		}
		for _, id := range some {
			done[id] = true
		}
		ids = ids[n:]
	}
	return done, nil
}
