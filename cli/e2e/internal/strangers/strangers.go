// Package strangers is a flood of connections by senders that know no secret. It runs in a process of its own, whose descriptors
// are not those of the test.
package strangers

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"
)

// Flood is what one process of strangers does.
type Flood struct {
	Ingest, Console, Ops string // addresses
	Connections          int    // kept open, or dialled again Pause after they were closed
	Pause                time.Duration
}

// kinds of strangers, by how they hold a connection of the webhooks' listener. Each returns when it has lost it.
var kinds = []func(ctx context.Context, c net.Conn){
	// Silent: not a byte.
	func(_ context.Context, c net.Conn) { untilClosed(c) },
	// A header that never ends.
	func(_ context.Context, c net.Conn) {
		_, _ = io.WriteString(c, "POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\nsvix-id: msg_1\r\n")
		untilClosed(c)
	},
	// A body that is announced and never comes.
	func(_ context.Context, c net.Conn) {
		_, _ = io.WriteString(c, head(1<<20))
		untilClosed(c)
	},
	// A large body that stands still after its first 70 KiB.
	func(_ context.Context, c net.Conn) {
		_, _ = io.WriteString(c, head(1<<20)+strings.Repeat("x", 70<<10))
		untilClosed(c)
	},
	// 2 kB/s to 19 kB/s.
	func(ctx context.Context, c net.Conn) {
		_, _ = io.WriteString(c, head(1<<20))
		part := []byte(strings.Repeat("x", (2000+rand.IntN(17000))/2))
		for ctx.Err() == nil {
			if _, err := c.Write(part); err != nil {
				return
			}
			pause(ctx, time.Second/2)
		}
	},
	// A forged delivery every second, on one connection.
	func(ctx context.Context, c net.Conn) {
		go func() { _, _ = io.Copy(io.Discard, c) }()
		for ctx.Err() == nil {
			if _, err := io.WriteString(c, head(4)+"body"); err != nil {
				return
			}
			pause(ctx, time.Second)
		}
	},
}

// head is that of a request which only its whole body proves to be forged.
func head(length int) string {
	return fmt.Sprintf("POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\nsvix-id: msg_1\r\nsvix-timestamp: %d\r\nsvix-signature: v1,%s=\r\nContent-Length: %d\r\n\r\n",
		time.Now().Unix(), strings.Repeat("A", 43), length)
}

func untilClosed(c net.Conn) { _, _ = io.Copy(io.Discard, c) }

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// Run floods as the JSON on in says, until in ends.
func Run(in io.Reader) error {
	var f Flood
	decoder := json.NewDecoder(in)
	if err := decoder.Decode(&f); err != nil {
		return fmt.Errorf("read what to flood: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for i := range f.Connections {
		all.Go(func() { f.hold(ctx, i) })
	}
	_, _ = io.Copy(io.Discard, in)
	stop()
	all.Wait()
	return nil
}

// hold keeps one connection: of ten, eight at the webhooks' listener and one at each of the others.
func (f Flood) hold(ctx context.Context, i int) {
	address, kind := f.Ingest, kinds[i%len(kinds)]
	switch i % 10 {
	case 8:
		address, kind = f.Console, kinds[i/10%2]
	case 9:
		address, kind = f.Ops, kinds[i/10%2]
	}
	for ctx.Err() == nil {
		if c, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", address); err == nil {
			cut := context.AfterFunc(ctx, func() { _ = c.Close() })
			kind(ctx, c)
			cut()
			_ = c.Close()
		}
		pause(ctx, f.Pause/2+rand.N(f.Pause))
	}
}
