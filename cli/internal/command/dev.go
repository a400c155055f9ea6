package command

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/listen"
	"github.com/usherhq/usher/pkg/mirror"
)

type devOptions struct {
	demo, exit bool
	users      int
	seed       uint64
	output     output
}

// before is how long ago the emulator's clock begins. A story takes 40 days, and then a while for each who signs up; its end must not be
// in the future, where no event is believed.
func (o *devOptions) before() time.Duration {
	const day = 24 * time.Hour
	if !o.demo {
		return day
	}
	return 45*day + time.Duration(o.users)*time.Minute
}

func (c *cli) dev() *cobra.Command {
	var o devOptions
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run everything in one process, to try and to develop, and leave nothing behind",
		Long: "dev runs Usher with an embedded broker and a throw-away database, whatever the environment says of others, and makes up\n" +
			"a signing secret where none is set. It uses another database only by --database-url, in PostgreSQL in the schema usher_dev,\n" +
			"which it keeps, and only where no rows but its own are. Where a default port is taken it uses the next free one.\n" +
			"An offline Clerk answers for Clerk's API, unless CLERK_SECRET_KEY is set: what `usher trigger` sends has happened there, and\n" +
			"`usher verify` compares with it. With --demo it tells a story of sign-ups, sessions,\n" +
			"organizations and deletions with all event types, delivers 5% of the events twice and 10% out of order; some\n" +
			"fail twice, one is dead-lettered, repaired and replayed; and a ledger shows what became of every one.",
		Example: "  usher dev\n  usher dev --demo\n  usher dev --demo --exit --output json\n  usher trigger user.created   # in another terminal",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.exit && !o.demo {
				return errors.New("--exit needs --demo")
			}
			if o.users < 1 {
				return fmt.Errorf("--users %d: want 1 or more", o.users)
			}
			return c.runDev(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.demo, "demo", false, "let the emulator tell a story and print the ledger")
	cmd.Flags().BoolVar(&o.exit, "exit", false, "stop after the demo; exit code 0 only when its ledger balances")
	cmd.Flags().IntVar(&o.users, "users", 200, "users in the demo's story")
	cmd.Flags().Uint64Var(&o.seed, "seed", 0, "seed of the demo's story; the same seed tells the same story, with the same events twice and out of order; ids and times are of the day (default: random)")
	outputFlag(cmd, &o.output)
	c.settingFlags(cmd, allSettings()...)
	return cmd
}

func (c *cli) runDev(ctx context.Context, o devOptions) (err error) {
	start := time.Now()
	key := make([]byte, 24)
	_, _ = rand.Read(key)
	settings, dir, made, notes, err := c.devSettings(ctx, "whsec_"+base64.StdEncoding.EncodeToString(key))
	if err != nil {
		return err
	}
	for _, note := range notes {
		_, _ = fmt.Fprintln(c.env.Stderr, "note:", note)
	}
	log, err := c.logger(settings)
	if err != nil {
		return err
	}
	info := c.env.Stdout
	if o.output != outputTable {
		info = c.env.Stderr
	}
	cfg := allinone.Config{
		Settings: settings, Mode: "dev", Dir: dir, Ephemeral: true, SigningSecret: made, Log: log,
	}
	var clerk *emulator.Clerk // nil: the real one
	faults := &demoFaults{flaky: map[string]bool{}}
	if o.demo {
		cfg.ChangeWorker = faults.change
		if c.flags["USHER_LOG_LEVEL"] == devLogLevel {
			cfg.Log = zap.NewNop() // the demo tells its failures itself
		}
		o.seed = cmp.Or(o.seed, mathrand.Uint64())
	}
	if o.demo || settings.ClerkSecretKey == "" {
		clerk = emulator.New(emulator.Config{Seed: o.seed, InstanceID: settings.ClerkInstanceID, Start: time.Now().Add(-o.before()), NULs: true})
		cfg.ClerkSecretKey = "sk_test_" + base64.RawURLEncoding.EncodeToString(key)
		var stop func()
		if cfg.ClerkAPIURL, stop, err = serveClerk(clerk, cfg.ClerkSecretKey); err != nil {
			return err
		}
		defer stop()
	}
	told := false
	err = c.run(ctx, cfg, func(ctx context.Context, i *allinone.Instance) error {
		if clerk != nil {
			if err := remember(ctx, i.DB, clerk); err != nil {
				return err
			}
		}
		_, _ = fmt.Fprintf(info, "Usher is ready (%.1f s).\n\n", time.Since(start).Seconds())
		banner(info, i, settings, made)
		if o.demo {
			err := c.demo(ctx, i, settings, faults, o, clerk, info)
			told = err == nil
			if err != nil || o.exit {
				return err
			}
		}
		if clerk == nil {
			_, _ = fmt.Fprintln(info, "CLERK_SECRET_KEY is set: `usher verify` and sweeps ask that Clerk, which does not know what `usher trigger` makes up.")
		}
		_, _ = fmt.Fprintf(info, "Try `usher trigger user.created`, `usher verify` and `usher events list` in another terminal. Stop with Ctrl-C (process %d).\n", os.Getpid())
		<-ctx.Done()
		return nil
	})
	if err == nil && o.exit && !told { // nothing balanced
		return fmt.Errorf("the demo did not come to its end: %w", context.Cause(ctx))
	}
	return err
}

// remember lets the offline Clerk have what a database that was kept has of its last life: else all of that would be drift.
func remember(ctx context.Context, db *gorm.DB, clerk *emulator.Clerk) error {
	for _, table := range emulator.Tables() {
		for row, err := range mirror.All(ctx, db, table) {
			if err != nil {
				return fmt.Errorf("read the database that was kept: %w", err)
			}
			if row.DeletedAt == nil && row.Version > 0 {
				clerk.Remember(table, row.Raw)
			}
		}
	}
	return nil
}

// serveClerk serves the Backend API of an emulated Clerk on a loopback port, so that `usher verify` can compare a demo's mirror
// with it.
func serveClerk(clerk *emulator.Clerk, key string) (url string, stop func(), err error) {
	listener, err := listen.Open("127.0.0.1:0", listen.Options{Name: "clerk", Share: 16, Most: 64})
	if err != nil {
		return "", nil, fmt.Errorf("serve the emulated Clerk: %w", err)
	}
	server := &http.Server{Handler: clerk.API(emulator.APIConfig{Key: key}), ReadHeaderTimeout: 5 * time.Second}
	listener.Attach(server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener) // ends with stop
	}()
	return "http://" + listener.Addr().String() + "/v1", func() { _ = server.Close(); <-done }, nil
}
