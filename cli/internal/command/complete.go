package command

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/worker"
)

// complete lets the shell complete what the flags and arguments of all commands take. What is a choice offers its values, what is a path
// offers files, and all else offers nothing.
func (c *cli) complete(root *cobra.Command) {
	choices := map[string]func() []string{
		"output": func() []string { return []string{string(outputTable), string(outputJSON), string(outputNDJSON)} },
		"type":   typePatterns,
		"status": func() []string { return statuses },
		"effect": func() []string { return strings.Split(effectNames(), ", ") },
		"reason": func() []string {
			var names []string
			for _, r := range deadletter.Reasons() {
				names = append(names, string(r))
			}
			return names
		},
		"handler": func() []string {
			var names []string
			for _, s := range worker.Specs() {
				names = append(names, s.Name)
			}
			return names
		},
		"resource":              clerk.Resources,
		"source":                c.sourceNames,
		"from":                  c.sourceNames,
		"log-level":             func() []string { return []string{"debug", "info", "warn", "error"} },
		"dialect":               func() []string { return []string{"postgres", "sqlite"} },
		"log-format":            func() []string { return []string{"json", "console"} },
		"stream-replicas":       func() []string { return []string{"1", "3", "5"} },
		"allow-unsynced-broker": func() []string { return []string{"true", "false"} },
		"keep-message-bodies":   func() []string { return []string{"true", "false"} },
	}
	paths := []string{"data-dir", "nats-creds", "nats-ca", "nats-cert", "nats-key", "geoip-db", "from-file"}
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		flag := func(f *pflag.Flag) {
			if _, registered := cmd.GetFlagCompletionFunc(f.Name); registered || slices.Contains(paths, f.Name) {
				return
			}
			_ = cmd.RegisterFlagCompletionFunc(f.Name, func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
				values := choices[f.Name]
				if values == nil || f.Name == "source" && f.Annotations[settingMark] != nil {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				return values(), cobra.ShellCompDirectiveNoFileComp
			})
		}
		cmd.Flags().VisitAll(flag)
		cmd.PersistentFlags().VisitAll(flag)
		switch {
		case cmd.ValidArgsFunction != nil || len(cmd.ValidArgs) > 0:
		case cmd.CommandPath() == "usher trigger":
			cmd.ValidArgsFunction = func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
				if len(args) > 0 {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				return append(fixture.Types(), fixture.Variants()...), cobra.ShellCompDirectiveNoFileComp
			}
		default:
			cmd.ValidArgsFunction = cobra.NoFileCompletions
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

// typePatterns are the known types of events, and the patterns that select several of them.
func typePatterns() []string {
	types := fixture.Types()
	var patterns []string
	for _, t := range types {
		resource, verb, _ := strings.Cut(t, ".")
		patterns = append(patterns, resource+".*", "*."+verb)
	}
	slices.Sort(patterns)
	return append(types, slices.Compact(patterns)...)
}

// sourceNames are those of the settings, as far as they can be read.
func (c *cli) sourceNames() []string {
	settings, _ := config.Load(c.env.Environ, c.flags)
	return settings.SourceNames()
}
