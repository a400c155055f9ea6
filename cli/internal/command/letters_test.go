package command

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/worker"
)

// lettersInTests is how many dead letters TestManyDeadLetters makes; USHER_TEST_LETTERS says more.
const lettersInTests = 1_500

// heapBound is what listing and replaying any number of letters may take; 50,000 of these letters have 125 MB.
const heapBound = 100 << 20

// TestManyDeadLetters lists, counts, groups and replays many letters, with flat memory and none missed.
func TestManyDeadLetters(t *testing.T) { //nolint:paralleltest // it measures the memory of the process
	n := lettersInTests
	if s := os.Getenv("USHER_TEST_LETTERS"); s != "" {
		var err error
		n, err = strconv.Atoi(s)
		require.NoError(t, err)
	}
	usher := filepath.Join(t.TempDir(), "usher")
	out, err := exec.Command("go", "build", "-o", usher, "../../cmd/usher").CombinedOutput()
	require.NoError(t, err, string(out))
	t.Run("sqlite", func(t *testing.T) { manyLetters(t, usher, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"), n) })
	t.Run("postgres", func(t *testing.T) { manyLetters(t, usher, dbtest.EmptyPostgresURL(t), n) })
}

func manyLetters(t *testing.T, usher, url string, n int) {
	t.Helper()
	c := &counter{}
	handlers := []worker.Registration{{Handler: c}}
	y := newYard(t, url, handlers...)
	require.NoError(t, y.db.Exec("CREATE TABLE applied (event_id text PRIMARY KEY, times bigint)").Error)
	require.NoError(t, y.db.Exec("CREATE TABLE effects (cause text PRIMARY KEY)").Error)
	y.step("fill", func() { y.fill(n) })

	y.step("list all", func() {
		seen, cursor := map[string]bool{}, ""
		for {
			entries, next, err := deadletter.List(t.Context(), y.db, deadletter.Filter{}, cursor, 1000)
			require.NoError(t, err)
			for _, e := range entries {
				require.False(t, seen[e.EventID], "twice: %s", e.EventID)
				seen[e.EventID] = true
			}
			if cursor = next; cursor == "" {
				break
			}
		}
		assert.Len(t, seen, n)
	})
	y.step("count", func() {
		total := 0
		for _, count := range into[listing[deadletter.Count]](y.Run("dlq", "list", "--count", "-o", "json").want(exitOK)).Items {
			total += count.Events
		}
		assert.Equal(t, n, total)
	})
	y.step("group", func() {
		groups := into[listing[deadletter.Group]](y.Run("dlq", "list", "--group", "-o", "json").want(exitOK)).Items
		require.Len(t, groups, 5)
		for _, g := range groups {
			assert.Equal(t, n/5, g.Events)
			assert.Equal(t, n/5, g.Users)
		}
	})
	y.step("sweep", func() {
		sweeper := deadletter.NewSweeper(y.js, y.db)
		sweeper.MinAge = 0
		swept, err := sweeper.Sweep(t.Context())
		require.NoError(t, err)
		assert.Equal(t, deadletter.Swept{Read: n}, swept)
	})
	stop := y.work(worker.Config{Handlers: handlers})
	// As a process of its own, since the broker of this one caches what it is asked for. (Its resident size would tell nothing: a
	// child begins with that of its parent.)
	run := exec.Command(usher, "dlq", "replay", "--all", "--yes", "-o", "json")
	var trace bytes.Buffer
	run.Env, run.Stderr = append(y.env, "GODEBUG=gctrace=1"), &trace
	begin := time.Now()
	out, err := run.Output()
	require.NoError(t, err, string(out))
	var result bulkResult
	require.NoError(t, json.Unmarshal(out, &result))
	assert.Equal(t, bulkResult{Selected: n, Replayed: n, Applied: n}, result)
	heap := 0
	for _, match := range regexp.MustCompile(`(\d+)->(\d+)->\d+ MB`).FindAllStringSubmatch(trace.String(), -1) {
		mib, err := strconv.Atoi(match[2])
		require.NoError(t, err)
		heap = max(heap, mib)
	}
	t.Logf("%-10s %8s, heap %d MiB", "replay all", time.Since(begin).Round(time.Millisecond), heap)
	assert.Positive(t, heap)
	assert.Less(t, heap<<20, heapBound/2)
	y.appliedOnce(n)
	assert.Zero(t, y.letters())
	stop()
}

// step runs one step, says how long it took, and asserts that the heap stayed within its bound.
func (y *yard) step(name string, fn func()) {
	y.t.Helper()
	var before, peak runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var highest atomic.Uint64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(20 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
				runtime.ReadMemStats(&peak)
				highest.Store(max(highest.Load(), peak.HeapAlloc))
			}
		}
	}()
	start := time.Now()
	fn()
	took := time.Since(start)
	close(stop)
	<-done
	grown := int64(highest.Load()) - int64(before.HeapAlloc)
	y.t.Logf("%-10s %8s, heap +%d MiB", name, took.Round(time.Millisecond), max(grown, 0)>>20)
	if name != "fill" {
		assert.Less(y.t, grown, int64(heapBound), name)
	}
}

// fill makes letters with their rows, as the worker does, of five kinds of failure.
func (y *yard) fill(n int) {
	y.t.Helper()
	type entry struct {
		Handler, EventID, Type, Source, Origin, UserID, Status, Error, Reason, Fingerprint string
		Attempts                                                                           int
		ReceivedAt, ProcessedAt, FirstFailedAt                                             time.Time
		StreamSeq, LetterSeq                                                               uint64
	}
	pad := make([]byte, 2000)
	for i := range pad {
		pad[i] = 'x'
	}
	rows := make([]entry, n)
	moment := time.Now().UTC().Truncate(time.Millisecond).Add(-time.Hour)
	var group errgroup.Group
	group.SetLimit(8)
	for i := range n {
		group.Go(func() error {
			name := fmt.Sprintf("%06d", i)
			body := fmt.Appendf(nil, `{"type":"user.created","object":"event","timestamp":1768471200036,"data":{"id":"user_%s","object":"user","note":%q,"created_at":1768471200000,"updated_at":1768471200018}}`, name, pad)
			e, err := event.Decode(body)
			if err != nil {
				return err
			}
			e.ID, e.Source, e.Origin, e.Seq, e.ReceivedAt = "msg_"+name, "clerk", event.OriginWebhook, uint64(i+1), moment.Add(time.Duration(i/100)*time.Millisecond)
			text := fmt.Sprintf("step %s failed for %d", []string{"one", "two", "three", "four", "five"}[i%5], i)
			r := &deadletter.Record{
				Handler: "counter", Event: e, Reason: deadletter.HandlerError, Error: text, Attempts: 10, FirstFailedAt: moment, LastFailedAt: moment,
				Subject: "clerk.evt.x", Sequence: e.Seq, Header: nats.Header{"Usher-Type": {string(e.Type)}, "Usher-Source": {"clerk"}, "Usher-Received-At": {e.ReceivedAt.Format(time.RFC3339Nano)}},
			}
			seq, err := deadletter.Put(y.t.Context(), y.js, r)
			rows[i] = entry{
				Handler: "counter", EventID: e.ID, Type: string(e.Type), Source: "clerk", Origin: "webhook", UserID: e.Object.UserID, Status: "dead", Error: text,
				Reason: string(r.Reason), Fingerprint: deadletter.Fingerprint("counter", r.Reason, text), Attempts: 10, ReceivedAt: e.ReceivedAt,
				ProcessedAt: moment, FirstFailedAt: moment, StreamSeq: e.Seq, LetterSeq: seq,
			}
			return err
		})
	}
	require.NoError(y.t, group.Wait())
	require.NoError(y.t, y.db.Table("deliveries").CreateInBatches(rows, 500).Error)
}
