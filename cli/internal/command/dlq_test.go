package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/deadletter"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/replay"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// yard is a broker and a database with a worker whose handlers the test chooses, and a harness that knows them.
type yard struct {
	*harness
	nats *natstest.Server
	js   jetstream.JetStream
	db   *gorm.DB
	dlq  jetstream.Stream
}

func newYard(t *testing.T, databaseURL string, handlers ...worker.Registration) *yard {
	t.Helper()
	y := &yard{nats: natstest.New(t)}
	y.harness = newHarness(t, "USHER_NATS_URL="+y.nats.URL(), "USHER_DATABASE_URL="+databaseURL, "USHER_STREAM_MAX_BYTES=4GiB", "USER=ada")
	y.Run("setup").want(exitOK)
	y.db = openDatabase(t, databaseURL)
	_, y.js = y.nats.Connect()
	topology := stream.Topology{Replicas: 1, MaxBytes: 1 << 30}
	for _, r := range handlers {
		if r.Handler.Name() != "mirror" {
			_, err := y.js.CreateConsumer(t.Context(), stream.Events, topology.Consumer(stream.HandlerSpec{Name: r.Handler.Name(), Filters: r.Filters}))
			require.NoError(t, err)
		}
	}
	var err error
	y.dlq, err = y.js.Stream(t.Context(), stream.DeadLetters)
	require.NoError(t, err)
	return y
}

// work starts a worker; the function stops it and waits for it.
func (y *yard) work(cfg worker.Config) (stop func()) {
	y.t.Helper()
	w, err := worker.New(cfg, worker.Deps{JetStream: y.js, DB: y.db, Log: zap.NewNop(), Registerer: prometheus.NewRegistry(), Health: &observe.Health{}})
	require.NoError(y.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		assert.NoError(y.t, <-done)
	})
	y.t.Cleanup(stop)
	return stop
}

// publish stores a user.created for each name; its event is msg_NAME and its user user_NAME.
func (y *yard) publish(names ...string) {
	y.t.Helper()
	for _, name := range names {
		_, err := y.js.PublishMsg(y.t.Context(), userEvent(name))
		require.NoError(y.t, err)
	}
}

func userEvent(name string) *nats.Msg { return userEventOf(name, event.OriginWebhook) }

func userEventOf(name string, origin event.Origin) *nats.Msg {
	body := fmt.Appendf(nil, `{"type":"user.created","object":"event","timestamp":1768471200036,"data":{"id":"user_%s","object":"user","first_name":%q,"created_at":1768471200000,"updated_at":1768471200018}}`, name, name)
	e, _ := event.Decode(body)
	e.ID, e.Source, e.Origin, e.ReceivedAt = "msg_"+name, "clerk", origin, time.Now()
	return stream.Message(&e)
}

func names(prefix string, n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("%s%03d", prefix, i)
	}
	return list
}

// wait waits until so many rows of a handler have a status.
func (y *yard) wait(handler, status string, n int) {
	y.t.Helper()
	var have int
	ok := assert.Eventually(y.t, func() bool {
		have = y.count("deliveries", "handler = ? AND status = ?", handler, status)
		return have == n
	}, 60*time.Second, 5*time.Millisecond)
	require.True(y.t, ok, "%s: %d rows are %s, want %d", handler, have, status, n)
}

func (y *yard) count(table, where string, args ...any) int {
	y.t.Helper()
	var n int64
	require.NoError(y.t, y.db.Table(table).Where(where, args...).Count(&n).Error)
	return int(n)
}

func (y *yard) letters() int {
	y.t.Helper()
	info, err := y.dlq.Info(y.t.Context())
	require.NoError(y.t, err)
	return int(info.State.Msgs)
}

// quiet waits until the handler has nothing to do.
func (y *yard) quiet(handler string) {
	y.t.Helper()
	require.Eventually(y.t, func() bool {
		c, err := y.js.Consumer(y.t.Context(), stream.Events, handler)
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	}, 60*time.Second, 5*time.Millisecond)
}

// broken breaks the mirror for some users, by a rule of the database, and returns what repairs it.
func (y *yard) broken(prefix string) (repair func()) {
	y.t.Helper()
	exec := func(sql string) { require.NoError(y.t, y.db.Exec(sql).Error) }
	if database.IsPostgres(y.db) {
		exec("ALTER TABLE users ADD CONSTRAINT odd CHECK (first_name NOT LIKE '" + prefix + "%')")
		return func() { exec("ALTER TABLE users DROP CONSTRAINT odd") }
	}
	exec("CREATE TRIGGER odd BEFORE INSERT ON users WHEN NEW.first_name LIKE '" + prefix + "%' BEGIN SELECT RAISE(ABORT, 'odd'); END")
	return func() { exec("DROP TRIGGER odd") }
}

