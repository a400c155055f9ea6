package worker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/stream"
)

// rememberFor is how long the delivery log remembers an event at least: the sender can send one again as long as it
// keeps the body, which is 90 days. Past the stream's own dedupe the log is all that recognises it.
const rememberFor = 90 * 24 * time.Hour

// deleteStep is how many rows of the delivery log go at once: a moment's lock and a moment's disk. deletePause is
// between two steps.
const (
	deleteStep  = 1000
	deletePause = 100 * time.Millisecond
)

// clean removes what is past its time until ctx is done. Every worker does it, now and then; nothing is removed twice, and
// nobody needs to lead. An error is logged and mended by the next turn.
func (w *Worker) clean(ctx context.Context) {
	log := w.deps.Log.With(zap.String("service", "worker"))
	for {
		wait := w.cfg.PurgeInterval*3/4 + rand.N(w.cfg.PurgeInterval/2+1)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		start := time.Now()
		if err := w.admitted(ctx); err != nil {
			continue
		}
		now, purged, err := w.purgeStream(ctx)
		if purged > 0 {
			w.metrics.purged.Add(float64(purged))
			log.Info("stream purged", zap.Uint64("events", purged), zap.Duration("retention", w.cfg.Retention), zap.Duration("duration", time.Since(start)))
		}
		if err == nil {
			start = time.Now()
			var deleted int64
			if deleted, err = w.deleteDeliveries(ctx, now); deleted > 0 {
				log.Info("delivery log cleaned", zap.Int64("rows", deleted), zap.Duration("duration", time.Since(start)))
			}
		}
		if err != nil && ctx.Err() == nil {
			log.Warn("retention waits for its next turn", zap.Error(err))
		}
	}
}

