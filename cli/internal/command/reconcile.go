package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/redact"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/reconciler"
)

type reconcileOptions struct {
	full, dryRun, force bool
	resources           []string
	source              string
	wait                config.Duration
	output              output
}

func (c *cli) reconcile() *cobra.Command {
	var o reconcileOptions
	cmd := &cobra.Command{
		Use:   "reconcile",
		Short: "Compare Clerk's API with the mirror and publish events for what was missed",
		Long: "reconcile reads Clerk's Backend API and publishes an event for every object that the mirror lacks or has in another\n" +
			"state; the worker applies them like any other. Without --full it reads what changed since the last run; with it,\n" +
			"everything. A row is deleted only when Clerk says of that one object that it does not exist. When more than 5% of a\n" +
			"table or more than 100 rows are unknown to Clerk (a wrong key looks just like that), nothing is deleted and the run\n" +
			"stops, unless --force is given; of a small table 3 rows may go, but no more than half of it, and always one. It stops\n" +
			"as well when Clerk's count contradicts its pages. A list that lacks objects which Clerk has when asked for them one by one\n" +
			"fails the run. Invitations to organizations are never deleted: Clerk's lists of them are not whole.\n\n" +
			"A table that cannot be read fails the run at its end, after the others. What the mirror has newer than Clerk, or deleted\n" +
			"later, is held back: it is reported, and no event could change it.\n\n" +
			"A run that was interrupted goes on where it was. One sweep runs at a time; this one waits for another.\n\n" +
			"Exit code 0: done. 1: it was stopped, or drift is held back, or --dry-run found some. 2: it could not compare.",
		Example: "  usher reconcile\n  usher reconcile --full --dry-run\n  usher reconcile --full --resource users --output json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts := reconciler.Options{Kind: reconciler.Incremental, Resources: o.resources, DryRun: o.dryRun, Force: o.force, Wait: time.Duration(o.wait)}
			if o.full {
				opts.Kind = reconciler.Full
			}
			return c.runReconcile(cmd.Context(), o, opts)
		},
	}
	cmd.Flags().BoolVar(&o.full, "full", false, "compare everything, not only what changed")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "look, and publish nothing")
	cmd.Flags().BoolVar(&o.force, "force", false, "delete whatever Clerk says is gone, however much it is")
	o.addFlags(cmd)
	c.settingFlags(cmd, slices.Concat(bothSettings, clerkSettings, []string{"USHER_STREAM_REPLICAS"})...)
	return cmd
}

func (o *reconcileOptions) addFlags(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar(&o.resources, "resource", nil, "only these: "+strings.Join(clerk.Resources(), ", "))
	cmd.Flags().StringVar(&o.source, "from", "", "source to read (default: the default source)")
	o.wait = config.Duration(time.Minute)
	cmd.Flags().Var(&o.wait, "wait", "how long to wait for another sweep to end")
	outputFlag(cmd, &o.output)
}

func (c *cli) runReconcile(ctx context.Context, o reconcileOptions, opts reconciler.Options) error {
	r, sweeper, err := c.sweeper(ctx, o, true)
	if err != nil {
		return err
	}
	defer r.close()
	sweeps := newSweepProgress(c.env.Stderr)
	opts.Progress = sweeps.show
	report, err := sweeper.Reconcile(ctx, opts)
	sweeps.done()
	if report != nil {
		if perr := c.printReport(o.output, report, opts.DryRun, true); perr != nil {
			return perr
		}
	}
	switch {
	case err != nil:
		return advise(err, r.settings)
	case report.Stopped != "", opts.DryRun && report.Drift.Sum() > 0, report.HeldBack.Sum() > 0:
		return errNo
	}
	return nil
}

