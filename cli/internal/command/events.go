package command

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/redact"
	"github.com/usherhq/usher/pkg/stream"
)

func (c *cli) events() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "events",
		Short:   "List, show and follow events",
		Long:    "events reads what arrived: list and show from the delivery log, tail from the stream.",
		Example: "  usher events list --type 'user.*' --since 24h\n  usher events show msg_…\n  usher events tail",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.eventsList(), c.eventsShow(), c.eventsTail())
	return cmd
}

// delivery is what became of an event at one handler.
type delivery struct {
	Source        string     `json:"-"`
	EventID       string     `json:"-"`
	Handler       string     `json:"handler"`
	Status        string     `json:"status"`
	Effect        string     `json:"effect"` // what it changed; empty where the handler does not say, or it is not processed
	Attempts      int        `json:"attempts"`
	DurationMS    float64    `json:"duration_ms" gorm:"column:duration_ms"`
	Error         string     `json:"error"`
	Reason        string     `json:"reason"`
	ProcessedAt   *time.Time `json:"processed_at"`
	NextAttemptAt *time.Time `json:"next_attempt_at"` // of what is retrying, where its handler had it in hand since it was replayed
}

// nextAttempt says when a delivery is tried again.
func (d *delivery) nextAttempt() string {
	switch {
	case d.Status != "retrying":
		return "-"
	case d.NextAttemptAt == nil:
		return "when its handler takes it"
	default:
		return timeText(*d.NextAttemptAt)
	}
}

// Head is what one event is. GORM embeds exported types only.
type Head struct {
	ID         string    `json:"id" gorm:"column:event_id"`
	Type       string    `json:"type"`
	Source     string    `json:"source"`
	Origin     string    `json:"origin"`
	ObjectID   string    `json:"object_id"`
	UserID     string    `json:"user_id"`
	ReceivedAt time.Time `json:"received_at"`
	StreamSeq  uint64    `json:"stream_seq"`
}

func (h *Head) ref() event.Ref { return event.Ref{Source: h.Source, ID: h.ID} }

type listedEvent struct {
	Head       `gorm:"embedded"`
	Deliveries []delivery `json:"deliveries" gorm:"-"`
}

// baseHandler sees every event, so its rows are the list of events.
const baseHandler = "mirror"

var statuses = []string{"processed", "retrying", "dead", "discarded"}

type listOptions struct {
	typ     typePattern
	user    string
	source  string
	status  string
	effect  string
	handler string
	since   since
	paging
}

func (c *cli) eventsList() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List events and what became of them, newest first",
		Long: "list reads the delivery log, so an event appears as soon as a handler had it in hand. --status is that of the handler\n" +
			"named with --handler; where none is named, an event is processed when it is so by all that had it in hand, and\n" +
			"retrying, dead or discarded when it is so by any. --effect is what it changed at that handler, mirror where none is named:\n" +
			"applied or deleted (a row was written), stub (only a row of another object), or nothing, since it is older, unchanged or\n" +
			"of an unknown_type.",
		Example: "  usher events list --type 'user.*' --since 24h\n" +
			"  usher events list --status dead --output json\n" +
			"  usher events list --user user_… --limit 10",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.status != "" && !slices.Contains(statuses, o.status) {
				return fmt.Errorf("--status %q: want one of %s", o.status, strings.Join(statuses, ", "))
			}
			if o.effect != "" && !slices.Contains(event.Effects(), event.Effect(o.effect)) {
				return fmt.Errorf("--effect %q: want one of %s", o.effect, effectNames())
			}
			if err := o.check(cmd); err != nil {
				return err
			}
			return c.listEvents(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.Var(&o.typ, "type", "only events of these types: user.created, 'user.*', '*.deleted'")
	f.StringVar(&o.user, "user", "", "only events about this user `ID`")
	f.StringVar(&o.source, "source", "", "only events of this source")
	f.StringVar(&o.status, "status", "", "only events of this status: "+strings.Join(statuses, ", "))
	f.StringVar(&o.effect, "effect", "", "only events that changed this: "+effectNames())
	f.StringVar(&o.handler, "handler", "", "only events that this handler had in hand")
	f.Var(&o.since, "since", "only events received since then")
	o.addFlags(cmd, "events")
	c.settingFlags(cmd, bothSettings...)
	return cmd
}

