package allinone

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/mirror"
)

// DevSchema is the schema of dev in a PostgreSQL.
const DevSchema = "usher_dev"

// devMark is SQLite's application_id of a database that dev made, and devComment the comment of its schema in PostgreSQL.
const (
	devMark    = "1970497636" // "ushd"
	devComment = "made by usher dev"
)

// errNotDevs ends the refusals of a database.
var errNotDevs = errors.New("dev invents users and does not mix them with others: leave out --database-url, or give an empty database, " +
	"or an empty schema by --database-schema")

// takeDatabase refuses a database that holds rows which dev did not make, or which are of none of the sources, and marks one without rows
// as dev's.
func takeDatabase(ctx context.Context, db *gorm.DB, schema string, sources []string) error {
	db = db.WithContext(ctx)
	tables, marked, err := inspect(db, schema)
	if err != nil {
		return fmt.Errorf("look whose database it is: %w", err)
	}
	for _, table := range tables {
		var rows bool
		if err := db.Raw(`SELECT EXISTS (SELECT 1 FROM "` + strings.ReplaceAll(table, `"`, `""`) + `")`).Scan(&rows).Error; err != nil {
			return fmt.Errorf("look whose database it is: %w", err)
		}
		if rows && !marked {
			return fmt.Errorf("refuse the database: table %s holds rows that dev did not make; %w", table, errNotDevs)
		}
	}
	if marked && slices.Contains(tables, "organizations") { // behind users
		unknown, err := mirror.UnknownSources(ctx, db, sources)
		if err != nil {
			return fmt.Errorf("look whose database it is: %w", err)
		}
		if len(unknown) > 0 {
			return fmt.Errorf("refuse the database: %s; %w", strings.Join(unknown, "; "), errNotDevs)
		}
	}
	if marked {
		return nil
	}
	mark := []string{"PRAGMA application_id = " + devMark}
	if database.IsPostgres(db) {
		mark = []string{`CREATE SCHEMA IF NOT EXISTS "` + schema + `"`, `COMMENT ON SCHEMA "` + schema + `" IS '` + devComment + `'`}
	}
	for _, statement := range mark {
		if err := db.Exec(statement).Error; err != nil {
			return fmt.Errorf("mark the database as dev's: the user must own the schema, or be allowed to create it: %w", err)
		}
	}
	return nil
}

// inspect lists the tables of the schema (SQLite: of the file) but for that of the migrations, and says whether dev has marked it.
func inspect(db *gorm.DB, schema string) (tables []string, marked bool, err error) {
	list := db.Raw("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT IN ('sqlite_sequence', 'sqlite_stat1', 'goose_db_version')")
	mark := db.Raw("SELECT application_id FROM pragma_application_id")
	want := devMark
	if database.IsPostgres(db) {
		list = db.Raw("SELECT tablename FROM pg_tables WHERE schemaname = ? AND tablename <> 'goose_db_version'", schema)
		mark = db.Raw("SELECT obj_description(oid, 'pg_namespace') FROM pg_namespace WHERE nspname = ?", schema)
		want = devComment
	}
	var is *string
	err = errors.Join(list.Scan(&tables).Error, mark.Scan(&is).Error)
	return tables, is != nil && *is == want, err
}
