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
