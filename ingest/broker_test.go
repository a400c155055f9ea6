package ingest

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// idle is a service that nothing is sent to.
func idle(t *testing.T, js jetstream.JetStream, replicas int) *observe.Health {
	t.Helper()
	health, _ := running(t, js, replicas, zap.NewNop())
	return health
}

func running(t *testing.T, js jetstream.JetStream, replicas int, log *zap.Logger) (*observe.Health, *Service) {
	t.Helper()
	publisher := stream.NewPublisher(js, replicas)
	t.Cleanup(publisher.Close)
	health := &observe.Health{}
	s, err := New(Config{Addr: "127.0.0.1:0", Sources: []Source{{Name: "clerk", Secrets: []string{secret}}}},
		Deps{Publisher: publisher, JetStream: js, Health: health, Logger: log})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ran })
	return health, s
}

// TestItSaysThatEventsCannotBeStored: in the log, in readiness and in the answer; and when they can again.
func TestItSaysThatEventsCannotBeStored(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	_, js := server.Setup()
	core, logged := observer.New(zap.InfoLevel)
	health, s := running(t, js, 1, zap.New(core))
	says(t, health, "")
	post := func() int {
		body := []byte(`{"type":"user.created","data":{"id":"user_1"}}`)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.Addr()+Path, bytes.NewReader(body))
		require.NoError(t, err)
		req.Header = fixture.Sign(secret, "msg_1", time.Now(), body)
		res, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		return res.StatusCode
	}
	require.Equal(t, http.StatusAccepted, post())
	require.Empty(t, logged.FilterMessageSnippet("events can").All(), "a start like any other")

	server.Stop()
	says(t, health, "not connected to the broker")
	require.Equal(t, http.StatusServiceUnavailable, post())
	require.Eventually(t, func() bool {
		all := logged.FilterMessageSnippet("events cannot be stored: webhooks are answered 503").FilterLevelExact(zap.WarnLevel).All()
		return len(all) > 0 && strings.Contains(fmt.Sprint(all[0].ContextMap()), "not connected to the broker")
	}, time.Minute, 20*time.Millisecond)

	server.Start()
	says(t, health, "")
	require.Eventually(t, func() bool { return logged.FilterMessage("events can be stored again").Len() == 1 }, time.Minute, 20*time.Millisecond)
	require.Equal(t, http.StatusAccepted, post())
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
