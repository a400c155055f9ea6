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
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/term"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/observe"
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
	told  bool              // the names of the environment that no setting has
}

// Run runs one command line (without the program's name) and returns its exit code. ctx is done when the user interrupts.
func Run(ctx context.Context, args []string, env Env) int {
	c := &cli{env: env, flags: map[string]string{}, args: args}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	if len(args) > 0 && strings.HasPrefix(args[0], cobra.ShellCompRequestCmd) { // cobra keeps what is registered for good, and only the shell asks
		c.complete(root)
	}
	err := unknownCommand(root, args)
	if err == nil {
		err = root.ExecuteContext(ctx)
	}
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
		if errors.As(err, new(failed)) { // a supervisor that does not repeat wrong use repeats this
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
	root.SetUsageFunc(usage)
	root.SetFlagErrorFunc(unknownFlag)
	c.addSettings(root.PersistentFlags(), globalSettings)
	root.AddCommand(c.dev(), c.serve(), c.setup(), c.trigger(), c.events(), c.backfill(), c.reconcile(), c.verify(), c.dlq(), c.replay(), c.portal(), c.schema(), c.config())
	return root
}

// settings are the effective ones: flags, then environment, then defaults. The first time, it warns about variables that look like
// settings without being any.
func (c *cli) settings() (*config.Settings, error) {
	if !c.told {
		for _, warning := range config.Environ(c.env.Environ).UnknownNames() {
			c.say("warning: %s", warning)
		}
		c.told = true
	}
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
