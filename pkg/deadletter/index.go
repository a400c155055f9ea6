package deadletter

import (
	"context"
	"database/sql/driver"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/event"
)

// Entry is a dead letter as the delivery log knows it. Its letter may be gone: it is kept for [stream.DeadLetterAge].
type Entry struct {
	EventID       string     `json:"id"`
	Handler       string     `json:"handler"`
	Type          string     `json:"type"` // empty where the body cannot be decoded
	Source        string     `json:"source"`
	ObjectID      string     `json:"object_id"`
	UserID        string     `json:"user_id"`
	Reason        Reason     `json:"reason"`
	Error         string     `json:"error"`
	Fingerprint   string     `json:"fingerprint"`
	Attempts      int        `json:"attempts"`
	FirstFailedAt *time.Time `json:"first_failed_at"`
	LastFailedAt  *time.Time `json:"last_failed_at" gorm:"column:processed_at"`
	ReceivedAt    time.Time  `json:"received_at"`
	StreamSeq     uint64     `json:"stream_seq"`
	LetterSeq     uint64     `json:"letter_seq"` // in [stream.DeadLetters], 0 where it was never written
}

// Filter selects dead letters. A zero field selects all; several must all hold.
type Filter struct {
	IDs         []string // of events, of any source where Source is empty
	Handler     string
	Type        string // user.created, user.*, *.deleted
	Reason      Reason
	Fingerprint string
	User        string
	Source      string
	Since       time.Time // of the last failure, inclusive
	Until       time.Time // of the last failure, exclusive

	event *event.Ref

	// through bounds a run to the letters that were there when it began.
	through uint64
}

// String is the filter as flags say it, empty where it selects everything.
func (f Filter) String() string {
	parts := slices.Clone(f.IDs)
	for _, flag := range []struct{ name, value string }{
		{"handler", f.Handler},
		{"type", f.Type},
		{"reason", string(f.Reason)},
		{"fingerprint", f.Fingerprint},
		{"user", f.User},
		{"source", f.Source},
		{"since", timeText(f.Since)},
		{"until", timeText(f.Until)},
	} {
		if flag.value != "" {
			parts = append(parts, "--"+flag.name+" "+flag.value)
		}
	}
	return strings.Join(parts, " ")
}

func timeText(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return at.UTC().Format(time.RFC3339)
}

// dead are the rows that the filter selects. The second condition follows from the first: it says to both databases that
// the partial index of what is not processed will do.
func (f Filter) dead(ctx context.Context, db *gorm.DB) *gorm.DB {
	q := db.WithContext(ctx).Table("deliveries").Where("deliveries.status = 'dead' AND deliveries.status <> 'processed'")
	if len(f.IDs) > 0 {
		q = q.Where("event_id IN ?", f.IDs)
	}
	if f.event != nil {
		q = q.Where("source = ? AND event_id = ?", f.event.Source, f.event.ID)
	}
	for column, value := range map[string]string{
		"handler": f.Handler, "reason": string(f.Reason), "fingerprint": f.Fingerprint, "user_id": f.User, "source": f.Source,
	} {
		if value != "" {
			q = q.Where(column+" = ?", value)
		}
	}
	if !f.Since.IsZero() {
		q = q.Where("processed_at >= ?", f.Since.UTC())
	}
	if !f.Until.IsZero() {
		q = q.Where("processed_at < ?", f.Until.UTC())
	}
	if f.through > 0 {
		q = q.Where("COALESCE(letter_seq, 0) <= ?", int64(f.through))
	}
	return whereType(q, f.Type)
}

// whereType narrows a query to a pattern of types, without LIKE, whose wildcards and folding of case differ between the databases.
func whereType(q *gorm.DB, pattern string) *gorm.DB {
	resource, verb, _ := strings.Cut(pattern, ".")
	switch {
	case pattern == "", pattern == "*", pattern == "*.*":
		return q
	case resource == "*":
		return q.Where("substr(type, length(type) - ? + 1) = ?", len([]rune(verb))+1, "."+verb)
	case verb == "*":
		return q.Where("substr(type, 1, ?) = ?", len([]rune(resource))+1, resource+".")
	default:
		return q.Where("type = ?", pattern)
	}
}

// ErrCursor tells that a cursor is not one of List's.
var ErrCursor = errors.New("not the cursor of a page")

// place is where a row stands in every listing and every run: it never changes, so a page never repeats or misses one.
type place struct {
	receivedAt               time.Time
	eventID, source, handler string
}

