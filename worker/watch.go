package worker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/outbox"
	"github.com/usherhq/usher/pkg/stream"
)

// watch compares, for one handler, what the stream says with what the database remembers of it, so that neither of them can lose
// something, or be taken back to an earlier state, without a word. It looks before the first batch and then every few seconds; a batch
// costs nothing for it. It also holds the database for one broker: two of them would undo each other's work.
type watch struct {
	handler string
	filters []string
	process string
	js      jetstream.JetStream
	db      *gorm.DB
	alerts  outbox.Alerts
	log     *zap.Logger
	first   chan struct{} // closed after the first look

	mu      sync.Mutex
	looked  error // of the last look
	foreign error // another broker works on this database
	gap     error // something is missing
	missing int64 // so many events, at least
	sample  *mark // the last event that this process settled
	old     *mark // the same, a look earlier: its row must be there
	freed   bool  // the other broker was let go at the look before
	seen    seen  // also while the database cannot be asked
	suspect kind  // of what the look before found, to be confirmed
	skips         // of the broker
}

// mark is an event that was settled.
type mark struct {
	ref event.Ref
	seq uint64
	at  time.Time
}

// seen is the highest sequence that this process saw of a stream.
type seen struct {
	streamID string
	lastSeq  int64
}

// watchRow is a row of the table stream_watch.
type watchRow struct {
	Handler    string `gorm:"primaryKey"`
	StreamID   string
	Process    string
	SeenAt     time.Time
	LastSeq    int64
	FloorSeq   int64
	PurgedSeq  int64
	Holes      int64
	Gap        string
	GapEvents  int64
	GapFrom    int64
	GapTo      int64
	GapFoundAt *time.Time
}

func (watchRow) TableName() string { return "stream_watch" }

// A process that has not looked for so long works no more.
const watchStale = 30 * time.Second

// confirmAfter is when a finding is looked at again before it is told: false alarms are worse than late ones.
const confirmAfter = time.Second

// released is the time of the last look of a process that has stopped.
var released = time.Unix(0, 0).UTC()

var (
	errForeign   = errors.New("this database belongs to another broker")
	errNotLooked = errors.New("the stream was not compared with the database yet")
)

func newWatch(w *Worker, r Registration, process string) *watch {
	consumer := (stream.Topology{}).Consumer(stream.HandlerSpec{Name: r.Handler.Name(), Filters: r.Filters})
	return &watch{
		handler: r.Handler.Name(), filters: consumer.FilterSubjects, process: process, js: w.deps.JetStream, db: w.deps.DB,
		alerts: w.cfg.Alerts,
		log:    w.deps.Log.With(zap.String("service", "worker"), zap.String("handler", r.Handler.Name())),
		first:  make(chan struct{}), looked: errNotLooked,
	}
}

// processName is who looked, for the operator who has to find him.
func processName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	return fmt.Sprintf("%s, process %d (%s)", host, os.Getpid(), rand.Text()[:8])
}

// run looks until ctx is done, and lets the database go then.
func (w *watch) run(ctx context.Context) {
	for {
		wait, told := watchInterval, w.problem()
		suspected, err := w.look(ctx)
		if ctx.Err() != nil {
			if !w.hasLooked() { // who waits for that has nothing to wait for
				w.mu.Lock()
				w.foreign = errNotLooked
				w.mu.Unlock()
				close(w.first)
			}
			w.release(context.WithoutCancel(ctx))
			return
		}
		w.mu.Lock()
		w.looked = err
		w.mu.Unlock()
		switch {
		case err != nil && !w.hasLooked():
			wait = 200 * time.Millisecond
		case suspected:
			wait = confirmAfter
		case err == nil && !w.hasLooked():
			close(w.first)
		}
		if err != nil && w.hasLooked() {
			w.log.Debug("stream not compared with the database", zap.Error(err))
		}
		switch now := w.problem(); {
		case now != nil && (told == nil || told.Error() != now.Error()):
			w.log.Error("broker and database do not agree", zap.Error(now))
		case now == nil && told != nil:
			w.log.Info("broker and database agree again")
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

func (w *watch) hasLooked() bool {
	select {
	case <-w.first:
		return true
	default:
		return false
	}
}

// problem is what an operator must see to.
func (w *watch) problem() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.foreign != nil {
		return w.foreign
	}
	return w.gap
}

// check is readiness, also while no event comes: what is missing. The handler works all the same.
func (w *watch) check() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.gap
}

// paused is why the handler may not work, though the broker has nothing for it yet: nil, or another broker's work on the database.
func (w *watch) paused() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.foreign == nil {
		return nil
	}
	return fmt.Errorf("paused: %w", w.foreign)
}