// counter counts in the database how often each event was applied, and fails as it is told.
type counter struct {
	mu   sync.Mutex
	fail func(event.Event) error
}

func (c *counter) Name() string { return "counter" }

func (c *counter) set(fail func(event.Event) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail = fail
}

func (c *counter) Handle(_ context.Context, tx *gorm.DB, batch []event.Event) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range batch {
		if c.fail != nil {
			if err := c.fail(e); err != nil {
				return err
			}
		}
		if err := tx.Exec("INSERT INTO applied (event_id, times) VALUES (?, 1) ON CONFLICT (event_id) DO UPDATE SET times = applied.times + 1", e.ID).Error; err != nil {
			return err
		}
		if err := tx.Exec("INSERT INTO effects (cause) VALUES (?) ON CONFLICT (cause) DO NOTHING", e.ID).Error; err != nil {
			return err
		}
	}
	return nil
}

var errBroken = errors.New("the thing is broken")

func always(event.Event) error { return worker.Permanent(errBroken) }

// newCounting is a yard with a counter whose every event is dead.
func newCounting(t *testing.T, url string, n int) (*yard, *counter, worker.Config) {
	t.Helper()
	c := &counter{fail: always}
	handlers := []worker.Registration{{Handler: c}}
	y := newYard(t, url, handlers...)
	require.NoError(t, y.db.Exec("CREATE TABLE applied (event_id text PRIMARY KEY, times bigint)").Error)
	require.NoError(t, y.db.Exec("CREATE TABLE effects (cause text PRIMARY KEY)").Error)
	cfg := worker.Config{Handlers: handlers, RetryInitial: 10 * time.Millisecond, RetryMax: 20 * time.Millisecond, Attempts: 2}
	stop := y.work(cfg)
	y.publish(names("u", n)...)
	y.wait("counter", "dead", n)
	y.quiet("counter")
	stop()
	require.Equal(t, n, y.letters())
	return y, c, cfg
}

// appliedOnce asserts that each of n events was applied once, and that nothing is left.
func (y *yard) appliedOnce(n int) {
	y.t.Helper()
	y.wait("counter", "processed", n)
	y.quiet("counter")
	assert.Equal(y.t, n, y.count("applied", "times = 1"))
	assert.Equal(y.t, n, y.count("applied", "true"))
}

