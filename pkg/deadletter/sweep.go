package deadletter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
)

// Sweeper makes the letters and their index agree again after a crash, or after one of the two was restored from a backup. A
// letter that the log does not know is indexed; one that was replayed or given up, and whose deletion a crash prevented, is
// deleted. Several may run at once. A Sweeper is for one goroutine.
type Sweeper struct {
	js jetstream.JetStream
	db *gorm.DB
	// MinAge is how old a letter must be before it is looked at (2 min): who is at work on a younger one settles it himself.
	MinAge time.Duration
	// Refuses reports whether the database refuses a row for what is in it and takes others: those are indexed all the same. Nil: every
	// error ends the sweep.
	Refuses func(error) bool

	walked    time.Time // when all letters were looked at last
	explained int64     // how many letters more than rows there were then, with nothing to be done about it
	young     bool      // a letter was not as it should be then, and too young
	refused   error     // the first row that the database refused then
}

// NewSweeper returns a Sweeper that has not looked at anything.
func NewSweeper(js jetstream.JetStream, db *gorm.DB) *Sweeper {
	return &Sweeper{js: js, db: db, MinAge: 2 * time.Minute}
}

// Swept says what a sweep did.
type Swept struct {
	Read    int // letters looked at; 0 where nothing seemed to be missing
	Indexed int
	Deleted int
}

// fullEvery is how often every letter is looked at even where the numbers agree, differentEvery where they differ by as many as they
// did when all were looked at last: somebody else's letter in the stream, or a row whose letter has gone.
const fullEvery, differentEvery = 24 * time.Hour, time.Hour

// Sweep is to be called every minute or so. Where the stream and the index hold the same number of letters, or differ as they did, it
// costs one request and one count; it looks at all of them where that difference has changed, and once in a while (and the first
// time).
func (s *Sweeper) Sweep(ctx context.Context) (Swept, error) {
	var swept Swept
	dlq, err := open(ctx, s.js)
	if err != nil {
		return swept, err
	}
	state := dlq.CachedInfo().State
	if state.Msgs == 0 {
		return swept, nil
	}
	var known int64
	err = s.db.WithContext(ctx).Table("deliveries").Where("status = 'dead' AND status <> 'processed' AND letter_seq BETWEEN ? AND ?", state.FirstSeq, state.LastSeq).Count(&known).Error
	if err != nil {
		return swept, fmt.Errorf("count dead letters: %w", err)
	}
	difference, due := int64(state.Msgs)-known, differentEvery
	switch {
	case s.young || difference != s.explained:
		due = 0
	case difference == 0:
		due = fullEvery
	}
	started := time.Now()
	if started.Sub(s.walked) < due {
		return swept, nil
	}
	s.young, s.refused = false, nil
	if err := s.walk(ctx, dlq, state.LastSeq, &swept); err != nil {
		s.walked = time.Time{} // again
		return swept, err
	}
	s.walked, s.explained = started, difference-int64(swept.Indexed+swept.Deleted) // which is what the mended ones made of it
	return swept, s.refused
}

// head is a letter without its body.
type head struct {
	Record
	seq   uint64
	at    time.Time
	young bool
}

// nextWait is how long a letter may take to come.
const nextWait = 5 * time.Second

// walk reads the heads of all letters up to a sequence, a page at a time.
func (s *Sweeper) walk(ctx context.Context, dlq jetstream.Stream, last uint64, swept *Swept) error {
	consumer, err := dlq.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{HeadersOnly: true, InactiveThreshold: time.Minute})
	if err != nil {
		return fmt.Errorf("read dead letters: %w", stream.Explain(err))
	}
	iter, err := consumer.Messages(jetstream.PullMaxMessages(page))
	if err != nil {
		return fmt.Errorf("read dead letters: %w", stream.Explain(err))
	}
	defer iter.Stop()
	heads := make([]head, 0, page)
	for seq, pending := uint64(0), uint64(1); seq < last && pending > 0; {
		msg, err := next(ctx, iter)
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil { // the last ones were deleted meanwhile
			return s.compare(ctx, dlq, heads, swept)
		}
		if err != nil {
			return fmt.Errorf("read dead letters: %w", stream.Explain(err))
		}
		meta, err := msg.Metadata()
		if err != nil {
			return fmt.Errorf("read dead letters: %w", stream.Explain(err))
		}
		seq, pending = meta.Sequence.Stream, meta.NumPending
		heads = append(heads, head{parse(&jetstream.RawStreamMsg{Header: msg.Headers(), Sequence: seq}), seq, meta.Timestamp, time.Since(meta.Timestamp) < s.MinAge})
		if len(heads) == page || seq >= last || pending == 0 {
			if err := s.compare(ctx, dlq, heads, swept); err != nil {
				return err
			}
			heads = heads[:0]
		}
	}
	return nil
}

func next(ctx context.Context, iter jetstream.MessagesContext) (jetstream.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, nextWait)
	defer cancel()
	return iter.Next(jetstream.NextContext(ctx)) //nolint:wrapcheck // the caller says what it was for
}

// known is what the log says of a letter's event at its handler.
type known struct {
	Handler, Source, EventID, Status string
	StreamSeq                        uint64
	LetterSeq                        uint64
	ReplayID                         string
	ProcessedAt                      time.Time
}

