package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/outbox"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

func (c *cli) setup() *cobra.Command {
	var o output
	var plan, apply, acceptLoss bool
	cmd := &cobra.Command{
		Use:   "setup",
		Short: "Run the migrations and create the streams and consumers that are missing",
		Long: "setup brings database and broker to what this version of Usher needs: pending migrations are applied, missing\n" +
			"streams and consumers are created. What exists on the broker is compared, every field that can lose or withhold\n" +
			"events, and not changed: a difference is printed, for you to decide. A fatal one keeps the services from being ready.\n" +
			"With --apply differences are changed where the broker changes them in place; for the others setup says what to do.\n" +
			"dev and serve do the same when they start, with their own broker as --apply does. It asks whether the broker\n" +
			"syncs to disk before it confirms an event, and refuses one that does not (USHER_ALLOW_UNSYNCED_BROKER=true takes it).\n\n" +
			"Foreign keys that others made on Usher's tables are named, with what to do: they break the rule that events may come\n" +
			"in any order. Nothing changes them.\n\n" +
			"Exit code 0: everything is as wanted. 1: differences remain. 2: it could not check. With --plan nothing is\n" +
			"changed, and the exit code is 0 whatever is found.\n\n" +
			"With --accept-loss it only ends the workers' alert that broker or database have lost events, once you have seen to\n" +
			"it: what is missing stays missing. `usher reconcile --full` brings it where Clerk's API can be read, and ends the alert itself.",
		Example: "  usher setup --plan\n  usher setup --apply\n" +
			"  USHER_DATABASE_URL=postgres://… USHER_NATS_URL=nats://… usher setup --stream-replicas 3\n" +
			"  usher setup --output json",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			how := allinone.Create
			switch {
			case plan && apply:
				return errors.New("--plan and --apply: want one of them")
			case plan:
				how = allinone.Plan
			case apply:
				how = allinone.Apply
			}
			r, err := c.reach()
			if err != nil {
				return err
			}
			defer r.close()
			if acceptLoss {
				if plan || apply {
					return errors.New("--accept-loss: takes neither --plan nor --apply")
				}
				return r.acceptLoss(cmd.Context())
			}
			report, err := r.setupPatiently(cmd.Context(), how)
			if err != nil {
				return err
			}
			if err := printSetup(c.env.Stdout, o, report, plan); err != nil {
				return err
			}
			warnDurability(c.env.Stderr, *report.Broker)
			broken := slices.ContainsFunc(report.ForeignKeys, func(k database.ForeignKey) bool { return k.Fatal })
			if len(report.Streams.Differences) == 0 {
				if broken && !plan {
					return errNo
				}
				return nil
			}
			_, _ = fmt.Fprintf(c.env.Stderr, "%d field(s) of existing streams or consumers differ and were not changed", len(report.Streams.Differences))
			if fatal := countFatal(report.Streams.Differences); fatal > 0 {
				_, _ = fmt.Fprintf(c.env.Stderr, "; %d of them lose events or withhold them, and keep the services from being ready", fatal)
			}
			_, _ = fmt.Fprint(c.env.Stderr, ".\nWhat to do stands under each. What --apply changes can also be left, where Usher is set to what is there\n"+
				"(USHER_STREAM_REPLICAS, USHER_STREAM_MAX_BYTES).\n")
			if plan {
				return nil
			}
			return errNo
		},
	}
	cmd.Flags().BoolVar(&plan, "plan", false, "only show what would be done")
	cmd.Flags().BoolVar(&apply, "apply", false, "also change what differs on the broker, where it can be changed in place")
	cmd.Flags().BoolVar(&acceptLoss, "accept-loss", false, "only end the alert about events that broker or database have lost")
	outputFlag(cmd, &o)
	c.settingFlags(cmd, append([]string{"USHER_SOURCE", "USHER_NATS_MONITOR_URL", "USHER_ALLOW_UNSYNCED_BROKER", "USHER_STREAM_REPLICAS", "USHER_STREAM_MAX_BYTES", "USHER_ALERT_EMAIL"},
		bothSettings...)...)
	return cmd
}

// acceptLoss ends what the workers have found missing, and says what it was.
func (r *reach) acceptLoss(ctx context.Context) error {
	address, schema := r.databaseURL()
	db, err := r.open(ctx, address, schema)
	if err != nil {
		return err
	}
	accepted, err := worker.AcceptLoss(ctx, db, outbox.AlertsFrom(r.settings))
	if err != nil {
		return err
	}
	if len(accepted) == 0 {
		accepted = []string{"nothing is missing"}
	}
	for _, line := range accepted {
		if _, err := fmt.Fprintln(r.cli.env.Stdout, line); err != nil {
			return fmt.Errorf("print: %w", err)
		}
	}
	return nil
}

// countFatal counts the differences that lose or withhold events.
func countFatal(diffs []stream.Difference) int {
	n := 0
	for _, d := range diffs {
		if d.Fatal {
			n++
		}
	}
	return n
}

// setupPatience is how long a setup waits for a broker or a database that was started just before it.
const setupPatience = 15 * time.Second

