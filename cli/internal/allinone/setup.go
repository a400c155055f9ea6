package allinone

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/stream"
)

// SetupReport is what Setup did and found. Its lists are never nil.
type SetupReport struct {
	Broker     *stream.Durability `json:"broker,omitempty"` // whether it syncs; Setup does not ask
	Migrations Migrations         `json:"migrations"`
	Streams    Streams            `json:"streams"`
	// ForeignKeys are those that others made on Usher's tables, or to them. Nothing changes them.
	ForeignKeys []database.ForeignKey `json:"foreign_keys"`
}

// Migrations of the database, by name and in order.
type Migrations struct {
	Applied []string `json:"applied"`
	Pending []string `json:"pending"` // what a plan would apply
}

// Streams are the streams and consumers, such as "stream CLERK_EVENTS" and "consumer mirror".
type Streams struct {
	Present     []string            `json:"present"`
	Created     []string            `json:"created"`
	Missing     []string            `json:"missing"` // what a plan would create
	Differences []stream.Difference `json:"differences"`
	Changed     []stream.Difference `json:"changed"` // differences that were ended
}

// Mode says how much Setup may change.
type Mode int

const (
	Plan   Mode = iota // nothing
	Create             // the database, and what is missing on the broker; what exists there is compared
	Apply              // what differs on the broker too, as far as it changes that in place
)

// Setup brings the database and the broker to what this program needs: it applies pending migrations, creates missing streams and
// consumers and compares those that exist. It may run at any time and from several places at once. After an error the report
// holds what was done before it.
func Setup(ctx context.Context, db *gorm.DB, js jetstream.JetStream, topology stream.Topology, how Mode) (SetupReport, error) {
	report := SetupReport{
		Migrations:  Migrations{Applied: []string{}, Pending: []string{}},
		Streams:     Streams{Present: []string{}, Created: []string{}, Missing: []string{}, Differences: []stream.Difference{}, Changed: []stream.Difference{}},
		ForeignKeys: []database.ForeignKey{},
	}
	// The broker is asked before the database is changed: a setup that cannot end should not begin.
	found, err := topology.Check(ctx, js)
	if err != nil {
		return report, fmt.Errorf("check streams: %w", stream.Explain(err))
	}
	report.Streams.Present, report.Streams.Differences, report.Streams.Missing = found.Present, found.Differences, found.Missing
	pending, err := database.Pending(ctx, db)
	if err != nil {
		return report, fmt.Errorf("check migrations: %w", err)
	}
	report.Migrations.Pending = append(report.Migrations.Pending, pending...)
	keys, err := database.ForeignKeys(ctx, db)
	if err != nil {
		return report, err
	}
	report.ForeignKeys = append(report.ForeignKeys, keys...)
	if how == Plan {
		return report, nil
	}

	if len(pending) > 0 {
		applied, err := database.Migrate(ctx, db)
		report.Migrations.Applied = append(report.Migrations.Applied, applied...)
		if err != nil {
			return report, err
		}
		report.Migrations.Pending = []string{}
	}
	if len(found.Missing) > 0 || how == Apply && len(found.Differences) > 0 {
		made, err := ensureStreams(ctx, js, topology, how)
		report.Streams.Changed = made.Changed
		if err != nil {
			return report, err
		}
		report.Streams.Present, report.Streams.Differences = made.Present, made.Differences
		report.Streams.Created, report.Streams.Missing = made.Missing, []string{}
	}
	return report, nil
}

// ensureStreams creates the streams and consumers that are missing, and with [Apply] changes those that differ.
func ensureStreams(ctx context.Context, js jetstream.JetStream, topology stream.Topology, how Mode) (stream.Plan, error) {
	ensure := topology.Ensure
	if how == Apply {
		ensure = topology.Apply
	}
	made, err := ensure(ctx, js)
	err = stream.Explain(err)
	if errors.Is(err, stream.ErrStorage) {
		return made, fmt.Errorf("set up streams of USHER_STREAM_MAX_BYTES and a tenth more: %w, or lower the setting", err)
	}
	if err != nil {
		return made, fmt.Errorf("set up streams: %w", err)
	}
	return made, nil
}