func (c *cli) listEvents(ctx context.Context, o listOptions) error {
	r, err := c.reach()
	if err != nil {
		return err
	}
	defer r.close()
	db, err := r.database(ctx)
	if err != nil {
		return err
	}
	if err := r.checkHandler(ctx, db, o.handler); err != nil {
		return err
	}
	row := func(e listedEvent) []string {
		var became []string
		for _, d := range e.Deliveries {
			text := d.Handler + "=" + d.Status
			switch {
			case d.Status == "retrying" && d.NextAttemptAt != nil:
				text += " (next attempt " + d.nextAttempt() + ")"
			case d.Effect != "" && d.Effect != string(event.EffectApplied):
				text += " (" + d.Effect + ")"
			}
			became = append(became, text)
		}
		return []string{timeText(e.ReceivedAt), e.ID, typeText(e.Type), cmp.Or(e.UserID, "-"), e.Source, e.Origin, strings.Join(became, " ")}
	}
	return printPages(c, o.paging, []string{"received", "id", "type", "user", "source", "origin", "deliveries"}, row, func(cursor string, limit int) (list listing[listedEvent], err error) {
		o.cursor, o.limit = cursor, limit
		// One snapshot, so that an event and its deliveries fit together.
		err = database.InReadTx(ctx, db, func(tx *gorm.DB) error {
			list, err = findEvents(tx, o)
			return err
		})
		return list, err
	})
}

func effectNames() string {
	var names []string
	for _, effect := range event.Effects() {
		names = append(names, string(effect))
	}
	return strings.Join(names, ", ")
}

// findEvents finds one page: events below the cursor in the order (received_at, event_id, source) downwards, one row more to
// know whether a next page exists.
func findEvents(tx *gorm.DB, o listOptions) (listing[listedEvent], error) {
	var list listing[listedEvent]
	q := o.typ.where(o.whereStatus(tx.Table(o.table(database.IsPostgres(tx)))))
	if o.user != "" {
		q = q.Where("user_id = ?", o.user)
	}
	if o.source != "" {
		q = q.Where("source = ?", o.source)
	}
	if o.effect != "" { // one of a closed set, in the text as whereStatus does it
		q = q.Where("effect = '" + o.effect + "'")
		if o.effect != string(event.EffectApplied) {
			q = q.Where("effect <> 'applied'")
		}
	}
	if !o.since.at.IsZero() {
		q = q.Where("received_at >= ?", o.since.at.UTC())
	}
	if o.cursor != "" {
		at, source, id, err := parseCursor(o.cursor)
		if err != nil {
			return list, err
		}
		q = q.Where("(received_at, event_id, source) < (?, ?, ?)", at, id, source)
	}
	err := q.Select(headColumns).Order("received_at DESC, event_id DESC, source DESC").Limit(o.limit + 1).Find(&list.Items).Error
	if err != nil {
		return list, fmt.Errorf("list events: %w", err)
	}
	if len(list.Items) > o.limit {
		list.Items = list.Items[:o.limit]
		last := list.Items[o.limit-1]
		list.Next = newCursor(last.ReceivedAt, last.Source, last.ID)
	}
	return list, addDeliveries(tx, list.Items)
}

// table names the index to read by, in SQLite: nearly every row passes most conditions and the newest are wanted, which
// PostgreSQL knows from its statistics, while SQLite takes every condition for a rare one and sorts the whole table.
func (o *listOptions) table(isPostgres bool) string {
	switch open := o.status != "" && o.status != "processed"; {
	case isPostgres, open && o.handler == "":
		return "deliveries"
	case o.effect != "" && o.effect != string(event.EffectApplied) && o.user == "":
		return "deliveries INDEXED BY deliveries_effect"
	case o.user != "":
		return "deliveries INDEXED BY deliveries_user"
	case open:
		return "deliveries INDEXED BY deliveries_open"
	default:
		return "deliveries INDEXED BY deliveries_received"
	}
}

