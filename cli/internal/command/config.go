package command

import (
	"cmp"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/usherhq/usher/pkg/config"
)

func (c *cli) config() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the effective settings, secrets masked, and where each comes from",
		Long: "config prints every setting as the other commands see it here: flags before environment before defaults.\n" +
			"Secrets are masked. Where settings are wrong it lists every problem instead, with exit code 2.",
		Example: "  usher config\n  USHER_STREAM_REPLICAS=3 usher config --output json | jq '.items[] | select(.origin != \"default\")'",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			settings, err := c.settings()
			if err != nil {
				return err
			}
			for _, warning := range settings.SourceWarnings() {
				_, _ = fmt.Fprintln(c.env.Stderr, "warning:", warning)
			}
			return printListing(c.env.Stdout, o, listing[config.Setting]{Items: settings.List()},
				[]string{"name", "value", "origin"}, func(s config.Setting) []string {
					return []string{s.Name, cmp.Or(s.Value, "-"), cmp.Or(s.Origin, "default")}
				})
		},
	}
	outputFlag(cmd, &o)
	c.settingFlags(cmd, false)
	return cmd
}
