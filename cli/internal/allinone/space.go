package allinone

import (
	"context"
	"path/filepath"

	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/stream"
)

// warnOfSpace compares what the streams of the embedded broker may still grow by with what the disk has left. A full disk freezes a stream
// until a restart, while a full stream only refuses.
func (i *Instance) warnOfSpace(ctx context.Context, topology stream.Topology) {
	dir := filepath.Join(i.cfg.Dir, "nats")
	free, err := freeSpace(dir)
	if err != nil {
		i.cfg.Log.Debug("free space not compared", zap.Error(err))
		return
	}
	var limit, stored int64
	for _, cfg := range topology.Streams() {
		limit += cfg.MaxBytes
		if s, err := i.JS.Stream(ctx, cfg.Name); err == nil {
			stored += int64(s.CachedInfo().State.Bytes)
		}
	}
	if free+stored >= limit {
		return
	}
	i.cfg.Log.Warn("the disk may be full before the event stream is, which then takes nothing until a restart: free space, or lower USHER_STREAM_MAX_BYTES",
		zap.String("folder", dir), zap.Int64("free_bytes", free), zap.Int64("stored_bytes", stored), zap.Int64("limit_bytes", limit))
}
