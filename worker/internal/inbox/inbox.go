// Package inbox is the delivery log: the table that remembers what every handler did with every
// event. It is written in the transaction of the effect, so an effect and the memory of it commit
// together; that is what makes an effect happen once. The console and the CLI read the same table.
package inbox

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
)

// Status is what became of an event at a handler.
type Status string

// The statuses.
const (
	Processed Status = "processed" // applied
	Retrying  Status = "retrying"  // failed, will be tried again
	Dead      Status = "dead"      // in the dead-letter stream
	Discarded Status = "discarded" // a dead letter that an operator gave up
)

// Entry is one row of the log.
type Entry struct {
	Event    *event.Event
	Status   Status
	Attempts int           // so far, with this one
	Duration time.Duration // the event's share of its batch
	Error    string        // one line
	Effect   event.Effect  // of what is processed: what it changed, empty where the handler does not say
	Reason   string        // of the closed set of deadletter.Reason, empty for a success
	// FirstFailedAt, NextAttemptAt, Fingerprint and LetterSeq are of a failure; zero for a success.
	FirstFailedAt time.Time
	NextAttemptAt time.Time
	Fingerprint   string
	LetterSeq     uint64
}

// Known is what the log already says of an event.
type Known struct {
	Status        Status
	Attempts      int
	FirstFailedAt time.Time
	NextAttemptAt time.Time
	WrittenAt     time.Time // of the row
	ReplayID      string
	Seq           uint64    // of the delivery that the row is of
	ReceivedAt    time.Time // of that delivery: a stream that was recreated counts from one again
	LetterSeq     uint64    // of a dead one
	Late          bool      // the last attempt ran out of time
	PutOff        bool      // the database refused it last time, which was no attempt
}

// For is what the log says to this delivery of the event. A deliberate replay that the log has not seen yet
// begins anew: its attempts count from zero, and an event that was applied is applied again. So does a dead one that its
// sender sent again, which is another delivery; the same delivery is only the end of what a crash interrupted. The replay of a
// dead letter does not repeat what was applied meanwhile, nor bring back what was discarded meanwhile.
func (k Known) For(e *event.Event) Known {
	if (k.Status == Processed || k.Status == Discarded) && strings.HasPrefix(e.ReplayID, stream.LetterReplay) {
		return k
	}
	if e.ReplayID != "" && e.ReplayID != k.ReplayID || k.Status == Dead && !k.same(e) {
		return Known{}
	}
	return k
}

// same reports whether the row is of this delivery. Databases keep a time to the microsecond.
func (k Known) same(e *event.Event) bool {
	return k.Seq == e.Seq && k.ReceivedAt.Sub(e.ReceivedAt).Abs() < time.Millisecond
}

// Settled reports whether the event needs nothing more from the handler. A dead letter is durable before its row is,
// but may have been lost since: the caller looks.
func (k Known) Settled() bool {
	return k.Status == Processed || k.Status == Discarded || k.Status == Dead
}

// ErrRaced tells that another worker settled an event of the batch while this one worked on it. The
// transaction must be rolled back; a fresh look into the inbox shows which.
var ErrRaced = errors.New("another worker settled an event of the batch")

// Inbox is the log of one handler. It holds no state and is safe for concurrent use.
type Inbox struct {
	handler string
}

// New returns the log of a handler.
func New(handler string) *Inbox { return &Inbox{handler: handler} }

// Find returns what the log says of the events; those that it does not know are absent.
func (i *Inbox) Find(ctx context.Context, tx *gorm.DB, events []event.Ref) (map[event.Ref]Known, error) {
	known := make(map[event.Ref]Known, len(events))
	for source, ids := range event.BySource(events) {
		if err := i.find(ctx, tx, source, ids, known); err != nil {
			return nil, err
		}
	}
	return known, nil
}

