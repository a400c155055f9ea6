package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/redact"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// reach finds the broker, the database and the ingest for a command: what a flag or the environment names comes first,
// else the running instance of the data folder. It opens only what is asked for; close ends that.
type reach struct {
	cli      *cli
	settings *config.Settings
	// state is the running instance; stateErr says why there is none.
	state    allinone.State
	stateErr error
	closers  lifecycle.Closers
}

func (c *cli) reach() (*reach, error) {
	settings, err := c.settings()
	r := &reach{cli: c, settings: settings}
	r.state, r.stateErr = allinone.ReadState(settings.DataDir)
	if r.stateErr == nil && r.state.Mode == "dev" { // what dev does not look at is not meant beside it either
		environ, ignored := devEnvironment(c.env.Environ, c.flags)
		r.settings, err = config.Load(environ, c.flags)
		ignored = slices.DeleteFunc(ignored, func(name string) bool { return name == "DATABASE_URL" }) // applications have it in every shell
		if len(ignored) > 0 {
			_, _ = fmt.Fprintf(c.env.Stderr, "note: %s not used: `usher dev` runs in %s, and that is what is meant; others by flag (--database-url, --nats-url)\n",
				isAre(ignored), settings.DataDir)
		}
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// isAre lists names, with the verb.
func isAre(names []string) string {
	verb := " is"
	if len(names) > 1 {
		verb = " are"
	}
	return strings.Join(names, ", ") + verb
}

func (r *reach) close() { _ = r.closers.Close() }

// given tells whether the user named a setting for this command, rather than leaving it to the default.
func (r *reach) given(setting string) bool {
	origin := r.settings.Origin(setting)
	return origin == "flag" || origin == "environment"
}

var errNoBroker = errors.New("check that it runs and that USHER_NATS_URL is right")

// broker connects to the broker. It does not wait for one that is away; a connection that is lost later comes back by
// itself.
func (r *reach) broker() (jetstream.JetStream, error) {
	s := r.settings
	address, creds, files := s.NATSURL, s.NATSCreds, stream.TLS(s.NATSCA, s.NATSCert, s.NATSKey)
	if address == "" {
		if r.stateErr != nil {
			return nil, fmt.Errorf("find the broker: %w", r.stateErr)
		}
		address, creds, files = r.state.NATSURL, cmp.Or(creds, r.state.NATSCreds), stream.TLS(r.state.NATSCA, r.state.NATSCert, r.state.NATSKey)
	}
	log, err := r.cli.logger(r.settings)
	if err != nil {
		return nil, err
	}
	nc, err := stream.Connect(address, creds, "ops", log, files, nats.RetryOnFailedConnect(false))
	if err != nil {
		where := redact.Hosts(address)
		switch {
		case errors.Is(err, nats.ErrNoServers):
			return nil, fmt.Errorf("no broker answers at %s: %w", where, errNoBroker)
		case errors.Is(err, nats.ErrAuthorization):
			return nil, fmt.Errorf("the broker at %s refuses the user: check USHER_NATS_URL and USHER_NATS_CREDS", where)
		}
		return nil, fmt.Errorf("connect to the broker at %s: %w", where, stream.Explain(err))
	}
	r.closers.Add(func() error { nc.Close(); return nil })
	return stream.JetStream(nc)
}

// databaseURL decides which database is meant. Whoever runs `usher dev` beside an application has the application's
// DATABASE_URL in the environment; the running instance knows better.
func (r *reach) databaseURL() (address, schema string) {
	address, schema = r.settings.DatabaseURL, r.settings.DatabaseSchema
	if r.given("USHER_DATABASE_URL") || r.stateErr != nil {
		return address, schema
	}
	if r.state.DatabaseSchema != "" && !r.given("USHER_DATABASE_SCHEMA") {
		schema = r.state.DatabaseSchema
	}
	return r.state.DatabaseURL, schema
}

// database opens the database as it is: a SQLite file is not created, and pending migrations are an error.
func (r *reach) database(ctx context.Context) (*gorm.DB, error) {
	address, schema := r.databaseURL()
	if path, missing := missingFile(address); missing {
		if r.settings.Origin("USHER_DATABASE_URL") == "default" && r.stateErr != nil {
			return nil, fmt.Errorf("find the database: %s does not exist, and %w", path, r.stateErr)
		}
		return nil, fmt.Errorf("find the database: %s does not exist: check %s, or create it with `usher setup`", path, r.settings.DatabaseSetting())
	}
	db, err := r.open(ctx, address, schema)
	if err != nil {
		return nil, err
	}
	if err := database.CheckMigrated(ctx, db); err != nil {
		return nil, err
	}
	return db, nil
}

func (r *reach) open(ctx context.Context, address, schema string) (*gorm.DB, error) {
	setting := r.settings.DatabaseSetting()
	if address != r.settings.DatabaseURL {
		setting = "the database URL of the running Usher"
	}
	db, err := database.Open(ctx, address, schema, setting)
	if err != nil {
		return nil, err
	}
	r.closers.Add(func() error { return database.Close(db) })
	return db, nil
}

// missingFile tells whether a database URL names a SQLite file that is not there.
func missingFile(address string) (string, bool) {
	path, ok := strings.CutPrefix(address, "sqlite:")
	if !ok {
		return "", false
	}
	path = strings.TrimPrefix(path, "//")
	_, err := os.Stat(path)
	return path, errors.Is(err, os.ErrNotExist)
}

// planDatabase is for looking only: where the SQLite file is not there yet, an empty one in a temporary folder stands for it.
func (r *reach) planDatabase(ctx context.Context) (*gorm.DB, error) {
	address, schema := r.databaseURL()
	if _, missing := missingFile(address); missing {
		dir, err := os.MkdirTemp("", "usher-plan-")
		if err != nil {
			return nil, fmt.Errorf("make temporary folder: %w", err)
		}
		r.closers.Add(func() error { return os.RemoveAll(dir) })
		address = "sqlite:" + filepath.Join(dir, "usher.db")
	}
	return r.open(ctx, address, schema)
}

// instances are the Clerk instances that the events of a source must be of: what the settings name, else what the running instance
// of the data folder was started with.
func (r *reach) instances() map[string]string {
	instances := map[string]string{}
	if r.stateErr == nil && !r.given("USHER_NATS_URL") {
		maps.Copy(instances, r.state.Instances)
	}
	for source, id := range worker.ConfigFrom(r.settings).Instances {
		if id != "" {
			instances[source] = id
		}
	}
	return instances
}

// checkHandler refuses the name of a handler that nobody knows: none of this version, none that left a row in the delivery log, and no
// consumer of the stream. An empty name selects all.
func (r *reach) checkHandler(ctx context.Context, db *gorm.DB, name string) error {
	if name == "" {
		return nil
	}
	var known []string
	if err := handlers(db.WithContext(ctx)).Scan(&known).Error; err != nil {
		return fmt.Errorf("read the handlers: %w", err)
	}
	for _, spec := range worker.Specs() {
		known = append(known, spec.Name)
	}
	if slices.Contains(known, name) { // seldom otherwise, so the broker is seldom asked
		return nil
	}
	consumers, asked := r.consumers(ctx)
	known = append(known, consumers...)
	if slices.Contains(known, name) {
		return nil
	}
	slices.Sort(known)
	err := fmt.Errorf("--handler %q: there is no such handler; want one of %s", name, strings.Join(slices.Compact(known), ", "))
	if asked != nil {
		err = fmt.Errorf("%w (the broker could not be asked for more: %w)", err, asked)
	}
	return err
}

// consumers names those of the stream of events that belong to handlers, and not to somebody who only looks.
func (r *reach) consumers(ctx context.Context) ([]string, error) {
	js, err := r.broker()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	s, err := js.Stream(ctx, stream.Events)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", stream.Events, stream.Explain(err))
	}
	var names []string
	list := s.ListConsumers(ctx)
	for info := range list.Info() {
		if info.Config.Durable != "" {
			names = append(names, info.Name)
		}
	}
	if err := list.Err(); err != nil {
		return nil, fmt.Errorf("list consumers: %w", stream.Explain(err))
	}
	return names, nil
}

// requestTimeout bounds what a command that only looks may wait for one answer.
const requestTimeout = 15 * time.Second