func TestDeadLettersAreShownRepairedAndReplayed(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y := newYard(t, url)
		repair := y.broken("bad")
		y.work(worker.Config{Attempts: 2, RetryInitial: 5 * time.Millisecond, RetryMax: 10 * time.Millisecond})
		y.publish(append(names("good", 5), names("bad", 3)...)...)
		y.wait("mirror", "processed", 5)
		y.wait("mirror", "dead", 3)

		list := into[listing[deadletter.Entry]](y.Run("dlq", "list", "--output", "json").want(exitOK))
		require.Len(t, list.Items, 3)
		assert.Empty(t, list.Next)
		first := list.Items[2]
		assert.Equal(t, "msg_bad000", first.EventID)
		assert.Equal(t, "user_bad000", first.UserID)
		assert.Equal(t, deadletter.Constraint, first.Reason)
		assert.Equal(t, 2, first.Attempts)
		assert.Contains(t, first.Error, "odd")
		assert.NotZero(t, first.LetterSeq)
		require.NotNil(t, first.FirstFailedAt)
		require.NotNil(t, first.LastFailedAt)
		assert.True(t, first.LastFailedAt.After(*first.FirstFailedAt))
		page := into[listing[deadletter.Entry]](y.Run("dlq", "list", "--limit", "2", "-o", "json").want(exitOK))
		page2 := into[listing[deadletter.Entry]](y.Run("dlq", "list", "--limit", "2", "-o", "json", "--cursor", page.Next).want(exitOK))
		assert.Equal(t, list.Items, append(page.Items, page2.Items...))
		assert.Empty(t, page2.Next)
		assert.Contains(t, y.Run("dlq", "list", "--cursor", "odd").want(exitUsage).err, "--cursor")
		assert.Contains(t, y.Run("dlq", "list").want(exitOK).out, "msg_bad001")

		counts := into[listing[deadletter.Count]](y.Run("dlq", "list", "--count", "-o", "json").want(exitOK))
		assert.Equal(t, []deadletter.Count{{Source: "clerk", Handler: "mirror", Type: "user.created", Reason: "constraint", Events: 3}}, counts.Items)
		groups := into[listing[deadletter.Group]](y.Run("dlq", "list", "--group", "-o", "json").want(exitOK))
		require.Len(t, groups.Items, 1)
		assert.Equal(t, first.Fingerprint, groups.Items[0].Fingerprint)
		assert.Equal(t, 3, groups.Items[0].Events)
		assert.Equal(t, 3, groups.Items[0].Users)
		assert.Contains(t, groups.Items[0].Example, "odd")
		assert.Contains(t, y.Run("dlq", "list", "--group").want(exitOK).out, first.Fingerprint)

		shown := into[shownLetter](y.Run("dlq", "show", "msg_bad000", "-o", "json").want(exitOK))
		assert.Equal(t, first, shown.Entry)
		assert.Equal(t, "mirror", shown.Headers["Usher-Handler"])
		assert.Contains(t, string(shown.Body), "user_bad000")
		assert.Contains(t, y.Run("dlq", "show", "msg_bad000").want(exitOK).out, "odd")
		y.Run("dlq", "show", "msg_good000").want(exitNo)

		// Without an answer to a question that cannot be asked, and without a selector, nothing is done.
		assert.Contains(t, y.Run("dlq", "replay", "--all").want(exitUsage).err, "--yes")
		assert.Contains(t, y.Run("dlq", "replay", "--yes").want(exitUsage).err, "--all")
		assert.Contains(t, y.Run("dlq", "replay", "--yes", "--all", "--handler", "mirror").want(exitUsage).err, "--all and a selector")
		assert.Contains(t, y.Run("dlq", "discard", "--reason", "odd").want(exitUsage).err, "--reason")

		// A dry run tells what would happen, before and after the repair, and leaves no trace.
		dry := into[bulkResult](y.Run("dlq", "replay", "--all", "--dry-run", "-o", "json").want(exitNo))
		require.NotNil(t, dry.WouldPass)
		assert.Equal(t, bulkResult{Selected: 3, Failed: 3, DryRun: true, WouldPass: dry.WouldPass, Groups: dry.Groups}, dry)
		assert.Zero(t, *dry.WouldPass)
		require.Len(t, dry.Groups, 1)
		assert.Equal(t, "constraint", dry.Groups[0].Reason)
		assert.Equal(t, 3, dry.Groups[0].Events)
		repair()
		dry = into[bulkResult](y.Run("dlq", "replay", "--all", "--dry-run", "-o", "json").want(exitOK))
		assert.Equal(t, 3, *dry.WouldPass)
		assert.Equal(t, 5, y.count("users", "true"), "rolled back")
		assert.Equal(t, 3, y.letters())
		assert.Zero(t, y.count("audit_log", "true"))

		one := into[bulkResult](y.Run("dlq", "replay", "msg_bad001", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, bulkResult{Selected: 1, Replayed: 1, Applied: 1}, one)
		assert.Contains(t, y.Run("dlq", "replay", "--all", "--yes").want(exitOK).out, "replayed 2 of 2: 2 applied")
		y.wait("mirror", "processed", 8)
		y.quiet("mirror")
		assert.Equal(t, 8, y.count("users", "true"))
		assert.Zero(t, y.letters())
		var r row
		require.NoError(t, y.db.Table("deliveries").Select("origin, attempts, error").Where("event_id = 'msg_bad001'").Take(&r).Error)
		assert.Equal(t, "replay", r.Origin)
		assert.Equal(t, 1, r.Attempts)
		assert.Nil(t, r.Error)
		assert.Contains(t, y.Run("dlq", "replay", "--all", "--yes").want(exitOK).err, "0 dead letters selected")

		var audits []struct {
			Actor, Action, Selector, Detail string
			Affected, Failed                int
		}
		require.NoError(t, y.db.Table("audit_log").Order("id").Find(&audits).Error)
		require.Len(t, audits, 2)
		assert.True(t, strings.HasPrefix(audits[0].Actor, "ada@"), audits[0].Actor)
		assert.Equal(t, "dead_letters.replay", audits[0].Action)
		assert.Equal(t, "msg_bad001", audits[0].Selector)
		assert.Equal(t, 1, audits[0].Affected)
		assert.Empty(t, audits[0].Detail)
		assert.Equal(t, "--all", audits[1].Selector)
		assert.Equal(t, 2, audits[1].Affected)
	})
}

