package allinone

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/pkg/config"
)

// modes are what lies in a folder.
func modes(t *testing.T, dir string) map[string]fs.FileMode {
	t.Helper()
	found := map[string]fs.FileMode{}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, entry := range entries {
		info, err := os.Stat(filepath.Join(dir, entry.Name()))
		require.NoError(t, err)
		found[entry.Name()] = info.Mode().Perm()
	}
	info, err := os.Stat(dir)
	require.NoError(t, err)
	found["."] = info.Mode().Perm()
	return found
}

func place(t *testing.T, dir, name string, mode fs.FileMode) {
	t.Helper()
	path := filepath.Join(dir, name)
	if mode.IsDir() {
		require.NoError(t, os.Mkdir(path, 0o700))
	} else {
		require.NoError(t, os.WriteFile(path, []byte("x"), 0o600))
	}
	require.NoError(t, os.Chmod(path, mode.Perm()))
}

// told are the paths of the log's lines, relative to the folder.
func told(dir string, logs *observer.ObservedLogs) map[string][]string {
	lines := map[string][]string{}
	for _, entry := range logs.All() {
		path, _ := entry.ContextMap()["path"].(string)
		if path == "" {
			path, _ = entry.ContextMap()["folder"].(string)
		}
		name, _ := filepath.Rel(dir, path)
		lines[name] = append(lines[name], entry.Message)
	}
	return lines
}

func TestWhatOthersCouldReadInTheDataFolderIsClosed(t *testing.T) {
	t.Parallel()
	if !config.HasModes {
		t.Skip("this system's files do not say who may read them")
	}
	const changed = "others on this machine could read it: its mode was changed"
	t.Run("a folder of Usher's own", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		require.NoError(t, os.Chmod(dir, 0o755))
		place(t, dir, "usher.db", 0o644)
		place(t, dir, "usher.db-wal", 0o644)
		place(t, dir, "usher.json", 0o666)
		place(t, dir, "usher.lock", 0o600)
		place(t, dir, console.TokenFile, 0o640)
		place(t, dir, "nats", fs.ModeDir|0o755)
		core, logs := observer.New(zap.WarnLevel)
		require.NoError(t, protect(dir, zap.New(core)))
		assert.Equal(t, map[string]fs.FileMode{
			".": 0o700, "usher.db": 0o600, "usher.db-wal": 0o600, "usher.json": 0o600, "usher.lock": 0o600, console.TokenFile: 0o600, "nats": 0o700,
		}, modes(t, dir))
		assert.Equal(t, map[string][]string{
			".": {changed}, "usher.db": {changed}, "usher.db-wal": {changed}, "usher.json": {changed}, "nats": {changed},
			console.TokenFile: {changed, "others may know the admin token: delete the file and restart, and a new one is made"},
		}, told(dir, logs))
		require.NoError(t, protect(dir, zap.New(core)))
		assert.Len(t, logs.All(), 7, "said once")
	})
	t.Run("a folder of others, with links", func(t *testing.T) {
		t.Parallel()
		dir, elsewhere := t.TempDir(), t.TempDir()
		require.NoError(t, os.Chmod(dir, 0o777))
		place(t, elsewhere, "mine.db", 0o644)
		place(t, elsewhere, "closed", 0o600)
		require.NoError(t, os.Symlink(filepath.Join(elsewhere, "mine.db"), filepath.Join(dir, "usher.db")))
		require.NoError(t, os.Symlink(filepath.Join(elsewhere, "closed"), filepath.Join(dir, console.TokenFile)))
		place(t, dir, "package.json", 0o644)
		place(t, dir, "usher.json", 0o644)
		core, logs := observer.New(zap.WarnLevel)
		require.NoError(t, protect(dir, zap.New(core)))
		assert.Equal(t, map[string]fs.FileMode{".": 0o777, "usher.db": 0o644, console.TokenFile: 0o600, "package.json": 0o644, "usher.json": 0o600}, modes(t, dir))
		assert.Equal(t, map[string][]string{
			".":          {"others on this machine can replace Usher's files: set USHER_DATA_DIR to a folder that only Usher uses, or chmod go-w this one"},
			"usher.db":   {"others on this machine can read what this link leads to, and it is left as it is: chmod go= it"},
			"usher.json": {changed},
		}, told(dir, logs))
	})
	t.Run("a folder of others that nobody else writes to", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		require.NoError(t, os.Chmod(dir, 0o755))
		place(t, dir, "package.json", 0o644)
		core, logs := observer.New(zap.WarnLevel)
		require.NoError(t, protect(dir, zap.New(core)))
		assert.Equal(t, map[string]fs.FileMode{".": 0o755, "package.json": 0o644}, modes(t, dir))
		assert.Empty(t, logs.All())
	})
	t.Run("what belongs to another user", func(t *testing.T) {
		t.Parallel()
		if os.Geteuid() != 0 {
			t.Skip("only root can give a file to another user")
		}
		dir := t.TempDir()
		place(t, dir, "usher.db", 0o644)
		require.NoError(t, os.Chown(filepath.Join(dir, "usher.db"), 4711, 4711))
		core, logs := observer.New(zap.WarnLevel)
		require.NoError(t, protect(dir, zap.New(core)))
		assert.Equal(t, fs.FileMode(0o644), modes(t, dir)["usher.db"])
		assert.Contains(t, told(dir, logs)["usher.db"][0], "belongs to another user")
	})
}
