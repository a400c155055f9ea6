package command

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/audit"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/replay"
)

// bulk are the flags of a command that changes many events at once.
type bulk struct {
	all, dryRun, yes bool
	actor            string
	rate             float64
	stopAt           float64 // percent
	patience         config.Duration
	output           output
}

const bulkHelp = "\n\nIt needs a selector or --all, says how many events are meant, and asks before it begins (--yes does not). What was done goes to\n" +
	"the table audit_log. It may be interrupted and repeated at any point."

func (b *bulk) addFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&b.all, "all", false, "select everything")
	f.BoolVar(&b.dryRun, "dry-run", false, "change nothing, only tell what would happen")
	f.BoolVar(&b.yes, "yes", false, "do not ask")
	f.StringVar(&b.actor, "actor", "", "who does it, for the audit log (default USER@host)")
	outputFlag(cmd, &b.output)
}

// addReplayFlags adds those of commands that give events to handlers.
func (b *bulk) addReplayFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.Float64Var(&b.rate, "rate", 0, "events a second (0: as fast as the handler takes them)")
	f.Float64Var(&b.stopAt, "stop-at", 5, "stop when more than so many `percent` fail again (100: never, and do not wait for outcomes)")
	b.patience = config.Duration(30 * time.Second)
	f.Var(&b.patience, "patience", "how long to wait without news from the handler")
}

// check refuses what is not said clearly enough. selected tells whether there is a selector.
func (b *bulk) check(selected bool) error {
	switch {
	case b.all && selected:
		return errors.New("--all and a selector: give one of the two")
	case !b.all && !selected:
		return errors.New("which ones? Give a selector (see --help), or --all")
	}
	return b.checkNumbers()
}

func (b *bulk) checkNumbers() error {
	switch {
	case b.rate < 0:
		return fmt.Errorf("--rate %g: want a positive number, or 0 for no limit", b.rate)
	case b.stopAt < 0 || b.stopAt > 100:
		return fmt.Errorf("--stop-at %g: want a percentage", b.stopAt)
	case b.patience < 0:
		return fmt.Errorf("--patience %s: want a positive time", &b.patience)
	}
	return nil
}

// replayOptions are the flags as a run wants them.
func (c *cli) replayOptions(b *bulk) replay.Options {
	o := replay.Options{Rate: b.rate, StopAt: b.stopAt / 100, Patience: time.Duration(b.patience), Outage: c.outage()}
	if b.stopAt == 0 { // zero means the default there
		o.StopAt = 1e-9
	}
	return o
}

// outageLimit is how long a change waits for a database or a broker that went away.
const outageLimit = time.Minute

// outage is how a change meets a database or a broker that is away: it waits, and says so.
func (c *cli) outage() replay.Outage {
	return replay.Outage{Limit: outageLimit, Tell: func(cause error, took time.Duration) {
		if cause != nil {
			c.say("usher: %v; trying again for up to %s", cause, outageLimit)
			return
		}
		c.say("usher: it goes on, after %s", took.Round(100*time.Millisecond))
	}}
}

// bulkResult is what a bulk change prints.
type bulkResult struct {
	Selected  int    `json:"selected"`
	Replayed  int    `json:"replayed"`
	Discarded int    `json:"discarded"`
	Failed    int    `json:"failed"` // could not be replayed, or failed again; of a dry run: would fail
	DryRun    bool   `json:"dry_run"`
	Stopped   string `json:"stopped"` // why it ended early

	Applied   int       `json:"applied"`              // of the replayed, known to be applied by now
	Unsettled int       `json:"unsettled"`            // of the replayed, those whose outcome was waited for in vain
	Retrying  int       `json:"retrying"`             // of the failed and the unsettled, those that their handlers try again by themselves
	Gone      int       `json:"gone"`                 // not replayed: the body is not kept any more (those failed), or somebody else took the letter
	Taken     int       `json:"-"`                    // of the gone: by somebody else
	WouldPass *int      `json:"would_pass,omitempty"` // of a dry run that tried
	Groups    []failing `json:"groups,omitempty"`     // of a dry run: why the others would fail
	Run       string    `json:"run,omitempty"`        // of a replay of events: for --resume
	Earlier   int       `json:"earlier"`              // of a replay of events that goes on: replayed before it was broken off; they count as applied
	LeftOut   int       `json:"left_out"`             // of a replay of events: not replayed, since they were discarded

	NextAttemptAt *time.Time `json:"next_attempt_at"` // the earliest of the retrying; null where no event is
}

// failing is a kind of failure in a dry run.
type failing struct {
	Handler string `json:"handler"`
	Reason  string `json:"reason"`
	Error   string `json:"error"` // of one of them
	Events  int    `json:"events"`
}

// answer is the exit code's error: no, where something failed or is not settled, or the run stopped.
func (r *bulkResult) answer() error {
	if r.Failed > 0 || r.Unsettled > 0 || r.Stopped != "" {
		return errNo
	}
	return nil
}

// say tells the person at the terminal; data goes to stdout.
func (c *cli) say(format string, args ...any) {
	_, _ = fmt.Fprintln(c.env.Stderr, printableLines(fmt.Sprintf(format, args...)))
}

// errDeclined is the answer no of the person who was asked.
var errDeclined = fmt.Errorf("%w: declined", errNo)

