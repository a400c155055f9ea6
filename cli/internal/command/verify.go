package command

import (
	"context"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/usherhq/usher/reconciler"
)

func (c *cli) verify() *cobra.Command {
	var o reconcileOptions
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Prove that the mirror is what Clerk has, and change nothing",
		Long: "verify reads every object of Clerk's Backend API and every row, and prints in which fields they differ; the typed\n" +
			"columns of a row are held against its raw. What differs is looked at again, up to three times with a pause, and what\n" +
			"has an event on its way is not drift: a busy minute is no failure. What belongs to a feature that is not enabled\n" +
			"in the instance, such as organizations, is left out. Invitations to organizations that Clerk's lists leave out cannot\n" +
			"be checked, nor can sessions and billing, which no list has: not_compared names those tables, and why. A row that is newer than its\n" +
			"object and has other content is reported as different, and held back: no event could change it.\n\n" +
			"Exit code 0: the mirror is true. 1: there is drift. 2: it could not check.",
		Example: "  usher verify\n  usher verify --resource users --output json | jq '.items[]'",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return c.runVerify(cmd.Context(), o) },
	}
	o.addFlags(cmd)
	_ = cmd.Flags().MarkHidden("wait") // it takes no turn
	c.settingFlags(cmd, slices.Concat(bothSettings, clerkSettings)...)
	return cmd
}

func (c *cli) runVerify(ctx context.Context, o reconcileOptions) error {
	r, sweeper, err := c.sweeper(ctx, o, false)
	if err != nil {
		return err
	}
	defer r.close()
	sweeps := newSweepProgress(c.env.Stderr)
	report, err := sweeper.Verify(ctx, reconciler.Options{Resources: o.resources, Progress: sweeps.show})
	sweeps.done()
	if perr := c.printReport(o.output, report, false, false); perr != nil {
		return perr
	}
	switch {
	case err != nil:
		return advise(err, r.settings)
	case report.Stopped != "":
		return fmt.Errorf("could not check: %s", report.Stopped)
	case report.Drift.Sum() > 0:
		return errNo
	}
	return nil
}