// TestAnIDOfTwoSourcesIsNoName: nothing is shown, replayed or discarded of a source that was not meant.
func TestAnIDOfTwoSourcesIsNoName(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y := newYard(t, url)
		y.work(worker.Config{Attempts: 1})
		repair := y.broken("bad")
		for source, name := range map[string]string{"clerk": "bad_c", "staging": "bad_s"} {
			e, err := stream.Parse(userEvent(name).Header, userEvent(name).Data, 1)
			require.NoError(t, err)
			e.ID, e.Source = "msg_both", source
			_, err = y.js.PublishMsg(t.Context(), stream.Message(&e))
			require.NoError(t, err)
		}
		y.publish("bad_other")
		y.wait("mirror", "dead", 3)
		y.quiet("mirror")

		for _, args := range [][]string{
			{"events", "show", "msg_both"},
			{"dlq", "show", "msg_both"},
			{"dlq", "replay", "msg_both", "--yes"},
			{"dlq", "discard", "msg_other", "msg_both", "--yes"},
			{"replay", "--event", "msg_both", "--yes"},
		} {
			r := y.Run(args...).want(exitUsage)
			assert.Contains(t, r.err, "several sources have an event msg_both: name one with --source (clerk, staging)", args)
			assert.Empty(t, r.out, args)
		}
		assert.Equal(t, 3, y.letters())
		y.Run("events", "show", "msg_both", "--source", "nope").want(exitNo)
		y.Run("dlq", "show", "msg_both", "--source", "nope").want(exitNo)
		none := into[bulkResult](y.Run("replay", "--event", "msg_both", "--source", "nope", "--yes", "-o", "json").want(exitNo))
		assert.Equal(t, 1, none.Gone)
		assert.Zero(t, none.Replayed)
		for source, user := range map[string]string{"clerk": "user_bad_c", "staging": "user_bad_s"} {
			assert.Equal(t, user, into[shownEvent](y.Run("events", "show", "msg_both", "--source", source, "-o", "json").want(exitOK)).UserID)
			letter := into[shownLetter](y.Run("dlq", "show", "msg_both", "--source", source, "-o", "json").want(exitOK))
			assert.Contains(t, string(letter.Body), user)
			list := into[listing[deadletter.Entry]](y.Run("dlq", "list", "--source", source, "-o", "json").want(exitOK))
			assert.Equal(t, user, list.Items[len(list.Items)-1].UserID)
		}

		done := into[bulkResult](y.Run("dlq", "discard", "msg_both", "--source", "staging", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, 1, done.Discarded)
		assert.Equal(t, 1, y.count("deliveries", "source = 'staging' AND status = 'discarded'"))
		assert.Equal(t, 2, y.count("deliveries", "source = 'clerk' AND status = 'dead'"))
		repair()
		done = into[bulkResult](y.Run("dlq", "replay", "msg_both", "--yes", "-o", "json").want(exitOK)) // one source alone has a letter of it
		assert.Equal(t, 1, done.Applied)
		done = into[bulkResult](y.Run("replay", "--event", "msg_both", "--source", "clerk", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, 1, done.Applied)
		assert.Equal(t, 1, y.count("users", "true"))
		assert.Equal(t, 1, y.letters())
	})
}

func TestALetterThatFailsAgainIsANewLetter(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y, c, cfg := newCounting(t, url, 5)
		y.work(cfg)
		for round := range 3 {
			result := into[bulkResult](y.Run("dlq", "replay", "--handler", "counter", "--yes", "-o", "json").want(exitNo))
			assert.Equal(t, bulkResult{Selected: 5, Replayed: 5, Failed: 5}, result, round)
			y.wait("counter", "dead", 5)
			y.quiet("counter")
			assert.Equal(t, 5, y.letters())
		}
		c.set(nil)
		y.Run("dlq", "replay", "--all", "--yes").want(exitOK)
		y.appliedOnce(5)
		assert.Zero(t, y.letters())
	})
}

// TestWhatIsRetriedIsSaidWithItsNextAttempt: after a replay, in lists and of one event.
func TestWhatIsRetriedIsSaidWithItsNextAttempt(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y, c, cfg := newCounting(t, url, 10)
		long := strings.Repeat("what the handler says ", 20) + "to its end"
		c.set(func(e event.Event) error {
			if e.ID <= "msg_u002" {
				return errors.New(long)
			}
			return nil
		})
		cfg.Attempts, cfg.RetryInitial, cfg.RetryMax = 5, 10*time.Minute, 10*time.Minute
		y.work(cfg)
		const at = `20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d.\d{3}Z`
		r := y.Run("dlq", "replay", "--all", "--yes", "--stop-at", "99").want(exitNo)
		assert.Contains(t, r.out, "replayed 10 of 10: 7 applied, 3 failed again\n")
		assert.Regexp(t, "\n3 of 10 are still retrying, next attempt at "+at, r.out)
		assert.Regexp(t, `counter=retrying \(next attempt `+at+`\)`, y.Run("events", "list", "--handler", "counter", "--status", "retrying").want(exitOK).out)
		show := y.Run("events", "show", "msg_u001").want(exitOK).out
		assert.Regexp(t, "NEXT ATTEMPT", show)
		assert.Regexp(t, "counter  retrying .*"+at+" .*"+at, show)
		assert.Contains(t, show, long)

		c.set(func(event.Event) error { return worker.Permanent(errors.New(long)) })
		y.publish("v")
		y.wait("counter", "dead", 1)
		for _, line := range []string{"dlq list", "dlq list --group", "dlq show msg_v"} {
			assert.Contains(t, y.Run(strings.Fields(line)...).want(exitOK).out, long, line)
		}
		if database.IsPostgres(y.db) {
			m := newYard(t, dbtest.PostgresURL(t))
			m.work(worker.Config{Attempts: 1})
			m.broken("bad")
			m.publish("bad")
			m.wait("mirror", "dead", 1)
			assert.Contains(t, m.Run("dlq", "list").want(exitOK).out, " constraint odd of table users: ")
			assert.Contains(t, m.Run("dlq", "replay", "--all", "--dry-run").want(exitNo).out, " constraint odd of table users: ")
		}
	})
}