func (p place) cursor() string {
	return base64.RawURLEncoding.EncodeToString([]byte(p.receivedAt.UTC().Format(time.RFC3339Nano) + " " + p.handler + " " + p.source + " " + p.eventID))
}

func parsePlace(cursor string) (place, error) {
	text, err := base64.RawURLEncoding.DecodeString(cursor)
	parts := strings.SplitN(string(text), " ", 4)
	if err != nil || len(parts) != 4 {
		return place{}, fmt.Errorf("%q is %w", cursor, ErrCursor)
	}
	at, err := time.Parse(time.RFC3339Nano, parts[0])
	if err != nil {
		return place{}, fmt.Errorf("%q is %w", cursor, ErrCursor)
	}
	return place{at, parts[3], parts[2], parts[1]}, nil
}

// Ref names the event of the letter.
func (e Entry) Ref() event.Ref { return event.Ref{Source: e.Source, ID: e.EventID} }

func (e Entry) place() place { return place{e.ReceivedAt, e.EventID, e.Source, e.Handler} }

const entryColumns = "event_id, handler, type, source, object_id, user_id, reason, error, fingerprint, attempts, first_failed_at, processed_at, received_at, stream_seq, letter_seq"

// List returns one page of at most limit dead letters, the newest event first, and the cursor of the next page, empty
// at the end. An empty cursor begins. The error is [ErrCursor] where cursor is not List's.
func List(ctx context.Context, db *gorm.DB, f Filter, cursor string, limit int) (entries []Entry, next string, err error) {
	q := f.dead(ctx, db)
	if cursor != "" {
		p, err := parsePlace(cursor)
		if err != nil {
			return nil, "", err
		}
		q = q.Where("(received_at, event_id, source, handler) < (?, ?, ?, ?)", p.receivedAt.UTC(), p.eventID, p.source, p.handler)
	}
	if err := q.Select(entryColumns).Order("received_at DESC, event_id DESC, source DESC, handler DESC").Limit(limit + 1).Find(&entries).Error; err != nil {
		return nil, "", fmt.Errorf("list dead letters: %w", err)
	}
	if len(entries) > limit {
		entries = entries[:limit]
		next = entries[limit-1].place().cursor()
	}
	inUTC(entries)
	return entries, next, nil
}

// Missing returns those of f.IDs that f selects no dead letter of, sorted, each once.
func Missing(ctx context.Context, db *gorm.DB, f Filter) ([]string, error) {
	missing := slices.Compact(slices.Sorted(slices.Values(f.IDs)))
	var found []string
	for ids := range slices.Chunk(missing, page) {
		f.IDs = ids
		var part []string
		if err := f.dead(ctx, db).Distinct("event_id").Pluck("event_id", &part).Error; err != nil {
			return nil, fmt.Errorf("find dead letters: %w", err)
		}
		found = append(found, part...)
	}
	return slices.DeleteFunc(missing, func(id string) bool { return slices.Contains(found, id) }), nil
}

// Ambiguous returns those of f.IDs that f selects dead letters of in several sources, with these sources.
func Ambiguous(ctx context.Context, db *gorm.DB, f Filter) (map[string][]string, error) {
	ids := f.IDs
	sources := map[string][]string{}
	for f.IDs = range slices.Chunk(ids, page) {
		var found []struct{ EventID, Source string }
		if err := f.dead(ctx, db).Distinct("event_id", "source").Order("event_id, source").Find(&found).Error; err != nil {
			return nil, fmt.Errorf("find dead letters: %w", err)
		}
		for _, e := range found {
			sources[e.EventID] = append(sources[e.EventID], e.Source)
		}
	}
	maps.DeleteFunc(sources, func(_ string, of []string) bool { return len(of) < 2 })
	return sources, nil
}

// after returns the page that follows in a run, the oldest event first.
func after(ctx context.Context, db *gorm.DB, f Filter, p place, limit int) ([]Entry, error) {
	q := f.dead(ctx, db)
	if p != (place{}) {
		q = q.Where("(received_at, event_id, source, handler) > (?, ?, ?, ?)", p.receivedAt.UTC(), p.eventID, p.source, p.handler)
	}
	var entries []Entry
	if err := q.Select(entryColumns).Order("received_at, event_id, source, handler").Limit(limit).Find(&entries).Error; err != nil {
		return nil, fmt.Errorf("list dead letters: %w", err)
	}
	inUTC(entries)
	return entries, nil
}

