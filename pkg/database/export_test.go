package database

import "testing"

// SchemaColumns is how many columns the tables of the migrations have.
func SchemaColumns(t *testing.T) int {
	t.Helper()
	columns, err := schemaColumns()
	if err != nil {
		t.Fatal(err)
	}
	return len(columns)
}

// OpenErrorOf is how an error of a server of this URL is told.
func OpenErrorOf(address string, err error) error {
	u, parsing := parsePostgres(address, "DATABASE_URL")
	if parsing != nil {
		return parsing
	}
	return u.openError(err)
}

// ClearTextOf is what is told of a URL whose connection others may read.
func ClearTextOf(t *testing.T, address string) string {
	t.Helper()
	u, err := parsePostgres(address, "DATABASE_URL")
	if err != nil {
		t.Fatal(err)
	}
	return u.clearText()
}
