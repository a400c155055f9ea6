package worker_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// BenchmarkWorker measures how fast a backlog is applied: broker, worker and database on this machine, distinct
// users of 2.5 KB, mirror and delivery log, raw kept. USHER_BENCH_EVENTS sets the size of the backlog (20,000).
func BenchmarkWorker(b *testing.B) {
	n := 20_000
	if s := os.Getenv("USHER_BENCH_EVENTS"); s != "" {
		n, _ = strconv.Atoi(s)
	}
	for _, concurrency := range []int{1, 2} {
		b.Run(fmt.Sprintf("postgres/concurrency=%d", concurrency), func(b *testing.B) { benchmarkWorker(b, dbtest.Postgres(b), n, concurrency) })
	}
	b.Run("sqlite/concurrency=1", func(b *testing.B) { benchmarkWorker(b, dbtest.SQLite(b), n, 1) })
}

func benchmarkWorker(b *testing.B, db *gorm.DB, n, concurrency int) {
	srv := natstest.New(b, natstest.WithSync)
	_, js := srv.Setup(worker.Specs()...)
	template, _ := fixture.Event("user.created")
	for run := range b.N {
		b.StopTimer()
		fill(b, js, template, run, n)
		w, err := worker.New(worker.Config{Concurrency: concurrency}, worker.Deps{JetStream: js, DB: db, Log: zap.NewNop(), Registerer: prometheus.NewRegistry(), Health: &observe.Health{}})
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		b.StartTimer()
		start := time.Now()
		go func() { done <- w.Run(ctx) }()
		for {
			c, err := js.Consumer(ctx, stream.Events, "mirror")
			if err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0 {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		b.ReportMetric(float64(n)/time.Since(start).Seconds(), "events/s")
		b.StopTimer()
		cancel()
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		var rows int64
		db.Table("deliveries").Where("status = 'processed'").Count(&rows)
		if rows != int64((run+1)*n) {
			b.Fatalf("%d rows, want %d", rows, (run+1)*n)
		}
	}
}

// fill publishes n events of distinct users.
func fill(b *testing.B, js jetstream.JetStream, template []byte, run, n int) {
	b.Helper()
	p := stream.NewPublisher(js, 1)
	defer p.Close()
	slots, failed := make(chan struct{}, 400), make(chan error, 1)
	for i := range n {
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			id := fmt.Sprintf("%07d%07d", i*7919%n, run)
			body := bytes.ReplaceAll(template, []byte("38HzI2pYfb8qPaRGOtjol4SEChQ"), []byte("38HzI2pYfb8qP"+id))
			e, err := event.Decode(body)
			if err == nil {
				e.ID, e.Source, e.Origin, e.ReceivedAt = "msg_"+id, "clerk", event.OriginWebhook, time.Now()
				_, err = p.Publish(context.Background(), &e)
			}
			if err != nil {
				select {
				case failed <- err:
				default:
				}
			}
		}()
	}
	for range cap(slots) {
		slots <- struct{}{}
	}
	select {
	case err := <-failed:
		b.Fatal(err)
	default:
	}
}