// sweeper opens what a sweep needs: database, broker and Clerk's API. publishes is false for one that only looks.
func (c *cli) sweeper(ctx context.Context, o reconcileOptions, publishes bool) (_ *reach, _ *reconciler.Sweeper, err error) {
	for _, name := range o.resources {
		if !slices.Contains(clerk.Resources(), name) {
			return nil, nil, fmt.Errorf("--resource %s: want %s", name, strings.Join(clerk.Resources(), ", "))
		}
	}
	r, err := c.reach()
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	source, err := r.source(o.source)
	if err != nil {
		return nil, nil, err
	}
	log, err := c.logger(r.settings)
	if err != nil {
		return nil, nil, err
	}
	if r.settings.Origin("USHER_LOG_LEVEL") == "default" { // what is found is printed
		log = log.WithOptions(zap.IncreaseLevel(zap.ErrorLevel))
	}
	metrics := reconciler.NewMetrics(nil)
	client, err := reconciler.Client(source, log, metrics)
	if err != nil {
		return nil, nil, err
	}
	r.closers.Add(func() error { client.Close(); return nil })
	db, err := r.database(ctx)
	if err != nil {
		return nil, nil, err
	}
	js, err := r.broker()
	if err != nil {
		return nil, nil, err
	}
	deps := reconciler.SweepDeps{API: client, DB: db, JS: js, Log: log, Metrics: metrics}
	if publishes {
		publisher := stream.NewPublisher(js, r.settings.StreamReplicas)
		r.closers.Add(func() error { publisher.Close(); return nil })
		deps.Publisher = publisher
	}
	return r, reconciler.NewSweeper(reconciler.SweepConfig{Source: source.Name, InstanceID: source.InstanceID}, deps), nil
}

// source finds the Clerk instance to read: the emulated one of a running demo, else that of the settings.
func (r *reach) source(name string) (clerk.Source, error) {
	name = cmp.Or(name, r.settings.Source)
	i := slices.IndexFunc(r.settings.Sources, func(s config.Source) bool { return s.Name == name })
	if i < 0 {
		return clerk.Source{}, fmt.Errorf("--from %s: there is no such source", name)
	}
	s := r.settings.Sources[i]
	source := clerk.Source{Name: name, APIURL: r.settings.ClerkAPIURL, SecretKey: s.SecretKey, InstanceID: r.instances()[name]}
	if name == r.settings.Source && r.stateErr == nil && r.state.ClerkSecretKey != "" && !r.given("USHER_NATS_URL") {
		source.APIURL, source.SecretKey, source.Quota = r.state.ClerkAPIURL, r.state.ClerkSecretKey, -1 // an emulator has no other callers
		return source, nil
	}
	if source.SecretKey != "" {
		return source, nil
	}
	if name != r.settings.Source {
		return source, fmt.Errorf("USHER_SOURCE_%s_SECRET_KEY is not set: Clerk's Backend API wants the secret key (sk_…), from Clerk's dashboard, API keys", strings.ToUpper(name))
	}
	return source, errors.New("CLERK_SECRET_KEY is not set: Clerk's Backend API wants the secret key (sk_…), from Clerk's dashboard, API keys")
}

// advise adds to an error of Clerk's API what to do about it.
func advise(err error, s *config.Settings) error {
	switch {
	case errors.Is(err, clerk.ErrUnauthorized):
		return fmt.Errorf("%w: Clerk refuses the secret key: check CLERK_SECRET_KEY, or USHER_SOURCE_<NAME>_SECRET_KEY of another source", err)
	case errors.Is(err, clerk.ErrUnavailable):
		return fmt.Errorf("%w: Clerk's API (%s) does not answer: check the network and CLERK_API_URL, or try again later", err, redact.URL(s.ClerkAPIURL))
	default:
		return err
	}
}

