package stream_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

func newEvent(id string) *event.Event {
	return &event.Event{
		ID: id, Type: "user.created", Source: "clerk", Origin: event.OriginWebhook, Raw: []byte(`{"id":"` + id + `"}`),
		ReceivedAt: time.Now(), Object: event.Object{ID: "user_1", UserID: "user_1"},
	}
}

func newEvents(n int) []*event.Event {
	events := make([]*event.Event, n)
	for i := range events {
		events[i] = newEvent("msg_" + rand.Text())
	}
	return events
}

type published struct {
	ack stream.Ack
	err error
}

// publishAll publishes all at once and waits for every answer.
func publishAll(t *testing.T, p *stream.Publisher, events []*event.Event) []published {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // a loaded machine is no failure
	defer cancel()
	results := make([]published, len(events))
	var group sync.WaitGroup
	for i, e := range events {
		group.Go(func() { results[i].ack, results[i].err = p.Publish(ctx, e) })
	}
	group.Wait()
	return results
}

func ids(t *testing.T, js jetstream.JetStream) map[string]int {
	t.Helper()
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	found := map[string]int{}
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		require.NoError(t, err)
		found[m.Header.Get(stream.HeaderEventID)]++
	}
	return found
}

// count counts what a run of publishes sent to the broker: batches that were begun, and singles.
func count(t *testing.T, nc *nats.Conn) func() (batches, singles int) {
	t.Helper()
	var (
		mu   sync.Mutex
		b, s int
	)
	sub, err := nc.Subscribe("clerk.evt.>", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		switch m.Header.Get("Nats-Batch-Sequence") {
		case "":
			s++
		case "1":
			b++
		}
	})
	require.NoError(t, err)
	require.NoError(t, nc.Flush())
	return func() (int, int) {
		require.NoError(t, nc.Flush())
		time.Sleep(20 * time.Millisecond) // the subscription's goroutine
		require.NoError(t, sub.Drain())
		mu.Lock()
		defer mu.Unlock()
		return b, s
	}
}

