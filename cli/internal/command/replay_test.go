package command

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/audit"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/stream"
	"github.com/usherhq/usher/worker"
)

// audited is a row of audit_log.
type audited struct {
	Action, Selector, Detail string
	Affected, Failed         int
}

func (y *yard) audits() []audited {
	y.t.Helper()
	var rows []audited
	require.NoError(y.t, y.db.Table("audit_log").Order("id").Find(&rows).Error)
	return rows
}

// begun runs a command beside the test; the channel gets its result.
func (y *yard) begun(args ...string) <-chan result {
	done := make(chan result, 1)
	go func() { done <- y.Run(args...) }()
	return done
}

// until waits for a condition.
func (y *yard) until(what string, condition func() bool) {
	y.t.Helper()
	require.Eventually(y.t, condition, 60*time.Second, 5*time.Millisecond, what)
}

func TestReplayWaitsForADatabaseThatIsRestarted(t *testing.T) {
	t.Parallel()
	const n = 400
	server := dbtest.NewServer(t)
	y, c, cfg := newCounting(t, server.Create(t, "usher"), n)
	c.set(nil)
	y.work(cfg)
	done := y.begun("dlq", "replay", "--all", "--yes", "--rate", "150", "-o", "json")
	y.until("noted while it runs", func() bool { return y.count("audit_log", "affected >= 50 AND detail LIKE 'has not come%'") == 1 })
	server.Stop()
	time.Sleep(1500 * time.Millisecond) // the outage
	server.Start(t)
	r := (<-done).want(exitOK)
	assert.Equal(t, bulkResult{Selected: n, Replayed: n, Applied: n}, into[bulkResult](r))
	assert.Contains(t, r.err, "trying again for up to 1m0s")
	assert.Contains(t, r.err, "it goes on")
	y.appliedOnce(n)
	assert.Zero(t, y.letters())
	assert.Equal(t, []audited{{Action: "dead_letters.replay", Selector: "--all", Affected: n}}, y.audits())
}

func TestReplayWaitsForABrokerThatIsRestarted(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		const n = 300
		y, c, cfg := newCounting(t, url, n)
		c.set(nil)
		y.work(cfg)
		done := y.begun("dlq", "replay", "--all", "--yes", "--rate", "150", "-o", "json")
		y.until("noted while it runs", func() bool { return y.count("audit_log", "affected >= 50") == 1 })
		y.nats.Stop()
		time.Sleep(time.Second) // the outage
		y.nats.Start()
		r := (<-done).want(exitOK)
		assert.Equal(t, n, into[bulkResult](r).Replayed)
		assert.Contains(t, r.err, "the broker does not answer: check that it runs and can be reached; trying again")
		assert.NotContains(t, r.err, "outbound buffer")
		y.wait("counter", "processed", n) // acks that were lost come again in a minute, and are recognised
		assert.Equal(t, n, y.count("applied", "times = 1"))
		assert.Zero(t, y.letters())
		assert.Equal(t, n, y.audits()[0].Affected)
	})
}

func TestReplayThatIsKilledLeavesItsNumber(t *testing.T) {
	t.Parallel()
	const n, rate = 300, 100
	y, c, cfg := newCounting(t, "sqlite:"+t.TempDir()+"/usher.db", n)
	c.set(nil)
	y.work(cfg)
	usher := y.build()
	cmd := exec.Command(usher.path, "dlq", "replay", "--all", "--yes", "--rate", "100")
	var shown bytes.Buffer
	cmd.Env, cmd.Stderr = usher.env, &shown
	require.NoError(t, cmd.Start())
	y.until("half way", func() bool { return y.letters() <= n/2 })
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	row := y.audits()[0]
	assert.InDelta(t, n-y.letters(), row.Affected, rate, shown.String())
	assert.Contains(t, row.Detail, "killed")
}

