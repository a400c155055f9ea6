package e2e

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/fixture"
)

// TestLargestEventsAtOnceAreHeldAFewAtATime sends 100 events of 1 MiB at once (USHER_E2E_LARGE sets another number, make chaos 228): all are accepted and
// applied in the end, and the process never holds more than 400 MB.
func TestLargestEventsAtOnceAreHeldAFewAtATime(t *testing.T) {
	t.Parallel()
	n, err := strconv.Atoi(setting("USHER_E2E_LARGE", "100"))
	require.NoError(t, err)
	t.Run("postgres", func(t *testing.T) { largestEvents(t, dbtest.PostgresURL(t), n) })
	t.Run("sqlite", func(t *testing.T) { largestEvents(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"), n) })
}

func largestEvents(t *testing.T, databaseURL string, n int) {
	dataDir := t.TempDir()
	p := start(t, append([]string{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + databaseURL, "USHER_LOG_LEVEL=warn",
	}, randomPorts...), "serve")
	url := p.ready(dataDir).IngestURL
	client := &http.Client{Timeout: time.Minute}
	defer client.CloseIdleConnections()
	var refused atomic.Int64
	var senders sync.WaitGroup
	begin, began := make(chan struct{}), time.Now()
	for i := range n {
		senders.Go(func() {
			id, body := fmt.Sprintf("msg_large_%d", i), largeUser(i)
			<-begin
			for !sendLarge(t, client, url, id, body) {
				refused.Add(1)
			}
		})
	}
	close(begin)
	senders.Wait()
	took := time.Since(began)

	db, err := database.Open(t.Context(), databaseURL, "usher")
	require.NoError(t, err)
	defer func() { assert.NoError(t, database.Close(db)) }()
	var processed int64
	applied := assert.Eventually(t, func() bool {
		return db.Table("deliveries").Where("handler = 'mirror' AND status = 'processed'").Count(&processed).Error == nil && processed == int64(n)
	}, 5*time.Minute, 100*time.Millisecond)
	require.True(t, applied, "%d of %d were applied, at most %d MB; stderr:\n%s", processed, n, highWater(t, p.cmd.Process.Pid)/1e6, &p.stderr)
	var users int64
	require.NoError(t, db.Table("users").Where("deleted_at IS NULL").Count(&users).Error)
	assert.EqualValues(t, n, users)
	peak := highWater(t, p.cmd.Process.Pid)
	t.Logf("%d events of 1 MiB: %d were refused before all were accepted after %s; at most %d MB", n, refused.Load(), took.Round(time.Millisecond), peak/1e6)
	assert.Less(t, peak, int64(400e6))
	assert.Equal(t, 0, p.stop(), p.stderr.String())
}

// sendLarge reports whether an event was accepted; one that was refused is to be sent again, for which it has waited as it was told to.
func sendLarge(t *testing.T, client *http.Client, url, id string, body []byte) bool {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(body))
	if !assert.NoError(t, err) {
		return true
	}
	req.Header = fixture.Sign(secret, id, time.Now(), body)
	wait := time.Second
	res, err := client.Do(req)
	switch {
	case t.Context().Err() != nil:
		return true
	case err == nil:
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		if res.StatusCode != http.StatusServiceUnavailable {
			assert.Equal(t, http.StatusAccepted, res.StatusCode)
			return true
		}
		seconds, err := strconv.Atoi(res.Header.Get("Retry-After"))
		assert.NoError(t, err)
		wait = time.Duration(seconds) * time.Second
	}
	select {
	case <-t.Context().Done():
	case <-time.After(wait):
	}
	return false
}

// largeUser is a user.created of exactly 1 MiB, as deep and wide as metadata is.
func largeUser(i int) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"type":"user.created","object":"event","timestamp":%d,"data":{"id":"user_large_%d","object":"user","updated_at":%[1]d,"public_metadata":{"items":[`, time.Now().UnixMilli(), i)
	for b.Len() < 1<<20-512 {
		fmt.Fprintf(&b, `{"id":%d,"name":"%x","tags":["%x",true]},`, rand.Uint32(), rand.Uint64(), rand.Uint64())
	}
	const end = `""]}}}`
	return append(append(b.Bytes(), bytes.Repeat([]byte{' '}, 1<<20-b.Len()-len(end))...), end...)
}

// highWater is the most that a process has held in memory so far, in bytes.
func highWater(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	_, rest, found := bytes.Cut(status, []byte("VmHWM:"))
	require.True(t, found)
	var kb int64
	_, err = fmt.Sscanf(string(rest), "%d kB", &kb)
	require.NoError(t, err)
	return kb << 10
}
