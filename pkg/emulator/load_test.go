package emulator_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/fixture"
)

func TestLoadInAClosedLoop(t *testing.T) {
	t.Parallel()
	for _, presign := range []bool{false, true} {
		r := newReceiver()
		server := httptest.NewServer(r)
		defer server.Close()
		load, err := emulator.NewLoad(emulator.LoadConfig{URL: server.URL + "/webhooks/clerk", Secret: fixture.Secret, Connections: 8, Presign: presign})
		require.NoError(t, err)
		_, events := story(emulator.Config{}, 5)
		report, err := load.Run(t.Context(), emulator.Copies(500, events))
		require.NoError(t, err)
		requireBalanced(t, report.Ledger)
		assert.EqualValues(t, 500, report.Accepted)
		assert.EqualValues(t, 500, report.Latency.Count)
		assert.Positive(t, report.PerSecond)
		for _, got := range r.receipts {
			require.NoError(t, got.verified)
		}
		assert.Len(t, r.stored, 500)
	}
}

func TestLoadAtAFixedRate(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(newReceiver())
	defer server.Close()
	load, err := emulator.NewLoad(emulator.LoadConfig{URL: server.URL, Secret: fixture.Secret, Rate: 1000})
	require.NoError(t, err)
	_, events := story(emulator.Config{}, 5)
	report, err := load.Run(t.Context(), emulator.Copies(300, events))
	require.NoError(t, err)
	assert.EqualValues(t, 300, report.Accepted)
	assert.GreaterOrEqual(t, report.Elapsed, 299*time.Millisecond)
}

func TestLoadGoesOnThroughARestart(t *testing.T) {
	t.Parallel()
	r := newReceiver()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := listener.Addr().String()
	serve := func(l net.Listener) *httptest.Server {
		s := httptest.NewUnstartedServer(r)
		_ = s.Listener.Close()
		s.Listener = l
		s.Start()
		return s
	}
	server := serve(listener)
	load, err := emulator.NewLoad(emulator.LoadConfig{URL: "http://" + address, Secret: fixture.Secret, Connections: 4, Pause: time.Millisecond})
	require.NoError(t, err)
	_, events := story(emulator.Config{}, 5)
	type result struct {
		report emulator.LoadReport
		err    error
	}
	done := make(chan result, 1)
	go func() {
		report, err := load.Run(t.Context(), emulator.Copies(3000, events))
		done <- result{report, err}
	}()
	for range 3 {
		seen := load.Ledger().Totals().Accepted
		require.Eventually(t, func() bool { return load.Ledger().Totals().Accepted > min(seen+50, 2900) }, 60*time.Second, time.Millisecond)
		server.CloseClientConnections()
		server.Close()
		errors := load.Ledger().Totals().Errors
		if load.Ledger().Totals().Pending() > 0 {
			require.Eventually(t, func() bool { return load.Ledger().Totals().Errors > errors+3 }, 60*time.Second, time.Millisecond)
		}
		listener, err = net.Listen("tcp", address)
		require.NoError(t, err)
		server = serve(listener)
	}
	got := <-done
	server.Close()
	require.NoError(t, got.err)
	requireBalanced(t, got.report.Ledger)
	assert.EqualValues(t, 3000, got.report.Accepted)
	assert.Positive(t, got.report.Errors)
	for id := range got.report.Ledger.AcceptedIDs() {
		require.True(t, r.stored[id], "what was answered 2xx was received")
	}
}

func TestLoadRetriesWhatMayPassAndGivesUpTheRest(t *testing.T) {
	t.Parallel()
	r := newReceiver()
	_, events := story(emulator.Config{}, 5)
	r.reply = func(id string, nth int) int {
		switch {
		case id == events[0].ID:
			return http.StatusUnauthorized
		case nth == 1:
			return http.StatusServiceUnavailable
		case nth == 2:
			return http.StatusTooManyRequests
		}
		return 0
	}
	server := httptest.NewServer(r)
	defer server.Close()
	load, err := emulator.NewLoad(emulator.LoadConfig{URL: server.URL, Secret: fixture.Secret, Pause: time.Millisecond})
	require.NoError(t, err)
	report, err := load.Run(t.Context(), slices.Values(events[:20]))
	require.NoError(t, err)
	requireBalanced(t, report.Ledger)
	assert.EqualValues(t, 1, report.Failed)
	assert.EqualValues(t, 19, report.Accepted)
	assert.EqualValues(t, 1+3*19, report.Attempts)

	server.Close()
	load, err = emulator.NewLoad(emulator.LoadConfig{URL: server.URL, Secret: fixture.Secret, Pause: time.Millisecond, GiveUp: 10 * time.Millisecond})
	require.NoError(t, err)
	report, err = load.Run(t.Context(), slices.Values(events[:5]))
	require.NoError(t, err)
	assert.EqualValues(t, 5, report.Failed)
}

func TestLoadStopsWithItsContext(t *testing.T) {
	t.Parallel()
	var stuck atomic.Bool
	hang := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if stuck.Load() {
			<-hang
		}
		w.WriteHeader(http.StatusAccepted)
	}))
	defer server.Close()
	defer close(hang)
	load, err := emulator.NewLoad(emulator.LoadConfig{URL: server.URL, Secret: fixture.Secret, Connections: 4})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for load.Ledger().Totals().Accepted < 20 && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		stuck.Store(true)
		cancel()
	}()
	_, events := story(emulator.Config{}, 5)
	report, err := load.Run(ctx, emulator.Copies(-1, events))
	require.NoError(t, err)
	assert.GreaterOrEqual(t, report.Accepted, int64(20))
	assert.GreaterOrEqual(t, report.Pending(), int64(0))
}

func BenchmarkLoad(b *testing.B) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusAccepted) }))
	defer server.Close()
	load, err := emulator.NewLoad(emulator.LoadConfig{URL: server.URL, Secret: fixture.Secret, Connections: 64, Presign: true})
	require.NoError(b, err)
	_, events := story(emulator.Config{}, 20)
	b.ResetTimer()
	report, err := load.Run(b.Context(), emulator.Copies(b.N, events))
	require.NoError(b, err)
	b.ReportMetric(report.PerSecond, "requests/s")
	b.ReportMetric(float64(report.Latency.P99.Microseconds()), "p99-µs")
}

func BenchmarkSender(b *testing.B) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusAccepted) }))
	defer server.Close()
	sender, err := emulator.NewSender(emulator.SenderConfig{URL: server.URL, Secret: fixture.Secret, Concurrency: 64})
	require.NoError(b, err)
	_, events := story(emulator.Config{}, 20)
	b.ResetTimer()
	require.NoError(b, sender.Deliver(b.Context(), emulator.Copies(b.N, events)))
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
}
