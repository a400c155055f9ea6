// Command usher keeps a database true to a Clerk instance: everything in one process, and the
// tools of its operators.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/usherhq/usher/cli/internal/command"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return command.Run(ctx, os.Args[1:], command.Env{
		Environ: os.Environ(), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
	})
}