func inUTC(entries []Entry) {
	for i := range entries {
		e := &entries[i]
		e.ReceivedAt = e.ReceivedAt.UTC()
		for _, at := range []*time.Time{e.FirstFailedAt, e.LastFailedAt} {
			if at != nil {
				*at = at.UTC()
			}
		}
	}
}

// Total is how many dead letters the filter selects.
func Total(ctx context.Context, db *gorm.DB, f Filter) (int, error) {
	n, _, err := total(ctx, db, f)
	return n, err
}

// total also returns the sequence of the newest letter.
func total(ctx context.Context, db *gorm.DB, f Filter) (int, uint64, error) {
	var found struct {
		N      int
		Newest uint64
	}
	if err := f.dead(ctx, db).Select("count(*) AS n, COALESCE(max(letter_seq), 0) AS newest").Find(&found).Error; err != nil {
		return 0, 0, fmt.Errorf("count dead letters: %w", err)
	}
	return found.N, found.Newest, nil
}

// Count is how many dead letters of a source a handler has of a type and a reason.
type Count struct {
	Source  string `json:"source"`
	Handler string `json:"handler"`
	Type    string `json:"type"`
	Reason  Reason `json:"reason"`
	Events  int    `json:"events"`
}

// Counts counts by source, handler, type and reason, the most first.
func Counts(ctx context.Context, db *gorm.DB, f Filter) ([]Count, error) {
	counts := []Count{}
	err := f.dead(ctx, db).Select("source, handler, type, reason, count(*) AS events").Group("source, handler, type, reason").
		Order("events DESC, source, handler, type, reason").Find(&counts).Error
	if err != nil {
		return nil, fmt.Errorf("count dead letters: %w", err)
	}
	return counts, nil
}

// Group is what the dead letters of one kind of failure of one source have in common.
type Group struct {
	Source      string    `json:"source"`
	Fingerprint string    `json:"fingerprint"`
	Handler     string    `json:"handler"`
	Reason      Reason    `json:"reason"`
	Events      int       `json:"events"`
	Users       int       `json:"users"`
	FirstSeen   time.Time `json:"first_seen"` // the first failure of any
	LastSeen    time.Time `json:"last_seen"`  // the last failure of any
	ExampleID   string    `json:"example_id"` // an event
	Example     string    `json:"example"`    // its error
}

// Groups groups by source and fingerprint, the largest first.
func Groups(ctx context.Context, db *gorm.DB, f Filter) ([]Group, error) {
	// Times are read as columns of a table: SQLite gives a computed one no type.
	grouped := f.dead(ctx, db).Select(`source, handler, reason, fingerprint, count(*) AS events, count(DISTINCT user_id) AS users,
		min(COALESCE(first_failed_at, processed_at, received_at)) AS first_seen, max(COALESCE(processed_at, received_at)) AS last_seen,
		max(event_id) AS example_id`).Group("source, handler, reason, fingerprint")
	var rows []struct {
		Source, Fingerprint, Handler, ExampleID, Example string
		Reason                                           Reason
		Events, Users                                    int
		FirstSeen, LastSeen                              clock
	}
	err := db.WithContext(ctx).Table("(?) AS g", grouped).Joins("JOIN deliveries AS d ON d.handler = g.handler AND d.source = g.source AND d.event_id = g.example_id").
		Select("g.*, d.error AS example").Order("g.events DESC, g.source, g.handler, g.fingerprint").Find(&rows).Error
	if err != nil {
		return nil, fmt.Errorf("group dead letters: %w", err)
	}
	groups := make([]Group, len(rows))
	for i, r := range rows {
		groups[i] = Group{r.Source, r.Fingerprint, r.Handler, r.Reason, r.Events, r.Users, r.FirstSeen.Time, r.LastSeen.Time, r.ExampleID, r.Example}
	}
	return groups, nil
}

// clock reads a computed time: PostgreSQL gives a time, SQLite the text of one.
type clock struct{ time.Time }

// Value implements driver.Valuer, which GORM asks for beside Scan.
func (c clock) Value() (driver.Value, error) { return c.Time, nil }

// Scan implements sql.Scanner.
func (c *clock) Scan(value any) error {
	switch v := value.(type) {
	case time.Time:
		c.Time = v.UTC()
		return nil
	case string:
		at, err := time.Parse("2006-01-02 15:04:05.999999999Z07:00", v)
		if err != nil {
			return fmt.Errorf("read time: %w", err)
		}
		c.Time = at.UTC()
		return nil
	default:
		return fmt.Errorf("read time: %T is none", value)
	}
}
