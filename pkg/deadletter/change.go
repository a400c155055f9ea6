package deadletter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/replay"
	"github.com/usherhq/usher/pkg/stream"
)

// Result says what a run did.
type Result struct {
	Selected  int    // when it began
	Replayed  int    // given to their handlers again
	Discarded int    // given up
	Gone      int    // not replayed by this run: their letters are gone, or somebody else took them
	Taken     int    // of the gone: replayed or given up by somebody else meanwhile
	Applied   int    // of the replayed: known to be applied
	Failed    int    // of the replayed: known to have failed again
	Open      int    // of the replayed: without an outcome, where outcomes are waited for
	Retrying  int    // of the failed and the open: tried again by their handlers
	Stopped   string // why it ended early

	NextAttemptAt *time.Time // the earliest of the retrying
}

// page is how many letters a run holds at once (fewer where [replay.PageBytes] are full before), and parallel how many of them it reads
// or deletes at once.
const (
	page     = 500
	parallel = 16
)

// settleTime bounds how long a run that was interrupted may take to settle what it had begun.
const settleTime = 10 * time.Second

// Replay gives every dead letter that f selects back to the handler that failed, the oldest event first, and takes the letter away.
// It holds a page of letters at a time. Those that die again meanwhile are not replayed again by this run. It may be broken off
// and repeated at any point, and run twice at once: each letter is applied once, and counted by the run that published it.
//
// A letter goes through four steps: it is published with an id of its own, the ack is awaited, the log's row is marked (unless the
// worker was faster), the letter is deleted. Whatever step comes last, repeating is harmless: before the mark, the same id is published
// again; after it, the row is no longer dead and the event is in the stream.
//
// The error of a run that too many failures or a handler that does not get on stopped is nil, and Result.Stopped says why. It is
// [stream.ErrSetup], before anything is published, where a handler has no consumer.
func Replay(ctx context.Context, js jetstream.JetStream, db *gorm.DB, f Filter, o replay.Options, progress func(Result)) (Result, error) {
	var result Result
	dlq, err := open(ctx, js)
	if err != nil {
		return result, replay.Explain(err)
	}
	if result.Selected, f.through, err = total(ctx, db, f); err != nil || result.Selected == 0 {
		return result, err
	}
	handlers, err := handlersOf(ctx, db, f)
	if err != nil {
		return result, err
	}
	if err := replay.Ready(ctx, js, handlers...); err != nil {
		return result, err
	}
	o.Progress = func(p replay.Progress) {
		result.Replayed, result.Applied, result.Failed, result.Open = p.Published, p.Applied, p.Failed, p.Open
		result.grow(p.Published + result.Gone)
		if progress != nil {
			progress(result)
		}
	}
	run := replay.New(js, db, o)
	err = replayAll(ctx, dlq, db, f, run, &result)
	whole := err == nil
	if whole {
		err = run.Finish(ctx)
	}
	o.Progress(run.Progress())
	result.Retrying, result.NextAttemptAt = run.Retrying(ctx)
	if whole { // what was selected and neither published nor lost was taken, or discarded before it was applied
		lost := result.Gone - result.Taken
		result.Gone = max(lost, result.Selected-result.Replayed)
		result.Taken = result.Gone - lost
	}
	if errors.Is(err, replay.ErrFailing) || errors.Is(err, replay.ErrStalled) {
		result.Stopped = err.Error()
		return result, nil
	}
	return result, err
}

// grow takes up letters that came into the index after the selection was counted, such as those that a sweep found: it lists them with
// the others, and they were selected too.
func (r *Result) grow(done int) { r.Selected = max(r.Selected, done) }

// handlersOf are the handlers that gave up what f selects.
func handlersOf(ctx context.Context, db *gorm.DB, f Filter) ([]string, error) {
	var names []string
	if err := f.dead(ctx, db).Distinct("handler").Order("handler").Pluck("handler", &names).Error; err != nil {
		return nil, fmt.Errorf("list handlers with dead letters: %w", err)
	}
	return names, nil
}

