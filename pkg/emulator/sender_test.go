package emulator_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	svix "github.com/svix/svix-webhooks/go"

	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/fixture"
)

// receipt is one request as the receiver saw it.
type receipt struct {
	id, timestamp, signature string
	at                       time.Time
	verified                 error
}

// receiver answers as ingest does, unless reply says otherwise.
type receiver struct {
	mu       sync.Mutex
	receipts []receipt
	stored   map[string]bool
	reply    func(id string, nth int) int // 0: as ingest does
	tries    map[string]int
}

func newReceiver() *receiver {
	return &receiver{stored: map[string]bool{}, tries: map[string]int{}}
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, _ := io.ReadAll(req.Body)
	webhook, err := svix.NewWebhook(fixture.Secret)
	if err == nil {
		err = webhook.Verify(body, req.Header)
	}
	id := req.Header.Get("svix-id")
	r.mu.Lock()
	defer r.mu.Unlock()
	r.receipts = append(r.receipts, receipt{id, req.Header.Get("svix-timestamp"), req.Header.Get("svix-signature"), time.Now(), err})
	r.tries[id]++
	status := 0
	if r.reply != nil {
		status = r.reply(id, r.tries[id])
	}
	if status != 0 {
		w.WriteHeader(status)
		return
	}
	w.WriteHeader(http.StatusAccepted)
	_, _ = fmt.Fprintf(w, `{"id":%q,"duplicate":%t}`, id, r.stored[id])
	r.stored[id] = true
}

func (r *receiver) ids() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for _, got := range r.receipts {
		ids = append(ids, got.id)
	}
	return ids
}

// direct lets a client call the handler without a network, so that a bubble's clock can run.
type direct struct{ http.Handler }

func (d direct) RoundTrip(req *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	d.ServeHTTP(w, req)
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

func newSender(t *testing.T, h http.Handler, change func(*emulator.SenderConfig)) *emulator.Sender {
	t.Helper()
	cfg := emulator.SenderConfig{
		URL: "http://ingest.test/webhooks/clerk", Secret: fixture.Secret, Client: &http.Client{Transport: direct{h}},
	}
	if change != nil {
		change(&cfg)
	}
	sender, err := emulator.NewSender(cfg)
	require.NoError(t, err)
	return sender
}

func requireBalanced(t *testing.T, l *emulator.Ledger) {
	t.Helper()
	total := l.Totals()
	require.Zero(t, total.Pending())
	var sum emulator.Count
	for _, c := range l.Types() {
		require.Zero(t, c.Pending())
		sum.Sent += c.Sent
		sum.Attempts += c.Attempts
		sum.Accepted += c.Accepted
		sum.Duplicates += c.Duplicates
		sum.Errors += c.Errors
		sum.Failed += c.Failed
		sum.Dropped += c.Dropped
		sum.Undelivered += c.Undelivered
		sum.Repeated += c.Repeated
		sum.Reordered += c.Reordered
		sum.Delayed += c.Delayed
	}
	require.Equal(t, total, sum)
	outcomes := map[emulator.Outcome]int64{}
	attempts := int64(0)
	for _, e := range l.All() {
		outcomes[e.Outcome]++
		attempts += int64(e.Attempts)
	}
	require.Equal(t, total.Attempts, attempts)
	require.Equal(t, total.Accepted, outcomes[emulator.Accepted])
	require.Equal(t, total.Failed, outcomes[emulator.Failed])
	require.Equal(t, total.Dropped, outcomes[emulator.Dropped])
	require.Equal(t, total.Undelivered, outcomes[emulator.Undelivered])
	require.Len(t, slices.Collect(l.AcceptedIDs()), int(total.Accepted))
}

func TestDeliversSignedOverHTTP(t *testing.T) {
	t.Parallel()
	r := newReceiver()
	server := httptest.NewServer(r)
	defer server.Close()
	sender, err := emulator.NewSender(emulator.SenderConfig{URL: server.URL, Secret: fixture.Secret})
	require.NoError(t, err)
	_, events := story(emulator.Config{Seed: 1}, 20)
	require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))

	for _, got := range r.receipts {
		require.NoError(t, got.verified)
	}
	total := sender.Ledger().Totals()
	requireBalanced(t, sender.Ledger())
	assert.EqualValues(t, len(events), total.Sent)
	assert.Equal(t, total.Sent, total.Accepted)
	assert.Equal(t, total.Sent, total.Attempts)
	assert.Zero(t, total.Duplicates)
	assert.Equal(t, total.Sent, sender.Ledger().Latency().Count)
	assert.Positive(t, sender.Ledger().Latency().P99)

	require.NoError(t, sender.Deliver(t.Context(), slices.Values(events[:5])), "a manual resend")
	total = sender.Ledger().Totals()
	assert.EqualValues(t, len(events), total.Sent)
	assert.EqualValues(t, 5, total.Duplicates)
}

