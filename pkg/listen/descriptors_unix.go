//go:build unix

package listen

import (
	"math"
	"syscall"
)

// Descriptors is how many files and connections this process may have open. Go has raised the soft limit to the hard one at the start.
func Descriptors() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1024 // what a shell gives
	}
	return int(min(uint64(limit.Cur), math.MaxInt32)) //nolint:unconvert // the types differ between systems
}