func TestReplaysEndIsWrittenOnceTheDatabaseIsBack(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	url := server.Create(t, "usher")
	y := newYard(t, url)
	log, err := audit.Begin(t.Context(), y.db, "ada", audit.ReplayLetters, "--all")
	require.NoError(t, err)
	server.Stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		(&cli{env: Env{Stderr: &bytes.Buffer{}}}).end(t.Context(), log, 657, 1, "conn closed")
	}()
	server.Start(t)
	<-done
	assert.Equal(t, []audited{{Action: "dead_letters.replay", Selector: "--all", Detail: "conn closed", Affected: 657, Failed: 1}}, y.audits())
}

func TestReplayIntoAFullStreamSaysWhatToDo(t *testing.T) {
	t.Parallel()
	y, c, _ := newCounting(t, "sqlite:"+t.TempDir()+"/usher.db", 5)
	c.set(nil)
	s, err := y.js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	full := s.CachedInfo().Config
	full.MaxBytes = int64(s.CachedInfo().State.Bytes)
	_, err = y.js.UpdateStream(t.Context(), full)
	require.NoError(t, err)
	for _, command := range [][]string{{"dlq", "replay", "--all"}, {"replay", "--all"}} {
		r := y.Run(append(command, "--yes")...).want(exitUsage)
		assert.Contains(t, r.err, "stream CLERK_EVENTS has no room", command)
		assert.Contains(t, r.err, "USHER_RETENTION", command)
		assert.NotContains(t, r.err, "10077", command)
	}
	for _, row := range y.audits() {
		assert.Contains(t, row.Detail, "has no room")
	}
}

func TestReplayThatIsNotSettledIsNoSuccess(t *testing.T) {
	t.Parallel()
	y, c, cfg := newCounting(t, "sqlite:"+t.TempDir()+"/usher.db", 2)
	c.set(nil)
	for _, command := range [][]string{{"dlq", "replay", "msg_u000"}, {"replay", "--event", "msg_u000"}} {
		r := y.Run(append(command, "--yes", "--patience", "200ms", "-o", "json")...).want(exitNo)
		open := into[bulkResult](r)
		assert.Contains(t, open.Stopped, "is a worker running", command)
		assert.Contains(t, open.Stopped, "/readyz", command)
		assert.Equal(t, bulkResult{Selected: 1, Replayed: 1, Unsettled: 1, Run: open.Run, Stopped: open.Stopped}, open, command)
		assert.Equal(t, open.Stopped, y.audits()[len(y.audits())-1].Detail)
	}
	r := y.Run("dlq", "replay", "msg_u001", "--yes", "--patience", "200ms").want(exitNo)
	assert.Contains(t, r.out, "replayed 1 of 1: 0 applied, 1 not settled yet\nstopped: the handler does not get on: no news of 1 within 200ms")
	not := y.Run("replay", "--event", "msg_u001", "--yes", "--stop-at", "100").want(exitOK)
	assert.Contains(t, not.out, "0 applied, 1 not waited for", "as it was asked for")

	// The consumer is gone: nothing is published that nobody would take.
	y.work(cfg)
	y.wait("counter", "processed", 2)
	y.quiet("counter")
	c.set(always)
	y.publish("v")
	y.wait("counter", "dead", 1)
	last := y.lastSeq()
	require.NoError(t, y.js.DeleteConsumer(t.Context(), stream.Events, "counter"))
	require.NoError(t, y.js.DeleteConsumer(t.Context(), stream.Events, "mirror"))
	for _, command := range [][]string{{"dlq", "replay", "--all", "--yes"}, {"replay", "--all", "--yes"}} {
		assert.Contains(t, y.Run(command...).want(exitUsage).err, "run `usher setup`", command)
	}
	assert.Equal(t, last, y.lastSeq())
	assert.Equal(t, 1, y.letters())
}

func TestReplaysAtTheSameTimeWaitForNothing(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		const n = 200
		y := newYard(t, url)
		y.work(worker.Config{})
		y.publish(names("u", n)...)
		y.wait("mirror", "processed", n)
		runs := []<-chan result{y.begun("replay", "--all", "--yes", "-o", "json"), y.begun("replay", "--user", "user_u003", "--yes", "-o", "json"), y.begun("replay", "--handler", "mirror", "--yes", "-o", "json")}
		for i, run := range runs {
			done := into[bulkResult]((<-run).want(exitOK))
			assert.Equal(t, []int{n, 1, n}[i], done.Applied)
		}
	})
}

