package command

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/audit"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

func (c *cli) dlq() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dlq",
		Short: "List, show, replay and discard dead letters",
		Long: "A dead letter is an event that a handler could not apply, at all its attempts or by an error that no attempt can mend. It is\n" +
			"kept with its body for 90 days. Other handlers have not been held up by it.",
		Example: "  usher dlq list --group\n  usher dlq show msg_…\n  usher dlq replay --handler mirror --dry-run\n  usher dlq replay --fingerprint 5f0c7d2a91be --yes",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.dlqList(), c.dlqShow(), c.dlqReplay(), c.dlqDiscard())
	return cmd
}

// letterFlags select dead letters.
type letterFlags struct {
	filter       deadletter.Filter
	typ          typePattern
	reason       string
	since, until since
}

func (s *letterFlags) addFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	var reasons []string
	for _, r := range deadletter.Reasons() {
		reasons = append(reasons, string(r))
	}
	f.StringVar(&s.filter.Handler, "handler", "", "only those of this handler")
	f.Var(&s.typ, "type", "only events of these types: user.created, 'user.*', '*.deleted'")
	f.StringVar(&s.reason, "reason", "", "only those given up for this reason: "+strings.Join(reasons, ", "))
	f.StringVar(&s.filter.Fingerprint, "fingerprint", "", "only those of this kind of failure (see dlq list --group)")
	f.StringVar(&s.filter.User, "user", "", "only events about this user `ID`")
	f.StringVar(&s.filter.Source, "source", "", "only events of this source")
	f.Var(&s.since, "since", "only those that failed last since then")
	f.Var(&s.until, "until", "only those that failed last before then")
}

// selection is the filter that the flags and the arguments (event ids) make.
func (s *letterFlags) selection(ids []string) (deadletter.Filter, error) {
	f := s.filter
	f.IDs, f.Type, f.Reason, f.Since, f.Until = ids, s.typ.String(), deadletter.Reason(s.reason), s.since.at, s.until.at
	if s.reason != "" && !slices.Contains(deadletter.Reasons(), f.Reason) {
		return f, fmt.Errorf("--reason %q: want one of %v", s.reason, deadletter.Reasons())
	}
	return f, nil
}

func (c *cli) dlqList() *cobra.Command {
	var (
		flags        letterFlags
		grouped, num bool
		p            paging
	)
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List dead letters, newest event first; or count or group them",
		Long: "list reads the delivery log and no letter, so it is quick at any number. --count counts by source, handler, type and reason; --group puts\n" +
			"together what failed in the same way (same source, handler and reason, and an error that differs only in ids and numbers).\n" +
			"Both have no pages: all is shown, or as many as --limit says.",
		Example: "  usher dlq list --group\n  usher dlq list --type 'user.*' --since 24h --output json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := flags.selection(nil)
			switch {
			case err != nil:
				return err
			case grouped && num:
				return errors.New("--group and --count: give one of the two")
			case (grouped || num) && p.cursor != "":
				return errors.New("--cursor: groups and counts have no pages")
			}
			if err := p.check(cmd); err != nil {
				return err
			}
			r, err := c.reach()
			if err != nil {
				return err
			}
			defer r.close()
			db, err := r.database(cmd.Context())
			if err != nil {
				return err
			}
			if err := r.checkHandler(cmd.Context(), db, f.Handler); err != nil {
				return err
			}
			switch {
			case num:
				counts, err := deadletter.Counts(cmd.Context(), db, f)
				if err != nil {
					return err
				}
				return printSome(c, p, counts, []string{"events", "source", "handler", "type", "reason"}, func(n deadletter.Count) []string {
					return []string{strconv.Itoa(n.Events), n.Source, n.Handler, typeText(n.Type), string(n.Reason)}
				})
			case grouped:
				groups, err := deadletter.Groups(cmd.Context(), db, f)
				if err != nil {
					return err
				}
				header := []string{"events", "users", "source", "handler", "reason", "fingerprint", "first seen", "last seen", "for example"}
				return printSome(c, p, groups, header, func(g deadletter.Group) []string {
					return []string{strconv.Itoa(g.Events), strconv.Itoa(g.Users), g.Source, g.Handler, string(g.Reason), g.Fingerprint, timeText(g.FirstSeen), timeText(g.LastSeen), g.Example}
				})
			default:
				header := []string{"received", "id", "type", "source", "handler", "reason", "attempts", "error"}
				row := func(e deadletter.Entry) []string {
					return []string{timeText(e.ReceivedAt), e.EventID, typeText(e.Type), e.Source, e.Handler, string(e.Reason), strconv.Itoa(e.Attempts), e.Error}
				}
				return printPages(c, p, header, row, func(cursor string, limit int) (listing[deadletter.Entry], error) {
					entries, next, err := deadletter.List(cmd.Context(), db, f, cursor, limit)
					if errors.Is(err, deadletter.ErrCursor) {
						err = fmt.Errorf("--cursor: %w", err)
					}
					return listing[deadletter.Entry]{Items: entries, Next: next}, err
				})
			}
		},
	}
	flags.addFlags(cmd)
	f := cmd.Flags()
	f.BoolVar(&grouped, "group", false, "group by kind of failure")
	f.BoolVar(&num, "count", false, "count by source, handler, type and reason")
	p.addFlags(cmd, "dead letters")
	c.settingFlags(cmd, bothSettings...)
	return cmd
}

