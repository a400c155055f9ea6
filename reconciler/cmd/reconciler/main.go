// Command reconciler runs the service that compares Clerk with the mirror. It takes its settings from the environment
// and no arguments.
package main

import (
	"context"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/lag"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/process"
	"github.com/usherhq/usher/reconciler"
)

var program = process.Program{
	Name:     reconciler.Name,
	Short:    "reconciler compares Clerk's API with the mirror, publishes events for what was missed, and notices when no webhook comes.",
	OpsAddr:  "127.0.0.1:8084",
	Database: true,
	Start:    start,
}

func main() { process.Main(program) }

func start(ctx context.Context, p *process.Process) (lifecycle.Service, error) {
	cfg := reconciler.ConfigFrom(p.Settings)
	var db *gorm.DB
	if len(cfg.Sources) > 0 { // without a key there is nothing to compare
		var err error
		if db, err = database.Await(ctx, p.Settings.DatabaseURL, p.Settings.DatabaseSchema, p.Log, p.WaitingForDatabase, p.Settings.DatabaseSetting()); err != nil {
			return nil, err
		}
		p.Closers.Add(func() error { return database.Close(db) })
		if err := database.AwaitMigrated(ctx, db, p.Log, p.WaitingForDatabase); err != nil {
			return nil, err
		}
	}
	js, err := p.Connect()
	if err != nil {
		return nil, err
	}
	watch, err := lag.New(js, db, p.Log, p.Registry)
	if err != nil {
		return nil, err
	}
	p.Beside = append(p.Beside, watch)
	return reconciler.New(cfg, reconciler.Deps{
		JetStream: js, DB: db, Log: p.Log, Registerer: p.Registry, Health: p.Health,
	})
}
