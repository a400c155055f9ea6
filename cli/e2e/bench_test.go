package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/fixture"
)

// BenchmarkReceiptToRow measures an idle system: one webhook at a time to `usher serve` (a process of its own), from the
// request until another connection sees the committed row.
func BenchmarkReceiptToRow(b *testing.B) {
	for name, url := range map[string]string{"postgres": dbtest.EmptyPostgresURL(b), "sqlite": "sqlite:" + filepath.Join(b.TempDir(), "usher.db")} {
		b.Run(name, func(b *testing.B) {
			dataDir := b.TempDir()
			p := start(b, append([]string{"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + url, "USHER_LOG_LEVEL=warn"}, randomPorts...), "serve")
			s := p.ready(dataDir)
			db, err := database.Open(b.Context(), url, "usher")
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = database.Close(db) }()
			pool, err := db.DB()
			if err != nil {
				b.Fatal(err)
			}
			client := &http.Client{Timeout: 10 * time.Second}
			defer client.CloseIdleConnections()
			var latencies []time.Duration
			for i := range b.N {
				id := fmt.Sprintf("user_bench%d", i)
				body, err := fixture.Make("user.created", fixture.Set("data.id", id))
				if err != nil {
					b.Fatal(err)
				}
				req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, s.IngestURL, bytes.NewReader(body))
				if err != nil {
					b.Fatal(err)
				}
				req.Header = fixture.Sign(secret, fixture.NewID(), time.Now(), body)
				begin := time.Now()
				res, err := client.Do(req)
				if err != nil {
					b.Fatal(err)
				}
				_ = res.Body.Close()
				for n := 0; n == 0; {
					if err := pool.QueryRowContext(b.Context(), "SELECT count(*) FROM users WHERE id = '"+id+"'").Scan(&n); err != nil {
						b.Fatal(err)
					}
				}
				latencies = append(latencies, time.Since(begin))
			}
			slices.Sort(latencies)
			at := func(q float64) float64 {
				return float64(latencies[int(q*float64(len(latencies)-1))].Microseconds()) / 1000
			}
			b.ReportMetric(at(.5), "p50-ms")
			b.ReportMetric(at(.99), "p99-ms")
			b.ReportMetric(at(1), "max-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkDevReady measures `usher dev` from its start until it says that it is ready.
func BenchmarkDevReady(b *testing.B) {
	for range b.N {
		dataDir := filepath.Join(b.TempDir(), "data")
		p := start(b, append([]string{"USHER_DATA_DIR=" + dataDir}, randomPorts...), "dev")
		p.ready(dataDir)
		b.StopTimer()
		if code := p.stop(); code != 0 {
			b.Fatalf("exit code %d: %s", code, p.stderr.String())
		}
		b.StartTimer()
	}
}