// shownLetter is a dead letter with its body.
type shownLetter struct {
	deadletter.Entry
	Headers  map[string]string `json:"headers"`   // of the letter; null where it is gone
	Body     json.RawMessage   `json:"body"`      // as it was signed, messages redacted; a JSON string where it is no JSON, null where it is gone
	BodyNote string            `json:"body_note"` // why it is left out, or what was redacted
}

func (c *cli) dlqShow() *cobra.Command {
	var f deadletter.Filter
	var o output
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show one dead letter: why, since when, and its body",
		Long: "show prints what the log and the letter say of an event that a handler gave up. Of mails and text messages the text, the codes\n" +
			"and the links are redacted. Exit code 1: there is no such dead letter.",
		Example: "  usher dlq show msg_2g7np7Hrk0SN6kj5EDMLDaKNL0S\n  usher dlq show msg_… --handler mirror --output json | jq .error",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			letter, err := c.showLetter(cmd.Context(), args[0], f)
			if errors.Is(err, deadletter.ErrNotFound) {
				c.say("There is no dead letter of %s; `usher events show %s` tells what became of it.", args[0], args[0])
				return errNo
			}
			if err != nil {
				return err
			}
			if o != outputTable {
				return printObject(c.env.Stdout, o, letter)
			}
			return printLetter(c.env.Stdout, letter)
		},
	}
	cmd.Flags().StringVar(&f.Handler, "handler", "", "the handler that gave it up, where there are several")
	cmd.Flags().StringVar(&f.Source, "source", "", "the event's source, where several have an event of this id")
	outputFlag(cmd, &o)
	c.settingFlags(cmd, bothSettings...)
	return cmd
}