// purgeStream removes the events that are older than the retention and settled by every handler and every other consumer that
// holds them ([stream.Holds]). It returns the broker's time: the events were stamped with that clock, and a clock of ours that
// jumped must not remove anything.
func (w *Worker) purgeStream(ctx context.Context) (now time.Time, purged uint64, err error) {
	s, err := w.deps.JetStream.Stream(ctx, stream.Events)
	if err != nil {
		return now, 0, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	before := s.CachedInfo()
	now = before.TimeStamp
	state := before.State
	cutoff := now.Add(-w.cfg.Retention)
	if state.Msgs == 0 || !state.FirstTime.Before(cutoff) {
		w.holding = holding{}
		return now, 0, nil
	}
	keep, holder, err := w.firstUnsettled(ctx, s, state.LastSeq)
	if err != nil {
		return now, 0, err
	}
	young, err := firstSince(ctx, s, cutoff, state.FirstSeq, min(keep, state.LastSeq)+1)
	if err != nil {
		return now, 0, fmt.Errorf("find the first event since %s: %w", cutoff.UTC().Format(time.RFC3339), stream.Explain(err))
	}
	if young <= keep { // nothing that is old is held
		keep, holder = young, ""
	}
	w.tellHolder(holder, keep, state.Bytes, before.Config.MaxBytes)
	if keep <= state.FirstSeq {
		return now, 0, nil
	}
	if err := w.purging(ctx, keep); err != nil {
		return now, 0, err
	}
	if err := s.Purge(ctx, jetstream.WithPurgeSequence(keep)); err != nil {
		return now, 0, fmt.Errorf("purge stream %s: %w", stream.Events, stream.Explain(err))
	}
	after, err := s.Info(ctx)
	if err != nil {
		return now, 0, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	// What came in meanwhile is not to be counted as a loss, nor another worker's purge as ours twice.
	gone := int64(state.Msgs) + int64(after.State.LastSeq) - int64(state.LastSeq) - int64(after.State.Msgs)
	return now, uint64(max(gone, 0)), nil
}

// nearlyFull is the share of the stream's room from which on settled events go before their time, until no more than roomy is used.
const nearlyFull, roomy = 0.8, 0.7

// fillEvery is how often the fill of the stream is looked at, and fillSeldom where nothing could be done about it.
const fillEvery, fillSeldom = time.Second, 5 * time.Second

// watchFill makes room in the stream before it refuses events, until ctx is done.
func (w *Worker) watchFill(ctx context.Context) {
	log := w.deps.Log.With(zap.String("service", "worker"))
	pause := fillEvery
	var told time.Time
	var held string
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		f, err := w.makeRoom(ctx)
		if ctx.Err() != nil {
			return
		}
		pause = fillEvery
		if err != nil {
			pause = fillSeldom // an outage is told of by the loops
			log.Debug("fill of the stream not looked at", zap.Error(err))
			continue
		}
		if f.purged > 0 {
			w.metrics.purged.Add(float64(f.purged))
			fields := []zap.Field{zap.Uint64("events", f.purged), zap.Uint64("bytes", f.before), zap.Int64("max_bytes", f.max)}
			if time.Since(told) > time.Hour {
				told = time.Now()
				log.Warn("stream was 80% full: its oldest settled events were removed before their retention; raise USHER_STREAM_MAX_BYTES, or shorten USHER_RETENTION", fields...)
			} else {
				log.Info("stream purged to make room", fields...)
			}
		}
		problem := f.problem()
		w.fill.setTrouble(problem)
		text := ""
		if problem != nil {
			pause, text = fillSeldom, f.holder
		}
		if problem != nil && held != text {
			log.Warn("stream is nearly full of events that are not settled", zap.Uint64("bytes", f.bytes), zap.Int64("max_bytes", f.max), zap.String("consumer", f.holder), zap.Error(problem))
		}
		held = text
	}
}

// fill is how full the stream is after a look at it.
type fill struct {
	before, bytes uint64
	max           int64
	purged        uint64
	holder        string // the consumer that needs the oldest event; empty while there was room
}

// problem says what is to be done about a stream that only unsettled events fill.
func (f fill) problem() error {
	if f.holder == "" {
		return nil
	}
	return fmt.Errorf("stream %s holds %d of %d bytes, and %s has not settled its oldest event: let that work, delete it where it is nobody's, or raise USHER_STREAM_MAX_BYTES",
		stream.Events, f.bytes, f.max, f.holder)
}

// makeRoom removes the oldest settled events, whatever their age, where the stream is nearly full.
func (w *Worker) makeRoom(ctx context.Context) (fill, error) {
	s, err := w.deps.JetStream.Stream(ctx, stream.Events)
	if err != nil {
		return fill{}, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	info := s.CachedInfo()
	f := fill{before: info.State.Bytes, bytes: info.State.Bytes, max: info.Config.MaxBytes}
	if w.cfg.MaxBytes > 0 && (f.max <= 0 || w.cfg.MaxBytes < f.max) {
		f.max = w.cfg.MaxBytes
	}
	if f.max <= 0 || float64(f.bytes) <= nearlyFull*float64(f.max) {
		return f, nil
	}
	keep, holder, err := w.firstUnsettled(ctx, s, info.State.LastSeq)
	if err != nil {
		return f, err
	}
	// Events differ in size: so many as would do on average go, and what is left to do is seen then.
	for target := uint64(roomy * float64(f.max)); f.bytes > target && info.State.Msgs > 0 && keep > info.State.FirstSeq; f.bytes = info.State.Bytes {
		state := info.State
		share := float64(f.bytes-target) / float64(f.bytes)
		upTo := state.FirstSeq + max(uint64(math.Ceil(share*float64(state.LastSeq-state.FirstSeq+1))), 1)
		upTo = min(upTo, keep)
		// Room is needed most while the database is unavailable. Without the note the rows of the delivery log explain the purge.
		noteCtx, cancel := context.WithTimeout(ctx, 2*time.Second)
		if err := w.purging(noteCtx, upTo); err != nil {
			w.deps.Log.Debug("purge not noted", zap.String("service", "worker"), zap.Error(err))
		}
		cancel()
		if err := s.Purge(ctx, jetstream.WithPurgeSequence(upTo)); err != nil {
			return f, fmt.Errorf("purge stream %s: %w", stream.Events, stream.Explain(err))
		}
		if info, err = s.Info(ctx); err != nil {
			return f, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
		}
		// What came in meanwhile is not to be counted as a loss, nor another worker's purge as ours twice.
		f.purged += uint64(max(int64(state.Msgs)+int64(info.State.LastSeq)-int64(state.LastSeq)-int64(info.State.Msgs), 0))
	}
	if float64(f.bytes) > nearlyFull*float64(f.max) {
		if f.holder = "consumer " + holder; holder == "" {
			f.holder = "a handler of this worker"
		}
	}
	return f, nil
}

// holding is what was last told of a consumer of somebody else that holds the purge back; its zero value is none.
type holding struct {
	consumer string
	full     bool // nearly
}

// tellHolder logs once which consumer, not one of ours, holds the purge back, and once more when the stream is nearly full.
func (w *Worker) tellHolder(consumer string, seq, used uint64, room int64) {
	last, now := w.holding, holding{consumer: consumer}
	if consumer != "" {
		now.full = room > 0 && float64(used) > nearlyFull*float64(room) || consumer == last.consumer && last.full
	}
	w.holding = now
	if consumer == "" || now == last {
		return
	}
	w.deps.Log.Warn("stream keeps events past their retention for a consumer that has not settled them: let it go on, or delete it",
		zap.String("service", "worker"), zap.String("consumer", consumer), zap.Uint64("stream_seq", seq), zap.Uint64("bytes", used), zap.Int64("max_bytes", room))
}

// firstUnsettled is the sequence of the first event that somebody still needs, last + 1 where nobody needs any up to last. holder
// is whoever needs it, where that is not a handler of this worker. A handler without a consumer is an error: nobody knows what it needs.
func (w *Worker) firstUnsettled(ctx context.Context, s jetstream.Stream, last uint64) (first uint64, holder string, err error) {
	infos, err := stream.ConsumerInfos(ctx, s)
	if err != nil {
		return 0, "", err
	}
	var handlers []string
	for _, r := range w.cfg.Handlers {
		name := r.Handler.Name()
		if infos[name] == nil {
			return 0, "", fmt.Errorf("find what handler %s has settled: %w", name, jetstream.ErrConsumerNotFound)
		}
		handlers = append(handlers, name)
	}
	first = last + 1
	for _, name := range slices.Sorted(maps.Keys(infos)) {
		foreign := !slices.Contains(handlers, name)
		if foreign && !stream.Holds(infos[name]) {
			continue
		}
		needs, _, err := stream.FirstUnsettled(ctx, s, infos[name])
		if needs == 0 {
			needs = last + 1
		}
		switch {
		case err != nil:
			return 0, "", err
		case needs < first && foreign:
			first, holder = needs, name
		case needs <= first && !foreign:
			first, holder = needs, ""
		}
	}
	return first, holder, nil
}

// firstSince finds the first sequence in [from, to) whose event was stored at cutoff or later, else to. It looks at as many
// events as to-from has binary digits.
func firstSince(ctx context.Context, s jetstream.Stream, cutoff time.Time, from, to uint64) (uint64, error) {
	for from < to {
		middle := from + (to-from)/2
		msg, err := s.GetMsg(ctx, middle, jetstream.WithGetMsgSubject(">")) // the next one, where middle was deleted
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			to = middle
		case err != nil:
			return 0, err //nolint:wrapcheck // the caller says what it was for
		case msg.Time.Before(cutoff):
			from = msg.Sequence + 1
		default:
			to = middle
		}
	}
	return to, nil
}

// deleteDeliveries removes rows of the delivery log that nothing can ask for any more, in small steps.
func (w *Worker) deleteDeliveries(ctx context.Context, now time.Time) (int64, error) {
	settled := now.Add(-max(w.cfg.Retention, rememberFor))
	// A letter lives for so long; its row stays for as long again, so that the letter's fate can be looked up.
	dead := now.Add(-max(w.cfg.Retention, rememberFor) - stream.DeadLetterAge)
	var total int64
	for {
		var n int64
		err := database.InTx(ctx, w.deps.DB, func(tx *gorm.DB) error {
			lock := ""
			if database.IsPostgres(tx) {
				lock = " FOR UPDATE SKIP LOCKED" // another worker cleans the same
			}
			result := tx.Exec(`DELETE FROM deliveries WHERE (handler, source, event_id) IN (SELECT handler, source, event_id FROM deliveries
				WHERE received_at < ? AND (status IN ('processed', 'discarded') AND COALESCE(processed_at, received_at) < ? OR status = 'dead' AND processed_at < ?)
				ORDER BY received_at LIMIT ?`+lock+`)`, settled, settled, dead, deleteStep)
			n = result.RowsAffected
			return result.Error
		})
		if err != nil {
			return total, fmt.Errorf("delete old deliveries: %w", err)
		}
		total += n
		if n < deleteStep {
			return total, nil
		}
		select {
		case <-ctx.Done():
			return total, nil
		case <-time.After(deletePause):
		}
	}
}
