package allinone

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestAFrozenBrokerEndsTheProcessOnceARestartHelps(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "later")
	broken := errors.New("open messages/12.blk: too many open files")
	var asked atomic.Int64
	f := frozen{dir: dir, every: time.Millisecond, after: 10 * time.Millisecond, check: func() error {
		if n := asked.Add(1); n == 3 { // a moment without trouble
			return nil
		}
		return broken
	}}
	ended := make(chan error, 1)
	go func() { ended <- f.Run(context.Background()) }()
	require.Eventually(t, func() bool { return asked.Load() > 200 }, time.Minute, time.Millisecond)
	select {
	case err := <-ended:
		require.Fail(t, "ended while the folder cannot be written", "%v", err)
	default:
	}
	require.NoError(t, os.Mkdir(dir, 0o700))
	err := <-ended
	require.ErrorIs(t, err, broken)
	assert.ErrorContains(t, err, "only a restart")
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, left)
}

func TestAWorkingBrokerIsLeftAlone(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	var asked atomic.Int64
	f := frozen{dir: t.TempDir(), every: time.Millisecond, after: time.Millisecond, check: func() error { asked.Add(1); return nil }}
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	require.Eventually(t, func() bool { return asked.Load() > 50 }, time.Minute, time.Millisecond)
	cancel()
	require.NoError(t, <-ended)
}
