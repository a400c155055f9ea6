package command

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/usherhq/usher/reconciler"
)

func (c *cli) backfill() *cobra.Command {
	var o reconcileOptions
	cmd := &cobra.Command{
		Use:   "backfill",
		Short: "Fill an empty or half-filled mirror from Clerk's API",
		Long: "backfill reads everything that Clerk has and publishes an event for what the mirror lacks. The events say that they\n" +
			"are of a backfill, so nobody gets mail because of them. It may run while webhooks come, and an interrupted one goes on\n" +
			"where it was. It waits for the worker while that has more than 50,000 events before it. It is `usher reconcile --full`,\n" +
			"with another origin.\n\n" +
			"Exit code 0: done. 1: it was stopped, or drift is held back. 2: it could not compare.",
		Example: "  usher backfill\n  usher backfill --resource users --resource organizations",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.runReconcile(cmd.Context(), o, reconciler.Options{Kind: reconciler.Backfill, Resources: o.resources, Wait: time.Duration(o.wait)})
		},
	}
	o.addFlags(cmd)
	c.settingFlags(cmd, slices.Concat(bothSettings, clerkSettings, []string{"USHER_STREAM_REPLICAS"})...)
	return cmd
}

// sweepProgress shows how far a sweep is with each table: a bar with rate and remaining time on a terminal, else a line every two
// seconds.
type sweepProgress struct {
	w        io.Writer
	terminal bool
	bar      *progressbar.ProgressBar
	now      reconciler.Progress
	began    time.Time // of the table
	first    int64     // what was done by then
	last     time.Time
}

func newSweepProgress(w io.Writer) *sweepProgress {
	return &sweepProgress{w: w, terminal: isTerminal(w), last: time.Now()}
}

// show implements the sweep's callback.
func (p *sweepProgress) show(now reconciler.Progress) {
	if now.Resource != p.now.Resource {
		p.done()
		p.began, p.first = time.Now(), now.Done
		if p.terminal {
			p.bar = progressbar.NewOptions64(max(now.Total, 1), progressbar.OptionSetWriter(p.w), progressbar.OptionSetDescription(now.Resource),
				progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("objects"), progressbar.OptionSetPredictTime(true),
				progressbar.OptionThrottle(50*time.Millisecond))
		}
	}
	waited := p.now.Waiting > 0
	p.now = now
	switch {
	case p.bar != nil:
		if now.Waiting > 0 {
			p.bar.Describe(now.Resource + ", " + waitingFor(now.Waiting))
		} else if waited {
			p.bar.Describe(now.Resource)
		}
		if total := max(now.Total, now.Done, 1); p.bar.GetMax64() != total {
			p.bar.ChangeMax64(total)
		}
		_ = p.bar.Set64(now.Done)
	case time.Since(p.last) >= 2*time.Second && (now.Done < now.Total || now.Waiting > 0):
		p.last = time.Now()
		p.line()
	}
}

func waitingFor(events int64) string {
	return "waiting for the worker: " + thousands(events) + " events not yet applied"
}

// thousands writes a number as 50,123.
func thousands(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

func (p *sweepProgress) line() {
	rate := float64(p.now.Done-p.first) / max(time.Since(p.began).Seconds(), 0.001)
	_, _ = fmt.Fprintf(p.w, "%s: %d of %d, %.0f/s", p.now.Resource, p.now.Done, p.now.Total, rate)
	if p.now.Waiting > 0 {
		_, _ = fmt.Fprintln(p.w, ", "+waitingFor(p.now.Waiting))
		return
	}
	if rest := p.now.Total - p.now.Done; rest > 0 && rate > 0 {
		_, _ = fmt.Fprintf(p.w, ", %s left", time.Duration(float64(rest)/rate*float64(time.Second)).Round(time.Second))
	}
	_, _ = fmt.Fprintln(p.w)
}

func (p *sweepProgress) done() {
	if p.bar != nil {
		_ = p.bar.Finish()
		_, _ = fmt.Fprintln(p.w)
		p.bar = nil
	}
}