func (c *cli) showLetter(ctx context.Context, id string, f deadletter.Filter) (shownLetter, error) {
	var letter shownLetter
	r, err := c.reach()
	if err != nil {
		return letter, err
	}
	defer r.close()
	db, err := r.database(ctx)
	if err != nil {
		return letter, err
	}
	f.IDs = []string{id}
	if err := oneSource(ctx, db, f); err != nil {
		return letter, err
	}
	entries, _, err := deadletter.List(ctx, db, f, "", maxLimit)
	if err != nil {
		return letter, err
	}
	if len(entries) == 0 {
		if err := r.checkHandler(ctx, db, f.Handler); err != nil {
			return letter, err
		}
		return letter, deadletter.ErrNotFound
	}
	if len(entries) > 1 {
		var names []string
		for _, e := range entries {
			names = append(names, e.Handler)
		}
		slices.Sort(names)
		return letter, fmt.Errorf("several handlers gave up %s: name one with --handler (%s)", id, strings.Join(names, ", "))
	}
	letter.Entry = entries[0]
	js, err := r.broker()
	if err != nil { // what the log says is worth showing without the letter
		letter.BodyNote = "not read: " + err.Error()
		return letter, nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	record, err := deadletter.Get(ctx, js, letter.Entry)
	switch {
	case errors.Is(err, deadletter.ErrGone):
		letter.BodyNote = err.Error()
	case err != nil:
		letter.BodyNote = "not read: " + err.Error()
	default:
		letter.Headers = map[string]string{}
		for name, values := range record.Header {
			letter.Headers[name] = strings.Join(values, ", ")
		}
		letter.Body, letter.BodyNote = mask(event.Type(cmp.Or(letter.Type, letter.Headers[stream.HeaderType])), record.Event.Raw)
	}
	return letter, nil
}

func printLetter(w io.Writer, l shownLetter) error {
	t := newTable(w)
	t.row("id", l.EventID)
	t.row("handler", l.Handler)
	t.row("type", typeText(l.Type))
	t.row("source", l.Source)
	t.row("object", cmp.Or(l.ObjectID, "-"))
	t.row("user", cmp.Or(l.UserID, "-"))
	t.row("received", timeText(l.ReceivedAt))
	t.row("reason", string(l.Reason))
	t.row("attempts", strconv.Itoa(l.Attempts))
	if l.FirstFailedAt != nil {
		t.row("first failed", timeText(*l.FirstFailedAt))
	}
	if l.LastFailedAt != nil {
		t.row("last failed", timeText(*l.LastFailedAt))
	}
	t.row("fingerprint", l.Fingerprint)
	t.row("letter sequence", strconv.FormatUint(l.LetterSeq, 10))
	t.row("stream sequence", strconv.FormatUint(l.StreamSeq, 10))
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	_, _ = fmt.Fprintf(w, "\nerror: %s\n\n", printable(l.Error))
	return printBody(w, l.BodyNote, l.Body)
}

func (c *cli) dlqReplay() *cobra.Command {
	var flags letterFlags
	var b bulk
	cmd := &cobra.Command{
		Use:   "replay [ID...]",
		Short: "Give dead letters back to the handler that failed",
		Long: "replay gives events back to the one handler that gave them up, with a fresh count of attempts, and takes their letters away. One that\n" +
			"fails again becomes a new dead letter. It waits for outcomes, and stops when more than 5% fail again.\n\n" +
			"--dry-run runs the handler on each in a transaction that is rolled back, and tells how many would pass now, and why the others\n" +
			"would not." + bulkHelp + "\nExit code 1: some failed again, were gone, or (dry run) would fail; or an ID has no dead letter (the others are replayed).",
		Example: "  usher dlq replay msg_2g7np7Hrk0SN6kj5EDMLDaKNL0S\n  usher dlq replay --handler mirror --reason constraint --dry-run\n  usher dlq replay --all --rate 100 --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.changeLetters(cmd.Context(), args, &flags, &b, c.replayLetters)
		},
	}
	flags.addFlags(cmd)
	b.addFlags(cmd)
	b.addReplayFlags(cmd)
	c.settingFlags(cmd, append([]string{"CLERK_INSTANCE_ID"}, bothSettings...)...)
	return cmd
}

func (c *cli) dlqDiscard() *cobra.Command {
	var flags letterFlags
	var b bulk
	cmd := &cobra.Command{
		Use:   "discard [ID...]",
		Short: "Give dead letters up for good",
		Long: "discard deletes letters with their bodies; the delivery log goes on saying what failed and why. An event that is still in the stream can\n" +
			"be replayed all the same, with `usher replay --event`." + bulkHelp + "\nExit code 1: an ID has no dead letter (the others are discarded).",
		Example: "  usher dlq discard msg_2g7np7Hrk0SN6kj5EDMLDaKNL0S\n  usher dlq discard --reason undecodable --until 720h --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.changeLetters(cmd.Context(), args, &flags, &b, c.discardLetters)
		},
	}
	flags.addFlags(cmd)
	b.addFlags(cmd)
	c.settingFlags(cmd, bothSettings...)
	return cmd
}

