package command

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/redact"
)

// Settings that commands read. A setting is a flag of those commands only, but for the few that all of them read.
var (
	globalSettings   = []string{"USHER_DATA_DIR", "USHER_LOG_LEVEL", "USHER_LOG_FORMAT"}
	databaseSettings = []string{"USHER_DATABASE_URL", "USHER_DATABASE_SCHEMA"}
	brokerSettings   = []string{"USHER_NATS_URL", "USHER_NATS_CREDS", "USHER_NATS_CA", "USHER_NATS_CERT", "USHER_NATS_KEY"}
	clerkSettings    = []string{"USHER_SOURCE", "CLERK_API_URL", "CLERK_INSTANCE_ID"}
	bothSettings     = slices.Concat(databaseSettings, brokerSettings)
)

// allSettings are those of a command that runs every service.
func allSettings() []string {
	var names []string
	for _, s := range config.Describe() {
		if !slices.Contains(globalSettings, s.Name) {
			names = append(names, s.Name)
		}
	}
	return names
}

// settingMark marks a flag that is a setting, with the setting's name.
const settingMark = "usher_setting"

// settingFlags gives a command flags for the settings that it reads: USHER_DATA_DIR is --data-dir. Secrets have none, since a command
// line is visible to everyone on the machine; URLs have, for those without a password.
func (c *cli) settingFlags(cmd *cobra.Command, names ...string) { c.addSettings(cmd.Flags(), names) }

func (c *cli) addSettings(set *pflag.FlagSet, names []string) {
	for _, s := range config.Describe() {
		if !slices.Contains(names, s.Name) || s.Secret && !s.URL || s.Name == "DATABASE_URL" {
			continue
		}
		name := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(s.Name, "USHER_"), "_", "-"))
		usage := s.Doc + " (" + s.Name + ")"
		if s.Default != "" {
			usage += " (default " + s.Default + ")"
		}
		set.Func(name, usage, func(value string) error {
			c.flags[s.Name] = value
			if s.URL && redact.HasPassword(value) {
				instead := fmt.Sprintf("set %s or %s_FILE instead", s.Name, s.Name)
				if s.Name == "USHER_DATABASE_URL" {
					instead += "; with dev, which takes this flag only, put the password in ~/.pgpass"
				}
				_, _ = fmt.Fprintf(c.env.Stderr, "warning: --%s holds a secret, and everyone on this machine can read a command line (ps): %s\n", name, instead)
			}
			return nil
		})
		set.Lookup(name).Annotations = map[string][]string{settingMark: {s.Name}}
	}
}

// usage prints how a command is used: its own flags first, then the settings that it reads, then the flags of all commands.
func usage(cmd *cobra.Command) error {
	own, settings, global := pflag.NewFlagSet("", pflag.ContinueOnError), pflag.NewFlagSet("", pflag.ContinueOnError), cmd.InheritedFlags()
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		switch {
		case f.Annotations[settingMark] == nil:
			own.AddFlag(f)
		case cmd.HasParent():
			settings.AddFlag(f)
		default:
			global.AddFlag(f)
		}
	})
	var b strings.Builder
	b.WriteString("Usage:\n")
	if cmd.Runnable() && !cmd.HasAvailableSubCommands() {
		b.WriteString("  " + cmd.UseLine() + "\n")
	}
	if cmd.HasAvailableSubCommands() {
		b.WriteString("  " + cmd.CommandPath() + " [command]\n")
	}
	if cmd.HasExample() {
		b.WriteString("\nExamples:\n" + cmd.Example + "\n")
	}
	if cmd.HasAvailableSubCommands() {
		b.WriteString("\nCommands:\n")
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() || sub.Name() == "help" {
				fmt.Fprintf(&b, "  %-*s %s\n", sub.NamePadding(), sub.Name(), sub.Short)
			}
		}
	}
	for _, part := range []struct {
		title string
		flags *pflag.FlagSet
	}{
		{"Flags", own}, {"Settings that it reads (a flag comes before the environment)", settings}, {"Flags of every command", global},
	} {
		if part.flags.HasAvailableFlags() {
			b.WriteString("\n" + part.title + ":\n" + part.flags.FlagUsages())
		}
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(&b, "\n`%s [command] --help` says more about a command.\n", cmd.CommandPath())
	}
	_, err := io.WriteString(cmd.OutOrStderr(), b.String())
	if err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// unknownCommand finds a word that stands in the place of a command without being one. It looks before the flags are parsed: those of a mistyped