func TestPublish(t *testing.T) {
	t.Parallel()
	setup := func(t *testing.T, replicas int) (*stream.Publisher, *natstest.Server, *nats.Conn, jetstream.JetStream) {
		t.Helper()
		server := natstest.New(t, natstest.WithSync)
		nc, js := server.Setup()
		p := stream.NewPublisher(js, replicas)
		t.Cleanup(p.Close)
		return p, server, nc, js
	}
	for _, replicas := range []int{1, 3} {
		t.Run(fmt.Sprintf("EveryEventIsStoredOnce/replicas=%d", replicas), func(t *testing.T) {
			t.Parallel()
			p, _, _, js := setup(t, replicas)
			events := newEvents(500)
			for i, r := range publishAll(t, p, events) {
				require.NoError(t, r.err, i)
				assert.False(t, r.ack.Duplicate)
			}
			found := ids(t, js)
			require.Len(t, found, len(events))
			for _, e := range events {
				assert.Equal(t, 1, found[e.ID])
			}
		})
	}
	t.Run("OneAfterAnotherIsStoredOnce", func(t *testing.T) {
		t.Parallel()
		p, _, nc, js := setup(t, 1)
		counted := count(t, nc)
		for _, e := range newEvents(50) {
			_, err := p.Publish(t.Context(), e)
			require.NoError(t, err)
		}
		batches, singles := counted()
		assert.Zero(t, batches)
		assert.Equal(t, 50, singles)
		assert.Len(t, ids(t, js), 50)
	})
	t.Run("LoadIsCommittedInGroups", func(t *testing.T) {
		t.Parallel()
		p, _, nc, _ := setup(t, 1)
		counted := count(t, nc)
		for _, r := range publishAll(t, p, newEvents(1000)) {
			require.NoError(t, r.err)
		}
		batches, singles := counted()
		assert.Positive(t, batches)
		assert.Less(t, batches+singles, 250)
	})
	t.Run("RepeatsInsideOneGroupShareOneAnswer", func(t *testing.T) {
		t.Parallel()
		p, _, _, js := setup(t, 1)
		events := newEvents(40)
		var all []*event.Event
		for _, e := range events {
			all = append(all, e, e, e)
		}
		results := publishAll(t, p, all)
		for i := range events {
			first := 0
			for _, r := range results[3*i : 3*i+3] {
				require.NoError(t, r.err)
				if !r.ack.Duplicate {
					first++
				}
			}
			assert.Equal(t, 1, first)
		}
		assert.Len(t, ids(t, js), len(events))
	})
	t.Run("BatchWithAStoredEventIsCutInHalves", func(t *testing.T) {
		t.Parallel()
		p, _, nc, js := setup(t, 1)
		events := newEvents(400)
		for _, i := range []int{3, 200, 399} {
			_, err := js.PublishMsg(t.Context(), stream.Message(events[i]))
			require.NoError(t, err)
		}
		counted := count(t, nc)
		for i, r := range publishAll(t, p, events) {
			require.NoError(t, r.err)
			assert.Equal(t, i == 3 || i == 200 || i == 399, r.ack.Duplicate, i)
		}
		_, singles := counted()
		assert.Less(t, singles, 150, "most went out in batches")
		found := ids(t, js)
		assert.Len(t, found, len(events))
		for id, n := range found {
			assert.Equal(t, 1, n, id)
		}
	})
	t.Run("ARestartFindsTheDuplicateAtTheBroker", func(t *testing.T) {
		t.Parallel()
		p, _, _, js := setup(t, 1)
		events := newEvents(100)
		publishAll(t, p, events)
		p.Forget()
		for _, r := range publishAll(t, p, events) {
			require.NoError(t, r.err)
			assert.True(t, r.ack.Duplicate)
		}
		assert.Len(t, ids(t, js), 100)
	})
	for _, replicas := range []int{1, 3} {
		for how, reconnect := range map[string]bool{"connected": false, "over a restart": true} {
			t.Run(fmt.Sprintf("WhatANewStreamNeverHadIsNoDuplicate/replicas=%d/%s", replicas, how), func(t *testing.T) {
				t.Parallel()
				p, server, nc, js := setup(t, replicas)
				events := newEvents(300)
				publishAll(t, p, events)
				require.NoError(t, js.DeleteStream(t.Context(), stream.Events))
				if reconnect {
					before := nc.Stats().Reconnects // it may not have noticed yet that it is disconnected
					server.Stop()
					server.Start()
					require.Eventually(t, func() bool { return nc.Stats().Reconnects > before }, time.Minute, 5*time.Millisecond)
				}
				server.Setup()
				for i, r := range publishAll(t, p, events) {
					require.NoError(t, r.err)
					assert.False(t, r.ack.Duplicate, i)
				}
				assert.Len(t, ids(t, js), len(events))
				for _, r := range publishAll(t, p, events) {
					require.NoError(t, r.err)
					assert.True(t, r.ack.Duplicate)
				}
			})
		}
	}
	t.Run("AResentEventDoesNotRefuseTheBatchOfTheOthers", func(t *testing.T) {
		t.Parallel()
		p, _, nc, js := setup(t, 1)
		first := newEvents(20)
		publishAll(t, p, first)
		counted := count(t, nc)
		events := append(newEvents(380), first...)
		for i, r := range publishAll(t, p, events) {
			require.NoError(t, r.err)
			assert.Equal(t, i >= 380, r.ack.Duplicate, i)
		}
		_, singles := counted()
		assert.Less(t, singles, 150, "most went out in batches")
		assert.Len(t, ids(t, js), 400)
	})
	t.Run("AStreamWithoutBatchesIsServedPlainly", func(t *testing.T) {
		t.Parallel()
		p, _, nc, js := setup(t, 1)
		s, err := js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		cfg := s.CachedInfo().Config
		cfg.AllowAtomicPublish = false
		_, err = js.UpdateStream(t.Context(), cfg)
		require.NoError(t, err)
		counted := count(t, nc)
		for range 5 {
			for _, r := range publishAll(t, p, newEvents(100)) {
				require.NoError(t, r.err)
			}
		}
		batches, singles := counted()
		assert.Equal(t, 500, singles)
		assert.LessOrEqual(t, batches, 1)
		assert.Len(t, ids(t, js), 500)
	})
	t.Run("BrokerStoppedUnderLoadAnswersEveryoneAndLosesNothing", func(t *testing.T) {
		t.Parallel()
		p, server, _, js := setup(t, 1)
		var (
			mu     sync.Mutex
			stored []string
			failed = make(chan struct{}, 1<<20)
			group  sync.WaitGroup
		)
		stop := make(chan struct{})
		for range 64 {
			group.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					ctx, cancel := context.WithTimeout(t.Context(), stream.PublishTimeout)
					e := newEvent("msg_" + rand.Text())
					_, err := p.Publish(ctx, e)
					cancel()
					if err != nil {
						assert.ErrorIs(t, err, stream.ErrUnavailable)
						failed <- struct{}{}
						time.Sleep(10 * time.Millisecond)
						continue
					}
					mu.Lock()
					stored = append(stored, e.ID)
					mu.Unlock()
				}
			})
		}
		have := func(n int) func() bool {
			return func() bool { mu.Lock(); defer mu.Unlock(); return len(stored) >= n }
		}
		require.Eventually(t, have(500), 60*time.Second, time.Millisecond)
		server.Stop()
		require.Eventually(t, func() bool { return len(failed) >= 64 }, 60*time.Second, time.Millisecond)
		mu.Lock()
		n := len(stored)
		mu.Unlock()
		server.Start()
		require.Eventually(t, have(n+500), 60*time.Second, time.Millisecond)
		close(stop)
		group.Wait()
		found := ids(t, js)
		for _, id := range stored {
			assert.Equal(t, 1, found[id], id)
		}
	})
	t.Run("WithoutABrokerItFailsAtOnce", func(t *testing.T) {
		t.Parallel()
		p, server, nc, _ := setup(t, 1)
		server.Stop()
		require.Eventually(t, func() bool { return !nc.IsConnected() }, 60*time.Second, time.Millisecond)
		_, err := p.Publish(t.Context(), newEvent("msg_1"))
		require.ErrorIs(t, err, stream.ErrUnavailable)
		assert.ErrorIs(t, err, nats.ErrReconnectBufExceeded, "it is not sent, so nobody waits for an answer")
	})
	t.Run("TheCallersContextEndsTheWait", func(t *testing.T) {
		t.Parallel()
		for _, replicas := range []int{1, 3} {
			p, _, _, js := setup(t, replicas)
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, err := p.Publish(ctx, newEvent("msg_1"))
			require.ErrorIs(t, err, stream.ErrUnavailable)
			require.ErrorIs(t, err, context.Canceled)
			_, err = p.Publish(t.Context(), newEvent("msg_1"))
			require.NoError(t, err)
			assert.Equal(t, map[string]int{"msg_1": 1}, ids(t, js))
		}
	})
	for _, replicas := range []int{1, 3} {
		t.Run(fmt.Sprintf("CloseAnswersEveryone/replicas=%d", replicas), func(t *testing.T) {
			t.Parallel()
			p, _, _, js := setup(t, replicas)
			events := newEvents(600)
			results := make([]published, len(events))
			entered := make(chan struct{}, len(events))
			var group sync.WaitGroup
			for i, e := range events {
				group.Go(func() {
					entered <- struct{}{}
					ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
					defer cancel()
					results[i].ack, results[i].err = p.Publish(ctx, e)
				})
			}
			for range len(events) / 2 {
				<-entered
			}
			p.Close()
			p.Close()
			atClose := ids(t, js) // nothing is published after Close returned
			group.Wait()
			for i, r := range results {
				if r.err == nil {
					assert.Equal(t, 1, atClose[events[i].ID])
				} else {
					assert.ErrorIs(t, r.err, stream.ErrClosed)
					assert.Zero(t, atClose[events[i].ID])
				}
			}
			assert.Equal(t, atClose, ids(t, js))
			_, err := p.Publish(t.Context(), newEvent("msg_late"))
			assert.ErrorIs(t, err, stream.ErrClosed)
		})
	}
	t.Run("FullStreamIsSaidSoToEachThatDoesNotFit", func(t *testing.T) {
		t.Parallel()
		p, _, _, js := setup(t, 1)
		s, err := js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		cfg := s.CachedInfo().Config
		cfg.MaxBytes = 20_000
		_, err = js.UpdateStream(t.Context(), cfg)
		require.NoError(t, err)
		events := newEvents(200)
		stored := 0
		for _, r := range publishAll(t, p, events) {
			if r.err != nil {
				assert.ErrorIs(t, r.err, stream.ErrFull)
				continue
			}
			stored++
		}
		assert.Len(t, ids(t, js), stored)
		assert.Positive(t, stored)
		assert.Less(t, stored, 200)
	})
	t.Run("TooLargeIsSaidSo", func(t *testing.T) {
		t.Parallel()
		server := natstest.New(t, natstest.WithSync, func(o *server.Options) { o.MaxPayload = 10_000 })
		_, js := server.Setup()
		for _, replicas := range []int{1, 3} {
			p := stream.NewPublisher(js, replicas)
			events := newEvents(50)
			events[7].Raw = make([]byte, 20_000)
			for i, r := range publishAll(t, p, events) { // one that is too large takes nobody along
				if i == 7 {
					assert.ErrorIs(t, r.err, stream.ErrTooLarge)
				} else {
					assert.NoError(t, r.err)
				}
			}
			p.Close()
		}
	})
	t.Run("MissingStreamIsSaidSo", func(t *testing.T) {
		t.Parallel()
		p, _, _, js := setup(t, 1)
		require.NoError(t, js.DeleteStream(t.Context(), stream.Events))
		for _, r := range publishAll(t, p, newEvents(30)) {
			require.ErrorIs(t, r.err, stream.ErrUnavailable)
			assert.Contains(t, r.err.Error(), "usher setup")
		}
	})
}

func TestConnect(t *testing.T) {
	t.Parallel()
	_, err := stream.Connect("nats://127.0.0.1:1", "/does/not/exist.creds", "test", nop())
	require.ErrorContains(t, err, "connect to the broker")
	nc, err := stream.Connect("nats://127.0.0.1:1", "", "test", nop()) // a broker that is away is no error
	require.NoError(t, err)
	defer nc.Close()
	js, err := stream.JetStream(nc)
	require.NoError(t, err)
	p := stream.NewPublisher(js, 1)
	defer p.Close()
	_, err = p.Publish(t.Context(), newEvent("msg_1"))
	require.ErrorIs(t, err, stream.ErrUnavailable)
	require.NotErrorIs(t, err, stream.ErrFull)
	assert.True(t, strings.HasPrefix(err.Error(), "publish msg_1: "))
}