// letterChange is a bulk change of dead letters: what was selected, and where.
type letterChange struct {
	*bulk
	filter    deadletter.Filter
	selected  int
	instances map[string]string // by source
	js        jetstream.JetStream
	db        *gorm.DB
}

// changeLetters does what all bulk changes of dead letters have in common: the selection is checked and counted first.
func (c *cli) changeLetters(ctx context.Context, ids []string, flags *letterFlags, b *bulk, change func(context.Context, *letterChange) error) error {
	f, err := flags.selection(ids)
	if err != nil {
		return err
	}
	if err := b.check(f.String() != ""); err != nil {
		return err
	}
	r, err := c.reach()
	if err != nil {
		return err
	}
	defer r.close()
	l := &letterChange{bulk: b, filter: f, instances: r.instances()}
	if l.db, err = r.database(ctx); err != nil {
		return err
	}
	if err := r.checkHandler(ctx, l.db, f.Handler); err != nil {
		return err
	}
	if l.js, err = r.broker(); err != nil {
		return err
	}
	unknown, err := deadletter.Missing(ctx, l.db, f)
	if err != nil {
		return err
	}
	if err := oneSource(ctx, l.db, f); err != nil {
		return err
	}
	if len(unknown) > 0 {
		c.say("No such dead letter: %s", strings.Join(unknown, " "))
	}
	if l.selected, err = deadletter.Total(ctx, l.db, f); err != nil {
		return err
	}
	c.say("%s selected.", count(l.selected, "dead letter"))
	if l.selected == 0 {
		err = c.printResult(b.output, &bulkResult{DryRun: b.dryRun}, nil)
	} else {
		err = change(ctx, l)
	}
	if err == nil && len(unknown) > 0 {
		err = errNo
	}
	return err
}

// oneSource returns an error where an id names dead letters of several sources and the filter no source.
func oneSource(ctx context.Context, db *gorm.DB, f deadletter.Filter) error {
	several, err := deadletter.Ambiguous(ctx, db, f)
	if err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(several)) {
		return severalSources(id, several[id])
	}
	return nil
}

// severalSources is the error of an id that does not say which event is meant.
func severalSources(id string, sources []string) error {
	return fmt.Errorf("several sources have an event %s: name one with --source (%s)", id, strings.Join(sources, ", "))
}

func (c *cli) replayLetters(ctx context.Context, l *letterChange) error {
	if l.dryRun {
		return c.tryLetters(ctx, l)
	}
	if err := c.confirm(ctx, l.bulk, fmt.Sprintf("Replay %s?", count(l.selected, "dead letter"))); err != nil {
		return err
	}
	log, err := c.begin(ctx, l.db, l.bulk, audit.ReplayLetters, l.filter.String())
	if err != nil {
		return err
	}
	bar := c.progress(l.selected, "replaying")
	done, err := deadletter.Replay(ctx, l.js, l.db, l.filter, c.replayOptions(l.bulk), func(p deadletter.Result) {
		_ = bar.Set(p.Replayed + p.Gone)
		c.note(ctx, log, p.Replayed, p.Failed+p.Gone-p.Taken)
	})
	_ = bar.Finish()
	result := &bulkResult{
		Selected: done.Selected, Replayed: done.Replayed, Applied: done.Applied, Gone: done.Gone, Taken: done.Taken,
		Failed:    done.Gone - done.Taken + done.Failed,
		Unsettled: done.Open, Stopped: detail(ctx, done.Stopped, err),
		Retrying: done.Retrying, NextAttemptAt: done.NextAttemptAt,
	}
	c.end(ctx, log, result.Replayed, result.Failed, result.Stopped)
	if printErr := c.printResult(l.output, result, replayText(result)); printErr != nil && err == nil {
		err = printErr
	}
	if err != nil {
		return err
	}
	return result.answer()
}