// whereStatus narrows a query to one handler's rows and to a status: that handler's where one was named, else that of
// the event as a whole. The status stands in the text, not in a parameter (it is one of four words), and with what it implies,
// so that both databases see that the partial index of what is not processed serves.
func (o *listOptions) whereStatus(q *gorm.DB) *gorm.DB {
	open := "status = '" + o.status + "' AND status <> 'processed'"
	switch {
	case o.status == "":
	case o.status == "processed":
		q = q.Where("status = 'processed'")
		if o.handler == "" { // by every handler that had it in hand
			q = q.Where(`NOT EXISTS (SELECT 1 FROM deliveries AS d
				WHERE d.received_at = deliveries.received_at AND d.source = deliveries.source AND d.event_id = deliveries.event_id AND d.status <> 'processed')`)
		}
	case o.handler != "":
		q = q.Where(open)
	default: // at any handler; few rows, looked up by the key
		q = q.Where("(source, event_id) IN (SELECT source, event_id FROM deliveries WHERE " + open + ")")
	}
	return q.Where("handler = ?", cmp.Or(o.handler, baseHandler))
}

const headColumns = "event_id, type, source, origin, object_id, user_id, received_at, stream_seq"

// addDeliveries reads what every handler did with the events.
func addDeliveries(tx *gorm.DB, events []listedEvent) error {
	byRef := map[event.Ref]*listedEvent{}
	for i := range events {
		events[i].ReceivedAt = events[i].ReceivedAt.UTC()
		events[i].Deliveries = []delivery{}
		byRef[events[i].ref()] = &events[i]
	}
	if len(events) == 0 {
		return nil
	}
	refs := make([]event.Ref, len(events))
	for i, e := range events {
		refs[i] = e.ref()
	}
	var found []delivery
	for source, ids := range event.BySource(refs) {
		var some []delivery
		err := tx.Table("deliveries").Where("handler IN (?) AND source = ? AND event_id IN ?", handlers(tx), source, ids).Order("handler").Find(&some).Error
		if err != nil {
			return fmt.Errorf("read deliveries: %w", err)
		}
		found = append(found, some...)
	}
	for _, d := range found {
		if d.ProcessedAt != nil {
			at := d.ProcessedAt.UTC()
			d.ProcessedAt = &at
		}
		if d.NextAttemptAt != nil {
			at := d.NextAttemptAt.UTC()
			d.NextAttemptAt = &at
		}
		e := byRef[event.Ref{Source: d.Source, ID: d.EventID}]
		e.Deliveries = append(e.Deliveries, d)
	}
	return nil
}

// handlers is a subquery for the names of all handlers in the log. The log's key begins with the handler, and it has
// few: one step of the index each, where DISTINCT would read it all.
func handlers(tx *gorm.DB) *gorm.DB {
	return tx.Session(&gorm.Session{NewDB: true}).Raw(`WITH RECURSIVE h(name) AS (
		SELECT min(handler) FROM deliveries
		UNION ALL SELECT (SELECT min(handler) FROM deliveries WHERE handler > h.name) FROM h WHERE h.name IS NOT NULL
	) SELECT name FROM h WHERE name IS NOT NULL`)
}

// handlerSources is a subquery for the pairs of a handler and a source in the log, found as the handlers are.
func handlerSources(tx *gorm.DB) *gorm.DB {
	return tx.Session(&gorm.Session{NewDB: true}).Raw(`WITH RECURSIVE h(name) AS (
		SELECT min(handler) FROM deliveries
		UNION ALL SELECT (SELECT min(handler) FROM deliveries WHERE handler > h.name) FROM h WHERE h.name IS NOT NULL
	), s(name, source) AS (
		SELECT name, (SELECT min(source) FROM deliveries WHERE handler = name) FROM h WHERE name IS NOT NULL
		UNION ALL SELECT name, (SELECT min(source) FROM deliveries WHERE handler = s.name AND source > s.source) FROM s WHERE s.source IS NOT NULL
	) SELECT name, source FROM s WHERE source IS NOT NULL`)
}

// A cursor is where a page ended. It is opaque to users.
func newCursor(at time.Time, source, id string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(at.UTC().Format(time.RFC3339Nano) + " " + source + " " + id))
}

