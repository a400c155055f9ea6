package command

import (
	"fmt"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/usherhq/usher/reconciler"
)

func (c *cli) portal() *cobra.Command {
	var from string
	cmd := &cobra.Command{
		Use:   "portal",
		Short: "Print a link to the webhook portal of a Clerk instance",
		Long: "portal asks Clerk for a link to the instance's webhook portal, where endpoints are enabled and missing messages are\n" +
			"replayed, and prints it. Whoever has the link is logged in there: do not pass it on. Usher keeps it nowhere.",
		Example: "  usher portal\n  usher portal --from staging",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := c.reach()
			if err != nil {
				return err
			}
			defer r.close()
			source, err := r.source(from)
			if err != nil {
				return err
			}
			client, err := reconciler.Client(source, zap.NewNop(), reconciler.NewMetrics(nil))
			if err != nil {
				return err
			}
			defer client.Close()
			link, err := client.RefreshPortalURL(cmd.Context())
			if err != nil {
				return advise(err, r.settings)
			}
			if _, err := fmt.Fprintln(c.env.Stdout, link); err != nil {
				return fmt.Errorf("print the link: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "source whose portal is meant (default: the default source)")
	c.settingFlags(cmd, clerkSettings...)
	return cmd
}