// letterKey is what a row of the log is found by.
type letterKey struct {
	handler string
	event   event.Ref
}

func (s *Sweeper) compare(ctx context.Context, dlq jetstream.Stream, heads []head, swept *Swept) error {
	rows := map[letterKey]known{}
	type owner struct{ handler, source string }
	ids := map[owner][]string{}
	for _, h := range heads {
		of := owner{h.Handler, h.Event.Source}
		ids[of] = append(ids[of], h.Event.ID)
	}
	for of, list := range ids {
		var found []known
		err := s.db.WithContext(ctx).Table("deliveries").Where("handler = ? AND source = ? AND event_id IN ?", of.handler, of.source, list).
			Select("handler, source, event_id, status, stream_seq, letter_seq, replay_id, processed_at").Find(&found).Error
		if err != nil {
			return fmt.Errorf("look up dead letters: %w", err)
		}
		for _, k := range found {
			rows[letterKey{k.Handler, event.Ref{Source: k.Source, ID: k.EventID}}] = k
		}
	}
	for _, h := range heads {
		row, exists := rows[letterKey{h.Handler, h.Event.Ref()}]
		verdict := judge(h, row, exists)
		if h.young {
			s.young = s.young || verdict != right
			continue
		}
		swept.Read++
		switch verdict {
		case index:
			n, err := s.index(ctx, dlq, h, row, exists)
			switch {
			case err != nil && s.Refuses != nil && s.Refuses(err):
				if s.refused == nil {
					s.refused = err
				}
			case err != nil:
				return err
			}
			swept.Indexed += n
		case obsolete:
			if err := remove(ctx, dlq, h.seq); err != nil {
				return err
			}
			swept.Deleted++
		case right:
		}
	}
	return nil
}

type judgement int

const (
	right    judgement = iota
	index              // the log must be told of the letter
	obsolete           // the letter has had its day
)

// judge says what is to be done about a letter. A letter is obsolete only where the row itself proves that the event went on: it names the
// letter's replay, or it was written later, by the letter's message or one behind it. (The sequence alone proves nothing: a stream
// that was made anew begins at one.)
func judge(h head, row known, exists bool) judgement {
	later := row.StreamSeq >= h.Sequence && row.ProcessedAt.After(h.at)
	switch {
	case h.Handler == "" || h.Event.ID == "": // not one of ours
		return right
	case !exists:
		return index
	case row.Status == "dead" && row.LetterSeq == h.seq:
		return right
	case row.ReplayID != "" && row.ReplayID == replayID(h.seq, h.at):
		return obsolete
	case row.Status == "dead" && row.LetterSeq > h.seq && later: // it failed again, or was put twice
		return obsolete
	case (row.Status == "processed" || row.Status == "discarded") && later:
		return obsolete
	case row.Status == "dead" && row.LetterSeq > h.seq, row.Status == "retrying" && later: // on another way, and not settled yet
		return right
	default:
		return index
	}
}

// index writes the row of a letter, unless it has changed since it was read.
func (s *Sweeper) index(ctx context.Context, dlq jetstream.Stream, h head, row known, exists bool) (int, error) {
	// The body says what the event is about.
	msg, err := dlq.GetMsg(ctx, h.seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read dead letter %d: %w", h.seq, stream.Explain(err))
	}
	r := parse(msg)
	e := r.Event
	if e.ReceivedAt.IsZero() {
		e.ReceivedAt = msg.Time
	}
	values := map[string]any{
		"type": string(e.Type), "origin": string(e.Origin), "object_id": null(e.Object.ID), "user_id": null(e.Object.UserID),
		"status": "dead", "attempts": r.Attempts, "received_at": e.ReceivedAt.UTC(), "processed_at": msg.Time.UTC(), "error": null(r.Error),
		"reason": null(string(r.Reason)), "stream_seq": int64(r.Sequence), "fingerprint": Fingerprint(r.Handler, r.Reason, r.Error),
		"letter_seq": int64(h.seq), "replay_id": null(e.ReplayID), "next_attempt_at": nil, "first_failed_at": nil,
	}
	if !r.FirstFailedAt.IsZero() {
		values["first_failed_at"] = r.FirstFailedAt.UTC()
	}
	if !r.LastFailedAt.IsZero() {
		values["processed_at"] = r.LastFailedAt.UTC()
	}
	db := s.db.WithContext(ctx)
	if exists {
		result := db.Table("deliveries").Where("handler = ? AND source = ? AND event_id = ? AND status = ? AND COALESCE(stream_seq, 0) = ? AND COALESCE(letter_seq, 0) = ?",
			row.Handler, row.Source, row.EventID, row.Status, int64(row.StreamSeq), int64(row.LetterSeq)).Updates(values)
		if result.Error != nil {
			return 0, fmt.Errorf("index dead letter %d: %w", h.seq, result.Error)
		}
		return int(result.RowsAffected), nil
	}
	values["handler"], values["source"], values["event_id"] = r.Handler, e.Source, e.ID
	result := db.Table("deliveries").Clauses(clause.OnConflict{DoNothing: true}).Create(values)
	if result.Error != nil {
		return 0, fmt.Errorf("index dead letter %d: %w", h.seq, result.Error)
	}
	return int(result.RowsAffected), nil
}

func null(s string) any {
	if s == "" {
		return nil
	}
	return s
}