func TestDiscardedLettersAreGone(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y, c, cfg := newCounting(t, url, 5)
		c.set(nil)
		dry := into[bulkResult](y.Run("dlq", "discard", "--all", "--dry-run", "-o", "json").want(exitOK))
		assert.Equal(t, bulkResult{Selected: 5, DryRun: true}, dry)
		letter := into[shownLetter](y.Run("dlq", "show", "msg_u001", "-o", "json").want(exitOK)).LetterSeq
		require.NoError(t, y.dlq.DeleteMsg(t.Context(), letter)) // as a run that was killed before the mark leaves it
		assert.Contains(t, y.Run("dlq", "show", "msg_u001").want(exitOK).out, "the letter is gone")
		result := into[bulkResult](y.Run("dlq", "discard", "msg_u001", "msg_u002", "--yes", "--actor", "ops", "-o", "json").want(exitOK))
		assert.Equal(t, bulkResult{Selected: 2, Discarded: 2}, result)
		assert.Equal(t, 2, y.count("deliveries", "status = 'discarded' AND error IS NOT NULL"))
		assert.Equal(t, 3, y.letters())
		assert.Equal(t, 1, y.count("audit_log", "actor = 'ops' AND action = 'dead_letters.discard' AND affected = 2 AND selector = 'msg_u001 msg_u002'"))

		y.work(cfg)
		y.Run("dlq", "replay", "--all", "--yes").want(exitOK)
		y.appliedOnce(3)
		assert.Equal(t, 2, y.count("deliveries", "status = 'discarded'"))
	})
}

// between does something once, when a letter was read and before it is published.
type between struct {
	jetstream.JetStream
	do func()
}

func (b between) PublishMsgAsync(m *nats.Msg, opts ...jetstream.PublishOpt) (jetstream.PubAckFuture, error) {
	b.do()
	return b.JetStream.PublishMsgAsync(m, opts...)
}

func TestLettersDiscardedDuringAReplayDoNotComeBack(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y, c, cfg := newCounting(t, url, 5)
		c.set(nil)
		y.work(cfg)
		discard := sync.OnceFunc(func() { y.Run("dlq", "discard", "msg_u002", "msg_u003", "--yes").want(exitOK) })
		result, err := deadletter.Replay(t.Context(), between{y.js, discard}, y.db, deadletter.Filter{}, replay.Options{}, nil)
		require.NoError(t, err)
		assert.Equal(t, deadletter.Result{Selected: 5, Replayed: 3, Applied: 3, Gone: 2, Taken: 2}, result)
		y.appliedOnce(3)
		assert.Equal(t, 2, y.count("deliveries", "status = 'discarded'"))
		sweeper := deadletter.NewSweeper(y.js, y.db)
		sweeper.MinAge = 0
		_, err = sweeper.Sweep(t.Context())
		require.NoError(t, err)
		assert.Zero(t, y.letters())
		assert.Equal(t, 2, y.count("deliveries", "status = 'discarded'"))
	})
}

// crash stands for the end of the process at one step of a replay: from there on nothing more is done.
type crash struct {
	jetstream.JetStream
	at string
	db *gorm.DB
}

var errCrash = errors.New("crash")

func (c crash) PublishMsgAsync(m *nats.Msg, opts ...jetstream.PublishOpt) (jetstream.PubAckFuture, error) {
	if c.at == "before publish" {
		return nil, errCrash
	}
	future, err := c.JetStream.PublishMsgAsync(m, opts...)
	if c.at == "before mark" && err == nil {
		<-future.Ok()
		again, err := c.JetStream.PublishMsgAsync(m, opts...) // its ack was taken
		_ = database.Close(c.db)
		return again, err
	}
	return future, err
}

