package clerk_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/emulator"
)

// BenchmarkPages reads a crowd over HTTP, emulator and reader in one process.
func BenchmarkPages(b *testing.B) {
	crowd := emulator.NewCrowd(100_000)
	c := emulator.New(emulator.Config{})
	w := serve(b, c, emulator.APIConfig{Crowd: crowd})
	client := w.reader(b)
	b.ReportAllocs()
	for b.Loop() {
		n := 0
		for page, err := range client.Pages(b.Context(), "users", clerk.Created, "") {
			require.NoError(b, err)
			n += len(page.Objects)
		}
		require.Equal(b, crowd.Size(), n)
	}
	b.ReportMetric(float64(b.N*crowd.Size())/b.Elapsed().Seconds(), "users/s")
	b.ReportMetric(0, "ns/op")
}
