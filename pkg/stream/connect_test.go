package stream_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

// hangable is a way to a broker that can hang as a stopped process does: connections stay, and nobody reads them.
type hangable struct {
	net.Listener
	mu     sync.RWMutex // held for writing while it hangs
	target string
	wg     sync.WaitGroup
}

func newHangable(t *testing.T, target string) *hangable {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	h := &hangable{Listener: l, target: target}
	h.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			h.wg.Go(func() { h.serve(in) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		h.wg.Wait()
	})
	return h
}

func (h *hangable) serve(in net.Conn) {
	defer in.Close()
	out, err := net.Dial("tcp", h.target)
	if err != nil {
		return
	}
	defer out.Close()
	h.wg.Go(func() {
		defer in.Close()
		_, _ = io.Copy(gate{in, h}, out)
	})
	defer out.Close()
	_, _ = io.Copy(gate{out, h}, in)
}

// gate lets nothing through while it hangs.
type gate struct {
	io.Writer
	h *hangable
}

func (g gate) Write(p []byte) (int, error) {
	g.h.mu.RLock()
	defer g.h.mu.RUnlock()
	return g.Writer.Write(p)
}

// TestAFullSocketToABrokerThatHangsHoldsNobody: the client library writes with the connection's lock held, so that everything that
// only asks for the connection's state would wait for as long as the broker hangs.
func TestAFullSocketToABrokerThatHangsHoldsNobody(t *testing.T) {
	t.Parallel()
	for _, replicas := range []int{1, 3} { // the publisher has two ways
		t.Run(fmt.Sprint(replicas, " replicas"), func(t *testing.T) {
			t.Parallel()
			srv := natstest.New(t)
			_, direct := srv.Setup()
			way := newHangable(t, strings.TrimPrefix(srv.URL(), "nats://"))
			nc, err := stream.Connect("nats://"+way.Addr().String(), "", "test", nop())
			require.NoError(t, err)
			t.Cleanup(nc.Close)
			js, err := stream.JetStream(nc)
			require.NoError(t, err)
			p := stream.NewPublisher(js, replicas)
			t.Cleanup(p.Close)
			require.Eventually(t, nc.IsConnected, 60*time.Second, 5*time.Millisecond)
			events := newEvents(400) // 25 MiB, more than any socket's buffers
			for i := range events {
				events[i].Raw = fmt.Appendf(nil, `{"pad":%q}`, strings.Repeat("x", 64<<10))
			}
			_, err = p.Publish(t.Context(), events[0])
			require.NoError(t, err)
			open := sync.OnceFunc(way.mu.Unlock)
			way.mu.Lock()
			defer open()

			failed := make([]error, len(events))
			var group sync.WaitGroup
			for i, e := range events[1:] {
				group.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), 2*stream.PublishTimeout)
					defer cancel()
					_, failed[i+1] = p.Publish(ctx, e)
				})
			}
			began, worst := time.Now(), time.Duration(0)
			for time.Since(began) < 10*time.Second {
				asked, answered := time.Now(), make(chan struct{})
				go func() { nc.IsConnected(); close(answered) }()
				select {
				case <-answered:
				case <-time.After(15 * time.Second):
					open()
					<-answered
				}
				worst = max(worst, time.Since(asked))
				time.Sleep(10 * time.Millisecond)
			}
			assert.Less(t, worst, stream.PublishTimeout+30*time.Second)
			group.Wait()
			for _, err := range failed[1:] {
				require.ErrorIs(t, err, stream.ErrUnavailable, "not known to be stored")
			}
			t.Logf("the connection's state took %s at most; all answered after %s", worst.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))

			open()
			require.Eventually(t, nc.IsConnected, 60*time.Second, 5*time.Millisecond)
			for start := time.Now(); ; {
				n := 0
				for _, r := range publishAll(t, p, events) {
					if r.err == nil {
						n++
					}
				}
				if n == len(events) {
					break
				}
				require.Less(t, time.Since(start), 2*time.Minute)
			}
			stored := ids(t, direct)
			assert.Len(t, stored, len(events))
			for id, n := range stored {
				require.Equal(t, 1, n, id)
			}
		})
	}
}