func (c crash) Stream(ctx context.Context, name string) (jetstream.Stream, error) {
	s, err := c.JetStream.Stream(ctx, name)
	return crashStream{s, c.at}, err
}

type crashStream struct {
	jetstream.Stream
	at string
}

func (c crashStream) DeleteMsg(ctx context.Context, seq uint64) error {
	if c.at == "before delete" {
		return errCrash
	}
	return c.Stream.DeleteMsg(ctx, seq)
}

func (c crashStream) GetMsg(ctx context.Context, seq uint64, opts ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	return c.Stream.GetMsg(ctx, seq, opts...)
}

func TestReplayMayCrashAnywhereAndIsAppliedOnce(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"before publish", "before mark", "before delete"} {
		for _, working := range []bool{true, false} { // the worker takes the replays at once, or after the repetition
			for _, dedupe := range []bool{true, false} { // the broker still knows the publish ids, or not
				t.Run(fmt.Sprintf("%s/working=%t/dedupe=%t", strings.ReplaceAll(at, " ", "-"), working, dedupe), func(t *testing.T) {
					t.Parallel()
					eachDatabase(t, func(t *testing.T, url string) {
						const n = 7
						y, c, cfg := newCounting(t, url, n)
						c.set(nil)
						if !dedupe { // a very short memory, before anything is replayed
							s, err := y.js.Stream(t.Context(), stream.Events)
							require.NoError(t, err)
							forgetful := s.CachedInfo().Config
							forgetful.Duplicates = 100 * time.Millisecond
							_, err = y.js.UpdateStream(t.Context(), forgetful)
							require.NoError(t, err)
						}
						if working {
							y.work(cfg)
						}
						dying := openDatabase(t, url)
						_, err := deadletter.Replay(t.Context(), crash{y.js, at, dying}, dying, deadletter.Filter{}, replay.Options{StopAt: 1, Outage: replay.Outage{Limit: -1}}, nil)
						require.Error(t, err)
						if working && at != "before publish" {
							y.quiet("counter")
						}
						if !dedupe {
							time.Sleep(300 * time.Millisecond) // the broker's memory is measured in time
						}
						for range 2 {
							_, err = deadletter.Replay(t.Context(), y.js, y.db, deadletter.Filter{}, replay.Options{StopAt: 1}, nil)
							require.NoError(t, err)
						}
						if !working {
							y.work(cfg)
						}
						y.appliedOnce(n)

						sweeper := deadletter.NewSweeper(y.js, y.db)
						sweeper.MinAge = 0
						_, err = sweeper.Sweep(t.Context())
						require.NoError(t, err)
						assert.Zero(t, y.letters(), "what the crash left is swept")
						assert.Zero(t, y.count("deliveries", "status <> 'processed' AND handler = 'counter'"))
						y.appliedOnce(n)
					})
				})
			}
		}
	}
}

func TestReplayStopsWhenTooManyFailAgainAndGoesOn(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		const n = 600
		y, c, cfg := newCounting(t, url, n)
		c.set(func(e event.Event) error { // every tenth
			if strings.HasSuffix(e.ID, "0") {
				return errBroken
			}
			return nil
		})
		y.work(cfg)
		result := into[bulkResult](y.Run("dlq", "replay", "--all", "--yes", "-o", "json").want(exitNo))
		assert.Contains(t, result.Stopped, "too many fail again")
		assert.Less(t, result.Replayed, 200, "it does not run ahead")
		assert.Positive(t, result.Failed)
		assert.Equal(t, 1, y.count("audit_log", "detail LIKE 'too many fail again%' AND affected = ?", result.Replayed))
		y.quiet("counter") // what failed once is dead now
		c.set(nil)
		result = into[bulkResult](y.Run("dlq", "replay", "--all", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, result.Selected, result.Applied)
		y.appliedOnce(n)
		assert.Zero(t, y.letters())
	})
}

func TestInterruptedReplayGoesOn(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		const n = 400
		y, c, cfg := newCounting(t, url, n)
		c.set(nil)
		y.work(cfg)
		ctx, interrupt := context.WithCancel(t.Context())
		go func() {
			for y.letters() > n*3/4 {
				time.Sleep(time.Millisecond)
			}
			interrupt()
		}()
		first := into[bulkResult](y.RunIn(ctx, "", "dlq", "replay", "--all", "--yes", "--rate", "200", "-o", "json").want(exitInterrupted))
		assert.Equal(t, "interrupted", first.Stopped)
		assert.Less(t, first.Replayed, n)
		assert.Equal(t, n-first.Replayed, y.letters(), "what was published is settled")
		second := into[bulkResult](y.Run("dlq", "replay", "--all", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, n, first.Replayed+second.Replayed)
		y.appliedOnce(n)
		assert.Zero(t, y.letters())
		assert.Equal(t, 1, y.count("audit_log", "detail = 'interrupted' AND affected = ?", first.Replayed))
	})
}

