package database_test

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

func TestClearTextToAnotherMachineIsWarnedAbout(t *testing.T) {
	t.Parallel()
	const advice = " in clear text: add sslmode=require to the URL, or better sslmode=verify-full with sslrootcert"
	for address, want := range map[string]string{
		"postgres://u:hush@127.0.0.1/db":                                   "",
		"postgres://u:hush@[::1]:5432/db":                                  "",
		"postgres://u:hush@localhost/db?sslmode=disable":                   "",
		"postgres:///db?host=/var/run/postgresql&user=u":                   "",
		"postgres://u:hush@db.example/db?sslmode=require":                  "",
		"postgres://u:hush@db.example/db?sslmode=no-verify":                "",
		"postgres://u:hush@db.example/db?ssl=true":                         "",
		"postgres://u:hush@db.example/db?sslmode=verify-full":              "",
		"postgres://u:hush@db.example/db?sslmode=require&sslaccept=strict": "",
		"postgres://u:hush@db.example/db?sslmode=disable":                  "DATABASE_URL: the login and rows may reach db.example",
		"postgres://u:hush@db.example/db?sslmode=prefer":                   "DATABASE_URL: the login and rows may reach db.example",
		"postgres://u:hush@db.example/db?sslmode=allow&schema=public":      "DATABASE_URL: the login and rows may reach db.example",
		"postgresql://u:hush@a.example,127.0.0.1,b.example/db":             "DATABASE_URL: the login and rows may reach a.example, b.example",
	} {
		if want != "" {
			want += advice
		}
		assert.Equal(t, want, database.ClearTextOf(t, address), address)
	}
}

// TestAFileThatEveryoneCanReadIsWarnedAbout: a database that is named by its path may be meant for a group, and is left as it is.
func TestAFileThatEveryoneCanReadIsWarnedAbout(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("its files do not say who may read them")
	}
	path := filepath.Join(t.TempDir(), "usher.db")
	db := dbtest.Open(t, "sqlite:"+path)
	for mode, warned := range map[os.FileMode]bool{0o600: false, 0o640: false, 0o660: false, 0o644: true, 0o602: true} {
		require.NoError(t, os.Chmod(path, mode))
		warnings, err := database.Warnings(t.Context(), db)
		require.NoError(t, err)
		assert.Equal(t, warned, len(warnings) == 1 && strings.Contains(warnings[0], path+" (mode "), "%s: %s", mode, warnings)
	}
}
