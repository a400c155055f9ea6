package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/stream"
)

// TestThreeBrokersUnderLoad lets three brokers meet what a cluster meets, under load with a tenth of junk, with ingest, worker, reconciler
// and console as processes of their own. What was answered 202 is applied or dead-lettered, once, and no service has to be restarted.
func TestThreeBrokersUnderLoad(t *testing.T) {
	t.Parallel()
	text := os.Getenv("USHER_CHAOS_FREEZE")
	if text == "" {
		t.Skip("skipped: takes minutes; make cluster runs it")
	}
	freeze, err := time.ParseDuration(text)
	require.NoError(t, err)
	clerk := newClerk()
	api := httptest.NewServer(clerk.API(emulator.APIConfig{Key: "sk_live_e2e"}))
	t.Cleanup(api.Close)
	c := newClusterOf(t, clusterConfig{
		databaseURL: dbtest.EmptyPostgresURL(t), ackWait: 5 * time.Second, brokers: 3, services: []string{"reconciler", "console"},
		env: []string{"CLERK_SECRET_KEY=sk_live_e2e", "CLERK_API_URL=" + api.URL + "/v1", "USHER_RECONCILE_INTERVAL=20s", "USHER_ADMIN_TOKEN=0123456789abcdef"},
	})
	c.ready()
	require.Eventually(t, func() bool { return c.metricOf("ingest", `usher_broker_durability{state="synced"}`) == "1" }, 60*time.Second, 50*time.Millisecond)
	load := startLoadWith(t, c.webhooks, clerk, loadOptions{junk: true, pace: 5 * time.Millisecond})
	load.wait(200)

	// resumes says how long it takes until events are accepted again, and then lets some more come.
	resumes := func(what string) {
		t.Helper()
		begin := time.Now()
		load.wait(load.accepted.Load() + 1)
		t.Logf("%s: events accepted after %s", what, time.Since(begin).Round(100*time.Millisecond))
		load.wait(load.accepted.Load() + 200)
	}
	// whole waits until all brokers have all that the others have.
	whole := func() {
		t.Helper()
		begin := time.Now()
		require.Eventually(t, func() bool { return c.healthy() && c.current() }, 60*time.Second, 100*time.Millisecond, "the brokers do not become whole")
		c.ready()
		t.Logf("brokers whole and services ready after %s", time.Since(begin).Round(100*time.Millisecond))
	}
	whole()

	leader := c.leader()
	c.processes[leader].kill()
	resumes("leader killed")
	c.start(leader)
	whole()

	for what, name := range map[string]string{"leader": c.leader(), "broker of ingest": c.brokerOf("ingest")} {
		frozen := c.processes[name].cmd.Process
		require.NoError(t, frozen.Signal(syscall.SIGSTOP))
		thaw := time.AfterFunc(freeze, func() { _ = frozen.Signal(syscall.SIGCONT) })
		t.Cleanup(func() { thaw.Stop() })
		begin := time.Now()
		resumes(what + " frozen for " + freeze.String())
		<-time.After(time.Until(begin.Add(freeze)))
		whole()
	}

	for _, name := range c.brokers {
		assert.Equal(t, 0, c.processes[name].stop(), name)
		resumes(name + " stopped")
		c.start(name)
		whole()
	}

	for _, name := range c.brokers[:2] {
		c.processes[name].kill()
	}
	lost := time.Now()
	for _, name := range []string{"ingest", "worker"} {
		require.Eventually(t, func() bool { return c.problems(name) != nil }, 60*time.Second, 100*time.Millisecond, "%s is ready without a majority of brokers", name)
		t.Logf("majority lost: %s is not ready after %s: %v", name, time.Since(lost).Round(100*time.Millisecond), c.problems(name))
	}
	require.Eventually(t, func() bool {
		text := fmt.Sprint(c.problems("ingest"))
		return strings.Contains(text, "no leader") || strings.Contains(text, "majority")
	}, 60*time.Second, 100*time.Millisecond, "%s: not the true cause", c.problems("ingest"))
	for range 3 {
		status, err := postOne(c.webhooks)
		require.NoError(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, status)
		assert.NotNil(t, c.problems("ingest"), "it stays so")
	}
	for _, name := range c.brokers[:2] {
		c.start(name)
	}
	resumes("majority back")
	whole()

	answered := load.finish()
	c.ready()
	c.settled(len(answered), 2*time.Minute)
	c.ledger(answered, clerk)
	for name := range c.ops {
		select {
		case err := <-c.processes[name].done:
			c.processes[name].done <- err
			t.Errorf("%s ended by itself: %v", name, err)
		default:
		}
		require.Eventually(t, func() bool { return c.problems(name) == nil }, 60*time.Second, 100*time.Millisecond, "%s is not ready: %v", name, c.problems(name))
	}
	assert.Positive(t, load.refused.Load())
	dead := 0
	for id := range answered {
		if strings.HasPrefix(id, undecodable) {
			dead++
		}
	}
	t.Logf("%d events answered 202: %d applied once, %d dead-lettered; %d forged refused", len(answered), len(answered)-dead, dead, load.refused.Load())
}

// leader is the broker that leads the stream of events.
func (c *cluster) leader() string {
	c.t.Helper()
	var name string
	require.Eventually(c.t, func() bool {
		s, err := c.js.Stream(context.Background(), stream.Events)
		if err == nil && s.CachedInfo().Cluster != nil {
			name = s.CachedInfo().Cluster.Leader
		}
		return name != ""
	}, 60*time.Second, 50*time.Millisecond, "the stream has no leader")
	return name
}

// brokerOf is the broker that a service is connected to.
func (c *cluster) brokerOf(service string) string {
	c.t.Helper()
	for _, name := range c.brokers {
		res, err := http.Get(c.monitors[name] + "/connz")
		require.NoError(c.t, err)
		body, err := io.ReadAll(res.Body)
		require.NoError(c.t, err)
		require.NoError(c.t, res.Body.Close())
		if strings.Contains(string(body), `"name": "usher-`+service+`"`) {
			return name
		}
	}
	require.Failf(c.t, "not connected", "%s has no connection to a broker", service)
	return ""
}

// healthy says whether every broker runs and says that it is well.
func (c *cluster) healthy() bool {
	for _, name := range c.brokers {
		if get(c.monitors[name]+"/healthz") != http.StatusOK {
			return false
		}
	}
	return true
}

// current says whether all replicas of the streams have caught up.
func (c *cluster) current() bool {
	for _, name := range []string{stream.Events, stream.DeadLetters} {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		s, err := c.js.Stream(ctx, name)
		cancel()
		if err != nil || s.CachedInfo().Cluster == nil || s.CachedInfo().Cluster.Leader == "" || len(s.CachedInfo().Cluster.Replicas) != len(c.brokers)-1 {
			return false
		}
		for _, r := range s.CachedInfo().Cluster.Replicas {
			if !r.Current || r.Offline {
				return false
			}
		}
	}
	return true
}
