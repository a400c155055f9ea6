// Package command is the usher command line. Commands get their arguments, environment and streams
// as parameters, so that a test runs them like a shell does. Data goes to stdout, everything else
// to stderr; the exit codes are 0 ok, 1 the answer is "no", 2 wrong use or could not check, 130 interrupted.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/term"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/redact"
)

// Env is what a command has of the world.
type Env struct {
	Environ []string
	Stdin   io.Reader
	Stdout  io.Writer
	Stderr  io.Writer
}

// Exit codes.
const (
	exitOK          = 0
	exitNo          = 1
	exitUsage       = 2
	exitInterrupted = 130
)

// errNo is the answer "no" (drift, refused events, an unbalanced ledger) after everything was printed.
var errNo = errors.New("no")

// cli is what all commands share.
type cli struct {
	env   Env
	flags map[string]string // settings given as flags, by setting name
	args  []string          // the command line
}

// Run runs one command line (without the program's name) and returns its exit code. ctx is done when the user interrupts.
func Run(ctx context.Context, args []string, env Env) int {
	c := &cli{env: env, flags: map[string]string{}, args: args}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errNo):
		return exitNo
	case ctx.Err() != nil:
		fmt.Fprintln(env.Stderr, "interrupted")
		return exitInterrupted
	default:
		fmt.Fprintln(env.Stderr, "usher:", printableLines(err.Error()))
		if errors.Is(err, allinone.ErrFrozen) { // a supervisor that does not repeat wrong use repeats this
			return exitNo
		}
		return exitUsage
	}
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "usher",
		Short: "Keep a database true to a Clerk instance",
		Long: "Usher takes Clerk's webhooks, makes each one durable before it answers, applies them to PostgreSQL or SQLite\n" +
			"exactly once in effect, and tells operators what happened.",
		Example:       "  usher dev --demo\n  usher serve\n  usher events list --type 'user.*' --output json",
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       Version(),
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	// Every setting that is not a secret is a flag too; those of all commands are shown with them, the others
	// with the commands that start services.
	c.settingFlags(root, true)
	root.AddCommand(c.dev(), c.serve(), c.setup(), c.trigger(), c.events(), c.backfill(), c.reconcile(), c.verify(), c.dlq(), c.replay(), c.portal(), c.schema(), c.config())
	return root
}

// connection are the settings that every command may need.
var connection = []string{"USHER_DATA_DIR", "USHER_DATABASE_URL", "USHER_DATABASE_SCHEMA", "USHER_NATS_URL", "USHER_NATS_CREDS", "USHER_NATS_CA", "USHER_NATS_CERT", "USHER_NATS_KEY", "USHER_LOG_LEVEL", "USHER_LOG_FORMAT"}

// settingFlags adds a flag for each setting: USHER_DATA_DIR is --data-dir. Secrets have none, since a command
// line is visible to everyone on the machine; URLs have, for those without a password.
func (c *cli) settingFlags(cmd *cobra.Command, global bool) {
	for _, s := range config.Describe() {
		isConnection := slices.Contains(connection, s.Name)
		if isConnection != global || s.Secret && !s.URL || s.Name == "DATABASE_URL" {
			continue
		}
		set := cmd.Flags()
		if global {
			set = cmd.PersistentFlags()
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
	}
}

// settings are the effective ones: flags, then environment, then defaults.
func (c *cli) settings() (*config.Settings, error) {
	return config.Load(c.env.Environ, c.flags)
}

// logger writes to stderr whatever the command's output is.
func (c *cli) logger(s *config.Settings) (*zap.Logger, error) {
	return observe.NewLogger(s.LogLevel, s.LogFormat)
}

// isTerminal tells whether a person looks at the stream.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
