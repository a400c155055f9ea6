// Command worker runs Usher's handlers as a process of its own. It takes its settings from the environment and no
// arguments.
package main

import (
	"context"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/lag"
	"github.com/usherhq/usher/pkg/lifecycle"
	"github.com/usherhq/usher/pkg/process"
	"github.com/usherhq/usher/worker"
)

var program = process.Program{
	Name:     "worker",
	Short:    "worker applies the events of the stream to the database.",
	OpsAddr:  "127.0.0.1:8083",
	Database: true,
	Check:    func(s *config.Settings) error { return worker.ConfigFrom(s).Validate() },
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
	return worker.New(worker.ConfigFrom(p.Settings), worker.Deps{
		JetStream: js, DB: db, Log: p.Log, Registerer: p.Registry, Health: p.Health,
	})
}