// command would be unknown first.
func unknownCommand(root *cobra.Command, args []string) error {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd(args...)
	if len(args) > 0 && (args[0] == "help" || strings.HasPrefix(args[0], "__complete")) { // the second is the shell's
		args = slices.Clone(args[1:])
		if len(args) > 0 && slices.Contains([]string{"-h", "--help"}, args[0]) {
			return nil
		}
	}
	cmd, rest, err := root.Find(args)
	if err != nil {
		cmd = root
	}
	word := firstWord(cmd, rest)
	if !cmd.HasSubCommands() || word == "" {
		return nil
	}
	cmd.SuggestionsMinimumDistance = 2
	typed := strings.TrimPrefix(cmd.CommandPath()+" "+word, root.Name()+" ")
	var near []string
	for _, name := range cmd.SuggestionsFor(word) {
		near = append(near, strings.TrimPrefix(cmd.CommandPath()+" "+name, root.Name()+" "))
	}
	if len(near) == 0 {
		near = deeper(root, word)
	}
	if len(near) == 0 {
		return fmt.Errorf("unknown command %q: `%s --help` lists the commands", typed, cmd.CommandPath())
	}
	slices.Sort(near)
	return fmt.Errorf("unknown command %q: did you mean %s?", typed, strings.Join(near, " or "))
}

// firstWord is the first argument that is neither a flag nor the value of one.
func firstWord(cmd *cobra.Command, args []string) string {
	for i := 0; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--":
			return ""
		case !strings.HasPrefix(arg, "-") || arg == "-":
			return arg
		case strings.Contains(arg, "="):
		default:
			f := cmd.Flag(strings.TrimLeft(arg, "-"))
			if f == nil && len(arg) == 2 {
				f = cmd.Flags().ShorthandLookup(arg[1:])
			}
			if name := strings.TrimLeft(arg, "-"); f == nil && slices.Contains([]string{"h", "help", "v", "version"}, name) || f != nil && f.NoOptDefVal != "" {
				continue
			}
			i++ // its value
		}
	}
	return ""
}

// deeper are the commands of a name that stand elsewhere: `usher tail` means `usher events tail`.
func deeper(cmd *cobra.Command, name string) []string {
	var found []string
	for _, group := range cmd.Commands() {
		if group.Name() == name {
			found = append(found, name)
		}
		for _, sub := range group.Commands() {
			if sub.Name() == name && sub.IsAvailableCommand() && group.Name() != "completion" {
				found = append(found, group.Name()+" "+name)
			}
		}
	}
	return found
}

// unknownFlag names the flag that was probably meant, and says in words what a number must be.
func unknownFlag(cmd *cobra.Command, err error) error {
	var number *strconv.NumError
	var wrong *pflag.InvalidValueError
	if errors.As(err, &number) && errors.As(err, &wrong) {
		want := "a whole number"
		if wrong.GetFlag().Value.Type() == "float64" {
			want = "a number"
		}
		if errors.Is(err, strconv.ErrRange) {
			want = "a smaller number"
		}
		return fmt.Errorf("--%s %q: want %s", wrong.GetFlag().Name, wrong.GetValue(), want)
	}
	var missing *pflag.NotExistError
	if !errors.As(err, &missing) || len(missing.GetSpecifiedName()) < 2 {
		return err
	}
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, f.Name)
		}
	})
	near := nearest(missing.GetSpecifiedName(), names, 2)
	if len(near) == 0 {
		return fmt.Errorf("%w: `%s --help` lists the flags", err, cmd.CommandPath())
	}
	return fmt.Errorf("%w: did you mean --%s?", err, strings.Join(near, " or --"))
}
