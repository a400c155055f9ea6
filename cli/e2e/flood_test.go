package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/cli/e2e/internal/strangers"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/fixture"
)

const strangersEnv = "USHER_E2E_STRANGERS" // set: a process of the tests floods as its stdin says

// flood starts a process of strangers; stop ends it.
func flood(t *testing.T, f strangers.Flood) (stop func()) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), strangersEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	require.NoError(t, json.NewEncoder(in).Encode(f))
	return sync.OnceFunc(func() {
		_ = in.Close()
		assert.NoError(t, cmd.Wait())
	})
}

// TestStrangersDoNoHarm floods every listener of `usher serve`, which may have few descriptors, with connections that are silent, slow
// or forged. USHER_FLOOD is how many there are, else three times what it may open. `make flood` runs it at full size.
func TestStrangersDoNoHarm(t *testing.T) {
	t.Parallel()
	descriptors, connections, deliver := 256, 768, 200
	if n, err := strconv.Atoi(os.Getenv("USHER_FLOOD")); err == nil {
		descriptors, connections, deliver = 1024, n, 3000
	}
	if n, err := strconv.Atoi(os.Getenv("USHER_FLOOD_DESCRIPTORS")); err == nil {
		descriptors = n
	}
	path, err := binary()
	require.NoError(t, err)
	dataDir := t.TempDir()
	databaseURL := "sqlite:" + filepath.Join(t.TempDir(), "usher.db")
	env := append([]string{"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + databaseURL}, randomPorts...)
	p := startProgram(t, env, "sh", "-c", fmt.Sprintf("ulimit -n %d && exec %s serve", descriptors, path))
	s := p.ready(dataDir)
	address := func(raw string) string {
		u, err := url.Parse(raw)
		require.NoError(t, err)
		return u.Host
	}
	const perProcess = 6000 // what a process of the tests may open
	var stops []func()
	for left := connections; left > 0; left -= perProcess {
		stop := flood(t, strangers.Flood{
			Ingest: address(s.IngestURL), Console: address(s.ConsoleURL), Ops: address(s.OpsURL),
			Connections: min(left, perProcess), Pause: max(time.Second, time.Duration(connections)*time.Millisecond/2),
		})
		t.Cleanup(stop)
		stops = append(stops, stop)
	}
	require.Eventually(t, func() bool { return metricAt(s.OpsURL, `usher_connections_dropped_total{listener="ingest"`) > 0 }, time.Minute, 100*time.Millisecond, "the flood is there")

	var accepted []string
	var mu sync.Mutex
	statuses := map[string]int{}
	post := func(client *http.Client, n int) {
		id := fmt.Sprintf("msg_flood_%d", n)
		size := 3 << 10
		if n%10 == 0 {
			size = 100 << 10
		}
		outcome := deliverTo(client, s.IngestURL, id, size)
		mu.Lock()
		defer mu.Unlock()
		statuses[outcome]++
		if outcome == "202" {
			accepted = append(accepted, id)
		}
	}
	kept := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}, Timeout: 15 * time.Second} // as Svix
	defer kept.CloseIdleConnections()
	fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 15 * time.Second}
	var group sync.WaitGroup
	var next atomic.Int64
	for sender := range 8 {
		group.Go(func() {
			pace := time.NewTicker(100 * time.Millisecond)
			defer pace.Stop()
			for n := next.Add(1); n <= int64(deliver); n = next.Add(1) {
				<-pace.C
				post([]*http.Client{kept, fresh}[sender%2], int(n))
			}
		})
	}
	group.Wait()
	during := len(accepted)
	t.Logf("%d strangers, %d descriptors: %v of %d deliveries", connections, descriptors, statuses, deliver)
	assert.GreaterOrEqual(t, during, deliver*95/100, "accepted during the flood: %v", statuses)
	require.Eventually(t, func() bool { return get(s.OpsURL+"/readyz") == http.StatusOK }, time.Minute, 100*time.Millisecond, "ready during the flood")

	for _, stop := range stops {
		stop()
	}
	require.Eventually(t, func() bool { // what still waits to be accepted is of the flood
		open := metricAt(s.OpsURL, `usher_connections{listener="ingest"}`)
		return open >= 0 && open < float64(descriptors)/10
	}, time.Minute, 100*time.Millisecond, "the flood is over")
	for n := range 50 {
		post(fresh, deliver+1+n)
	}
	assert.Equal(t, 50, statuses["202"]-during, "all are accepted after the flood: %v", statuses)
	db, err := database.Open(t.Context(), databaseURL, "usher")
	require.NoError(t, err)
	defer func() { assert.NoError(t, database.Close(db)) }()
	require.Eventually(t, func() bool {
		done := deliveries(t, db)
		for _, id := range accepted {
			if done[id] != "processed" {
				return false
			}
		}
		return true
	}, time.Minute, 100*time.Millisecond, "what was accepted is applied")
	assert.Equal(t, http.StatusOK, get(s.OpsURL+"/readyz"))
	assert.Equal(t, 0, p.stop(), p.stderr.String()) // the process that was started: there was no restart
	assert.Contains(t, p.stderr.String(), `"remote_addr":"127.0.0.1"`, "strangers are named")
}

// deliverTo sends one signed event of about size bytes and returns the status of the answer, or the error.
func deliverTo(client *http.Client, url, id string, size int) string {
	body := fmt.Appendf(nil, `{"type":"user.created","object":"event","data":{"id":"user_%s","object":"user","updated_at":1,"bio":%q}}`, id, strings.Repeat("x", size))
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err.Error()
	}
	req.Header = fixture.Sign(secret, id, time.Now(), body)
	res, err := client.Do(req)
	if err != nil {
		return "error: " + redactAddresses.ReplaceAllString(err.Error(), "…")
	}
	_, _ = io.Copy(io.Discard, res.Body)
	_ = res.Body.Close()
	return strconv.Itoa(res.StatusCode)
}

var redactAddresses = regexp.MustCompile(`127\.0\.0\.1:[0-9]+`) // so that equal errors count as one

// metricAt adds up the series that begin with prefix; -1 where the listener does not answer.
func metricAt(ops, prefix string) float64 {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, ops+"/metrics", nil)
	if err != nil {
		return -1
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return -1
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	var sum float64
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, prefix) {
			value, _ := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' ')+1:]), 64)
			sum += value
		}
	}
	return sum
}