// printReport prints what a sweep found.
func (c *cli) printReport(o output, report *reconciler.Report, dryRun, publishes bool) error {
	w := c.env.Stdout
	switch o {
	case outputJSON:
		return printJSON(w, report)
	case outputNDJSON:
		return printListing(w, o, listing[reconciler.Item]{Items: report.Items}, nil, nil)
	case outputTable:
	}
	t := newTable(w, "resource", "checked")
	for _, name := range clerk.Resources() {
		if slices.Contains(report.Absent, name) {
			t.row(name, "0 (the instance does without it)")
		} else if report.Failed[name] != "" {
			t.row(name, "could not be compared")
		} else if n, ok := report.Checked[name]; ok {
			t.row(name, strconv.FormatInt(n, 10))
		}
	}
	for _, table := range mirror.Tables() {
		if why := report.NotCompared[table.Name]; why != "" {
			t.row(table.Name, "not compared: "+why)
		}
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	d := report.Drift
	if len(report.Checked) > 0 { // no drift of what was not looked at
		_, _ = fmt.Fprintf(w, "\nmissing %d, stale %d, different %d, extra %d", d.Missing, d.Stale, d.Different, d.Extra)
		if publishes {
			_, _ = fmt.Fprintf(w, "; published %d", report.Published)
		}
		_, _ = fmt.Fprintln(w)
	}
	if n := report.HeldBack.ByDelete; n > 0 {
		_, _ = fmt.Fprintf(w, "%d %s held back by a newer delete here: it comes back with its next change at Clerk\n", n, isOrAre(n))
	}
	if n := report.HeldBack.ByVersion; n > 0 {
		_, _ = fmt.Fprintf(w, "%d %s held back by a newer version here: the version rule takes nothing older; it follows with a change at Clerk that is newer\n", n, isOrAre(n))
	}
	if n := report.HeldBack.BySource; n > 0 {
		_, _ = fmt.Fprintf(w, "%d %s held back: the rows belong to another source; see \"Sources\" in docs/architecture.md, where the source was renamed\n", n, isOrAre(n))
	}
	if dryRun {
		_, _ = fmt.Fprintln(w, "Nothing was published: this was a dry run.")
	}
	if err := printItems(w, report.Items); err != nil {
		return err
	}
	if report.Stopped != "" {
		_, _ = fmt.Fprintln(w, "\nstopped: "+printable(report.Stopped))
		if strings.Contains(report.Stopped, "--force") {
			_, _ = fmt.Fprintln(w, "\nTo see what would be deleted: usher reconcile --full --dry-run --force\nTo delete it:                 usher reconcile --full --force")
		}
	}
	return nil
}

func isOrAre(n int64) string {
	if n == 1 {
		return "is"
	}
	return "are"
}

// shownItems is how many objects a table lists.
const shownItems = 50

func printItems(w io.Writer, items []reconciler.Item) error {
	if len(items) == 0 {
		return nil
	}
	_, _ = fmt.Fprintln(w)
	t := newTable(w, "resource", "id", "drift", "field", "mirror", "clerk")
	for _, item := range items[:min(len(items), shownItems)] {
		drift := string(item.Drift)
		if item.HeldBack != "" {
			drift += " (held back)"
		}
		if len(item.Fields) == 0 {
			t.row(item.Resource, item.ID, drift)
		}
		for _, f := range item.Fields {
			have, want := excerpts(f.Mirror, f.Clerk)
			t.row(item.Resource, item.ID, drift, f.Field, have, want)
		}
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	if len(items) > shownItems {
		_, _ = fmt.Fprintf(w, "and %d more (--output json)\n", len(items)-shownItems)
	}
	return nil
}

// shownRunes is how much of a value a table shows.
const shownRunes = 120

// excerpts are two values that differ as a table shows them: whole, or where they are long from shortly before the first difference on.
func excerpts(a, b []byte) (first, second string) {
	x, y := []rune(string(a)), []rune(string(b))
	from := 0
	for from < min(len(x), len(y)) && x[from] == y[from] {
		from++
	}
	if from = max(from-20, 0); max(len(x), len(y)) <= shownRunes {
		from = 0
	}
	cut := func(text []rune) string {
		begin := min(from, len(text))
		end := min(begin+shownRunes, len(text))
		shown := string(text[begin:end])
		if begin > 0 {
			shown = "…" + shown
		}
		if end < len(text) {
			shown += "…"
		}
		return shown
	}
	return cut(x), cut(y)
}
