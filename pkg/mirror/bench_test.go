package mirror_test

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/mirror"
)

// users makes events of distinct users, some 2.5 KB each, in no order of their ids.
func users(tb testing.TB, from, n int, verb string, at int64) []event.Event {
	tb.Helper()
	template, ok := fixture.Event("user.created")
	require.True(tb, ok)
	batch := make([]event.Event, n)
	for i := range batch {
		no := from + i
		body := strings.NewReplacer(
			"user_38HzI2pYfb8qPaRGOtjol4SEChQ", fmt.Sprintf("user_%027d", uint64(no)*11400714819323198485>>16),
			"ada.lovelace@", fmt.Sprintf("person.%d@", no),
			"1768471200018", strconv.FormatInt(at, 10), "1768471200036", strconv.FormatInt(at+20, 10), "user.created", "user."+verb,
		).Replace(string(template))
		batch[i] = decode(tb, fmt.Sprintf("msg_%d_%d", at, no), []byte(body))
	}
	return batch
}

func eachDatabase(b *testing.B, run func(b *testing.B, db *gorm.DB)) {
	b.Helper()
	b.Run("postgres", func(b *testing.B) { run(b, dbtest.Postgres(b)) })
	b.Run("sqlite", func(b *testing.B) { run(b, dbtest.SQLite(b)) })
}

const batchSize = 500

// BenchmarkApply writes batches of new users.
func BenchmarkApply(b *testing.B) {
	eachDatabase(b, func(b *testing.B, db *gorm.DB) {
		n, bytes := 0, 0
		b.ReportAllocs()
		var spent time.Duration
		for b.Loop() {
			b.StopTimer()
			batch := users(b, n, batchSize, "created", 1_768_471_200_000)
			n += batchSize
			bytes += len(batch[0].Raw)
			b.StartTimer()
			started := time.Now()
			if err := tryApply(context.Background(), db, batch...); err != nil {
				b.Fatal(err)
			}
			spent += time.Since(started)
		}
		b.ReportMetric(float64(n)/spent.Seconds(), "events/s")
		b.ReportMetric(float64(bytes*batchSize/n), "bytes/event")
	})
}

// BenchmarkApplyBySize updates random rows of small and large tables: what an event costs must not grow with them. The large
// one takes minutes to fill; BENCH_LARGE=1 runs it.
func BenchmarkApplyBySize(b *testing.B) {
	sizes := []int{10_000}
	if os.Getenv("BENCH_LARGE") != "" {
		sizes = append(sizes, 1_000_000)
	}
	eachDatabase(b, func(b *testing.B, db *gorm.DB) {
		filled := 0
		for _, size := range sizes {
			for ; filled < size; filled += batchSize {
				if err := tryApply(b.Context(), db, users(b, filled, batchSize, "created", 1_768_471_200_000)...); err != nil {
					b.Fatal(err)
				}
			}
			if database.IsPostgres(db) {
				require.NoError(b, db.Exec("VACUUM ANALYZE users").Error)
				require.NoError(b, db.Exec("CHECKPOINT").Error)
			}
			at := int64(1_768_471_300_000)
			b.Run(fmt.Sprintf("rows=%d", size), func(b *testing.B) {
				n := 0
				var spent time.Duration
				for b.Loop() {
					b.StopTimer()
					at++
					batch := users(b, (n*7919)%(size-batchSize), batchSize, "updated", at)
					n += batchSize
					b.StartTimer()
					started := time.Now()
					if err := tryApply(context.Background(), db, batch...); err != nil {
						b.Fatal(err)
					}
					spent += time.Since(started)
				}
				b.ReportMetric(float64(n)/spent.Seconds(), "events/s")
			})
		}
	})
}

// BenchmarkRead is what happens before the database: events to rows.
func BenchmarkRead(b *testing.B) {
	batch := users(b, 0, batchSize, "created", 1_768_471_200_000)
	b.ReportAllocs()
	for b.Loop() {
		if err := mirror.Read(batch); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N*batchSize)/b.Elapsed().Seconds(), "events/s")
}