// setupPatiently is setup that waits a while for what does not answer yet; a plan does not.
func (r *reach) setupPatiently(ctx context.Context, how allinone.Mode) (allinone.SetupReport, error) {
	for begun, told := time.Now(), false; ; told = true {
		report, err := r.setup(ctx, how)
		starting := errors.Is(err, errNoBroker) || errors.Is(err, stream.ErrUnavailable) || errors.Is(err, database.ErrUnreachable)
		if !starting || how == allinone.Plan || time.Since(begun) > setupPatience {
			return report, err
		}
		if !told {
			r.cli.say("usher: %v; trying again for up to %s", err, setupPatience)
		}
		r.close()
		select {
		case <-ctx.Done():
			return report, err
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (r *reach) setup(ctx context.Context, how allinone.Mode) (allinone.SetupReport, error) {
	js, err := r.broker()
	if err != nil {
		return allinone.SetupReport{}, err
	}
	durability := r.durability(ctx, js)
	if err := durability.Refuse(); err != nil && how != allinone.Plan && !r.settings.AllowUnsynced {
		return allinone.SetupReport{}, err
	}
	var db *gorm.DB
	if how == allinone.Plan {
		db, err = r.planDatabase(ctx)
	} else {
		address, schema := r.databaseURL()
		db, err = r.open(ctx, address, schema)
	}
	if err != nil {
		return allinone.SetupReport{}, err
	}
	warnings, err := database.Warnings(ctx, db)
	if err != nil {
		return allinone.SetupReport{}, err
	}
	for _, warning := range warnings {
		_, _ = fmt.Fprintln(r.cli.env.Stderr, "warning:", warning)
	}
	topology := stream.Topology{Replicas: r.settings.StreamReplicas, MaxBytes: int64(r.settings.StreamMaxBytes), Handlers: worker.Specs()}
	report, err := allinone.Setup(ctx, db, js, topology, how)
	report.Broker = &durability
	if err != nil {
		return report, err
	}
	return report, r.warn(ctx, db, report.Migrations.Pending)
}

// warn says what [config.Settings.Warnings] has, and whose rows are nobody's. A database that a plan leaves without the tables has none.
func (r *reach) warn(ctx context.Context, db *gorm.DB, pending []string) error {
	warnings := r.settings.Warnings()
	if len(pending) == 0 {
		names := append(r.settings.SourceNames(), slices.Collect(maps.Keys(r.state.Instances))...)
		unknown, err := mirror.UnknownSources(ctx, db, names)
		if err != nil {
			return err
		}
		warnings = append(warnings, unknown...)
	}
	for _, warning := range warnings {
		_, _ = fmt.Fprintln(r.cli.env.Stderr, "warning:", warning)
	}
	return nil
}

// durability asks whether the broker syncs, unless it is the one that a running serve or dev embeds.
func (r *reach) durability(ctx context.Context, js jetstream.JetStream) stream.Durability {
	if r.settings.NATSURL == "" && r.state.EmbeddedBroker {
		return allinone.EmbeddedDurability
	}
	return stream.AskDurability(ctx, js, r.settings.NATSMonitorURL, r.settings.StreamReplicas)
}

// warnDurability says loudly what is not known to be durable, and how to get it.
func warnDurability(w io.Writer, d stream.Durability) {
	switch d.State {
	case stream.Unsynced:
		_, _ = fmt.Fprintf(w, "\nTHE BROKER DOES NOT SYNC (%s): a power cut loses events that Clerk was told are safe, and maybe the stream.\n"+
			"Usher refuses it unless USHER_ALLOW_UNSYNCED_BROKER=true. Better, %s\n", d.Detail, stream.SyncAdvice)
	case stream.Unknown:
		_, _ = fmt.Fprintf(w, "\nDURABILITY IS NOT VERIFIED (%s): if the broker does not sync before it confirms, which\n"+
			"nats-server does not as it comes, a power cut loses events that Clerk was told are safe. To be sure, %s\nand %s.\n", d.Detail, stream.SyncAdvice, stream.SyncVerify)
	}
}

// printSetup writes one line an object, or the report as one JSON object.
func printSetup(w io.Writer, o output, report allinone.SetupReport, plan bool) error {
	if o != outputTable {
		return printObject(w, o, report)
	}
	t := newTable(w, "what", "result")
	if report.Broker != nil {
		t.row("durability of the broker", report.Broker.State)
	}
	for _, name := range report.Migrations.Applied {
		t.row("migration "+name, "applied")
	}
	for _, name := range report.Migrations.Pending {
		t.row("migration "+name, "would be applied")
	}
	if len(report.Migrations.Applied)+len(report.Migrations.Pending) == 0 {
		t.row("migrations", "all applied before")
	}
	for _, k := range report.ForeignKeys {
		t.row("foreign key "+k.Constraint+" of "+k.Table, map[bool]string{true: "in the way of events, see the warning", false: "in the way of the application, see the warning"}[k.Fatal])
	}
	differing := map[string]bool{}
	for _, d := range report.Streams.Differences {
		differing[d.Object] = true
	}
	for _, d := range report.Streams.Changed {
		t.row(d.Object, fmt.Sprintf("changed: %s was %s, is %s", d.Field, d.Have, d.Want))
	}
	for _, name := range report.Streams.Present {
		if differing[name] {
			t.row(name, "present, differs")
		} else {
			t.row(name, "present")
		}
	}
	for _, name := range report.Streams.Created {
		t.row(name, "created")
	}
	for _, name := range report.Streams.Missing {
		t.row(name, "would create")
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	if len(report.Streams.Differences) > 0 {
		_, _ = fmt.Fprintln(w)
		t = newTable(w, "object", "field", "have", "want", "fatal")
		for _, d := range report.Streams.Differences {
			t.row(d.Object, d.Field, d.Have, d.Want, map[bool]string{true: "yes", false: "no"}[d.Fatal])
		}
		if err := t.Flush(); err != nil {
			return fmt.Errorf("print: %w", err)
		}
		_, _ = fmt.Fprintln(w)
		for _, d := range report.Streams.Differences {
			_, _ = fmt.Fprintln(w, d)
		}
	}
	if plan {
		_, _ = fmt.Fprintln(w, "\nNothing was changed: this was a plan.")
	}
	return nil
}