func TestReplayWithoutAWorkerStopsAndLosesNothing(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		const n = 300
		y, c, cfg := newCounting(t, url, n)
		c.set(nil)
		result := into[bulkResult](y.Run("dlq", "replay", "--all", "--yes", "--patience", "200ms", "-o", "json").want(exitNo))
		assert.Contains(t, result.Stopped, "is a worker running")
		assert.Less(t, result.Replayed, n)
		result = into[bulkResult](y.Run("dlq", "replay", "--all", "--yes", "--stop-at", "100", "-o", "json").want(exitOK))
		assert.Equal(t, result.Selected, result.Replayed)
		assert.Zero(t, y.letters())
		y.work(cfg)
		y.appliedOnce(n)
	})
}

func TestReplayHoldsItsRate(t *testing.T) {
	t.Parallel()
	y, c, cfg := newCounting(t, "sqlite:"+t.TempDir()+"/usher.db", 60)
	c.set(nil)
	y.work(cfg)
	start := time.Now()
	y.Run("dlq", "replay", "--all", "--yes", "--rate", "50").want(exitOK)
	assert.Greater(t, time.Since(start), time.Second)
	y.appliedOnce(60)
}

func TestEventsAreReplayedOnPurpose(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y := newYard(t, url)
		y.work(worker.Config{})
		y.publish(names("u", 30)...)
		y.wait("mirror", "processed", 30)

		require.NoError(t, y.db.Exec("DELETE FROM users WHERE id IN ('user_u003', 'user_u004')").Error)
		require.NoError(t, y.db.Exec("UPDATE users SET first_name = 'by hand' WHERE id = 'user_u005'").Error)
		require.NoError(t, y.db.Exec("UPDATE users SET first_name = 'newer', version = version + 1 WHERE id = 'user_u006'").Error)

		y.Run("replay", "--yes").want(exitUsage)
		y.Run("replay", "--handler", "nobody", "--yes").want(exitUsage)
		dry := into[bulkResult](y.Run("replay", "--user", "user_u003", "--dry-run", "-o", "json").want(exitOK))
		assert.Equal(t, bulkResult{Selected: 1, DryRun: true}, dry)
		one := into[bulkResult](y.Run("replay", "--event", "msg_u003", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, 1, one.Applied)
		assert.Equal(t, 1, y.count("users", "id = 'user_u003'"), "a row that was deleted by hand is back")

		all := into[bulkResult](y.Run("replay", "--since", "1h", "--type", "user.*", "--handler", "mirror", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, bulkResult{Selected: 30, Replayed: 30, Applied: 30, Run: all.Run}, all)
		assert.Equal(t, 30, y.count("users", "true"))
		assert.Equal(t, 1, y.count("users", "first_name = 'by hand'"), "by the version rule, the same version is not newer")
		assert.Equal(t, 1, y.count("users", "first_name = 'newer'"))
		assert.Equal(t, 30, y.count("deliveries", "status = 'processed' AND origin = 'replay' AND attempts = 1"))
		assert.Equal(t, 2, y.count("audit_log", "action = 'events.replay'"))

		last := y.lastSeq()
		again := into[bulkResult](y.Run("replay", "--type", "user.*", "--handler", "mirror", "--resume", all.Run, "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, 30, again.Applied, "known from the log")
		assert.Equal(t, last, y.lastSeq(), "nothing was published twice")
		y.Run("replay", "--type", "user.created", "--resume", all.Run, "--yes").want(exitUsage)
		y.Run("replay", "--resume", "odd", "--yes").want(exitUsage)

		none := into[bulkResult](y.Run("replay", "--type", "session.*", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, bulkResult{}, none)
		assert.Equal(t, 1, into[bulkResult](y.Run("replay", "--event", "msg_nobody", "--yes", "-o", "json").want(exitNo)).Gone)
		from := into[bulkResult](y.Run("replay", "--from-seq", "29", "--dry-run", "-o", "json").want(exitOK))
		assert.Equal(t, 2, from.Selected, "replays are not events to be replayed")
	})
}

func (y *yard) lastSeq() uint64 {
	y.t.Helper()
	s, err := y.js.Stream(y.t.Context(), stream.Events)
	require.NoError(y.t, err)
	return s.CachedInfo().State.LastSeq
}

func TestReplayOfAnAppliedEventRepeatsNoEffect(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y, c, cfg := newCounting(t, url, 3)
		var mu sync.Mutex
		var seen []event.Event
		c.set(func(e event.Event) error {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, e)
			return nil
		})
		y.work(cfg)
		y.Run("dlq", "replay", "--all", "--yes").want(exitOK)
		y.appliedOnce(3)
		s, err := y.js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		for _, effects := range []bool{false, true} { // the command knows Usher's own handlers only
			run := replay.New(y.js, y.db, replay.Options{})
			require.NoError(t, run.Events(t.Context(), s, replay.Selection{
				Handler: "counter", Subjects: []string{"clerk.evt.>"}, Last: 3, RunID: fmt.Sprint(effects), WithEffects: effects,
			}))
			require.NoError(t, run.Finish(t.Context()))
			assert.Equal(t, replay.Progress{Published: 3, Applied: 3}, run.Progress())
		}
		assert.Equal(t, 3, y.count("applied", "times = 3"), "it was applied again, on purpose")
		assert.Equal(t, 3, y.count("effects", "true"), "an effect has a key, and happens once")
		mu.Lock()
		defer mu.Unlock()
		require.Len(t, seen, 9)
		for i, e := range seen {
			assert.Equal(t, event.OriginReplay, e.Origin)
			assert.Equal(t, i >= 6, e.WithEffects)
		}
	})
}