func (i *Inbox) find(ctx context.Context, tx *gorm.DB, source string, ids []string, known map[event.Ref]Known) error {
	const columns = "event_id, status, attempts, first_failed_at, next_attempt_at, processed_at, replay_id, stream_seq, reason, received_at, letter_seq"
	var query string
	args := []any{i.handler, source}
	if database.IsPostgres(tx) {
		// One look into the index an event. With a plain list of ids PostgreSQL reads all rows of the handler instead while the table has no
		// statistics, as it has none when a first backlog is applied (20,207 blocks instead of 1,500 at 20,000 rows).
		query = "SELECT known.* FROM unnest($3::text[]) AS wanted (id) CROSS JOIN LATERAL (SELECT " + columns +
			" FROM deliveries WHERE handler = $1 AND source = $2 AND event_id = wanted.id LIMIT 1) AS known"
		args = append(args, ids)
	} else {
		query = "SELECT " + columns + " FROM deliveries WHERE handler = ? AND source = ? AND event_id IN (?" + strings.Repeat(",?", len(ids)-1) + ")"
		for _, id := range ids {
			args = append(args, id)
		}
	}
	rows, err := tx.Statement.ConnPool.QueryContext(ctx, query, args...)
	if err != nil {
		return fmt.Errorf("find deliveries: %w", err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var id string
		var k Known
		var first, next, written sql.NullTime
		var replay, reason sql.NullString
		var seq, letter sql.NullInt64
		if err := rows.Scan(&id, &k.Status, &k.Attempts, &first, &next, &written, &replay, &seq, &reason, &k.ReceivedAt, &letter); err != nil {
			return fmt.Errorf("read delivery: %w", err)
		}
		k.FirstFailedAt, k.NextAttemptAt, k.WrittenAt, k.ReplayID = first.Time, next.Time, written.Time, replay.String
		k.Seq, k.LetterSeq = uint64(max(seq.Int64, 0)), uint64(max(letter.Int64, 0))
		k.Late = reason.String == string(deadletter.Timeout)
		k.PutOff = k.Status == Retrying && !reason.Valid
		known[event.Ref{Source: source, ID: id}] = k
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("find deliveries: %w", err)
	}
	return nil
}

// Settle writes entries that are applied in this transaction. ErrRaced means that it must be rolled back.
func (i *Inbox) Settle(ctx context.Context, tx *gorm.DB, entries []Entry) error {
	written, err := i.write(ctx, tx, entries)
	if err != nil {
		return err
	}
	if written != int64(len(entries)) {
		return ErrRaced
	}
	return nil
}

// Record writes entries of attempts that failed. An event that another worker applied meanwhile stays applied.
func (i *Inbox) Record(ctx context.Context, tx *gorm.DB, entries []Entry) error {
	_, err := i.write(ctx, tx, entries)
	return err
}

// Try reads and writes a plain row of its own, for the caller to roll back. An error says that the log takes no row at all.
func (i *Inbox) Try(ctx context.Context, tx *gorm.DB) error {
	e := event.Event{ID: "try_" + rand.Text(), Type: "user.created", Source: "clerk", Origin: event.OriginWebhook, ReceivedAt: time.Now(), Seq: 1}
	e.Object.ID = e.ID
	e.Object.UserID = e.ID
	if _, err := i.Find(ctx, tx, []event.Ref{e.Ref()}); err != nil {
		return err
	}
	return i.Settle(ctx, tx, []Entry{{Event: &e, Status: Processed, Attempts: 1, Duration: time.Millisecond}})
}

var upsert = database.Upsert{
	Table: "deliveries",
	Columns: []database.Column{
		{Name: "handler", Type: "text"},
		{Name: "event_id", Type: "text"},
		{Name: "type", Type: "text"},
		{Name: "source", Type: "text"},
		{Name: "origin", Type: "text"},
		{Name: "object_id", Type: "text"},
		{Name: "user_id", Type: "text"},
		{Name: "status", Type: "text"},
		{Name: "attempts", Type: "bigint"},
		{Name: "received_at", Type: "timestamptz"},
		{Name: "processed_at", Type: "timestamptz"},
		{Name: "duration_ms", Type: "float8"},
		{Name: "error", Type: "text"},
		{Name: "reason", Type: "text"},
		{Name: "stream_seq", Type: "bigint"},
		{Name: "first_failed_at", Type: "timestamptz"},
		{Name: "next_attempt_at", Type: "timestamptz"},
		{Name: "fingerprint", Type: "text"},
		{Name: "letter_seq", Type: "bigint"},
		{Name: "replay_id", Type: "text"},
		{Name: "effect", Type: "text"},
	},
	Conflict: []string{"handler", "source", "event_id"},
	// What is settled stays so, but for a deliberate replay that the row has not seen.
	Guard: "(deliveries.status NOT IN ('processed', 'discarded') OR " +
		"excluded.replay_id IS NOT NULL AND excluded.replay_id NOT LIKE '" + stream.LetterReplay + "%' AND excluded.replay_id <> COALESCE(deliveries.replay_id, ''))",
}

func (i *Inbox) write(ctx context.Context, tx *gorm.DB, entries []Entry) (int64, error) {
	slices.SortFunc(entries, func(a, b Entry) int { return a.Event.Ref().Compare(b.Event.Ref()) })
	now := time.Now().UTC()
	rows := make([][]any, len(entries))
	for n, e := range entries {
		ev := e.Event
		rows[n] = []any{
			i.handler, ev.ID, string(ev.Type), ev.Source, string(ev.Origin), null(ev.Object.ID), null(ev.Object.UserID),
			string(e.Status), int64(e.Attempts), ev.ReceivedAt.UTC(), now, float64(e.Duration.Microseconds()) / 1000,
			null(e.Error), null(e.Reason), int64(ev.Seq),
			nullTime(e.FirstFailedAt), nullTime(e.NextAttemptAt), null(e.Fingerprint), nullSeq(e.LetterSeq), null(ev.ReplayID), null(string(e.Effect)),
		}
	}
	n, err := upsert.Exec(ctx, tx, rows)
	if err != nil {
		return 0, fmt.Errorf("write deliveries: %w", err)
	}
	return n, nil
}

func null(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func nullTime(at time.Time) any {
	if at.IsZero() {
		return nil
	}
	return at.UTC()
}

func nullSeq(seq uint64) any {
	if seq == 0 {
		return nil
	}
	return int64(seq)
}