func parseCursor(cursor string) (at time.Time, source, id string, err error) {
	text, err := base64.RawURLEncoding.DecodeString(cursor)
	parts := strings.SplitN(string(text), " ", 3)
	when, timeErr := time.Parse(time.RFC3339Nano, parts[0])
	if err != nil || len(parts) != 3 || timeErr != nil {
		return time.Time{}, "", "", fmt.Errorf("--cursor: %q is not the `next` of a page", cursor)
	}
	return when, parts[1], parts[2], nil
}

// shownEvent is an event with its body.
type shownEvent struct {
	listedEvent
	// OriginalSeq is where the event itself lies in the stream: stream_seq is that of its last replay, where it was replayed. 0 where
	// nobody can tell any more.
	OriginalSeq uint64 `json:"original_seq"`

	Body     json.RawMessage `json:"body"`      // as it was signed, messages redacted; a JSON string where it is no JSON, null where it is gone
	BodyNote string          `json:"body_note"` // why it is left out, or what was redacted
}

func (c *cli) eventsShow() *cobra.Command {
	var source string
	var o output
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show one event: its deliveries and its body",
		Long: "show prints what every handler did with an event, and its body as it lies in the stream. Of mails and text messages\n" +
			"the text, the codes and the links are redacted. Exit code 1: there is no such event.",
		Example: "  usher events show msg_2g7np7Hrk0SN6kj5EDMLDaKNL0S\n  usher events show msg_… --output json | jq .body.data",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := c.showEvent(cmd.Context(), args[0], source)
			if errors.Is(err, gorm.ErrRecordNotFound) {
				c.say("There is no event %s in the delivery log: no handler had it in hand yet, or it never arrived.", args[0])
				return errNo
			}
			if err != nil {
				return err
			}
			if o != outputTable {
				return printObject(c.env.Stdout, o, e)
			}
			return printEvent(c.env.Stdout, e)
		},
	}
	cmd.Flags().StringVar(&source, "source", "", "the event's source, where several have an event of this id")
	outputFlag(cmd, &o)
	c.settingFlags(cmd, bothSettings...)
	return cmd
}

// showEvent finds an event of a source, where one is named; the error is gorm.ErrRecordNotFound where the log does not know it.
func (c *cli) showEvent(ctx context.Context, id, source string) (shownEvent, error) {
	var e shownEvent
	r, err := c.reach()
	if err != nil {
		return e, err
	}
	defer r.close()
	db, err := r.database(ctx)
	if err != nil {
		return e, err
	}
	err = database.InReadTx(ctx, db, func(tx *gorm.DB) error {
		var found []listedEvent
		sources := []string{source}
		if source == "" {
			var err error
			if sources, err = sourcesOf(tx, id); err != nil {
				return err
			}
		}
		if len(sources) > 1 {
			return severalSources(id, sources)
		}
		err := tx.Table("deliveries").Where("handler IN (?) AND source IN ? AND event_id = ?", handlers(tx), sources, id).
			Select(headColumns).Order("handler").Limit(1).Find(&found).Error
		if err != nil {
			return fmt.Errorf("find event %s: %w", id, err)
		}
		if len(found) == 0 {
			return gorm.ErrRecordNotFound
		}
		err = addDeliveries(tx, found)
		e.listedEvent = found[0]
		return err
	})
	if err != nil {
		return e, err
	}
	if e.Origin != string(event.OriginReplay) {
		e.OriginalSeq = e.StreamSeq
	}
	r.readBody(ctx, &e)
	return e, nil
}

// sourcesOf are the sources that have an event of this id.
func sourcesOf(tx *gorm.DB, id string) ([]string, error) {
	var sources []string
	err := tx.Table("deliveries").Where("(handler, source) IN (?) AND event_id = ?", handlerSources(tx), id).Distinct("source").Order("source").Pluck("source", &sources).Error
	if err != nil {
		return nil, fmt.Errorf("find event %s: %w", id, err)
	}
	return sources, nil
}