// TestReplaysKeepTheFirstOrigin: a handler must be able to see that what is replayed was a backfill, which sends no reminder.
func TestReplaysKeepTheFirstOrigin(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y, c, cfg := newCounting(t, url, 0)
		var mu sync.Mutex
		var seen []string
		failing := true
		c.set(func(e event.Event) error {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, fmt.Sprintf("%s %s %s", e.ID, e.Origin, e.FirstOrigin))
			if failing {
				return worker.Permanent(errBroken)
			}
			return nil
		})
		handled := func() []string {
			mu.Lock()
			defer mu.Unlock()
			list := slices.Compact(slices.Sorted(slices.Values(seen))) // a batch that fails is tried again one by one
			seen = nil
			return list
		}
		y.work(cfg)
		for name, origin := range map[string]event.Origin{"a": event.OriginBackfill, "b": event.OriginReconcile, "c": event.OriginWebhook} {
			_, err := y.js.PublishMsg(t.Context(), userEventOf(name, origin))
			require.NoError(t, err)
		}
		y.wait("counter", "dead", 3)
		assert.Equal(t, []string{"msg_a backfill backfill", "msg_b reconcile reconcile", "msg_c webhook webhook"}, handled())

		// Replayed, and dead again: the letter of a replay.
		replayed := []string{"msg_a replay backfill", "msg_b replay reconcile", "msg_c replay webhook"}
		y.Run("dlq", "replay", "--all", "--yes").want(exitNo)
		y.wait("counter", "dead", 3)
		y.quiet("counter")
		assert.Equal(t, replayed, handled())
		assert.Equal(t, "backfill", into[shownLetter](y.Run("dlq", "show", "msg_a", "-o", "json").want(exitOK)).Headers["Usher-First-Origin"])
		mu.Lock()
		failing = false
		mu.Unlock()
		y.Run("dlq", "replay", "--all", "--yes").want(exitOK)
		y.appliedOnce(3)
		assert.Equal(t, replayed, handled())

		// Replayed on purpose: found by id, which is the replay that the log names, and then from the events themselves.
		y.Run("replay", "--event", "msg_b", "--stop-at", "100", "--yes").want(exitOK)
		s, err := y.js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		last, err := s.GetLastMsgForSubject(t.Context(), "clerk.replay.mirror.>")
		require.NoError(t, err)
		assert.Equal(t, "msg_b replay reconcile", last.Header.Get("Usher-Event-Id")+" "+last.Header.Get("Usher-Origin")+" "+last.Header.Get("Usher-First-Origin"))
		run := replay.New(y.js, y.db, replay.Options{})
		require.NoError(t, run.Events(t.Context(), s, replay.Selection{Handler: "counter", Subjects: []string{"clerk.evt.>"}, Last: 3, RunID: "r"}))
		require.NoError(t, run.Finish(t.Context()))
		assert.Equal(t, replayed, handled())
		assert.Equal(t, 3, y.count("deliveries", "handler = 'counter' AND origin = 'replay'"), "the log says how it came the last time")
	})
}

func TestResultsHaveTheFieldsOfTheContract(t *testing.T) {
	t.Parallel()
	text, err := json.Marshal(bulkResult{})
	require.NoError(t, err)
	assert.JSONEq(t, `{"selected":0,"replayed":0,"discarded":0,"failed":0,"dry_run":false,"stopped":"","applied":0,"unsettled":0,"retrying":0,"next_attempt_at":null,"gone":0,"earlier":0,"left_out":0}`, string(text))
}
