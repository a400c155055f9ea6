package reconciler

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/mirror"
)

// rowPage is how many rows are read at once. Tests read less.
var rowPage = 500

// books reads the mirror's rows of one source. Table names come from clerk.Resources only.
type books struct {
	db     *gorm.DB
	source string
}

// livingPages goes through the living rows that have a time of creation from the given one (ms) on, in that order, a page
// at a time, so that no transaction is held.
func (b books) livingPages(ctx context.Context, table string, from int64) iter.Seq2[[]row, error] {
	return func(yield func([]row, error) bool) {
		var at any = time.UnixMilli(from).UTC()
		id := ""
		for {
			page, last, err := b.query(ctx, table, "WHERE deleted_at IS NULL AND source = ? AND (clerk_created_at, id) > (?, ?) ORDER BY clerk_created_at, id LIMIT ?", b.source, at, id, rowPage)
			if !yield(page, err) || err != nil || len(page) < rowPage {
				return
			}
			at, id = last, page[len(page)-1].id // what the column holds, to the letter: less than that would be read again, and for ever
		}
	}
}

// heads goes through the ids of all living rows, in their order; undated, only of those without a time of creation, which stubs may lack.
func (b books) heads(ctx context.Context, table string, undated bool) iter.Seq2[row, error] {
	where := ""
	if undated {
		where = " AND clerk_created_at IS NULL"
	}
	return func(yield func(row, error) bool) {
		after := ""
		for {
			var ids []string
			err := b.db.WithContext(ctx).Raw("SELECT id FROM "+table+" WHERE deleted_at IS NULL AND source = ? AND id > ?"+where+" ORDER BY id LIMIT ?", b.source, after, rowPage).Scan(&ids).Error
			if err != nil {
				yield(row{}, fmt.Errorf("read %s: %w", table, err))
				return
			}
			for _, id := range ids {
				if !yield(row{id: id}, nil) {
					return
				}
			}
			if len(ids) < rowPage {
				return
			}
			after = ids[len(ids)-1]
		}
	}
}

// byID finds rows, tombstones and those of other sources included.
func (b books) byID(ctx context.Context, table string, ids []string) (map[string]*row, error) {
	found := make(map[string]*row, len(ids))
	for len(ids) > 0 {
		n := min(len(ids), rowPage)
		page, _, err := b.query(ctx, table, "WHERE id IN ?", ids[:n])
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

// query reads the rows that which selects, and holds the columns of each against its raw: what differs is noted, and nothing else of them kept.
// last is clerk_created_at of the last row, as an argument of the next query.
func (b books) query(ctx context.Context, table, which string, args ...any) (page []row, last any, err error) {
	check, err := mirror.NewCheck(b.db, table)
	if err != nil {
		return nil, nil, err
	}
	rows, err := b.db.WithContext(ctx).Raw("SELECT id, source, version, seen_at, deleted_at IS NOT NULL, raw, "+check.Columns()+" FROM "+table+" "+which, args...).Rows()
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", table, err)
	}
	defer func() { _ = rows.Close() }()
	var r row
	var source string
	targets := append([]any{&r.id, &source, &r.version, &r.seenAt, &r.deleted, &r.raw}, check.Targets()...)
	for rows.Next() {
		if err := rows.Scan(targets...); err != nil {
			return nil, nil, fmt.Errorf("read %s: %w", table, err)
		}
		r.created, last = check.CreatedAt()
		r.columns, r.foreign = nil, source != b.source
		if r.version > 0 && !r.deleted {
			r.columns = check.Differences(r.raw)
		}
		page = append(page, r)
	}
	if err := rows.Err(); err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", table, err)
	}
	return page, last, nil
}

// childrenOf are those of the ids of a table's rows that have one of the parents, which are given by their table.
func (b books) childrenOf(ctx context.Context, table string, ids []string, parents map[string]map[string]bool) (map[string]bool, error) {
	children := map[string]bool{}
	for parent, column := range mirror.Parents(table) {
		if len(parents[parent]) == 0 {
			continue
		}
		for chunk := range slices.Chunk(ids, rowPage) {
			var found []struct{ ID, Parent string }
			err := b.db.WithContext(ctx).Table(table).Select("id, "+column+" AS parent").Where("id IN ? AND "+column+" IS NOT NULL", chunk).Scan(&found).Error
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", table, err)
			}
			for _, row := range found {
				if parents[parent][row.Parent] {
					children[row.ID] = true
				}
			}
		}
	}
	return children, nil
}

// settled tells which events of the source the mirror has in one of the states.
func (b books) settled(ctx context.Context, ids []string, states ...string) (map[string]bool, error) {
	done := make(map[string]bool, len(ids))
	for len(ids) > 0 {
		n := min(len(ids), rowPage)
		var some []string
		err := b.db.WithContext(ctx).Table("deliveries").Where("handler = ? AND source = ? AND event_id IN ? AND status IN ?", mirrorHandler, b.source, ids[:n], states).Pluck("event_id", &some).Error
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