func (c *cli) discardLetters(ctx context.Context, l *letterChange) error {
	result := &bulkResult{Selected: l.selected, DryRun: l.dryRun}
	if l.dryRun {
		return c.printResult(l.output, result, []string{"would discard " + count(l.selected, "dead letter")})
	}
	if err := c.confirm(ctx, l.bulk, fmt.Sprintf("Discard %s for good?", count(l.selected, "dead letter"))); err != nil {
		return err
	}
	log, err := c.begin(ctx, l.db, l.bulk, audit.DiscardLetters, l.filter.String())
	if err != nil {
		return err
	}
	bar := c.progress(l.selected, "discarding")
	done, err := deadletter.Discard(ctx, l.js, l.db, l.filter, c.outage(), func(p deadletter.Result) {
		_ = bar.Set(p.Discarded)
		c.note(ctx, log, p.Discarded, 0)
	})
	_ = bar.Finish()
	result.Selected, result.Discarded, result.Stopped = done.Selected, done.Discarded, detail(ctx, "", err)
	c.end(ctx, log, result.Discarded, 0, result.Stopped)
	if printErr := c.printResult(l.output, result, []string{fmt.Sprintf("discarded %d of %d", result.Discarded, result.Selected)}); err == nil {
		err = printErr
	}
	return err
}

// tryLetters tells what a replay would bring, by running the handlers on every letter and rolling back.
func (c *cli) tryLetters(ctx context.Context, l *letterChange) error {
	result := &bulkResult{Selected: l.selected, DryRun: true, WouldPass: new(int)}
	groups := map[string]*failing{}
	bar := c.progress(l.selected, "trying")
	err := deadletter.Each(ctx, l.js, l.db, l.filter, func(e deadletter.Entry, r *deadletter.Record) error {
		_ = bar.Add(1)
		if r == nil {
			result.Gone++
		}
		err := try(ctx, l.db, l.instances, e, r)
		switch {
		case err == nil:
			*result.WouldPass++
			return nil
		case worker.IsOutage(err):
			return fmt.Errorf("try %s: %w", e.EventID, err)
		}
		result.Failed++
		reason, text := worker.Reason(err), deadletter.OneLine(worker.ErrorText(err))
		key := deadletter.Fingerprint(e.Handler, reason, text)
		if groups[key] == nil {
			groups[key] = &failing{Handler: e.Handler, Reason: string(reason), Error: text}
		}
		groups[key].Events++
		return nil
	})
	_ = bar.Finish()
	if err != nil {
		return err
	}
	for _, g := range groups {
		result.Groups = append(result.Groups, *g)
	}
	slices.SortFunc(result.Groups, func(a, b failing) int {
		return cmp.Or(cmp.Compare(b.Events, a.Events), cmp.Compare(a.Handler, b.Handler), cmp.Compare(a.Error, b.Error))
	})
	text := []string{fmt.Sprintf("would replay %s: %d would pass, %d would fail", count(l.selected, "dead letter"), *result.WouldPass, result.Failed)}
	for _, g := range result.Groups {
		text = append(text, fmt.Sprintf("  %d  %s  %s  %s", g.Events, g.Handler, g.Reason, g.Error))
	}
	if err := c.printResult(l.output, result, text); err != nil {
		return err
	}
	return result.answer()
}

// try judges one letter as the worker would.
func try(ctx context.Context, db *gorm.DB, instances map[string]string, e deadletter.Entry, r *deadletter.Record) error {
	if r == nil {
		return deadletter.ErrGone
	}
	if _, err := event.Decode(r.Event.Raw); err != nil {
		return err
	}
	if want := instances[r.Event.Source]; want != "" && r.Event.InstanceID != "" && r.Event.InstanceID != want {
		return worker.WrongInstance(r.Event.InstanceID, want)
	}
	return worker.Try(ctx, db, e.Handler, r.Event)
}
