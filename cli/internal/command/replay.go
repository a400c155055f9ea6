package command

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/audit"
	"github.com/usherhq/usher/pkg/replay"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

type replayFlags struct {
	bulk
	since       since
	from        uint64
	events      []string
	user        string
	source      string
	typ         typePattern
	handler     string
	withEffects bool
	resume      string
}

func (c *cli) replay() *cobra.Command {
	var o replayFlags
	cmd := &cobra.Command{
		Use:   "replay",
		Short: "Give events to handlers again, also those that were applied",
		Long: "replay takes events from the stream and gives them to every handler that wants them, or to the one named with --handler, as\n" +
			"deliberate replays: a handler applies again what it had applied.\n\n" +
			"The mirror applies by its version rule: a row that is missing comes back, and a newer row stays as it is. A row that was changed by\n" +
			"hand and still carries the event's version is not newer and not older, so it stays as well; `usher verify` finds those. Mails and\n" +
			"other effects on the outside are not sent again, unless --with-effects.\n\n" +
			"Events that were discarded as dead letters of the handler are left out, unless they are named with --event.\n\n" +
			"A run that stopped, was interrupted or had failures goes on with the same command and --resume RUN; it prints that command line.\n" +
			"What it had published and is applied is not published twice, and what has failed since is tried again at once." + bulkHelp +
			"\nExit code 1: some failed, were not settled within --patience, or it stopped.",
		Example: "  usher replay --since 24h --type 'user.*' --handler mirror\n  usher replay --event msg_2g7np7Hrk0SN6kj5EDMLDaKNL0S\n  usher replay --all --rate 200 --yes",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return c.replayEvents(cmd.Context(), &o) },
	}
	f := cmd.Flags()
	f.Var(&o.since, "since", "events stored since then")
	f.Uint64Var(&o.from, "from-seq", 0, "events from this stream sequence on (events show tells an event's)")
	f.StringArrayVar(&o.events, "event", nil, "this event `ID`; may be repeated")
	f.StringVar(&o.user, "user", "", "only events about this user `ID`")
	f.StringVar(&o.source, "source", "", "only events of this source")
	f.Var(&o.typ, "type", "only events of these types: user.created, 'user.*', '*.deleted'")
	f.StringVar(&o.handler, "handler", "", "only for this handler (default: every handler)")
	f.BoolVar(&o.withEffects, "with-effects", false, "let handlers send mails and other effects again")
	f.StringVar(&o.resume, "resume", "", "go on with this `RUN`, where it began; the rest of the command as it was")
	o.addFlags(cmd)
	o.addReplayFlags(cmd)
	c.settingFlags(cmd, bothSettings...)
	return cmd
}

// selector is what was asked for, as the flags say it, but for the place in the stream, which the run's id holds.
func (o *replayFlags) selector() string {
	var parts []string
	for _, id := range o.events {
		parts = append(parts, "--event "+id)
	}
	for _, flag := range []struct{ name, value string }{{"user", o.user}, {"source", o.source}, {"type", o.typ.String()}, {"handler", o.handler}} {
		if flag.value != "" {
			parts = append(parts, "--"+flag.name+" "+flag.value)
		}
	}
	if o.withEffects {
		parts = append(parts, "--with-effects")
	}
	return strings.Join(parts, " ")
}

// text is the selector with the place in the stream.
func (o *replayFlags) text() string {
	text := o.selector()
	if at := o.since.String(); at != "" {
		text += " --since " + at
	}
	if o.from > 0 {
		text += " --from-seq " + strconv.FormatUint(o.from, 10)
	}
	if o.resume != "" {
		text += " --resume " + o.resume
	}
	return strings.TrimSpace(text)
}

func (o *replayFlags) check() error {
	place := !o.since.at.IsZero() || o.from > 0
	switch {
	case len(o.events) > 0 && (place || o.user != "" || o.typ.String() != ""):
		return errors.New("--event names events; --since, --from-seq, --user and --type choose among all: give the one or the others")
	case !o.since.at.IsZero() && o.from > 0:
		return errors.New("--since and --from-seq: give one of the two")
	case o.resume != "": // as it was begun
		return o.checkNumbers()
	}
	narrow := place || len(o.events) > 0 || o.user != "" || o.source != "" || o.typ.String() != ""
	return o.bulk.check(narrow || o.handler != "" && !o.all) // --all --handler is as good as --handler
}

// handlers are those that are meant.
func (o *replayFlags) handlers() ([]stream.HandlerSpec, error) {
	specs := worker.Specs()
	if o.handler == "" {
		return specs, nil
	}
	var names []string
	for _, s := range specs {
		if s.Name == o.handler {
			return []stream.HandlerSpec{s}, nil
		}
		names = append(names, s.Name)
	}
	return nil, fmt.Errorf("--handler %q: there is no such handler; want one of %s", o.handler, strings.Join(names, ", "))
}

