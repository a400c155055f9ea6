//go:build linux || darwin || freebsd

package allinone

import (
	"fmt"
	"syscall"
)

// freeSpace is how many bytes an ordinary user can still write to the file system of a folder.
func freeSpace(dir string) (int64, error) {
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		return 0, fmt.Errorf("ask for the free space of %s: %w", dir, err)
	}
	return int64(s.Bavail) * int64(s.Bsize), nil //nolint:unconvert // the types differ between systems
}