func TestRetriesOnSvixSchedule(t *testing.T) {
	t.Parallel()
	for _, compress := range []float64{1, 1000} {
		synctest.Test(t, func(t *testing.T) {
			r := newReceiver()
			r.reply = func(string, int) int { return http.StatusServiceUnavailable }
			sender := newSender(t, r, func(c *emulator.SenderConfig) { c.Compress = compress })
			_, events := story(emulator.Config{}, 1)
			require.NoError(t, sender.Deliver(t.Context(), slices.Values(events[:1])))

			want := []time.Duration{0, 5 * time.Second, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour, 5 * time.Hour, 10 * time.Hour, 10 * time.Hour}
			require.Len(t, r.receipts, len(want))
			signatures := map[string]bool{}
			for i, got := range r.receipts {
				require.NoError(t, got.verified, "signed anew at each attempt")
				require.Equal(t, r.receipts[0].id, got.id, "with the same id")
				require.Equal(t, fmt.Sprint(got.at.Unix()), got.timestamp)
				signatures[got.timestamp+got.signature] = true
				if i > 0 {
					require.Equal(t, time.Duration(float64(want[i])/compress), got.at.Sub(r.receipts[i-1].at))
				}
			}
			if compress == 1 {
				require.Len(t, signatures, len(want))
			}
			e, ok := sender.Ledger().Lookup(events[0].ID)
			require.True(t, ok)
			require.Equal(t, emulator.Entry{Type: events[0].Type, Attempts: 8, Status: 503, Outcome: emulator.Failed}, e)
			requireBalanced(t, sender.Ledger())
		})
	}
}

func TestOnlySuccessWithinTheTimeoutEndsTheRetries(t *testing.T) {
	t.Parallel()
	answers := map[string]func(w http.ResponseWriter, r *http.Request){
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusMovedPermanently)
		},
		"bad request": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadRequest) },
		"too late":    func(http.ResponseWriter, *http.Request) { time.Sleep(15*time.Second + time.Millisecond) },
	}
	for name, first := range answers {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := 0
				h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if n++; n == 1 {
						first(w, r)
						return
					}
					time.Sleep(14 * time.Second) // late, but in time
					w.WriteHeader(http.StatusNoContent)
				})
				sender := newSender(t, h, nil)
				_, events := story(emulator.Config{}, 1)
				require.NoError(t, sender.Deliver(t.Context(), slices.Values(events[:1])))
				total := sender.Ledger().Totals()
				require.Equal(t, emulator.Count{Sent: 1, Attempts: 2, Accepted: 1, Errors: 1}, total)
			})
		})
	}
}

func TestDropNeverSends(t *testing.T) {
	t.Parallel()
	r := newReceiver()
	sender := newSender(t, r, func(c *emulator.SenderConfig) { c.Faults.Drop, c.Seed = .3, 4 })
	_, events := story(emulator.Config{}, 40)
	require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
	total := sender.Ledger().Totals()
	requireBalanced(t, sender.Ledger())
	assert.InDelta(t, .3, float64(total.Dropped)/float64(total.Sent), .06)
	assert.EqualValues(t, len(r.receipts), total.Sent-total.Dropped)
	for _, id := range r.ids() {
		e, _ := sender.Ledger().Lookup(id)
		require.Equal(t, emulator.Accepted, e.Outcome)
	}

	again := newSender(t, newReceiver(), func(c *emulator.SenderConfig) { c.Faults.Drop, c.Seed = .3, 4 })
	require.NoError(t, again.Deliver(t.Context(), slices.Values(events)))
	for id, e := range again.Ledger().All() {
		same, _ := sender.Ledger().Lookup(id)
		require.Equal(t, same.Outcome, e.Outcome, "the same seed drops the same events")
	}
}