func TestReplaysOfTheSameLettersCountEachOnce(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		const n = 1500
		y, c, cfg := newCounting(t, url, n)
		c.set(nil)
		y.work(cfg)
		first, second := y.begun("dlq", "replay", "--all", "--yes", "-o", "json"), y.begun("dlq", "replay", "--all", "--yes", "-o", "json")
		sum := 0
		for _, run := range []<-chan result{first, second} {
			done := into[bulkResult]((<-run).want(exitOK))
			t.Log(done)
			assert.Equal(t, done.Selected, done.Replayed+done.Gone, "all are accounted for")
			assert.Equal(t, done.Replayed, done.Applied)
			assert.Zero(t, done.Failed)
			sum += done.Replayed
		}
		assert.Equal(t, n, sum)
		affected := 0
		for _, row := range y.audits() {
			affected += row.Affected
		}
		assert.Equal(t, n, affected)
		y.appliedOnce(n)
		assert.Zero(t, y.letters())
	})
}

func TestReplayCountsNoMoreThanItSelectedWhileEventsArrive(t *testing.T) {
	t.Parallel()
	y := newYard(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"))
	y.publish(names("early", 50)...)
	ctx, stop := context.WithCancel(t.Context())
	var arriving sync.WaitGroup
	arriving.Go(func() {
		for ctx.Err() == nil {
			_, _ = y.js.PublishMsg(ctx, userEvent(rand.Text()))
		}
	})
	for range 3 {
		done := into[bulkResult](y.Run("replay", "--all", "--stop-at", "100", "--yes", "-o", "json").want(exitOK))
		assert.LessOrEqual(t, done.Replayed+done.Earlier+done.LeftOut+done.Gone, done.Selected)
		assert.GreaterOrEqual(t, done.Replayed, 50)
	}
	stop()
	arriving.Wait()
}

// paste runs the command line that a run has printed, as a shell does.
func (p program) paste(stderr string, more ...string) result {
	p.t.Helper()
	_, line, found := strings.Cut(stderr, "To go on:\n")
	require.True(p.t, found, stderr)
	line, _, _ = strings.Cut(line, "\n")
	cmd := exec.Command("sh", "-c", line+" "+strings.Join(more, " "))
	var out, err bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = append(slices.Clone(p.env), "PATH="+filepath.Dir(p.path)), &out, &err
	cmd.Path = "/bin/sh"
	_ = cmd.Run()
	return result{p.t, cmd.ProcessState.ExitCode(), out.String(), err.String()}
}

func TestReplayThatStoppedGoesOnOnceTheCauseIsMended(t *testing.T) {
	t.Parallel()
	built := newHarness(t).build().path
	for _, attempts := range []int{1, 10} { // what failed is dead, or waits for ten minutes
		t.Run(fmt.Sprint(attempts), func(t *testing.T) {
			t.Parallel()
			eachDatabase(t, func(t *testing.T, url string) {
				const good, bad = 100, 300
				const n = good + bad
				y := newYard(t, url)
				y.work(worker.Config{Attempts: attempts, RetryInitial: 10 * time.Minute})
				y.publish(append(names("good", good), names("bad", bad)...)...)
				y.wait("mirror", "processed", n)
				require.NoError(t, y.db.Exec("DELETE FROM users").Error)
				repair := y.broken("bad")
				first := y.Run("replay", "--type", "user.*", "--since", "1h", "--actor", "it's me", "--yes", "-o", "json").want(exitNo)
				stopped := into[bulkResult](first)
				assert.Contains(t, stopped.Stopped, "too many fail again")
				y.publish("later") // which is not the run's
				y.until("later", func() bool { return y.count("deliveries", "event_id = 'msg_later' AND status = 'processed'") == 1 })
				y.quietBut("mirror")
				applied := y.count("deliveries", "origin = 'replay' AND status = 'processed'")
				repair()

				usher := program{y.harness, built}
				begin := time.Now()
				second := usher.paste(first.err).want(exitOK)
				assert.Less(t, time.Since(begin), 9*time.Minute, "nothing waits for its next attempt")
				assert.Contains(t, second.err, "400 events for handler mirror selected.")
				done := into[bulkResult](second)
				assert.Equal(t, bulkResult{Selected: n, Replayed: n - applied, Applied: n, Earlier: applied, Run: stopped.Run}, done)
				assert.Equal(t, n+1, y.count("users", "true"))
				rows := y.audits()
				require.Len(t, rows, 2)
				assert.Equal(t, stopped.Replayed, rows[0].Affected)
				assert.Equal(t, n-applied, rows[1].Affected, "what it did itself")
				assert.Equal(t, 2, y.count("audit_log", "actor = ?", "it's me"))

				third := usher.paste(first.err, "-o", "table").want(exitOK)
				assert.Equal(t, "replayed 0 of 400: 400 applied; 400 were replayed before the run was broken off\n", third.out)
			})
		})
	}
}

// quietBut waits until the handler has nothing to do but what waits for its next attempt.
func (y *yard) quietBut(handler string) {
	y.t.Helper()
	y.until("quiet", func() bool {
		c, err := y.js.Consumer(y.t.Context(), stream.Events, handler)
		waiting := y.count("deliveries", "handler = ? AND status = 'retrying'", handler)
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending <= waiting
	})
}

func TestReplayHintIsTheSameCommand(t *testing.T) {
	t.Parallel()
	c := &cli{args: []string{"replay", "--type", "user.*", "--actor=it's me", "--since", "24h"}}
	assert.Equal(t, `usher replay --type 'user.*' '--actor=it'\''s me' --since 24h --resume 1-2-x-y`, c.resumeLine("1-2-x-y", false))
	c.args = append(c.args, "--resume", "1-2-x-y")
	assert.Equal(t, `usher replay --type 'user.*' '--actor=it'\''s me' --since 24h --resume 1-2-x-y`, c.resumeLine("1-2-x-y", true))
}

func TestReplayLeavesOutWhatWasDiscarded(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		y := newYard(t, url)
		y.work(worker.Config{Attempts: 1})
		y.broken("bad")
		y.publish(append(names("good", 10), names("bad", 8)...)...)
		y.wait("mirror", "dead", 8)
		y.wait("mirror", "processed", 10)
		y.Run("dlq", "replay", "msg_bad000", "--yes").want(exitNo) // its row names the replay
		y.wait("mirror", "dead", 8)
		y.Run("dlq", "discard", "--all", "--yes").want(exitOK)

		dry := y.Run("replay", "--all", "--dry-run").want(exitOK)
		assert.Equal(t, "would replay 10 events; 8 discarded ones left out\n", dry.out)
		assert.Contains(t, dry.err, "18 events for handler mirror selected; 8 discarded ones are left out.")
		assert.Equal(t, bulkResult{Selected: 18, LeftOut: 8, DryRun: true}, into[bulkResult](y.Run("replay", "--all", "--dry-run", "-o", "json").want(exitOK)))
		assert.Equal(t, 7, into[bulkResult](y.Run("replay", "--from-seq", "12", "--dry-run", "-o", "json").want(exitOK)).LeftOut)
		assert.Zero(t, into[bulkResult](y.Run("replay", "--user", "user_good003", "--dry-run", "-o", "json").want(exitOK)).LeftOut)
		assert.Contains(t, y.Run("replay", "--help").out, "discarded")

		all := into[bulkResult](y.Run("replay", "--all", "--yes", "-o", "json").want(exitOK))
		assert.Equal(t, bulkResult{Selected: 18, Replayed: 10, Applied: 10, LeftOut: 8, Run: all.Run}, all)
		assert.Contains(t, y.Run("replay", "--type", "user.*", "--yes").want(exitOK).out, "replayed 10 of 18: 10 applied; 8 discarded ones left out")
		assert.Equal(t, 8, y.count("deliveries", "status = 'discarded'"))
		assert.Zero(t, y.letters())

		one := into[bulkResult](y.Run("replay", "--event", "msg_bad001", "--yes", "-o", "json").want(exitNo))
		assert.Equal(t, 1, one.Replayed, "named, it is meant")
		y.wait("mirror", "dead", 1)
	})
}
