package ingest

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// idle is a service that nothing is sent to.
func idle(t *testing.T, js jetstream.JetStream, replicas int) *observe.Health {
	t.Helper()
	publisher := stream.NewPublisher(js, replicas)
	t.Cleanup(publisher.Close)
	health := &observe.Health{}
	s, err := New(Config{Addr: "127.0.0.1:0", Sources: []Source{{Name: "clerk", Secrets: []string{secret}}}},
		Deps{Publisher: publisher, JetStream: js, Health: health})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ran })
	return health
}

func says(t *testing.T, health *observe.Health, words string) {
	t.Helper()
	var last string
	require.Eventually(t, func() bool {
		last = health.Problems()["broker"]
		return words == "" && last == "" || words != "" && strings.Contains(last, words)
	}, time.Minute, 20*time.Millisecond, "want %q", words)
	require.NotContains(t, last, "nats:")
	require.NotContains(t, last, "disk")
}

// TestAStreamWithoutAMajorityIsNotReady: nothing is sent, so that no failed publish says it.
func TestAStreamWithoutAMajorityIsNotReady(t *testing.T) {
	t.Parallel()
	c := natstest.NewCluster(t, 3, natstest.WithSync)
	_, js := c.Setup()
	health := idle(t, js, 3)
	says(t, health, "")
	c.Servers[1].Stop()
	c.Servers[2].Stop()
	says(t, health, "no leader")
	c.Servers[1].Start()
	says(t, health, "")
}

func TestReadinessNamesTheCause(t *testing.T) {
	t.Parallel()
	t.Run("JetStream is not enabled", func(t *testing.T) {
		t.Parallel()
		_, js := natstest.New(t, func(o *server.Options) { o.JetStream = false }).Connect()
		says(t, idle(t, js, 1), "JetStream does not answer at the broker: enable it there")
	})
	t.Run("stream is missing", func(t *testing.T) {
		t.Parallel()
		s := natstest.New(t)
		_, js := s.Connect()
		health := idle(t, js, 1)
		says(t, health, "run `usher setup`")
		s.Setup()
		says(t, health, "")
	})
	t.Run("ingest may only publish", func(t *testing.T) {
		t.Parallel()
		s := natstest.New(t, func(o *server.Options) {
			o.Users = []*server.User{
				{Username: "admin", Password: "admin"},
				{Username: "ingest", Password: "ingest", Permissions: &server.Permissions{
					Publish: &server.SubjectPermission{Allow: []string{"clerk.evt.>"}}, Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX_test.>"}},
				}},
			}
		})
		as := func(user string) jetstream.JetStream {
			nc, err := stream.Connect(strings.Replace(s.URL(), "://", "://"+user+":"+user+"@", 1), "", "test", zap.NewNop())
			require.NoError(t, err)
			t.Cleanup(nc.Close)
			js, err := stream.JetStream(nc)
			require.NoError(t, err)
			require.Eventually(t, nc.IsConnected, time.Minute, time.Millisecond)
			return js
		}
		admin := as("admin")
		health := idle(t, as("ingest"), 1)
		says(t, health, "no stream took the event")
		_, err := stream.Topology{Replicas: 1, MaxBytes: 1 << 20}.Ensure(t.Context(), admin)
		require.NoError(t, err)
		says(t, health, "")
		events, err := admin.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		require.Zero(t, events.CachedInfo().State.LastSeq, "looking stores nothing")
		require.NoError(t, admin.DeleteStream(t.Context(), stream.Events))
		says(t, health, "no stream took the event")
	})
}
