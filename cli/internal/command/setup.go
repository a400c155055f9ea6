package command

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

func (c *cli) setup() *cobra.Command {
	var o output
	var plan bool
	cmd := &cobra.Command{
		Use:   "setup",
		Short: "Run the migrations and create the streams and consumers that are missing",
		Long: "setup brings database and broker to what this version of Usher needs: pending migrations are applied, missing\n" +
			"streams and consumers are created. What exists on the broker is compared and never changed: a difference is\n" +
			"printed, for you to decide. dev and serve do the same when they start.\n\n" +
			"Exit code 0: everything is as wanted. 1: differences remain. 2: it could not check. With --plan nothing is\n" +
			"changed, and the exit code is 0 whatever is found.",
		Example: "  usher setup --plan\n" +
			"  USHER_DATABASE_URL=postgres://… USHER_NATS_URL=nats://… usher setup --stream-replicas 3\n" +
			"  usher setup --output json",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := c.reach()
			if err != nil {
				return err
			}
			defer r.close()
			report, err := r.setup(cmd.Context(), plan)
			if err != nil {
				return err
			}
			if err := printSetup(c.env.Stdout, o, report, plan); err != nil {
				return err
			}
			if len(report.Streams.Differences) == 0 {
				return nil
			}
			_, _ = fmt.Fprintf(c.env.Stderr, "%d field(s) of existing streams or consumers differ and were not changed. Either set Usher to what is there\n"+
				"(USHER_STREAM_REPLICAS, USHER_STREAM_MAX_BYTES), or change it yourself while no event waits for a retry\n"+
				"(`nats stream edit`, `nats consumer edit`) and run `usher setup` again.\n", len(report.Streams.Differences))
			if plan {
				return nil
			}
			return errNo
		},
	}
	cmd.Flags().BoolVar(&plan, "plan", false, "only show what would be done")
	outputFlag(cmd, &o)
	c.settingFlags(cmd, false)
	return cmd
}

func (r *reach) setup(ctx context.Context, plan bool) (allinone.SetupReport, error) {
	js, err := r.broker()
	if err != nil {
		return allinone.SetupReport{}, err
	}
	var db *gorm.DB
	if plan {
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
	return allinone.Setup(ctx, db, js, topology, plan)
}

// printSetup writes one line an object, or the report as one JSON object.
func printSetup(w io.Writer, o output, report allinone.SetupReport, plan bool) error {
	if o != outputTable {
		return printObject(w, o, report)
	}
	t := newTable(w, "what", "result")
	for _, name := range report.Migrations.Applied {
		t.row("migration "+name, "applied")
	}
	for _, name := range report.Migrations.Pending {
		t.row("migration "+name, "would be applied")
	}
	if len(report.Migrations.Applied)+len(report.Migrations.Pending) == 0 {
		t.row("migrations", "all applied before")
	}
	differing := map[string]bool{}
	for _, d := range report.Streams.Differences {
		differing[d.Object] = true
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
		t = newTable(w, "object", "field", "have", "want")
		for _, d := range report.Streams.Differences {
			t.row(d.Object, d.Field, d.Have, d.Want)
		}
		if err := t.Flush(); err != nil {
			return fmt.Errorf("print: %w", err)
		}
	}
	if plan {
		_, _ = fmt.Fprintln(w, "\nNothing was changed: this was a plan.")
	}
	return nil
}
