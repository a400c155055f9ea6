package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/fixture"
)

// kills is how often the process is killed; USHER_E2E_KILLS asks for more (make chaos).
func kills(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(setting("USHER_E2E_KILLS", "6"))
	require.NoError(t, err)
	return n
}

// TestKilledAtAnyMomentLosesNothing kills `usher serve` at random moments under load. Every event that was answered
// 2xx must have been applied in the end, each once, and the tables must equal Clerk's own state.
func TestKilledAtAnyMomentLosesNothing(t *testing.T) {
	t.Parallel()
	t.Run("postgres", func(t *testing.T) { killTest(t, dbtest.PostgresURL(t)) })
	t.Run("sqlite", func(t *testing.T) { killTest(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db")) })
}

func killTest(t *testing.T, databaseURL string) {
	dataDir, addr := t.TempDir(), freeAddr(t)
	env := []string{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + databaseURL,
		"USHER_INGEST_ADDR=" + addr, "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=warn",
	}
	clerk := newClerk()
	load := startLoad(t, "http://"+addr+"/webhooks/clerk", clerk)

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range kills(t) {
		p := start(t, env, "serve")
		// The moment: so many more answers, and then some microseconds, wherever that hits.
		load.wait(load.accepted.Load() + 1 + rng.Int64N(150))
		for until := time.Now().Add(time.Duration(rng.IntN(3000)) * time.Microsecond); time.Now().Before(until); {
		}
		p.kill()
	}
	p := start(t, env, "serve")
	p.ready(dataDir)
	answered := load.finish()
	require.NotEmpty(t, answered)

	db, err := database.Open(t.Context(), databaseURL, "usher")
	require.NoError(t, err)
	defer func() { assert.NoError(t, database.Close(db)) }()
	var statuses map[string]string
	require.Eventually(t, func() bool {
		statuses = deliveries(t, db)
		return len(statuses) >= len(answered)
	}, 60*time.Second, 50*time.Millisecond, "answered %d: what the killed process held must come again at once", len(answered))
	for id := range answered {
		require.Equal(t, "processed", statuses[id], id)
	}
	assert.Len(t, statuses, len(answered), "nothing was applied that was never accepted")
	diffs, err := allinone.Compare(t.Context(), db, clerk, 10)
	require.NoError(t, err)
	assert.Empty(t, diffs)
	assert.Equal(t, 0, p.stop(), p.stderr.String())
	t.Logf("%d kills, %d events answered 2xx, all applied", kills(t), len(answered))
}

func deliveries(t *testing.T, db *gorm.DB) map[string]string {
	t.Helper()
	var rows []struct{ EventID, Status string }
	require.NoError(t, db.Table("deliveries").Where("handler = 'mirror'").Find(&rows).Error)
	byID := make(map[string]string, len(rows))
	for _, r := range rows {
		byID[r.EventID] = r.Status
	}
	return byID
}

// load sends a story over and over until told to finish; an event that was not answered 2xx is sent again.
type load struct {
	t        *testing.T
	url      string
	refused  atomic.Int64 // forged events that were answered 401
	accepted atomic.Int64
	mu       sync.Mutex
	answered map[string]bool
	stop     chan struct{}
	wg       sync.WaitGroup
}

func startLoad(t *testing.T, url string, clerk *emulator.Clerk) *load {
	t.Helper()
	return startLoadWith(t, url, clerk, loadOptions{})
}

type loadOptions struct {
	junk bool          // every tenth event is what nobody can use
	pace time.Duration // between two events; 0: as fast as they are answered
}

// The junk of a load, by the beginnings of its ids.
const (
	undecodable = "msg_undecodable_" // signed, and not JSON: accepted and dead-lettered
	unknown     = "msg_unknown_"     // of a type that nobody knows: accepted and logged
	forged      = "msg_forged_"      // with a wrong signature: refused
)

func junk(n int) emulator.Event {
	switch n % 3 {
	case 0:
		return emulator.Event{ID: undecodable + strconv.Itoa(n), Body: []byte(`{"type":"user.created","data":`)}
	case 1:
		return emulator.Event{ID: unknown + strconv.Itoa(n), Body: fmt.Appendf(nil, `{"type":"starship.launched","object":"event","timestamp":%d,"data":{"id":"ship_%d","object":"starship"}}`, time.Now().UnixMilli(), n)}
	default:
		return emulator.Event{ID: forged + strconv.Itoa(n), Body: fmt.Appendf(nil, `{"type":"user.deleted","object":"event","data":{"id":"user_%d","object":"user","deleted":true}}`, n)}
	}
}

func startLoadWith(t *testing.T, url string, clerk *emulator.Clerk, options loadOptions) *load {
	t.Helper()
	l := &load{t: t, url: url, answered: map[string]bool{}, stop: make(chan struct{})}
	const senders = 24
	client := &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: senders}}
	events := make(chan emulator.Event)
	ctx, cancel := context.WithCancel(context.Background())
	l.wg.Go(func() {
		defer close(events)
		for n := 1; ; {
			for e := range clerk.Story(50) { // a story is told to its end, so that its last state was announced
				events <- e
				if n++; options.junk && n%9 == 0 {
					events <- junk(n / 9)
				}
				if options.pace > 0 {
					select {
					case <-ctx.Done():
					case <-time.After(options.pace):
					}
				}
			}
			select {
			case <-l.stop:
				return
			default:
			}
		}
	})
	for range senders {
		l.wg.Go(func() {
			for e := range events {
				for !l.send(ctx, client, e) && ctx.Err() == nil {
					select {
					case <-ctx.Done():
					case <-time.After(20 * time.Millisecond): // as Svix waits before it tries again, only shorter
					}
				}
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		l.once()
		l.wg.Wait()
		client.CloseIdleConnections()
	})
	return l
}

func (l *load) send(ctx context.Context, client *http.Client, e emulator.Event) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, l.url, bytes.NewReader(e.Body))
	if err != nil {
		return false
	}
	key := secret
	if strings.HasPrefix(e.ID, forged) {
		key = "whsec_" + base64.StdEncoding.EncodeToString([]byte("the key of another one"))
	}
	req.Header = fixture.Sign(key, e.ID, time.Now(), e.Body)
	res, err := client.Do(req)
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, res.Body)
	_ = res.Body.Close()
	if key != secret && res.StatusCode == http.StatusUnauthorized {
		l.refused.Add(1)
		return true
	}
	if res.StatusCode/100 != 2 {
		return false
	}
	l.mu.Lock()
	l.answered[e.ID] = true
	l.mu.Unlock()
	l.accepted.Add(1)
	return true
}

// wait waits for so many answers.
func (l *load) wait(n int64) {
	l.t.Helper()
	require.Eventually(l.t, func() bool { return l.accepted.Load() >= n }, 60*time.Second, time.Millisecond)
}

func (l *load) once() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
}

// sofar is a copy of the ids that were answered 2xx.
func (l *load) sofar() map[string]bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.answered)
}

// finish lets the story end and returns the ids that were answered 2xx.
func (l *load) finish() map[string]bool {
	l.once()
	l.wg.Wait()
	return l.answered
}