// readBody reads an event's body from the stream. What the log says is worth showing without it, so a reason takes the
// place of an error.
func (r *reach) readBody(ctx context.Context, e *shownEvent) {
	js, err := r.broker()
	if err != nil {
		e.BodyNote = "not read: " + err.Error()
		return
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	msg, err := getMsg(ctx, js, e.StreamSeq)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		e.BodyNote = "no longer in the stream (settled and past the retention time)"
	case err != nil:
		e.BodyNote = "not read: " + err.Error()
	case cmp.Or(msg.Header.Get(stream.HeaderEventID), e.ID) != e.ID, msg.Header.Get(stream.HeaderSource) != e.Source:
		e.BodyNote = "no longer in the stream (another event has its place: the stream was made anew)"
	default:
		if first, err := strconv.ParseUint(msg.Header.Get(stream.HeaderFirstSequence), 10, 64); err == nil {
			e.OriginalSeq = first
		}
		e.Body, e.BodyNote = mask(event.Type(cmp.Or(e.Type, msg.Header.Get(stream.HeaderType))), msg.Data)
	}
}

func getMsg(ctx context.Context, js jetstream.JetStream, seq uint64) (*jetstream.RawStreamMsg, error) {
	s, err := js.Stream(ctx, stream.Events)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	msg, err := s.GetMsg(ctx, seq)
	if err != nil {
		return nil, fmt.Errorf("read event %d: %w", seq, stream.Explain(err))
	}
	return msg, nil
}

// mask is a body as it is shown: without what a mail or a text message told its receiver, and why it is not as it was sent. The type is that
// of the log, empty where the body could not be decoded.
func mask(t event.Type, body []byte) (json.RawMessage, string) {
	if hidden, message := redact.Message(string(t), body); message {
		return hidden, "texts, codes and links are redacted"
	}
	switch {
	case json.Valid(body) && utf8.Valid(body):
		return body, ""
	case json.Valid(body):
		return body, "bytes that are not UTF-8 are replaced"
	}
	text, err := json.Marshal(string(body))
	if err != nil {
		return nil, "not shown: " + err.Error()
	}
	return text, "no JSON"
}

