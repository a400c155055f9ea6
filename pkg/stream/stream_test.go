package stream_test

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

func nop() *zap.Logger { return zap.NewNop() }

func TestSubjects(t *testing.T) {
	t.Parallel()
	types := fixture.Types()
	require.Len(t, types, 46)
	for _, typ := range types {
		body, ok := fixture.Event(typ)
		require.True(t, ok)
		e, err := event.Decode(body)
		require.NoError(t, err)
		e.Source = "clerk"
		resource, verb, _ := strings.Cut(typ, ".")
		subject := stream.Subject(&e)
		assert.Equal(t, "clerk.evt.clerk."+resource+"."+verb+"."+e.Key(), subject)
		assert.Regexp(t, `^clerk\.evt\.clerk\.[a-zA-Z]+\.[a-zA-Z]+\.[A-Za-z0-9]+_[A-Za-z0-9]+$`, subject, typ)
		assert.Equal(t, strings.Replace(subject, "clerk.evt.", "clerk.replay.mirror.", 1), stream.ReplaySubject("mirror", &e))
		assert.Equal(t, strings.Replace(subject, "clerk.evt.", "clerk.dlq.mirror.", 1), stream.DeadLetterSubject("mirror", &e))
	}
	assert.Equal(t, "clerk.evt.clerk._._._", stream.Subject(&event.Event{Source: "clerk"}))
	assert.Equal(t, "clerk.evt.clerk.odd._.=2E=3E=2A=20", stream.Subject(&event.Event{Source: "clerk", Type: "odd", Object: event.Object{ID: ".>* "}}))
}

func FuzzToken(f *testing.F) {
	for _, s := range []string{"", "user_1", "a.b", "*", ">", " ", "é", strings.Repeat("a", 300), strings.Repeat(".", 300)} {
		f.Add(s)
	}
	fits := regexp.MustCompile(`^[A-Za-z0-9_=-]+$`)
	f.Fuzz(func(t *testing.T, s string) {
		token := stream.Token(s)
		assert.Regexp(t, fits, token)
		assert.LessOrEqual(t, len(token), 130)
		if fits.MatchString(s) && !strings.Contains(s, "=") && len(s) <= 128 {
			assert.Equal(t, s, token)
		}
	})
}

func TestMessageAndParse(t *testing.T) {
	t.Parallel()
	body, _ := fixture.Event("user.created")
	want, err := event.Decode(body)
	require.NoError(t, err)
	want.ID, want.Source, want.Origin = "msg_1", "eu", event.OriginReconcile
	want.ReceivedAt = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	want.TraceParent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	msg := stream.Message(&want)
	assert.Equal(t, body, msg.Data)
	want.Seq, want.FirstOrigin = 7, event.OriginReconcile
	got, err := stream.Parse(msg.Header, msg.Data, 7)
	require.NoError(t, err)
	assert.Equal(t, want, got)

	// What cannot be decoded keeps what its headers say.
	bad := event.Event{ID: "msg_2", Source: "eu", Origin: event.OriginWebhook, Raw: []byte("{"), ReceivedAt: want.ReceivedAt}
	msg = stream.Message(&bad)
	got, err = stream.Parse(msg.Header, msg.Data, 8)
	require.ErrorIs(t, err, event.ErrMalformed)
	bad.Seq, bad.FirstOrigin = 8, event.OriginWebhook
	assert.Equal(t, bad, got)

	// Published by hand.
	got, err = stream.Parse(nats.Header{}, body, 9)
	require.NoError(t, err)
	assert.Equal(t, "seq_9", got.ID)
	assert.Equal(t, event.OriginWebhook, got.Origin)
	assert.Equal(t, event.OriginWebhook, got.FirstOrigin)
	got, err = stream.Parse(nats.Header{stream.HeaderMsgID: {"x"}}, body, 9)
	require.NoError(t, err)
	assert.Equal(t, "x", got.ID)
}