func replayAll(ctx context.Context, dlq jetstream.Stream, db *gorm.DB, f Filter, run *replay.Run, result *Result) error {
	var at place
	for {
		if err := run.Wait(ctx); err != nil {
			return err
		}
		var entries []Entry
		err := run.Try(ctx, func(ctx context.Context) (err error) {
			entries, err = after(ctx, db, f, at, run.Window())
			return err
		})
		if err != nil || len(entries) == 0 {
			return err
		}
		at = entries[len(entries)-1].place()
		for len(entries) > 0 {
			n, err := replayPage(ctx, dlq, db, entries, run, result)
			if err != nil {
				return err
			}
			entries = entries[n:]
		}
	}
}

// replayPage replays as many entries as may be held at once, from the first on, and returns their number.
func replayPage(ctx context.Context, dlq jetstream.Stream, db *gorm.DB, entries []Entry, run *replay.Run, result *Result) (int, error) {
	var n int
	var items []replay.Item
	var found []held
	err := run.Try(ctx, func(ctx context.Context) (err error) {
		n, items, found, err = readAll(ctx, dlq, entries)
		return err
	})
	if err != nil {
		return 0, err
	}
	result.Gone += n - len(found)
	if err := run.Try(ctx, func(ctx context.Context) error { return countTaken(ctx, db, entries[:n], found, result) }); err != nil {
		return 0, err
	}
	stored, publishErr := run.Publish(ctx, items)
	// What is stored is settled, by a run that was interrupted as well, and also where another run has stored it: that one may have been killed.
	ids := make(map[string]bool, len(stored))
	for _, item := range stored {
		ids[item.ID] = true
	}
	found = slices.DeleteFunc(found, func(l held) bool { return !ids[l.replayID] })
	if err := settle(ctx, db, dlq, run, found); err != nil {
		return 0, errors.Join(publishErr, err)
	}
	return n, publishErr
}

// countTaken counts among the entries whose letter was not found those whose row has changed meanwhile.
func countTaken(ctx context.Context, db *gorm.DB, entries []Entry, found []held, result *Result) error {
	read := make(map[place]bool, len(found))
	for _, l := range found {
		read[l.place()] = true
	}
	taken := 0
	for _, e := range entries {
		if read[e.place()] {
			continue
		}
		now, err := Find(ctx, db, e.Handler, e.Ref())
		switch {
		case errors.Is(err, ErrNotFound), err == nil && now.LetterSeq != e.LetterSeq:
			taken++
		case err != nil:
			return err
		}
	}
	result.Taken += taken
	return nil
}

// held is an entry whose letter was read.
type held struct {
	Entry
	replayID string
}

// replayID is the id of the replay of one letter. It holds the time of the letter, since the sequences of a stream that was made
// anew begin at one again.
func replayID(seq uint64, at time.Time) string {
	return stream.LetterReplay + strconv.FormatUint(seq, 10) + ":" + strconv.FormatInt(at.UnixMicro(), 36)
}

