package reconciler

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/stream"
)

// sample is a table counted at Clerk and in the mirror at about the same time.
type sample struct {
	clerk.Tally
	rows, oldRows int64
}

func (w *sweep) sample(ctx context.Context) (s sample, err error) {
	var newest time.Time
	if w.at.Watermark != 0 {
		newest = time.UnixMilli(w.at.Watermark)
	}
	if s.Tally, err = w.api.Tally(ctx, w.table, newest); err != nil {
		return s, fmt.Errorf("count: %w", err)
	}
	if s.rows, err = w.books.count(ctx, w.table); err != nil {
		return s, err
	}
	s.oldRows = s.rows
	if !s.Until.IsZero() {
		s.oldRows, err = w.books.countOld(ctx, w.table, s.Until)
	}
	return s, err
}

// standing is by how much Clerk counted more than the mirror had when the last run ended: that has a reason which no sweep takes away.
func standing(last *progress) int64 { return last.Count - last.Rows }

// all is how many rows the mirror has too many, below 0 too few, and old how many of them are of old objects.
func (s *sample) all(last *progress) int64 { return s.rows - (s.All - standing(last)) }

func (s *sample) old(last *progress) int64 { return s.oldRows - (s.Old - standing(last)) }

// differ decides what is done where Clerk and the mirror differ by something else than what the last run left. On a busy instance they nearly
// always do, by what is on its way, and a whole sweep each time would be dear. A table is swept whole where the mirror has too many
// rows while nothing moves, which is how deletes that were missed look, and where two runs in a row find it apart in the same direction.
func (w *sweep) differ(ctx context.Context, last *progress, before sample) error {
	w.at.Rows = w.at.Count - standing(last) // what the last run left is still to be expected
	applied, err := w.applied(ctx)
	if err != nil {
		return err
	}
	if !applied {
		w.at.Apart = last.Apart // the next run will see
		return nil
	}
	now, err := w.sample(ctx)
	if err != nil {
		return err
	}
	rows, still := apart(&before, &now, last)
	if rows > 0 && clerk.Partial(w.table) { // the list leaves more out than it did, which a whole sweep would not tell from what is gone
		w.at.Count, w.at.Rows, w.at.Apart = now.All, now.rows, 0
		return nil
	}
	w.at.Apart = rows
	if rows == 0 {
		return nil
	}
	if twice := rows > 0 && last.Apart > 0 || rows < 0 && last.Apart < 0; !twice && (rows < 0 || !still) {
		w.log.Info("counts differ, which may be what is on its way: the next sweep looks again", zap.String("resource", w.table), zap.Int64("rows_too_many", rows))
		return nil
	}
	w.log.Info("counts differ, sweeping whole", zap.String("resource", w.table), zap.Int64("rows_too_many", rows))
	return w.full(ctx)
}

// apart is how many rows the mirror has too many, below 0 too few, by two samples with a pause between them; still says that nothing moved.
func apart(before, now *sample, last *progress) (rows int64, still bool) {
	// What is old has arrived, but for a delete now and then: both samples see what is wrong with it.
	if a, b := before.old(last), now.old(last); !now.Until.IsZero() && !before.Until.IsZero() {
		if a > 0 && b > 0 {
			return min(a, b), a == b
		}
		if a < 0 && b < 0 {
			return max(a, b), a == b
		}
	}
	// Of the rest the mirror has, once the pause is over, at least what Clerk had at its beginning and at most what it has at its end.
	low, high := min(before.All, now.All)-standing(last), max(before.All, now.All)-standing(last)
	return now.rows - min(max(now.rows, low), high), now.Until.IsZero() && before.All == now.All && before.rows == now.rows
}

// applied waits a pause, and a few more where it must, until the mirror has settled all events that the stream had when it was called. False
// where the mirror is further behind.
func (w *sweep) applied(ctx context.Context) (bool, error) {
	events, err := w.js.Stream(ctx, stream.Events)
	if err != nil {
		return false, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	for range w.cfg.Rechecks {
		if err := sleep(ctx, w.cfg.Pause); err != nil {
			return false, err
		}
		pending, floor, err := w.backlog(ctx)
		if err != nil {
			return false, err
		}
		if pending == 0 || floor >= events.CachedInfo().State.LastSeq {
			return true, nil
		}
	}
	return false, nil
}

// countOld is how many rows live of objects that were created before a time, and of those that do not say.
func (b books) countOld(ctx context.Context, table string, until time.Time) (int64, error) {
	var n int64
	err := b.db.WithContext(ctx).Table(table).Where("deleted_at IS NULL AND source = ? AND (clerk_created_at IS NULL OR clerk_created_at < ?)", b.source, until.UTC()).
		Count(&n).Error
	if err != nil {
		return 0, fmt.Errorf("count %s: %w", table, err)
	}
	return n, nil
}