func TestTopology(t *testing.T) {
	t.Parallel()
	handlers := []stream.HandlerSpec{{Name: "mirror"}, {Name: "onboarding", Filters: []string{"user.>"}}, {Name: "fraud", Filters: []string{"session.>", "user.deleted.>"}}}
	want := stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: handlers}
	all := []string{"stream CLERK_EVENTS", "stream CLERK_DLQ", "bucket CLERK_LEASES", "consumer mirror", "consumer onboarding", "consumer fraud"}
	setup := func(t *testing.T) (jetstream.JetStream, func() []string) {
		t.Helper()
		server := natstest.New(t)
		nc, js := server.Connect()
		var writes []string // every change that somebody asks the broker for
		sub, err := nc.SubscribeSync("$JS.API.>")
		require.NoError(t, err)
		require.NoError(t, nc.Flush())
		return js, func() []string {
			writes = nil
			require.NoError(t, nc.Flush())
			for {
				m, err := sub.NextMsg(50 * time.Millisecond)
				if err != nil {
					return writes
				}
				if !strings.Contains(m.Subject+".", ".INFO.") && !strings.Contains(m.Subject, ".LIST.") && !strings.Contains(m.Subject, ".NAMES") {
					writes = append(writes, m.Subject)
				}
			}
		}
	}
	t.Run("CheckChangesNothing", func(t *testing.T) {
		t.Parallel()
		js, writes := setup(t)
		plan, err := want.Check(t.Context(), js)
		require.NoError(t, err)
		assert.Equal(t, stream.Plan{Present: []string{}, Missing: all, Differences: []stream.Difference{}, Changed: []stream.Difference{}}, plan)
		assert.Empty(t, writes())
	})
	t.Run("EnsureCreatesWhatIsMissingAndNeverWritesAgain", func(t *testing.T) {
		t.Parallel()
		js, writes := setup(t)
		plan, err := want.Ensure(t.Context(), js)
		require.NoError(t, err)
		assert.Equal(t, all, plan.Missing)
		assert.Len(t, writes(), len(all))
		for range 3 {
			plan, err = want.Ensure(t.Context(), js)
			require.NoError(t, err)
			assert.Equal(t, stream.Plan{Present: all, Missing: []string{}, Differences: []stream.Difference{}, Changed: []stream.Difference{}}, plan)
		}
		assert.Empty(t, writes(), "equal is not written again")

		more := want
		more.Handlers = append([]stream.HandlerSpec{{Name: "extra"}}, handlers...)
		plan, err = more.Ensure(t.Context(), js)
		require.NoError(t, err)
		assert.Equal(t, []string{"consumer extra"}, plan.Missing)
		assert.Len(t, writes(), 1)
	})
	t.Run("DifferencesAreReportedFieldByField", func(t *testing.T) {
		t.Parallel()
		js, writes := setup(t)
		_, err := want.Ensure(t.Context(), js)
		require.NoError(t, err)
		s, err := js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		cfg := s.CachedInfo().Config
		cfg.MaxBytes, cfg.Duplicates = 2<<30, time.Hour
		cfg.MaxMsgs = 1_000_000 // zero where Usher made it
		_, err = js.UpdateStream(t.Context(), cfg)
		require.NoError(t, err)
		c, err := js.Consumer(t.Context(), stream.Events, "fraud")
		require.NoError(t, err)
		consumer := c.CachedInfo().Config
		consumer.MaxDeliver, consumer.FilterSubjects = 3, []string{"clerk.evt.>"}
		_, err = js.UpdateConsumer(t.Context(), stream.Events, consumer)
		require.NoError(t, err)
		writes()

		plan, err := want.Ensure(t.Context(), js)
		require.NoError(t, err)
		const apply = "run `usher setup --apply`"
		assert.Equal(t, []stream.Difference{
			{Object: "stream CLERK_EVENTS", Field: "max_msgs", Have: "1000000", Want: "unlimited", Fix: apply},
			{Object: "stream CLERK_EVENTS", Field: "max_bytes", Have: "2147483648", Want: "1073741824", Fix: apply},
			{Object: "stream CLERK_EVENTS", Field: "duplicate_window", Have: "1h0m0s", Want: "72h0m0s", Fix: apply},
			{Object: "consumer fraud", Field: "max_deliver", Have: "3", Want: "unlimited", Fatal: true, Effect: "an event that was delivered so often is dropped in silence", Fix: apply},
			{
				Object: "consumer fraud", Field: "filter_subjects", Have: "[clerk.evt.>]", Want: "[clerk.evt.*.session.> clerk.evt.*.user.deleted.> clerk.replay.fraud.>]",
				Fatal: true, Effect: "the others are never delivered", Fix: apply,
			},
		}, plan.Differences)
		assert.Empty(t, writes(), "an operator decides")
		again, err := want.Check(t.Context(), js)
		require.NoError(t, err)
		assert.Equal(t, plan, again)
		assert.Contains(t, plan.Differences[1].String(), "stream CLERK_EVENTS: max_bytes is 2147483648, want 1073741824")
		assert.True(t, json.Valid(must(json.Marshal(plan))))
	})
	t.Run("SeveralMayEnsureAtOnce", func(t *testing.T) {
		t.Parallel()
		js, _ := setup(t)
		errs := make(chan error, 8)
		for range cap(errs) {
			go func() {
				_, err := want.Ensure(t.Context(), js)
				errs <- err
			}()
		}
		for range cap(errs) {
			require.NoError(t, <-errs)
		}
		plan, err := want.Check(t.Context(), js)
		require.NoError(t, err)
		assert.Equal(t, all, plan.Present)
		assert.Empty(t, plan.Differences)
	})
	t.Run("ABrokerThatIsAwayIsAnError", func(t *testing.T) {
		t.Parallel()
		server := natstest.New(t)
		nc, js := server.Connect()
		server.Stop()
		require.Eventually(t, func() bool { return !nc.IsConnected() }, 60*time.Second, time.Millisecond)
		_, err := want.Check(t.Context(), js)
		require.ErrorContains(t, err, "look up stream CLERK_EVENTS")
	})
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return bytes.TrimSpace(b)
}
