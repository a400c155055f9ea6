package allinone

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/usherhq/usher/pkg/observe"
)

const (
	// frozenAfter is how long the broker's storage must fail before it counts as frozen; frozenEvery is how often it is looked at.
	frozenAfter = 5 * time.Second
	frozenEvery = time.Second
	// enoughSpace is the free space with which a restart is worth its while: less would freeze the broker again at once.
	enoughSpace = 64 << 20
)

// frozen ends the process where only a restart makes the embedded broker work again: a write of it failed, after which it takes nothing, and
// what kept it from writing (a full disk, no descriptor left) is over. Until then readiness says what to do. A supervisor starts
// the process again, and all that was confirmed is there.
type frozen struct {
	check        observe.Check // of the broker's storage
	dir          string
	after, every time.Duration
}

// errFrozen says that the embedded broker works again only in a new process. Starting it again helps, unlike with wrong settings.
var errFrozen = errors.New("the embedded broker froze, and its folder can be written again: only a restart makes it work")

func (frozen) Name() string { return "broker storage" }

func (f frozen) Run(ctx context.Context) error {
	ticker := time.NewTicker(f.every)
	defer ticker.Stop()
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			err := f.check()
			switch {
			case err == nil:
				since = time.Time{}
			case since.IsZero():
				since = now
			case now.Sub(since) >= f.after && writable(f.dir) == nil:
				return fmt.Errorf("%w: %w", errFrozen, err)
			}
		}
	}
}

var errSpace = errors.New("too little free space")

// writable writes a file into a folder as the broker would.
func writable(dir string) error {
	if free, err := freeSpace(dir); err == nil && free < enoughSpace {
		return errSpace
	}
	file, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return fmt.Errorf("try the broker's folder: %w", err)
	}
	_, err = file.Write(make([]byte, 4096))
	if err = errors.Join(err, file.Sync(), file.Close(), os.Remove(file.Name())); err != nil {
		return fmt.Errorf("try the broker's folder: %w", err)
	}
	return nil
}
