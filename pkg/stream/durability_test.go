package stream_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

func withMonitor(o *server.Options) { o.HTTPHost, o.HTTPPort = "127.0.0.1", server.RANDOM_PORT }

func monitorOf(s *natstest.Server) string { return "http://" + s.Server().MonitorAddr().String() }

// TestDurabilityIsAskedForAtTheMonitoringPort: a nats-server as it comes syncs every two minutes.
func TestDurabilityIsAskedForAtTheMonitoringPort(t *testing.T) {
	t.Parallel()
	named := func(name string) natstest.Option { return func(o *server.Options) { o.ServerName = name } }
	for _, withStream := range []bool{false, true} {
		t.Run(fmt.Sprint("stream exists: ", withStream), func(t *testing.T) {
			t.Parallel()
			connect := func(s *natstest.Server) jetstream.JetStream {
				if withStream {
					_, js := s.Setup()
					return js
				}
				nc, js := s.Connect()
				require.Eventually(t, nc.IsConnected, time.Minute, time.Millisecond)
				return js
			}
			lazy, always := natstest.New(t, withMonitor, named("lazy")), natstest.New(t, withMonitor, natstest.WithSync, named("always"))
			jsLazy, jsAlways := connect(lazy), connect(always)

			d := stream.AskDurability(t.Context(), jsLazy, monitorOf(lazy), 1)
			assert.Equal(t, stream.Durability{State: stream.Unsynced, Detail: "server lazy syncs every 2m0s only"}, d)
			require.ErrorIs(t, d.Refuse(), stream.ErrUnsynced)
			d = stream.AskDurability(t.Context(), jsAlways, monitorOf(always)+"/", 1)
			assert.Equal(t, stream.Durability{State: stream.Synced, Detail: "sync_interval is always at always"}, d)
			require.NoError(t, d.Refuse())

			for name, monitor := range map[string]string{
				"not set": "", "nobody there": "http://user:hidden@127.0.0.1:1", "no monitoring port": "http://" + lazy.Server().Addr().String(),
			} {
				d := stream.AskDurability(t.Context(), jsLazy, monitor, 1)
				assert.Equal(t, stream.Unknown, d.State, name)
				assert.NotEmpty(t, d.Detail, name)
				assert.NotContains(t, d.Detail, "hidden", name)
				require.NoError(t, d.Refuse(), name)
			}
			if withStream { // the port of a server that does not keep the stream says nothing
				d = stream.AskDurability(t.Context(), jsLazy, monitorOf(always), 1)
				assert.Equal(t, stream.Durability{State: stream.Unknown, Detail: "server lazy, which keeps the stream, was not asked"}, d)
			} else { // three are wanted, and one has answered
				d = stream.AskDurability(t.Context(), jsAlways, monitorOf(always), 3)
				assert.Equal(t, stream.Unknown, d.State)
			}
		})
	}
}

func TestAStreamThatIsNotOnDiskIsUnsynced(t *testing.T) {
	t.Parallel()
	for want, change := range map[string]func(*jetstream.StreamConfig){
		"in memory": func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage },
		"persist_mode async": func(c *jetstream.StreamConfig) {
			c.PersistMode, c.AllowAtomicPublish = jetstream.AsyncPersistMode, false
		},
	} {
		s := natstest.New(t, withMonitor, natstest.WithSync)
		_, js := s.Connect()
		cfg := stream.Topology{Replicas: 1, MaxBytes: 1 << 20}.Streams()[0]
		change(&cfg)
		_, err := js.CreateStream(t.Context(), cfg)
		require.NoError(t, err)
		d := stream.AskDurability(t.Context(), js, monitorOf(s), 1)
		assert.Equal(t, stream.Unsynced, d.State)
		assert.Contains(t, d.Detail, want)
	}
}

// TestDurabilityIsAskedForOverTheConnection: where the user's account imports the question to the system account.
func TestDurabilityIsAskedForOverTheConnection(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, `
system_account: SYS
accounts {
  SYS { users: [{user: sys, password: sys}], exports: [{service: "$SYS.REQ.SERVER.PING.VARZ", response: stream}] }
  APP { jetstream: enabled, users: [{user: usher, password: right}], imports: [{service: {account: SYS, subject: "$SYS.REQ.SERVER.PING.VARZ"}}] }
}`)
	nc, err := stream.Connect(fmt.Sprintf("nats://usher:right@127.0.0.1:%d", d.port), "", "test", nop())
	require.NoError(t, err)
	defer nc.Close()
	require.Eventually(t, nc.IsConnected, time.Minute, 10*time.Millisecond)
	js, err := stream.JetStream(nc)
	require.NoError(t, err)
	assert.Equal(t, stream.Synced, stream.AskDurability(t.Context(), js, "", 1).State)
	_, err = stream.Topology{Replicas: 1, MaxBytes: 1 << 20}.Ensure(t.Context(), js)
	require.NoError(t, err)
	assert.Equal(t, stream.Synced, stream.AskDurability(t.Context(), js, "", 1).State)
}

// TestEveryServerOfAReplicatedStreamCounts: a majority that syncs is no promise, since the one that does not may be part of the quorum.
func TestEveryServerOfAReplicatedStreamCounts(t *testing.T) {
	t.Parallel()
	c := natstest.NewCluster(t, 3, withMonitor, natstest.WithSync)
	_, js := c.Setup()
	all := ""
	for i, s := range c.Servers {
		assert.Equal(t, stream.Unknown, stream.AskDurability(t.Context(), js, monitorOf(s), 3).State, "one of three: %d", i)
		all += "," + monitorOf(s)
	}
	d := stream.AskDurability(t.Context(), js, all[1:], 3)
	assert.Equal(t, stream.Durability{State: stream.Synced, Detail: "sync_interval is always at n1, n2, n3"}, d)

	mixed := natstest.NewCluster(t, 3, withMonitor, natstest.WithSync, func(o *server.Options) { o.SyncAlways = o.ServerName != "n2" })
	_, js = mixed.Setup()
	all = ""
	for _, s := range mixed.Servers {
		all += "," + monitorOf(s)
	}
	d = stream.AskDurability(t.Context(), js, all[1:], 3)
	assert.Equal(t, stream.Durability{State: stream.Unsynced, Detail: "server n2 syncs every 2m0s only"}, d)
}