// A run's id holds what a repetition must know: where it began and ended, and by which selectors.
type runID struct {
	from, last uint64
	nonce      string
	selectors  string
}

func (id runID) String() string {
	return fmt.Sprintf("%d-%d-%s-%s", id.from, id.last, id.nonce, id.selectors)
}

func parseRunID(text string) (runID, error) {
	parts := strings.Split(text, "-")
	if len(parts) != 4 {
		return runID{}, fmt.Errorf("--resume: %q is not the id of a run", text)
	}
	from, err1 := strconv.ParseUint(parts[0], 10, 64)
	last, err2 := strconv.ParseUint(parts[1], 10, 64)
	if err1 != nil || err2 != nil {
		return runID{}, fmt.Errorf("--resume: %q is not the id of a run", text)
	}
	return runID{from, last, parts[2], parts[3]}, nil
}

// resumeLine is the command line that goes on with a run: the same one with --resume. Where the run began, its id knows, so that
// --since and --from-seq do no harm.
func (c *cli) resumeLine(run string, resumed bool) string {
	words := []string{"usher"}
	for _, arg := range c.args {
		words = append(words, quote(arg))
	}
	if !resumed {
		words = append(words, "--resume", run)
	}
	return strings.Join(words, " ")
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// quote writes a word as a shell takes it.
func quote(word string) string {
	if plainWord.MatchString(word) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

func (o *replayFlags) newRunID(ctx context.Context, s jetstream.Stream) (runID, error) {
	sum := sha256.Sum256([]byte(o.selector()))
	selectors := hex.EncodeToString(sum[:3])
	if o.resume != "" {
		id, err := parseRunID(o.resume)
		if err == nil && id.selectors != selectors {
			err = fmt.Errorf("--resume: run %s was begun with other selectors; repeat the command as it was, with --resume", o.resume)
		}
		return id, err
	}
	state := s.CachedInfo().State
	id := runID{max(o.from, state.FirstSeq, 1), state.LastSeq, strings.ToLower(rand.Text()[:8]), selectors}
	if !o.since.at.IsZero() {
		var err error
		if id.from, err = replay.FirstAt(ctx, s, o.since.at); err != nil {
			return id, err
		}
	}
	return id, nil
}

func (c *cli) replayEvents(ctx context.Context, o *replayFlags) error {
	if err := o.check(); err != nil {
		return err
	}
	handlers, err := o.handlers()
	if err != nil {
		return err
	}
	r, err := c.reach()
	if err != nil {
		return err
	}
	defer r.close()
	db, err := r.database(ctx)
	if err != nil {
		return err
	}
	js, err := r.broker()
	if err != nil {
		return err
	}
	s, err := js.Stream(ctx, stream.Events)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return stream.ErrSetup
	}
	if err != nil {
		return fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	for _, h := range handlers {
		if err := replay.Ready(ctx, js, h.Name); err != nil {
			return err
		}
	}
	id, err := o.newRunID(ctx, s)
	if err != nil {
		return err
	}
	selections := make([]replay.Selection, len(handlers))
	result := &bulkResult{DryRun: o.dryRun}
	var places []replay.Place
	if len(o.events) > 0 {
		if places, result.Gone, err = findPlaces(ctx, db, o.events, o.source); err != nil {
			return err
		}
		if result.Gone > 0 {
			c.say("%s not known to the delivery log.", count(result.Gone, "event"))
		}
		result.Gone *= len(handlers)
	}
	again := ""
	if o.resume != "" {
		again = strings.ToLower(rand.Text()[:6])
	}
	for i, h := range handlers {
		selections[i] = replay.Selection{
			Handler: h.Name, Subjects: replay.Subjects(h, o.typ.subject(o.source, o.user)), From: id.from, Last: id.last,
			RunID: id.String(), WithEffects: o.withEffects, Again: again, Discarded: len(o.events) > 0,
		}
		n, discarded := len(places), 0
		if len(o.events) == 0 {
			if n, err = replay.Count(ctx, js, selections[i]); err != nil {
				return err
			}
			if discarded, err = o.discarded(ctx, db, s, h.Name, id); err != nil {
				return err
			}
			discarded = min(discarded, n)
		}
		if discarded == 0 {
			c.say("%s for handler %s selected.", count(n, "event"), h.Name)
		} else {
			c.say("%s for handler %s selected; %d discarded ones are left out.", count(n, "event"), h.Name, discarded)
		}
		result.Selected += n
		result.LeftOut += discarded
	}
	result.Failed = result.Gone
	switch {
	case result.Selected == 0 || o.dryRun:
		var text []string
		if o.dryRun {
			text = []string{"would replay " + count(result.Selected-result.LeftOut, "event")}
			if result.LeftOut > 0 {
				text[0] += fmt.Sprintf("; %d discarded ones left out", result.LeftOut)
			}
		}
		if err := c.printResult(o.output, result, text); err != nil {
			return err
		}
		return result.answer()
	}
	question := fmt.Sprintf("Replay %s?", count(result.Selected-result.LeftOut, "event"))
	if o.withEffects {
		question = fmt.Sprintf("Replay %s, with mails and other effects?", count(result.Selected-result.LeftOut, "event"))
	}
	if err := c.confirm(ctx, &o.bulk, question); err != nil {
		return err
	}
	result.Run = id.String()
	log, err := c.begin(ctx, db, &o.bulk, audit.ReplayEvents, strings.TrimSpace(o.text()+" (run "+result.Run+")"))
	if err != nil {
		return err
	}
	bar := c.progress(result.Selected, "replaying")
	options := c.replayOptions(&o.bulk)
	options.Progress = func(p replay.Progress) {
		_ = bar.Set(p.Published + p.Earlier + p.LeftOut)
		c.note(ctx, log, p.Published, p.Failed)
	}
	run := replay.New(js, db, options)
	for _, sel := range selections {
		if len(o.events) > 0 {
			var gone int
			gone, err = run.Each(ctx, s, sel, places)
			result.Gone += gone
		} else {
			err = run.Events(ctx, s, sel)
		}
		if err != nil {
			break
		}
	}
	if err == nil {
		err = run.Finish(ctx)
	}
	_ = bar.Finish()
	p := run.Progress()
	result.Retrying, result.NextAttemptAt = run.Retrying(ctx)
	result.Replayed, result.Earlier, result.LeftOut = p.Published, p.Earlier, p.LeftOut
	result.Applied, result.Failed, result.Unsettled = p.Applied, p.Failed+result.Gone, p.Open
	// The selection is bounded by its last event; its count is not exact where events come in at the same time.
	result.Selected = max(result.Selected, p.Published+p.Earlier+p.LeftOut+result.Gone)
	if errors.Is(err, replay.ErrFailing) || errors.Is(err, replay.ErrStalled) {
		result.Stopped, err = err.Error(), nil
	}
	result.Stopped = detail(ctx, result.Stopped, err)
	c.end(ctx, log, result.Replayed, result.Failed, result.Stopped)
	if result.Stopped != "" || p.Failed > 0 { // those are tried again
		c.say("To go on:\n  %s", c.resumeLine(result.Run, o.resume != ""))
	}
	if printErr := c.printResult(o.output, result, replayText(result)); printErr != nil && err == nil {
		err = printErr
	}
	if err != nil {
		return err
	}
	return result.answer()
}

// findPlaces finds where events lie in the stream, by the delivery log, and how many it does not know.
func findPlaces(ctx context.Context, db *gorm.DB, ids []string, source string) (places []replay.Place, unknown int, err error) {
	slices.Sort(ids)
	ids = slices.Compact(ids)
	q := db.WithContext(ctx).Table("deliveries").Where("(handler, source) IN (?) AND event_id IN ?", handlerSources(db.WithContext(ctx)), ids)
	if source != "" {
		q = q.Where("source = ?", source)
	}
	if err = q.Select("source, event_id, max(stream_seq) AS seq").Group("source, event_id").Order("event_id, source").Find(&places).Error; err != nil {
		return nil, 0, fmt.Errorf("find events: %w", err)
	}
	for i := 1; i < len(places); i++ {
		if places[i].EventID == places[i-1].EventID {
			return nil, 0, severalSources(places[i].EventID, []string{places[i-1].Source, places[i].Source})
		}
	}
	return places, len(ids) - len(places), nil
}

// discarded is how many events of a selection were discarded as dead letters of a handler, by the delivery log, which does not know the
// place of an event that was replayed before but its time. The run itself looks at each event.
func (o *replayFlags) discarded(ctx context.Context, db *gorm.DB, s jetstream.Stream, handler string, id runID) (int, error) {
	q := o.typ.where(db.WithContext(ctx).Table("deliveries")).
		Where("handler = ? AND status = 'discarded' AND status <> 'processed' AND stream_seq >= ? AND (stream_seq <= ? OR origin = 'replay')", handler, id.from, id.last)
	if o.user != "" {
		q = q.Where("user_id = ?", o.user)
	}
	if o.source != "" {
		q = q.Where("source = ?", o.source)
	}
	if id.from > max(s.CachedInfo().State.FirstSeq, 1) {
		first, err := s.GetMsg(ctx, id.from, jetstream.WithGetMsgSubject(">"))
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			return 0, nil
		case err != nil:
			return 0, fmt.Errorf("read event %d: %w", id.from, replay.Explain(err))
		}
		q = q.Where("received_at >= ?", first.Time.Add(-stream.PublishTimeout).UTC())
	}
	var n int64
	if err := q.Count(&n).Error; err != nil {
		return 0, fmt.Errorf("count discarded events: %w", err)
	}
	return int(n), nil
}
