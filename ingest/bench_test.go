package ingest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

// modes are the ways to store that the benchmarks compare, all on the same kind of embedded server.
var modes = []struct {
	name    string
	sync    bool
	grouped bool
}{
	{"grouped", true, true},
	{"fsync-per-request", true, false},
	{"no-fsync", false, false},
	{"no-fsync-grouped", false, true},
}

// benchSetup starts ingest on an embedded server that is reached in the process, as `usher serve` does.
func benchSetup(b testing.TB, syncAlways, grouped bool) string {
	b.Helper()
	broker := natstest.New(b, func(o *server.Options) { o.SyncAlways = syncAlways })
	_, js := broker.Connect(nats.InProcessServer(broker.Server()))
	_, err := stream.Topology{Replicas: 1, MaxBytes: 4 << 30}.Ensure(b.Context(), js)
	require.NoError(b, err)
	var publisher Publisher = publishFunc(func(ctx context.Context, e *event.Event) (stream.Ack, error) {
		_, err := js.PublishMsg(ctx, stream.Message(e))
		return stream.Ack{}, err
	})
	if grouped {
		p := stream.NewPublisher(js, 1)
		b.Cleanup(p.Close)
		publisher = p
	}
	s, err := New(Config{Addr: "127.0.0.1:0", Sources: []Source{{Name: "clerk", Secrets: []string{secret}}}}, Deps{Publisher: publisher, JetStream: js})
	require.NoError(b, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		require.NoError(b, <-ended)
	})
	return s.Addr()
}

// BenchmarkIngest is a closed loop: every connection sends its next event when it has its answer.
func BenchmarkIngest(b *testing.B) {
	for _, connections := range []int{1, 16, 64, 256} {
		for _, m := range modes {
			b.Run(fmt.Sprintf("connections=%d/%s", connections, m.name), func(b *testing.B) {
				addr := benchSetup(b, m.sync, m.grouped)
				body, _ := fixture.Event("user.created")
				var left atomic.Int64
				left.Store(int64(b.N))
				senders := dial(b, addr, connections)
				b.ResetTimer()
				start := time.Now()
				times := each(senders, func(s *sender) (times []time.Duration) {
					for left.Add(-1) >= 0 {
						begin := time.Now()
						s.send(b, body)
						times = append(times, time.Since(begin))
					}
					return times
				})
				report(b, times, time.Since(start))
			})
		}
	}
}

// BenchmarkIngestHalfPeak measures the peak at 256 connections, then sends half as much at fixed times,
// whether answers come or not. Latency counts from when a request was due.
func BenchmarkIngestHalfPeak(b *testing.B) {
	addr := benchSetup(b, true, true)
	body, _ := fixture.Event("user.created")
	senders := dial(b, addr, 256)
	var sent atomic.Int64
	start := time.Now()
	each(senders, func(s *sender) []time.Duration {
		for time.Since(start) < 3*time.Second {
			s.send(b, body)
			sent.Add(1)
		}
		return nil
	})
	rate := float64(sent.Load()) / time.Since(start).Seconds() / 2
	b.ResetTimer()
	start = time.Now()
	var next atomic.Int64
	times := each(senders, func(s *sender) (times []time.Duration) {
		for {
			i := next.Add(1) - 1
			if i >= int64(b.N) {
				return times
			}
			due := start.Add(time.Duration(float64(i) / rate * float64(time.Second)))
			time.Sleep(time.Until(due))
			s.send(b, body)
			times = append(times, time.Since(due))
		}
	})
	report(b, times, time.Since(start))
	b.ReportMetric(2*rate, "peak/s")
}

func report(b *testing.B, times []time.Duration, took time.Duration) {
	b.Helper()
	slices.Sort(times)
	ms := func(p float64) float64 {
		return float64(times[min(int(p*float64(len(times))), len(times)-1)].Microseconds()) / 1000
	}
	b.ReportMetric(float64(len(times))/took.Seconds(), "req/s")
	b.ReportMetric(ms(.5), "p50-ms")
	b.ReportMetric(ms(.99), "p99-ms")
	b.ReportMetric(0, "ns/op")
}

// sender is one connection that costs little: the sender shares its processors with what it measures.
type sender struct {
	conn net.Conn
	in   *bufio.Reader
	out  bytes.Buffer
}

func dial(b testing.TB, addr string, n int) []*sender {
	b.Helper()
	senders := make([]*sender, n)
	for i := range senders {
		conn, err := net.Dial("tcp", addr)
		require.NoError(b, err)
		b.Cleanup(func() { _ = conn.Close() })
		senders[i] = &sender{conn: conn, in: bufio.NewReader(conn)}
	}
	return senders
}

func each(senders []*sender, run func(*sender) []time.Duration) []time.Duration {
	var (
		group sync.WaitGroup
		mu    sync.Mutex
		all   []time.Duration
	)
	for _, s := range senders {
		group.Go(func() {
			times := run(s)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, times...)
		})
	}
	group.Wait()
	return all
}

var benchKey, _ = base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))

// send posts one event and wants a 202.
func (s *sender) send(b testing.TB, body []byte) {
	b.Helper()
	id, at := newID(), strconv.FormatInt(time.Now().Unix(), 10)
	mac := hmac.New(sha256.New, benchKey)
	_, _ = io.WriteString(mac, id+"."+at+".")
	_, _ = mac.Write(body)
	s.out.Reset()
	fmt.Fprintf(&s.out, "POST %s HTTP/1.1\r\nHost: usher\r\nsvix-id: %s\r\nsvix-timestamp: %s\r\nsvix-signature: v1,%s\r\nContent-Length: %d\r\n\r\n",
		Path, id, at, base64.StdEncoding.EncodeToString(mac.Sum(nil)), len(body))
	s.out.Write(body)
	if _, err := s.conn.Write(s.out.Bytes()); err != nil {
		b.Error(err)
		return
	}
	if err := s.answer(); err != nil {
		b.Error(err)
	}
}

func (s *sender) answer() error {
	status, err := s.in.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(status, []byte("HTTP/1.1 202")) {
		return errors.New(string(status))
	}
	length := 0
	for {
		line, err := s.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) == 2 {
			break
		}
		if n, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			length, _ = strconv.Atoi(string(bytes.TrimSpace(n)))
		}
	}
	_, err = s.in.Discard(length)
	return err
}