// confirm asks on a terminal, and refuses where there is none (a question that nobody sees is not asked) and --yes was not given.
func (c *cli) confirm(ctx context.Context, b *bulk, question string) error {
	if b.yes {
		return nil
	}
	if !isTerminal(c.env.Stdin) || !isTerminal(c.env.Stderr) {
		return fmt.Errorf("%s No terminal to ask at: --yes goes ahead, --dry-run changes nothing", question)
	}
	_, _ = fmt.Fprintf(c.env.Stderr, "%s [y/N] ", question)
	answers := make(chan string, 1)
	go func() { // ends with the process where nobody answers
		line, _ := bufio.NewReader(c.env.Stdin).ReadString('\n')
		answers <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case <-ctx.Done():
		return ctx.Err() //nolint:wrapcheck // the context's own
	case answer := <-answers:
		if answer == "y" || answer == "yes" {
			return nil
		}
	}
	c.say("Nothing was changed.")
	return errDeclined
}

// begin writes the audit row of a change.
func (c *cli) begin(ctx context.Context, db *gorm.DB, b *bulk, action audit.Action, selector string) (*audit.Log, error) {
	if b.all {
		selector = strings.TrimSpace("--all " + selector)
	}
	return audit.Begin(ctx, db, cmp.Or(b.actor, c.whoami()), action, selector)
}

// note says in it how far a change has come. What fails here is said by the next note, or at the end.
func (c *cli) note(ctx context.Context, log *audit.Log, affected, failed int) {
	_ = log.Note(context.WithoutCancel(ctx), affected, failed)
}

// end completes it, also where the user has interrupted, and tries for some seconds where the database is away. A failure is told and changes
// nothing else: the row says by itself that it was not completed.
func (c *cli) end(ctx context.Context, log *audit.Log, affected, failed int, detail string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	patient := replay.Outage{Limit: requestTimeout}
	if err := patient.Try(ctx, func(ctx context.Context) error { return log.End(ctx, affected, failed, detail) }); err != nil {
		c.say("usher: %v", err)
	}
}

// detail is why a run ended early, for the audit log and the result.
func detail(ctx context.Context, stopped string, err error) string {
	switch {
	case stopped != "":
		return stopped
	case ctx.Err() != nil:
		return "interrupted"
	case err != nil:
		return err.Error()
	default:
		return ""
	}
}

// whoami is USER@host.
func (c *cli) whoami() string {
	name := ""
	for _, entry := range c.env.Environ {
		if value, ok := strings.CutPrefix(entry, "USER="); ok {
			name = value
		}
	}
	if name == "" {
		if u, err := user.Current(); err == nil {
			name = u.Username
		}
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return cmp.Or(name, "unknown") + "@" + host
}

// progress is a bar where a person looks at it.
func (c *cli) progress(total int, what string) *progressbar.ProgressBar {
	if !isTerminal(c.env.Stderr) {
		return progressbar.DefaultSilent(int64(total))
	}
	bar := progressbar.NewOptions(total, progressbar.OptionSetWriter(c.env.Stderr), progressbar.OptionSetDescription(what),
		progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("events"), progressbar.OptionClearOnFinish())
	_ = bar.RenderBlank() // a slow start looks like none
	return bar
}

// printResult prints what was done: as text, or as one JSON value.
func (c *cli) printResult(o output, r *bulkResult, text []string) error {
	if o != outputTable {
		return printObject(c.env.Stdout, o, r)
	}
	for _, line := range text {
		if _, err := fmt.Fprintln(c.env.Stdout, printable(line)); err != nil {
			return fmt.Errorf("print: %w", err)
		}
	}
	return nil
}

// count says how many of something there are: "1 dead letter", "2 dead letters".
func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// replayText says how a replay went.
func replayText(r *bulkResult) []string {
	text := fmt.Sprintf("replayed %d of %d: %d applied", r.Replayed, r.Selected, r.Applied)
	lost := r.Gone - r.Taken
	again := r.Failed - lost
	if again > 0 {
		text += fmt.Sprintf(", %d failed again", again)
	}
	if r.Unsettled > 0 {
		text += fmt.Sprintf(", %d not settled yet", r.Unsettled)
	} else if open := r.Replayed + r.Earlier - r.Applied - again; open > 0 {
		text += fmt.Sprintf(", %d not waited for", open)
	}
	if r.Earlier > 0 {
		text += fmt.Sprintf("; %d were replayed before the run was broken off", r.Earlier)
	}
	if r.LeftOut > 0 {
		text += fmt.Sprintf("; %d discarded ones left out", r.LeftOut)
	}
	if lost > 0 {
		text += fmt.Sprintf("; %d not replayed: the body is gone", lost)
	}
	if r.Taken > 0 {
		text += fmt.Sprintf("; %d replayed or discarded by somebody else meanwhile", r.Taken)
	}
	lines := []string{text}
	if r.Retrying > 0 && r.NextAttemptAt != nil {
		lines = append(lines, fmt.Sprintf("%d of %d %s still retrying, next attempt at %s (`usher events list --status retrying`)",
			r.Retrying, r.Replayed+r.Earlier, isOrAre(int64(r.Retrying)), timeText(*r.NextAttemptAt)))
	}
	if r.Stopped != "" {
		lines = append(lines, "stopped: "+r.Stopped)
	}
	return lines
}
