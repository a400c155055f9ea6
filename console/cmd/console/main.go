// Command console runs the service that shows what Usher does. It takes its settings from the environment
// and no arguments.
package main

import (
	"context"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/lag"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/process"
)

var program = process.Program{
	Name:     console.Name,
	Short:    "console serves the pages and the API of operators, and `ensure` for applications.",
	OpsAddr:  "127.0.0.1:8085",
	Database: true,
	Check:    func(s *config.Settings) error { return console.ConfigFrom(s).Validate() },
	Start:    start,
}

func main() { process.Main(program) }

func start(ctx context.Context, p *process.Process) (lifecycle.Service, error) {
	db, err := database.Await(ctx, p.Settings.DatabaseURL, p.Settings.DatabaseSchema, p.Log, p.WaitingForDatabase, p.Settings.DatabaseSetting())
	if err != nil {
		return nil, err
	}
	p.Closers.Add(func() error { return database.Close(db) })
	js, err := p.Connect()
	if err != nil {
		return nil, err
	}
	watch, err := lag.New(js, db, p.Log, p.Registry)
	if err != nil {
		return nil, err
	}
	p.Beside = append(p.Beside, watch)
	return console.New(console.ConfigFrom(p.Settings), console.Deps{
		JetStream: js, DB: db, Log: p.Log, Health: p.Health, Registerer: p.Registry,
	})
}