// lost is how many events are known to be missing.
func (w *watch) lost() float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return float64(w.missing)
}

// admit returns once the handler may work on the database: after the first look, and for as long as no other broker does. What is worked on
// before would hide what the first look finds.
func (w *watch) admit(ctx context.Context) error {
	select {
	case <-w.first:
	default:
		select {
		case <-w.first:
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller's own
		case <-time.After(2 * watchInterval):
			w.mu.Lock()
			defer w.mu.Unlock()
			return errors.Join(errNotLooked, w.looked, w.foreign)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.foreign
}

// settled notes an event whose row is committed.
func (w *watch) settled(e *event.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sample = &mark{e.Ref(), e.Seq, time.Now()}
}

// kind is what can be wrong. Between two looks the numbers may change, and it does not.
type kind string

const (
	databaseBehind kind = "the database lacks events"
	recreated      kind = "the stream was recreated"
	wentBack       kind = "the stream went back"
	cutOff         kind = "the first events are gone"
	holes          kind = "events are gone"
	skipped        kind = "events were skipped"
)

// finding is something that is missing.
type finding struct {
	kind     kind
	text     string // what and since when, without what to do
	events   int64
	from, to uint64 // what the database lacks and the stream has; 0 for what the stream lacks

	held []uint64 // what the broker holds in flight for ever, since it cannot read it
}

// look compares once. suspected: something was found and is to be looked at again before it is told.
func (w *watch) look(ctx context.Context) (suspected bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*watchInterval)
	defer cancel()
	// The row comes first: what it remembers was true before the broker is asked.
	var rows []watchRow
	if err := w.db.WithContext(ctx).Where("handler = ?", w.handler).Find(&rows).Error; err != nil {
		if s, err := w.js.Stream(ctx, stream.Events); err == nil {
			w.sees(s.CachedInfo())
		}
		return false, fmt.Errorf("read what was seen of the stream: %w", err)
	}
	now, err := databaseTime(ctx, w.db)
	if err != nil {
		return false, err
	}
	s, err := w.js.Stream(ctx, stream.Events)
	if err != nil {
		return false, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	info := s.CachedInfo()
	before := w.sees(info)
	consumer, err := w.js.Consumer(ctx, stream.Events, w.handler)
	if err != nil {
		return false, fmt.Errorf("look up consumer %s: %w", w.handler, stream.Explain(err))
	}
	c := consumer.CachedInfo()
	next := watchRow{
		Handler: w.handler, StreamID: streamID(info), Process: w.process, SeenAt: now,
		LastSeq: int64(info.State.LastSeq), FloorSeq: int64(c.AckFloor.Stream), Holes: int64(info.State.NumDeleted),
	}
	if c.NumPending == 0 && c.NumAckPending == 0 {
		next.FloorSeq = next.LastSeq
	}
	var row *watchRow
	if len(rows) > 0 {
		row = &rows[0]
	}
	if row != nil && w.isForeign(row, &next, now) {
		return false, nil
	}
	if row != nil && before.streamID == row.StreamID {
		row.LastSeq = max(row.LastSeq, before.lastSeq)
	}
	found, err := w.compare(ctx, s, info, c, row, &next)
	if found == nil && err == nil {
		found, err = w.compareSkipped(ctx, s, info, c, row, &next)
	}
	if err != nil {
		// What cannot be compared now, as while the delivery log is unusable, may be lost before it can be.
		return false, errors.Join(err, w.advance(ctx, seen{next.StreamID, next.LastSeq}))
	}
	if found != nil && !w.confirmed(found) {
		return true, nil
	}
	if found == nil {
		w.confirmed(nil)
	}
	if err := w.write(ctx, s, row, &next, found, int64(info.State.FirstSeq), now); err != nil {
		return false, err
	}
	if found != nil {
		w.giveUp(found.held)
	}
	w.mu.Lock()
	w.old = w.sample
	w.mu.Unlock()
	return false, nil
}

func streamID(info *jetstream.StreamInfo) string { return info.Created.UTC().Format(time.RFC3339Nano) }

// sees notes how far the stream has come, and returns what was noted before.
func (w *watch) sees(info *jetstream.StreamInfo) seen {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.seen
	w.seen = seen{streamID(info), int64(info.State.LastSeq)}
	if before.streamID == w.seen.streamID { // until the loss of the newest events is written
		w.seen.lastSeq = max(w.seen.lastSeq, before.lastSeq)
	}
	return before
}

// advance remembers in the database how far the stream has come, and nothing else.
func (w *watch) advance(ctx context.Context, to seen) error {
	err := w.db.WithContext(ctx).Exec("UPDATE stream_watch SET last_seq = ? WHERE handler = ? AND stream_id = ? AND last_seq < ?",
		to.lastSeq, w.handler, to.streamID, to.lastSeq).Error
	if err != nil {
		return fmt.Errorf("remember how far the stream has come: %w", err)
	}
	return nil
}

func (w *watch) confirmed(f *finding) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.suspect
	if w.suspect = ""; f == nil {
		return false
	}
	w.suspect = f.kind
	return before == f.kind
}

// isForeign reports whether the database is another broker's, whose workers are at work.
func (w *watch) isForeign(row, next *watchRow, now time.Time) bool {
	foreign := row.StreamID != next.StreamID && row.Process != w.process && now.Sub(row.SeenAt) < watchStale
	w.mu.Lock()
	defer w.mu.Unlock()
	// A rolling restart lets go for a moment: who lies in wait gives the others the time of another look.
	if freed := row.StreamID != next.StreamID && row.SeenAt.Equal(released) && w.foreign != nil && !w.freed; freed {
		w.freed = true
		return true
	}
	if w.freed = false; !foreign {
		return false
	}
	w.foreign = fmt.Errorf("%w, which is at work (%s, stream created %s): stop one of the two, or give this one a database or USHER_DATABASE_SCHEMA of its own; "+
		"if the other has died, this one takes over %s after its last sign of life", errForeign, row.Process, row.StreamID, watchStale)
	return true
}

// compare finds what is missing since the row was written; nil for nothing. row is nil at the first look ever.
func (w *watch) compare(ctx context.Context, s jetstream.Stream, info *jetstream.StreamInfo, c *jetstream.ConsumerInfo, row, next *watchRow) (*finding, error) {
	if f, err := w.compareStream(ctx, s, info, row, next); f != nil || err != nil {
		return f, err
	}
	// Of what the handler has settled the database must have the row: of the last one at the first look, later of one that this
	// process settled itself.
	w.mu.Lock()
	old := w.old
	w.mu.Unlock()
	var bad uint64
	switch {
	case old != nil && time.Since(old.at) < rememberFor/2:
		if ok, err := w.hasRow(ctx, old.ref); ok || err != nil {
			return nil, err
		}
		bad = old.seq
	case old == nil && (row == nil || row.Gap == ""):
		msg, err := w.before(ctx, s, c.AckFloor.Stream)
		if msg == nil || err != nil || info.TimeStamp.Sub(msg.Time) > rememberFor-24*time.Hour {
			return nil, err
		}
		if ok, err := w.hasRow(ctx, refOf(msg)); ok || err != nil {
			return nil, err
		}
		bad = msg.Sequence
	default:
		return nil, nil
	}
	from, at, err := w.firstWithoutRow(ctx, s, info.State.FirstSeq, bad)
	if err != nil {
		return nil, err
	}
	f := &finding{kind: databaseBehind, text: "the database lacks events that were settled: it was emptied, replaced or taken back to an earlier state", events: 1}
	if from > 0 {
		f.from, f.to, f.events = from, bad, int64(bad-from)+1
		f.text += fmt.Sprintf(", from sequence %d (%s) to %d", from, at.UTC().Format(time.RFC3339), bad)
	}
	return f, nil
}

// compareStream finds what the stream has lost.
func (w *watch) compareStream(ctx context.Context, s jetstream.Stream, info *jetstream.StreamInfo, row, next *watchRow) (*finding, error) {
	state := info.State
	if row == nil {
		return nil, nil
	}
	if row.StreamID != next.StreamID {
		lost, err := w.unsettled(ctx, row.FloorSeq+1, row.LastSeq)
		if err != nil || lost == 0 {
			if err == nil {
				w.log.Warn("the stream was recreated since it was last seen, when everything in it was settled", zap.String("was", row.StreamID), zap.String("is", next.StreamID))
			}
			return nil, err
		}
		return &finding{kind: recreated, text: fmt.Sprintf("the stream was recreated, and %d of its events had not been settled", lost), events: lost}, nil
	}
	if next.LastSeq < row.LastSeq {
		return &finding{
			kind:   wentBack,
			text:   fmt.Sprintf("the stream went back from sequence %d to %d: the broker lost its newest events or was taken back to an earlier state", row.LastSeq, next.LastSeq),
			events: row.LastSeq - next.LastSeq,
		}, nil
	}
	base := max(row.FloorSeq, row.PurgedSeq)
	if gone := min(int64(state.FirstSeq)-1, row.LastSeq); gone > base {
		if lost, err := w.unsettled(ctx, base+1, gone); lost > 0 || err != nil {
			return &finding{kind: cutOff, text: fmt.Sprintf("%d events up to sequence %d are gone from the stream and had not been settled", lost, gone), events: lost}, err
		}
	}
	if next.Holes <= row.Holes {
		return nil, nil
	}
	detailed, err := s.Info(ctx, jetstream.WithDeletedDetails(true))
	if err != nil {
		return nil, fmt.Errorf("look up the holes of stream %s: %w", stream.Events, err)
	}
	var first, last int64
	for _, seq := range detailed.State.Deleted {
		if int64(seq) > base {
			if first == 0 {
				first = int64(seq)
			}
			last = int64(seq)
		}
	}
	if first == 0 {
		return nil, nil
	}
	settled, err := w.rowsOf(ctx, first, last)
	if err != nil {
		return nil, err
	}
	lost := int64(0)
	for _, seq := range detailed.State.Deleted {
		if int64(seq) > base && !settled[int64(seq)] {
			lost++
		}
	}
	if lost == 0 {
		return nil, nil
	}
	return &finding{kind: holes, text: fmt.Sprintf("%d events between the sequences %d and %d are gone from the stream and had not been settled: its file is damaged, or they were deleted by hand", lost, first, last), events: lost}, nil
}

// unsettled is how many events of a span of sequences the log has no settled row of.
func (w *watch) unsettled(ctx context.Context, from, to int64) (int64, error) {
	if to < from {
		return 0, nil
	}
	settled, err := w.rowsOf(ctx, from, to)
	return to - from + 1 - int64(len(settled)), err
}

// rowsOf are the sequences of a span that the log has a settled row of. It reads the whole log: only for where something seems to be missing.
func (w *watch) rowsOf(ctx context.Context, from, to int64) (map[int64]bool, error) {
	var list []int64
	err := w.db.WithContext(ctx).Table("deliveries").Where("handler = ? AND stream_seq BETWEEN ? AND ? AND status <> 'retrying'", w.handler, from, to).
		Distinct("stream_seq").Pluck("stream_seq", &list).Error
	if err != nil {
		return nil, fmt.Errorf("find what is settled of the sequences %d to %d: %w", from, to, err)
	}
	settled := make(map[int64]bool, len(list))
	for _, seq := range list {
		settled[seq] = true
	}
	return settled, nil
}

// write remembers what was seen, and what is missing.
func (w *watch) write(ctx context.Context, s jetstream.Stream, row, next *watchRow, found *finding, first int64, now time.Time) error {
	over := false
	if row != nil && row.Gap != "" && found == nil {
		var err error
		if over, err = w.healed(ctx, s, row); err != nil {
			return err
		}
	}
	var result watchRow
	err := database.InTx(ctx, w.db, func(tx *gorm.DB) error {
		inserted := tx.Clauses(clause.OnConflict{DoNothing: true}).Create(next)
		if inserted.Error != nil {
			return inserted.Error
		}
		q := tx.Where("handler = ?", w.handler)
		if database.IsPostgres(tx) {
			q = q.Clauses(clause.Locking{Strength: "UPDATE"})
		}
		var have watchRow
		if err := q.Take(&have).Error; err != nil {
			return err
		}
		switch {
		case have.StreamID == next.StreamID && next.LastSeq >= have.LastSeq: // another process may have come further, in the same stream
			next.FloorSeq = max(next.FloorSeq, have.FloorSeq)
			next.PurgedSeq = have.PurgedSeq
		case have.StreamID == next.StreamID && found == nil: // it has seen a later state
			next.LastSeq, next.FloorSeq, next.PurgedSeq, next.Holes = have.LastSeq, have.FloorSeq, have.PurgedSeq, have.Holes
		case have.StreamID != next.StreamID && have.Process != w.process && now.Sub(have.SeenAt) < watchStale:
			return nil // another broker was faster: the next look says so
		}
		next.Gap, next.GapEvents, next.GapFrom, next.GapTo, next.GapFoundAt = have.Gap, have.GapEvents, have.GapFrom, have.GapTo, have.GapFoundAt
		switch {
		case found != nil && found.kind == skipped && strings.Contains(have.Gap, found.text): // another process has told it
		case found != nil:
			next.add(found, now)
			if err := next.tell(tx, w.alerts); err != nil {
				return err
			}
		case over && row.Gap == have.Gap:
			if err := next.end(tx, w.alerts, now); err != nil {
				return err
			}
		}
		if found != nil { // told once
			next.PurgedSeq = first - 1
			if have.StreamID == next.StreamID { // another stream has other sequences
				next.PurgedSeq = max(have.PurgedSeq, next.PurgedSeq)
			}
		}
		result = *next
		return tx.Save(next).Error
	})
	if err != nil {
		return fmt.Errorf("remember what was seen of the stream: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if found != nil { // what is missing is known: another event is to be lost before it is told of again
		w.sample, w.old = nil, nil
		switch found.kind {
		case skipped:
			w.told = append(w.told, w.suspects...)
		case databaseBehind, recreated, wentBack: // which explains what else is missing
			w.spans, w.told = nil, nil
		case cutOff, holes:
		}
		w.suspects = nil
	}
	if result.Handler == "" {
		return nil
	}
	w.seen = seen{result.StreamID, result.LastSeq}
	w.foreign, w.gap, w.missing = nil, nil, result.GapEvents
	if result.Gap != "" {
		w.gap = fmt.Errorf("%s: %s", result.Gap, result.heal())
	}
	return nil
}

// add notes one more thing that is missing.
func (r *watchRow) add(f *finding, now time.Time) {
	const most = 1 << 10
	text, from, to := f.text, int64(f.from), int64(f.to)
	if r.Gap != "" && len(r.Gap) < most {
		text = r.Gap + "; " + text
		if r.GapFrom == 0 || from == 0 { // a replay would not bring all of it
			from, to = 0, 0
		} else {
			from, to = min(from, r.GapFrom), max(to, r.GapTo)
		}
	}
	r.Gap, r.GapEvents, r.GapFrom, r.GapTo, r.GapFoundAt = text, r.GapEvents+f.events, from, to, &now
}

// Kinds of the alerts in the outbox.
const (
	kindStalled     = "stalled"
	kindStalledOver = "stalled_over"
)

// alertKey names a finding among the alerts.
func (r *watchRow) alertKey(kind string) string {
	return fmt.Sprintf("%s/stream/%s/%d", kind, r.Handler, r.GapFoundAt.UnixMicro())
}

// tell raises the alert of what was found, in the transaction that remembers it: once.
func (r *watchRow) tell(tx *gorm.DB, alerts outbox.Alerts) error {
	_, err := alerts.Enqueue(tx, outbox.Notification{
		EffectKey: r.alertKey(kindStalled), Kind: kindStalled,
		Subject: fmt.Sprintf("Usher: events are missing, handler %s (stalled)", r.Handler),
		Body: fmt.Sprintf("Broker and database do not agree about handler %s: %s.\n\nWhat to do: %s.\n\n"+
			"Events that are there are applied meanwhile. /readyz of the worker and the metric usher_worker_stream_gap say when it is over.\n", r.Handler, r.Gap, r.heal()),
	})
	return err
}

// end ends a finding, and tells so.
func (r *watchRow) end(tx *gorm.DB, alerts outbox.Alerts, now time.Time) error {
	if r.GapFoundAt != nil {
		found := *r.GapFoundAt
		_, err := alerts.Enqueue(tx, outbox.Notification{
			EffectKey: r.alertKey(kindStalledOver), Kind: kindStalledOver,
			Subject: fmt.Sprintf("Usher: events are missing no more, handler %s (stalled, over)", r.Handler),
			Body: fmt.Sprintf("Broker and database agree again about handler %s. Since %s (%s): %s.\n", r.Handler, found.UTC().Format(time.RFC3339),
				now.Sub(found).Round(time.Second), r.Gap),
		})
		if err != nil {
			return err
		}
	}
	r.Gap, r.GapEvents, r.GapFrom, r.GapTo, r.GapFoundAt = "", 0, 0, 0, nil
	return nil
}

// AcceptLoss ends what workers have found missing, by an operator's word and not because it is there again. It returns what was ended, in
// words. Workers follow within seconds.
func AcceptLoss(ctx context.Context, db *gorm.DB, alerts outbox.Alerts) ([]string, error) {
	var accepted []string
	now, err := databaseTime(ctx, db)
	if err != nil {
		return nil, err
	}
	err = database.InTx(ctx, db, func(tx *gorm.DB) error {
		accepted = nil
		q := tx.Where("gap <> ''").Order("handler")
		if database.IsPostgres(tx) {
			q = q.Clauses(clause.Locking{Strength: "UPDATE"})
		}
		var rows []watchRow
		if err := q.Find(&rows).Error; err != nil {
			return err
		}
		for i := range rows {
			accepted = append(accepted, fmt.Sprintf("handler %s: %s", rows[i].Handler, rows[i].Gap))
			if err := rows[i].end(tx, alerts, now); err != nil {
				return err
			}
			if err := tx.Save(&rows[i]).Error; err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("accept what is missing: %w", err)
	}
	return accepted, nil
}

// heal is what an operator does about a gap.
func (r *watchRow) heal() string {
	full := "run `usher reconcile --full`, which ends this alert (without Clerk's API `usher setup --accept-loss` does)"
	if r.GapFrom > 0 {
		return fmt.Sprintf("run `usher replay --from-seq %d --handler %s`, or where the events are gone meanwhile %s", r.GapFrom, r.Handler, full)
	}
	return full
}

// healed reports whether what was missing is there again: the rows are, or a whole sweep has begun since and succeeded.
func (w *watch) healed(ctx context.Context, s jetstream.Stream, row *watchRow) (bool, error) {
	if row.GapFoundAt != nil {
		var sweeps int64
		err := w.db.WithContext(ctx).Table("reconcile_runs").
			Where("kind IN ('full', 'backfill') AND status = 'succeeded' AND NOT dry_run AND started_at > ?", row.GapFoundAt.UTC()).Count(&sweeps).Error
		if err != nil {
			return false, fmt.Errorf("look for a sweep: %w", err)
		}
		if sweeps > 0 {
			return true, nil
		}
	}
	if row.GapFrom == 0 {
		return false, nil
	}
	for _, seq := range []int64{row.GapFrom, row.GapTo} {
		msg, err := s.GetMsg(ctx, uint64(seq))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read event %d: %w", seq, stream.Explain(err))
		}
		if ok, err := w.hasRow(ctx, refOf(msg)); !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}

func refOf(msg *jetstream.RawStreamMsg) event.Ref {
	e, _ := stream.Parse(msg.Header, msg.Data, msg.Sequence) // what cannot be decoded has a row too
	return e.Ref()
}

func (w *watch) hasRow(ctx context.Context, ref event.Ref) (bool, error) {
	var n int64
	err := w.db.WithContext(ctx).Table("deliveries").Where("handler = ? AND source = ? AND event_id = ?", w.handler, ref.Source, ref.ID).Count(&n).Error
	if err != nil {
		return false, fmt.Errorf("look up delivery of %s: %w", ref, err)
	}
	return n > 0, nil
}

// after is the handler's first event from a sequence on, nil where there are no more.
func (w *watch) after(ctx context.Context, s jetstream.Stream, seq uint64) (*jetstream.RawStreamMsg, error) {
	var first *jetstream.RawStreamMsg
	for _, filter := range w.filters {
		msg, err := s.GetMsg(ctx, max(seq, 1), jetstream.WithGetMsgSubject(filter))
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
		case err != nil:
			return nil, fmt.Errorf("read the first event of %s from %d on: %w", filter, seq, stream.Explain(err))
		case first == nil || msg.Sequence < first.Sequence:
			first = msg
		}
	}
	return first, nil
}

// before is one of the handler's last events up to a sequence, nil where none is near.
func (w *watch) before(ctx context.Context, s jetstream.Stream, seq uint64) (*jetstream.RawStreamMsg, error) {
	for back := uint64(0); back <= 1<<16 && back < seq; back = back*2 + 1 {
		msg, err := w.after(ctx, s, seq-back)
		if err != nil {
			return nil, err
		}
		if msg != nil && msg.Sequence <= seq {
			return msg, nil
		}
	}
	return nil, nil
}

// firstWithoutRow finds where the rows end: the database was taken back to a time, and has none of what came later. from is 0 where the
// event of sequence bad, which has none, is gone from the stream.
func (w *watch) firstWithoutRow(ctx context.Context, s jetstream.Stream, low, bad uint64) (from uint64, at time.Time, err error) {
	msg, err := w.after(ctx, s, bad)
	if err != nil || msg == nil || msg.Sequence != bad {
		return 0, at, err
	}
	from, at = bad, msg.Time
	for high := bad; low < high; {
		middle := low + (high-low)/2
		msg, err := w.after(ctx, s, middle)
		if err != nil {
			return 0, at, err
		}
		if msg == nil || msg.Sequence >= high {
			high = middle
			continue
		}
		ok, err := w.hasRow(ctx, refOf(msg))
		if err != nil {
			return 0, at, err
		}
		if ok {
			low = msg.Sequence + 1
		} else {
			from, at, high = msg.Sequence, msg.Time, middle
		}
	}
	return from, at, nil
}

// release lets the database go, so that another broker need not wait, and remembers how far the stream has come.
func (w *watch) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, drainWait)
	defer cancel()
	if w.problem() == nil && w.js.Conn().IsConnected() {
		if s, err := w.js.Stream(ctx, stream.Events); err == nil {
			w.sees(s.CachedInfo())
		}
		w.mu.Lock()
		last := w.seen
		w.mu.Unlock()
		_ = w.advance(ctx, last) // who died has not done it either
	}
	// It is only quicker: who died takes watchStale.
	_ = w.db.WithContext(ctx).Table("stream_watch").Where("handler = ? AND process = ?", w.handler, w.process).Update("seen_at", released).Error
}

// databaseTime is the clock that all workers share.
func databaseTime(ctx context.Context, db *gorm.DB) (time.Time, error) {
	now := time.Now().UTC()
	if !database.IsPostgres(db) {
		return now, nil
	}
	if err := db.WithContext(ctx).Raw("SELECT clock_timestamp()").Row().Scan(&now); err != nil {
		return now, fmt.Errorf("ask the database for the time: %w", err)
	}
	return now.UTC(), nil
}

// admitted returns nil where every handler may work.
func (w *Worker) admitted(ctx context.Context) error {
	for _, one := range w.watches {
		if err := one.admit(ctx); err != nil {
			return err
		}
	}
	return nil
}

// purging remembers that events before a sequence are removed on purpose. It comes before the purge, so that nobody takes it for a loss.
func (w *Worker) purging(ctx context.Context, keep uint64) error {
	err := w.deps.DB.WithContext(ctx).Exec("UPDATE stream_watch SET purged_seq = ? WHERE purged_seq < ?", int64(keep)-1, int64(keep)-1).Error
	if err != nil {
		return fmt.Errorf("remember the purge: %w", err)
	}
	return nil
}