// TestTheSameSeedStrikesTheSameEventsOfAStory: ids differ, since they hold the time of the story.
func TestTheSameSeedStrikesTheSameEventsOfAStory(t *testing.T) {
	t.Parallel()
	tell := func(seed uint64, start time.Time) (types []string, struck []int, total emulator.Count) {
		r := newReceiver()
		sender := newSender(t, r, func(c *emulator.SenderConfig) {
			c.Faults, c.Seed, c.Compress = emulator.Faults{Drop: .1, Duplicate: .1, Reorder: .1, Delay: .1}, seed, 1e6
		})
		_, events := story(emulator.Config{Seed: seed, Start: start}, 40)
		require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
		for i, e := range events {
			types = append(types, e.Type)
			if entry, _ := sender.Ledger().Lookup(e.ID); entry.Outcome == emulator.Dropped {
				struck = append(struck, i)
			}
		}
		return types, struck, sender.Ledger().Totals()
	}
	morning := time.Date(2026, 1, 15, 8, 0, 0, 0, time.UTC)
	types, struck, total := tell(7, morning)
	types2, struck2, total2 := tell(7, morning.Add(31*time.Hour+7*time.Minute))
	assert.Equal(t, types, types2)
	assert.Equal(t, struck, struck2)
	assert.Equal(t, total, total2)
	_, other, _ := tell(8, morning)
	assert.NotEqual(t, struck, other)
}

func TestDuplicateSendsTwiceWithTheSameId(t *testing.T) {
	t.Parallel()
	r := newReceiver()
	sender := newSender(t, r, func(c *emulator.SenderConfig) { c.Faults.Duplicate = .2 })
	_, events := story(emulator.Config{}, 40)
	require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
	total := sender.Ledger().Totals()
	requireBalanced(t, sender.Ledger())
	assert.InDelta(t, .2, float64(total.Repeated)/float64(total.Sent), .05)
	assert.Equal(t, total.Sent, total.Accepted)
	assert.Equal(t, total.Repeated, total.Duplicates, "each second copy was answered as a duplicate")
	assert.Equal(t, total.Sent+total.Repeated, total.Attempts)
}

func TestReorderDeliversAfterFollowingEvents(t *testing.T) {
	t.Parallel()
	r := newReceiver()
	sender := newSender(t, r, func(c *emulator.SenderConfig) { c.Faults.Reorder, c.Concurrency = .1, 1 })
	_, events := story(emulator.Config{}, 40)
	require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
	requireBalanced(t, sender.Ledger())
	total := sender.Ledger().Totals()
	assert.InDelta(t, .1, float64(total.Reordered)/float64(total.Sent), .04)
	assert.Equal(t, total.Sent, total.Accepted)
	place := map[string]int{}
	for i, e := range events {
		place[e.ID] = i
	}
	overtaken, newest := int64(0), -1
	for _, id := range r.ids() {
		if place[id] < newest {
			overtaken++
		}
		newest = max(newest, place[id])
	}
	assert.InDelta(t, total.Reordered, overtaken, 3, "a last one has nothing to wait for")
}

func TestDelayDeliversLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newReceiver()
		sender := newSender(t, r, func(c *emulator.SenderConfig) {
			c.Faults.Delay, c.MaxDelay, c.Compress = 1, 10*time.Minute, 10
		})
		_, events := story(emulator.Config{}, 20)
		begin := time.Now()
		require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
		requireBalanced(t, sender.Ledger())
		require.EqualValues(t, len(events), sender.Ledger().Totals().Delayed)
		last := r.receipts[len(r.receipts)-1].at.Sub(begin)
		require.Greater(t, last, 50*time.Second)
		require.LessOrEqual(t, last, time.Minute)
	})
}

func TestDisablesAnEndpointThatOnlyFailsForFiveDays(t *testing.T) {
	t.Parallel()
	for _, faults := range []emulator.Faults{{}, {Disable: 1}} {
		synctest.Test(t, func(t *testing.T) {
			r := newReceiver()
			r.reply = func(string, int) int { return http.StatusInternalServerError }
			sender := newSender(t, r, func(c *emulator.SenderConfig) {
				c.Faults, c.Rate, c.Compress = faults, 1./3600*100, 100 // one an hour, in compressed time
			})
			_, events := story(emulator.Config{}, 20)
			events = events[:150]
			require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
			requireBalanced(t, sender.Ledger())
			total := sender.Ledger().Totals()
			require.Equal(t, faults.Disable > 0, sender.Disabled())
			if faults.Disable == 0 {
				require.EqualValues(t, 150, total.Failed)
				return
			}
			require.InDelta(t, 120-28, total.Failed, 2, "those whose attempts ended within five days")
			require.InDelta(t, 28+30, total.Undelivered, 2)

			sender.Enable()
			r.reply = nil
			require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
			requireBalanced(t, sender.Ledger())
			require.EqualValues(t, 150, sender.Ledger().Totals().Accepted, "a resend of what was missing")
		})
	}
}

func TestOneSuccessStartsTheFiveDaysAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newReceiver()
		n := 0
		r.reply = func(string, int) int {
			if n++; n%200 == 0 {
				return http.StatusNoContent
			}
			return http.StatusInternalServerError
		}
		sender := newSender(t, r, func(c *emulator.SenderConfig) { c.Faults.Disable, c.Rate = 1, 1./3600 })
		_, events := story(emulator.Config{}, 20)
		require.NoError(t, sender.Deliver(t.Context(), slices.Values(events[:200])))
		require.False(t, sender.Disabled())
		requireBalanced(t, sender.Ledger())
	})
}

func TestRateLimitsNewEvents(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sender := newSender(t, newReceiver(), func(c *emulator.SenderConfig) { c.Rate = 10 })
		_, events := story(emulator.Config{}, 20)
		begin := time.Now()
		require.NoError(t, sender.Deliver(t.Context(), slices.Values(events[:101])))
		require.InDelta(t, 10, time.Since(begin).Seconds(), .1)
	})
}

func TestCancellationStopsEverything(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.Header.Get("svix-id"), "msg_") {
				<-r.Context().Done()
			}
		})
		sender := newSender(t, h, func(c *emulator.SenderConfig) { c.Faults = emulator.Faults{Reorder: .2, Delay: .2, Duplicate: .2} })
		clerk := emulator.New(emulator.Config{})
		done := make(chan error)
		go func() { done <- sender.Deliver(ctx, clerk.Story(1000)) }()
		synctest.Wait()
		require.Error(t, sender.Deliver(ctx, clerk.Story(0)), "one call at a time")
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
		total := sender.Ledger().Totals()
		require.Positive(t, total.Pending())
		require.Zero(t, total.Attempts, "hanging up is nobody's failure")
	})
}

func TestLedgerCanBeReadWhileItRuns(t *testing.T) {
	t.Parallel()
	sender := newSender(t, newReceiver(), func(c *emulator.SenderConfig) { c.Faults.Duplicate = .1 })
	done := make(chan error, 1)
	go func() { done <- sender.Deliver(t.Context(), emulator.New(emulator.Config{}).Story(30)) }()
	for range 100 {
		l := sender.Ledger()
		total := l.Totals()
		assert.GreaterOrEqual(t, total.Pending(), int64(0))
		l.Types()
		l.Latency()
	}
	require.NoError(t, <-done)
}

func TestConfigurationErrorsAreAllReported(t *testing.T) {
	t.Parallel()
	_, err := emulator.NewSender(emulator.SenderConfig{URL: "ftp://x", Secret: "", Compress: -1, Faults: emulator.Faults{Drop: 2}})
	require.Error(t, err)
	for _, want := range []string{"ftp://x", "secret", "compress", "drop"} {
		assert.ErrorContains(t, err, want)
	}
	_, err = emulator.NewLoad(emulator.LoadConfig{URL: "", Secret: "whsec_"})
	require.Error(t, err)
}

func TestFaultsAreParsedByName(t *testing.T) {
	t.Parallel()
	f, err := emulator.ParseFaults(" duplicate=0.05, reorder = .1,disable,")
	require.NoError(t, err)
	assert.Equal(t, emulator.Faults{Duplicate: .05, Reorder: .1, Disable: 1}, f)
	f, err = emulator.ParseFaults("")
	require.NoError(t, err)
	assert.Zero(t, f)
	for _, bad := range []string{"x=1", "drop=y", "drop=2", "drop=-1", "drop=NaN"} {
		_, err = emulator.ParseFaults(bad)
		require.Error(t, err, bad)
	}
	_, err = emulator.ParseFaults("x,drop=2")
	assert.ErrorContains(t, err, "x")
	assert.ErrorContains(t, err, "drop")
}

func TestCompressedRetriesOverRealHTTPEndAccepted(t *testing.T) {
	t.Parallel()
	r := newReceiver()
	r.reply = func(_ string, nth int) int {
		if nth <= 3 {
			return http.StatusServiceUnavailable
		}
		return 0
	}
	server := httptest.NewServer(r)
	defer server.Close()
	sender, err := emulator.NewSender(emulator.SenderConfig{
		URL: server.URL, Secret: fixture.Secret, Compress: 1e6, Faults: emulator.Faults{Duplicate: .05, Reorder: .1, Delay: .05},
	})
	require.NoError(t, err)
	require.NoError(t, sender.Deliver(t.Context(), emulator.New(emulator.Config{}).Story(20)))
	requireBalanced(t, sender.Ledger())
	total := sender.Ledger().Totals()
	assert.Equal(t, total.Sent, total.Accepted)
}