func printEvent(w io.Writer, e shownEvent) error {
	t := newTable(w)
	t.row("id", e.ID)
	t.row("type", typeText(e.Type))
	t.row("source", e.Source)
	t.row("origin", e.Origin)
	t.row("object", cmp.Or(e.ObjectID, "-"))
	t.row("user", cmp.Or(e.UserID, "-"))
	t.row("received", timeText(e.ReceivedAt))
	switch e.OriginalSeq {
	case e.StreamSeq:
		t.row("stream sequence", strconv.FormatUint(e.StreamSeq, 10))
	case 0:
		t.row("stream sequence", fmt.Sprintf("not known, replayed as %d", e.StreamSeq))
	default:
		t.row("stream sequence", fmt.Sprintf("%d, replayed as %d", e.OriginalSeq, e.StreamSeq))
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	_, _ = fmt.Fprintln(w)
	t = newTable(w, "handler", "status", "effect", "attempts", "processed", "next attempt", "ms", "reason", "error")
	for _, d := range e.Deliveries {
		at := "-"
		if d.ProcessedAt != nil {
			at = timeText(*d.ProcessedAt)
		}
		t.row(d.Handler, d.Status, cmp.Or(d.Effect, "-"), strconv.Itoa(d.Attempts), at, d.nextAttempt(), strconv.FormatFloat(d.DurationMS, 'f', -1, 64), d.Reason, d.Error)
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	_, _ = fmt.Fprintln(w)
	return printBody(w, e.BodyNote, e.Body)
}

// printBody prints an event's body for people, or why there is none.
func printBody(w io.Writer, note string, body json.RawMessage) error {
	if note != "" {
		_, _ = fmt.Fprintf(w, "body: %s\n", printable(note))
	}
	if len(body) == 0 {
		return nil
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, body, "", "  "); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	_, _ = fmt.Fprintln(w, printableLines(pretty.String()))
	return nil
}

// timeText is a time in a table: UTC, in ms, so that columns align and logs compare.
func timeText(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

type tailOptions struct {
	typ    typePattern
	user   string
	source string
	since  since
	limit  int
	output output
}

func (c *cli) eventsTail() *cobra.Command {
	var o tailOptions
	cmd := &cobra.Command{
		Use:   "tail",
		Short: "Follow events as they arrive",
		Long: "tail prints a line for every event that reaches the stream, from now on or from --since on, whatever the handlers make\n" +
			"of it. It leaves no trace on the broker. It ends when interrupted (exit code 130) or after --limit events (0).",
		Example: "  usher events tail\n  usher events tail --type 'session.*' --since 10m\n  usher events tail --user user_… --output ndjson --limit 5",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.limit < 0 {
				return fmt.Errorf("--limit %d: want at least 1, or 0 for no limit", o.limit)
			}
			return c.tail(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.Var(&o.typ, "type", "only events of these types: user.created, 'user.*', '*.deleted'")
	f.StringVar(&o.user, "user", "", "only events about this user `ID`")
	f.StringVar(&o.source, "source", "", "only events of this source")
	f.Var(&o.since, "since", "begin with the events stored since then")
	f.IntVar(&o.limit, "limit", 0, "end after so many events (0: go on)")
	outputFlag(cmd, &o.output)
	c.settingFlags(cmd, brokerSettings...)
	return cmd
}

func (c *cli) tail(ctx context.Context, o tailOptions) error {
	r, err := c.reach()
	if err != nil {
		return err
	}
	defer r.close()
	js, err := r.broker()
	if err != nil {
		return err
	}
	cfg := jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{o.typ.subject(o.source, o.user)}, DeliverPolicy: jetstream.DeliverNewPolicy,
	}
	if !o.since.at.IsZero() {
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &o.since.at
	}
	consumer, err := js.OrderedConsumer(ctx, stream.Events, cfg)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return stream.ErrSetup
	}
	if err != nil {
		return fmt.Errorf("follow %s: %w", stream.Events, stream.Explain(err))
	}
	// The client leaves the consumer to the broker, which would keep it for five minutes. Another one may have taken its place meanwhile.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if info := consumer.CachedInfo(); info != nil {
			_ = js.DeleteConsumer(ctx, stream.Events, info.Name)
		}
	}()
	// A limit of bytes and not of messages, of which half must hold the largest event: 500 of them may be half a gigabyte.
	iter, err := consumer.Messages(jetstream.PullMaxBytes(8 << 20))
	if err != nil {
		return fmt.Errorf("follow %s: %w", stream.Events, stream.Explain(err))
	}
	defer iter.Stop()
	_, _ = fmt.Fprintln(c.env.Stderr, "Following the events; Ctrl-C ends it.")
	for n := 0; o.limit == 0 || n < o.limit; n++ {
		msg, err := iter.Next(jetstream.NextContext(ctx))
		if err != nil {
			return fmt.Errorf("follow %s: %w", stream.Events, stream.Explain(err))
		}
		meta, err := msg.Metadata()
		if err != nil {
			return fmt.Errorf("follow %s: %w", stream.Events, stream.Explain(err))
		}
		if err := printTailed(c.env.Stdout, o.output, headOf(msg, meta)); err != nil {
			return err
		}
	}
	return nil
}

// headOf is what a line says of an event; a body that cannot be decoded has its headers.
func headOf(msg jetstream.Msg, meta *jetstream.MsgMetadata) Head {
	e, _ := stream.Parse(msg.Headers(), msg.Data(), meta.Sequence.Stream)
	if e.ReceivedAt.IsZero() {
		e.ReceivedAt = meta.Timestamp
	}
	return Head{
		ID: e.ID, Type: string(e.Type), Source: e.Source, Origin: string(e.Origin), ObjectID: e.Object.ID, UserID: e.Object.UserID,
		ReceivedAt: e.ReceivedAt.UTC(), StreamSeq: meta.Sequence.Stream,
	}
}

func printTailed(w io.Writer, o output, e Head) error {
	if o != outputTable { // a stream has no end to close a list with
		return printObject(w, outputNDJSON, e)
	}
	_, err := fmt.Fprintf(w, "%s  %-31s  %-32s  %-32s  %s\n",
		timeText(e.ReceivedAt), printable(e.ID), printable(typeText(e.Type)), printable(cmp.Or(e.UserID, "-")), printable(e.Origin))
	if err != nil { // the reader has gone
		return fmt.Errorf("print: %w", err)
	}
	return nil
}
