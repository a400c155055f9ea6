package command

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/redact"
)

func (c *cli) config() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the effective settings, secrets masked, and where each comes from",
		Long: "config prints every setting as the other commands see it here: flags before environment before defaults;\n" +
			"beside a running dev or serve what that runs with, origin dev or serve, unless a flag says otherwise, or beside serve\n" +
			"the environment names another database or broker, which commands take first.\n" +
			"Secrets are masked. Where settings are wrong it lists every problem instead, with exit code 2.",
		Example: "  usher config\n  USHER_STREAM_REPLICAS=3 usher config --output json | jq '.items[] | select(.origin != \"default\")'",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := c.reach()
			if err != nil {
				return err
			}
			settings := r.settings
			for _, warning := range settings.Warnings() {
				_, _ = fmt.Fprintln(c.env.Stderr, "warning:", warning)
			}
			return printListing(c.env.Stdout, o, listing[config.Setting]{Items: r.list()},
				[]string{"name", "value", "origin"}, func(s config.Setting) []string {
					return []string{s.Name, cmp.Or(s.Value, "-"), cmp.Or(s.Origin, "default")}
				})
		},
	}
	outputFlag(cmd, &o)
	c.settingFlags(cmd, allSettings()...)
	return cmd
}

// list is what [config.Settings.List] has, beside a running instance with what that runs with.
func (r *reach) list() []config.Setting {
	items := r.settings.List()
	if r.stateErr != nil || len(r.state.Settings) == 0 {
		return items
	}
	r.cli.say("note: this is what the running `usher %s` (process %d) has, in %s", r.state.Mode, r.state.PID, r.settings.DataDir)
	running := slices.Clone(r.state.Settings)
	for i := range running {
		item := &running[i]
		switch {
		case item.Name == "USHER_NATS_URL" && item.Value == "": // its own broker
			item.Value, item.Origin = redact.URL(r.state.NATSURL), r.state.Mode
		case item.Origin != "default":
			item.Origin = r.state.Mode
		}
		for _, here := range items {
			if here.Name != item.Name {
				continue
			}
			// What commands take from here, whatever runs.
			elsewhere := here.Origin == "environment" && slices.Contains(bothSettings, here.Name) && here.Value != item.Value
			if here.Origin == "flag" || elsewhere {
				*item = here
			}
		}
	}
	return running
}