// readPage reads the letters of entries from the first on, at least one and as many as [replay.PageBytes] hold; nil where one is gone.
func readPage(ctx context.Context, dlq jetstream.Stream, entries []Entry) ([]*jetstream.RawStreamMsg, error) {
	messages := make([]*jetstream.RawStreamMsg, 0, len(entries))
	for room := replay.PageBytes; len(messages) < len(entries) && room >= replay.EventBytes; {
		part := make([]*jetstream.RawStreamMsg, min(parallel, len(entries)-len(messages), room/replay.EventBytes))
		group, groupCtx := errgroup.WithContext(ctx)
		for i, e := range entries[len(messages) : len(messages)+len(part)] {
			group.Go(func() error {
				msg, err := read(groupCtx, dlq, e)
				if errors.Is(err, ErrGone) {
					return nil
				}
				part[i] = msg
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return nil, err //nolint:wrapcheck // read says it
		}
		for _, msg := range part {
			if msg != nil {
				room -= len(msg.Data)
			}
		}
		messages = append(messages, part...)
	}
	return messages, nil
}

// readAll reads a page of letters as readPage does and makes their replays. Entries whose letter is gone are left out; n counts them too.
func readAll(ctx context.Context, dlq jetstream.Stream, entries []Entry) (n int, _ []replay.Item, _ []held, _ error) {
	messages, err := readPage(ctx, dlq, entries)
	if err != nil {
		return 0, nil, nil, replay.Explain(err)
	}
	items, found := make([]replay.Item, 0, len(entries)), make([]held, 0, len(entries))
	for i, msg := range messages {
		if msg != nil {
			id := replayID(msg.Sequence, msg.Time)
			item := replay.NewItem(entries[i].Handler, id, msg)
			if at := entries[i].LastFailedAt; at != nil {
				item = item.Seen(*at)
			}
			items = append(items, item)
			found = append(found, held{entries[i], id})
		}
	}
	return len(messages), items, found, nil
}

// Discard gives up every dead letter that f selects: the letter is deleted, then the log's row says discarded. A run that was
// broken off in between has left rows without a letter, which the next one discards.
func Discard(ctx context.Context, js jetstream.JetStream, db *gorm.DB, f Filter, outage replay.Outage, progress func(Result)) (Result, error) {
	var result Result
	dlq, err := open(ctx, js)
	if err != nil {
		return result, replay.Explain(err)
	}
	if result.Selected, f.through, err = total(ctx, db, f); err != nil {
		return result, err
	}
	for at := (place{}); ctx.Err() == nil; {
		var entries []Entry
		err := outage.Try(ctx, func(ctx context.Context) (err error) {
			entries, err = after(ctx, db, f, at, page)
			return err
		})
		if err != nil || len(entries) == 0 {
			return result, err
		}
		at = entries[len(entries)-1].place()
		for len(entries) > 0 {
			var n int
			var found []held
			err := outage.Try(ctx, func(ctx context.Context) (err error) {
				n, _, found, err = readAll(ctx, dlq, entries) // only a row's own letter is deleted
				return err
			})
			if err != nil {
				return result, err
			}
			err = giveUp(ctx, db, dlq, outage, entries[:n], found, &result)
			result.grow(result.Discarded + result.Gone)
			if progress != nil {
				progress(result)
			}
			if err != nil {
				return result, err
			}
			entries = entries[n:]
		}
	}
	return result, ctx.Err() //nolint:wrapcheck // the context's own
}

// giveUp deletes the letters of a page that were found and then marks its rows, also where ctx has ended meanwhile.
func giveUp(ctx context.Context, db *gorm.DB, dlq jetstream.Stream, outage replay.Outage, entries []Entry, found []held, result *Result) error {
	ctx, cancel := grace(ctx)
	defer cancel()
	if err := outage.Try(ctx, func(ctx context.Context) error { return deleteAll(ctx, dlq, found) }); err != nil {
		return err
	}
	all := make([]held, len(entries))
	for i, e := range entries {
		all[i] = held{Entry: e}
	}
	return outage.Try(ctx, func(ctx context.Context) error {
		n, err := markDiscarded(ctx, db, all)
		result.Discarded += n // what was marked at a try that failed is not found by the next
		return err
	})
}

// settle marks the rows of what was published and then deletes the letters, also where ctx has ended meanwhile.
func settle(ctx context.Context, db *gorm.DB, dlq jetstream.Stream, run *replay.Run, letters []held) error {
	ctx, cancel := grace(ctx)
	defer cancel()
	err := run.Try(ctx, func(ctx context.Context) error {
		_, err := markRetrying(ctx, db, letters)
		return err
	})
	if err != nil {
		return err
	}
	return run.Try(ctx, func(ctx context.Context) error { return deleteAll(ctx, dlq, letters) })
}

// grace is a context that ends [settleTime] after its parent.
func grace(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(parent))
	stop := context.AfterFunc(parent, func() {
		select {
		case <-time.After(settleTime):
			cancel()
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		stop()
		cancel()
	}
}

func deleteAll(ctx context.Context, dlq jetstream.Stream, letters []held) error {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for _, l := range letters {
		group.Go(func() error { return remove(groupCtx, dlq, l.LetterSeq) })
	}
	return group.Wait() //nolint:wrapcheck // remove says it
}

// remove deletes a letter; one that is not there is none to delete.
func remove(ctx context.Context, dlq jetstream.Stream, seq uint64) error {
	err := dlq.DeleteMsg(ctx, seq)
	if err == nil {
		return nil
	}
	if _, getErr := dlq.GetMsg(ctx, seq); errors.Is(getErr, jetstream.ErrMsgNotFound) {
		return nil
	}
	return fmt.Errorf("delete dead letter %d: %w", seq, replay.Explain(err))
}

// markRetrying says in the log that a letter is with its handler again: its attempts begin anew. A row that the worker has written
// since the letter was read is left alone.
func markRetrying(ctx context.Context, db *gorm.DB, letters []held) (int, error) {
	return mark(ctx, db, letters, `status = 'retrying', attempts = 0, first_failed_at = NULL, next_attempt_at = NULL, letter_seq = NULL,
		processed_at = ?, replay_id = ?`, func(l held) []any { return []any{time.Now().UTC(), l.replayID} })
}

// markDiscarded says in the log that letters were given up.
func markDiscarded(ctx context.Context, db *gorm.DB, letters []held) (int, error) {
	return mark(ctx, db, letters, "status = 'discarded', letter_seq = NULL, processed_at = ?", func(held) []any { return []any{time.Now().UTC()} })
}

// mine is a row that is still what it was when its letter was read. The status stands inside the CASE, so that PostgreSQL takes the
// key and not the partial index of all that is dead.
const mine = "handler = ? AND source = ? AND event_id = ? AND CASE WHEN status = 'dead' THEN COALESCE(letter_seq, 0) END = ?"

// mark updates the rows of letters that are still what they were. On PostgreSQL it never waits for a lock while it holds one, so
// that it cannot get into a deadlock with a worker that is writing the same rows: those that are locked are left for the end, one at a time.
func mark(ctx context.Context, db *gorm.DB, letters []held, set string, args func(held) []any) (int, error) {
	update, skipping := "UPDATE deliveries SET "+set+" WHERE "+mine, false
	if db.Name() == "postgres" {
		update, skipping = "UPDATE deliveries AS d SET "+set+" FROM (SELECT handler, source, event_id FROM deliveries WHERE "+mine+
			" FOR UPDATE SKIP LOCKED) AS l WHERE d.handler = l.handler AND d.source = l.source AND d.event_id = l.event_id", true
	}
	one := func(tx *gorm.DB, update string, l held) (int, error) {
		result := tx.Exec(update, append(args(l), l.Handler, l.Source, l.EventID, int64(l.LetterSeq))...)
		if result.Error != nil {
			return 0, fmt.Errorf("mark %s: %w", l.EventID, result.Error)
		}
		return int(result.RowsAffected), nil
	}
	changed := 0
	var left []held
	err := db.WithContext(ctx).Transaction(func(tx *gorm.DB) error {
		for _, l := range letters {
			n, err := one(tx, update, l)
			if err != nil {
				return err
			}
			if n == 0 && skipping {
				left = append(left, l)
			}
			changed += n
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("mark dead letters: %w", err)
	}
	for _, l := range left {
		n, err := one(db.WithContext(ctx), "UPDATE deliveries SET "+set+" WHERE "+mine, l)
		if err != nil {
			return changed, err
		}
		changed += n
	}
	return changed, nil
}
