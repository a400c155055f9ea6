package emulator_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/emulator"
)

// BenchmarkAPI serves a crowd without a network.
func BenchmarkAPI(b *testing.B) {
	crowd := emulator.NewCrowd(100_000)
	api := emulator.New(emulator.Config{}).API(emulator.APIConfig{Crowd: crowd})
	for b.Loop() {
		for after := ""; ; {
			req := httptest.NewRequestWithContext(b.Context(), http.MethodGet, "/v1/users?limit=500&order_by=%2Bcreated_at&starting_after="+after, nil)
			if after == "" {
				req = httptest.NewRequestWithContext(b.Context(), http.MethodGet, "/v1/users?limit=500&order_by=%2Bcreated_at", nil)
			}
			req.Header.Set("Authorization", "Bearer "+emulator.DefaultKey)
			w := httptest.NewRecorder()
			api.ServeHTTP(w, req)
			require.Equal(b, http.StatusOK, w.Code)
			_, _ = io.Discard.Write(w.Body.Bytes())
			if after == crowd.ID(crowd.Size()-1) {
				break
			}
			number := 499
			if after != "" {
				n, _ := crowd.Number(after)
				number = min(n+500, crowd.Size()-1)
			}
			after = crowd.ID(number)
		}
	}
	b.ReportMetric(float64(b.N*crowd.Size())/b.Elapsed().Seconds(), "users/s")
	b.ReportMetric(0, "ns/op")
}
