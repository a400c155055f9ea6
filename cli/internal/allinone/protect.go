package allinone

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/pkg/config"
)

// brokerFolder holds the embedded broker's store, within the folder of the mode.
const brokerFolder = "nats"

// isOwn reports whether Usher makes a file or folder of this name in its data folder.
func isOwn(name string) bool {
	return slices.Contains([]string{"dev", brokerFolder, "usher.lock", "usher.db"}, name) ||
		slices.ContainsFunc([]string{"usher.db-", "usher.json", console.TokenFile}, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// others are the modes by which others than the owner read or change a file.
const others fs.FileMode = 0o077

// protect takes from others what they may do with Usher's own files in the data folder, and says so: they hold addresses, tokens and every
// event. The folder itself too, unless something else lies in it, as where it is a home or /tmp. What is a link or belongs to another user is
// left as it is, with a warning.
func protect(dir string, log *zap.Logger) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look at the data folder: %w", err)
	}
	root, err := os.OpenRoot(dir) // whatever others put there meanwhile, nothing outside of it is changed
	if err != nil {
		return fmt.Errorf("look at the data folder: %w", err)
	}
	defer root.Close()
	shared := false
	for _, entry := range entries {
		if isOwn(entry.Name()) {
			tighten(root, entry.Name(), log)
		} else {
			shared = true
		}
	}
	info, err := root.Stat(".")
	if err != nil {
		return fmt.Errorf("look at the data folder: %w", err)
	}
	if shared && !config.Foreign(info) {
		if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
			log.Warn("others on this machine can replace Usher's files: set USHER_DATA_DIR to a folder that only Usher uses, or chmod go-w this one",
				zap.String("folder", dir), zap.String("mode", info.Mode().Perm().String()))
		}
		return nil
	}
	tighten(root, ".", log)
	return nil
}

func tighten(root *os.Root, name string, log *zap.Logger) {
	path := zap.String("path", filepath.Join(root.Name(), name))
	info, err := root.Lstat(name)
	switch {
	case err != nil: // gone meanwhile
	case info.Mode()&fs.ModeSymlink != 0:
		if target, err := os.Stat(filepath.Join(root.Name(), name)); err == nil && (target.Mode().Perm()&others != 0 || config.Foreign(target)) {
			log.Warn("others on this machine can read what this link leads to, and it is left as it is: chmod go= it", path, zap.String("mode", target.Mode().Perm().String()))
		}
	case config.Foreign(info):
		log.Warn("belongs to another user, who can read and change it: chown it to the user that Usher runs as", path)
	case config.HasModes && info.Mode().Perm()&others != 0:
		mode := info.Mode().Perm() &^ others
		was := zap.String("was", info.Mode().Perm().String())
		if err := root.Chmod(name, mode); err != nil {
			log.Warn("others on this machine can read it, and its mode cannot be changed", path, was, zap.Error(err))
			return
		}
		log.Warn("others on this machine could read it: its mode was changed", path, was, zap.String("is", mode.String()))
		if name == console.TokenFile {
			log.Warn("others may know the admin token: delete the file and restart, and a new one is made", path)
		}
	}
}
