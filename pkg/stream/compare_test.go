package stream_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

// wrong is one field of a stream or consumer that is not as Usher made it.
type wrong[T any] struct {
	change  func(*T) // by an operator's tool, at the creation or later
	fatal   bool
	fixed   bool   // the broker does not change it in place
	ignored bool   // not compared
	pure    bool   // no broker of this version takes it so
	reports string // instead of the field itself, where it is compared under another name
}

type (
	wrongStream   = wrong[jetstream.StreamConfig]
	wrongConsumer = wrong[jetstream.ConsumerConfig]
)

// wrongStreams are by the field that they are about; every field of the library's type is in it.
var wrongStreams = map[string]wrongStream{
	"Name":         {ignored: true},
	"Description":  {change: func(c *jetstream.StreamConfig) { c.Description = "ours" }, ignored: true},
	"Subjects":     {change: func(c *jetstream.StreamConfig) { c.Subjects = []string{"clerk.evt.*.user.>", "clerk.replay.>"} }, fatal: true},
	"Retention":    {change: func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy }, fatal: true},
	"MaxConsumers": {change: func(c *jetstream.StreamConfig) { c.MaxConsumers = 7 }},
	"MaxMsgs":      {change: func(c *jetstream.StreamConfig) { c.MaxMsgs = 1000 }},
	"MaxBytes":     {change: func(c *jetstream.StreamConfig) { c.MaxBytes = 2 << 30 }},
	"Discard":      {change: func(c *jetstream.StreamConfig) { c.Discard = jetstream.DiscardOld }, fatal: true},
	"DiscardNewPerSubject": {change: func(c *jetstream.StreamConfig) {
		c.DiscardNewPerSubject, c.MaxMsgsPerSubject = true, 1
	}, fatal: true},
	"MaxAge":            {change: func(c *jetstream.StreamConfig) { c.MaxAge = 100 * time.Hour }, fatal: true},
	"MaxMsgsPerSubject": {change: func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = 1 }, fatal: true},
	"MaxMsgSize":        {change: func(c *jetstream.StreamConfig) { c.MaxMsgSize = 4096 }, fatal: true},
	"Storage":           {change: func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage }, fatal: true, fixed: true},
	"Replicas":          {change: func(c *jetstream.StreamConfig) { c.Replicas = 3 }, pure: true},
	"NoAck":             {change: func(c *jetstream.StreamConfig) { c.NoAck = true }, fatal: true},
	"Duplicates":        {change: func(c *jetstream.StreamConfig) { c.Duplicates = time.Minute }},
	"Placement":         {change: func(c *jetstream.StreamConfig) { c.Placement = &jetstream.Placement{Tags: []string{"fast"}} }, ignored: true, pure: true},
	"Mirror": {change: func(c *jetstream.StreamConfig) {
		c.Subjects, c.AllowAtomicPublish, c.Mirror = nil, false, &jetstream.StreamSource{Name: "OTHER"}
	}, fatal: true},
	"Sources":     {change: func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "OTHER"}} }},
	"Sealed":      {change: func(c *jetstream.StreamConfig) { c.Sealed = true }, fatal: true, fixed: true},
	"DenyDelete":  {change: func(c *jetstream.StreamConfig) { c.DenyDelete = true }, fixed: true},
	"DenyPurge":   {change: func(c *jetstream.StreamConfig) { c.DenyPurge = true }, fixed: true},
	"AllowRollup": {change: func(c *jetstream.StreamConfig) { c.AllowRollup = true }},
	"Compression": {change: func(c *jetstream.StreamConfig) { c.Compression = jetstream.S2Compression }, ignored: true},
	"FirstSeq":    {change: func(c *jetstream.StreamConfig) { c.FirstSeq = 100 }, ignored: true},
	"SubjectTransform": {change: func(c *jetstream.StreamConfig) {
		c.SubjectTransform = &jetstream.SubjectTransformConfig{Source: "clerk.evt.>", Destination: "elsewhere.>"}
	}, fatal: true},
	"RePublish": {change: func(c *jetstream.StreamConfig) {
		c.RePublish = &jetstream.RePublish{Source: "clerk.evt.>", Destination: "copy.>"}
	}},
	"AllowDirect":  {change: func(c *jetstream.StreamConfig) { c.AllowDirect = false }},
	"MirrorDirect": {change: func(c *jetstream.StreamConfig) { c.MirrorDirect = true }, ignored: true, pure: true},
	"ConsumerLimits": {change: func(c *jetstream.StreamConfig) {
		c.ConsumerLimits = jetstream.StreamConsumerLimits{MaxAckPending: 200_000}
	}},
	"Metadata":    {change: func(c *jetstream.StreamConfig) { c.Metadata = map[string]string{"team": "ours"} }, ignored: true},
	"Template":    {change: func(c *jetstream.StreamConfig) { c.Template = "x" }, ignored: true, pure: true},
	"AllowMsgTTL": {change: func(c *jetstream.StreamConfig) { c.AllowMsgTTL = true }, fixed: true},
	"SubjectDeleteMarkerTTL": {change: func(c *jetstream.StreamConfig) {
		c.SubjectDeleteMarkerTTL, c.AllowMsgTTL, c.AllowRollup = time.Minute, true, true
	}},
	"AllowMsgCounter":    {change: func(c *jetstream.StreamConfig) { c.AllowMsgCounter = true }, fatal: true, fixed: true, pure: true},
	"AllowAtomicPublish": {change: func(c *jetstream.StreamConfig) { c.AllowAtomicPublish = false }},
	"AllowMsgSchedules": {change: func(c *jetstream.StreamConfig) {
		c.AllowMsgSchedules, c.AllowRollup, c.Discard = true, true, jetstream.DiscardOld
	}, fixed: true},
	"PersistMode": {change: func(c *jetstream.StreamConfig) {
		c.PersistMode, c.AllowAtomicPublish = jetstream.AsyncPersistMode, false
	}, fatal: true, fixed: true},
	"AllowBatchPublish": {change: func(c *jetstream.StreamConfig) { c.AllowBatchPublish = true }, ignored: true},
}

var past, future = time.Now().Add(-time.Hour).UTC(), time.Now().Add(24 * time.Hour).UTC()

// wrongConsumers are by the field that they are about; every field of the library's type is in it.
var wrongConsumers = map[string]wrongConsumer{
	"Name":          {ignored: true},
	"Durable":       {change: func(c *jetstream.ConsumerConfig) { c.Durable, c.Name, c.InactiveThreshold = "", "fraud", time.Hour }, fatal: true, fixed: true},
	"Description":   {change: func(c *jetstream.ConsumerConfig) { c.Description = "ours" }, ignored: true},
	"DeliverPolicy": {change: func(c *jetstream.ConsumerConfig) { c.DeliverPolicy = jetstream.DeliverNewPolicy }, fatal: true, fixed: true},
	"OptStartSeq": {change: func(c *jetstream.ConsumerConfig) {
		c.DeliverPolicy, c.OptStartSeq = jetstream.DeliverByStartSequencePolicy, 5
	}, fatal: true, fixed: true},
	"OptStartTime": {change: func(c *jetstream.ConsumerConfig) {
		c.DeliverPolicy, c.OptStartTime = jetstream.DeliverByStartTimePolicy, &past
	}, fatal: true, fixed: true},
	"AckPolicy":  {change: func(c *jetstream.ConsumerConfig) { c.AckPolicy = jetstream.AckAllPolicy }, fatal: true, fixed: true},
	"AckWait":    {change: func(c *jetstream.ConsumerConfig) { c.AckWait = time.Second }},
	"MaxDeliver": {change: func(c *jetstream.ConsumerConfig) { c.MaxDeliver = 3 }, fatal: true},
	"BackOff":    {change: func(c *jetstream.ConsumerConfig) { c.BackOff = []time.Duration{stream.AckWait, 2 * stream.AckWait} }},
	"FilterSubject": {change: func(c *jetstream.ConsumerConfig) {
		c.FilterSubjects, c.FilterSubject = nil, "clerk.evt.*.user.>"
	}, fatal: true, reports: "filter_subjects"},
	"ReplayPolicy":       {change: func(c *jetstream.ConsumerConfig) { c.ReplayPolicy = jetstream.ReplayOriginalPolicy }, fixed: true},
	"RateLimit":          {change: func(c *jetstream.ConsumerConfig) { c.RateLimit = 1024 }, pure: true},
	"SampleFrequency":    {change: func(c *jetstream.ConsumerConfig) { c.SampleFrequency = "50" }, ignored: true},
	"MaxWaiting":         {change: func(c *jetstream.ConsumerConfig) { c.MaxWaiting = 1 }, fixed: true},
	"MaxAckPending":      {change: func(c *jetstream.ConsumerConfig) { c.MaxAckPending = 1 }},
	"HeadersOnly":        {change: func(c *jetstream.ConsumerConfig) { c.HeadersOnly = true }, fatal: true},
	"MaxRequestBatch":    {change: func(c *jetstream.ConsumerConfig) { c.MaxRequestBatch = 10 }, fatal: true},
	"MaxRequestExpires":  {change: func(c *jetstream.ConsumerConfig) { c.MaxRequestExpires = time.Second }, fatal: true},
	"MaxRequestMaxBytes": {change: func(c *jetstream.ConsumerConfig) { c.MaxRequestMaxBytes = 1024 }, fatal: true},
	"InactiveThreshold":  {change: func(c *jetstream.ConsumerConfig) { c.InactiveThreshold = time.Hour }, fatal: true},
	"Replicas":           {change: func(c *jetstream.ConsumerConfig) { c.Replicas = 1 }},
	"MemoryStorage":      {change: func(c *jetstream.ConsumerConfig) { c.MemoryStorage = true }, fatal: true, fixed: true},
	"FilterSubjects": {change: func(c *jetstream.ConsumerConfig) {
		c.FilterSubjects = []string{"clerk.evt.*.user.>", "clerk.replay.fraud.>"}
	}, fatal: true},
	"Metadata":   {change: func(c *jetstream.ConsumerConfig) { c.Metadata = map[string]string{"team": "ours"} }, ignored: true},
	"PauseUntil": {change: func(c *jetstream.ConsumerConfig) { c.PauseUntil = &future }, fixed: true},
	"PriorityPolicy": {change: func(c *jetstream.ConsumerConfig) {
		c.PriorityPolicy, c.PriorityGroups = jetstream.PriorityPolicyOverflow, []string{"a"}
	}, fatal: true},
	"PinnedTTL": {change: func(c *jetstream.ConsumerConfig) { c.PinnedTTL = time.Minute }, ignored: true, pure: true},
	"PriorityGroups": {change: func(c *jetstream.ConsumerConfig) {
		c.PriorityPolicy, c.PriorityGroups = jetstream.PriorityPolicyOverflow, []string{"a"}
	}, fatal: true},
	"DeliverSubject": {change: func(c *jetstream.ConsumerConfig) { c.DeliverSubject = "somewhere.else" }, fatal: true, fixed: true},
	"DeliverGroup":   {change: func(c *jetstream.ConsumerConfig) { c.DeliverGroup = "g" }, ignored: true, pure: true},
	"FlowControl":    {change: func(c *jetstream.ConsumerConfig) { c.FlowControl = true }, ignored: true, pure: true},
	"IdleHeartbeat":  {change: func(c *jetstream.ConsumerConfig) { c.IdleHeartbeat = time.Second }, ignored: true, pure: true},
}

var fraud = stream.HandlerSpec{Name: "fraud", Filters: []string{"session.>", "user.deleted.>"}}

// TestEveryFieldOfAStreamIsComparedOrIgnoredForAReason holds for what the broker says of a stream that an operator made by hand, and
// for `usher setup --apply` on it. A field that the library gets is not known here, and fails.
func TestEveryFieldOfAStreamIsComparedOrIgnoredForAReason(t *testing.T) {
	t.Parallel()
	topology := stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{fraud}}
	for field := range reflect.TypeFor[jetstream.StreamConfig]().Fields() {
		w, known := wrongStreams[field.Name]
		if !assert.True(t, known, "%s is new: is it compared, and what comes of a difference?", field.Name) || w.change == nil {
			continue
		}
		tag, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		want := topology.Streams()[0]
		have := want
		w.change(&have)
		err := stream.CheckStream(have)
		if w.fatal {
			require.ErrorContains(t, err, "stream CLERK_EVENTS: "+tag+" is ", field.Name)
		} else if len(differing(have, want)) == 1 {
			require.NoError(t, err, field.Name)
		}
		assert.Equal(t, w.ignored, stream.IgnoredStreamField(field.Name) != "", field.Name)
		if w.pure {
			continue
		}
		t.Run(field.Name, func(t *testing.T) {
			t.Parallel()
			srv := natstest.New(t, func(o *server.Options) { o.JetStreamMaxMemory = 2 << 30 })
			_, js := srv.Connect()
			if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "OTHER", Subjects: []string{"other"}}); err != nil {
				t.Fatal(err)
			}
			created := have
			created.Sealed = false // only of a stream that exists
			_, err := js.CreateStream(t.Context(), created)
			require.NoError(t, err)
			if have.Sealed {
				_, err = js.UpdateStream(t.Context(), have)
				require.NoError(t, err)
			}
			plan, err := stream.Topology{Replicas: 1, MaxBytes: 1 << 30}.Check(t.Context(), js)
			require.NoError(t, err)
			if w.ignored {
				assert.Empty(t, plan.Differences)
				return
			}
			before := named(plan.Differences, tag)
			require.NotNil(t, before, "%v", plan.Differences)
			assert.Equal(t, w.fatal, before.Fatal, before)
			assert.Equal(t, w.fatal, before.Effect != "", before)

			plan, err = stream.Topology{Replicas: 1, MaxBytes: 1 << 30}.Apply(t.Context(), js)
			require.NoError(t, err)
			after, changed := named(plan.Differences, tag), named(plan.Changed, tag)
			if w.fixed {
				require.NotNil(t, after)
				assert.Nil(t, changed)
				assert.Contains(t, after.Fix, "nats stream rm CLERK_EVENTS")
				return
			}
			assert.Nil(t, after)
			assert.NotNil(t, changed)
			again, err := stream.Topology{Replicas: 1, MaxBytes: 1 << 30}.Check(t.Context(), js)
			require.NoError(t, err)
			assert.Nil(t, named(again.Differences, tag))
		})
	}
}

func TestEveryFieldOfAConsumerIsComparedOrIgnoredForAReason(t *testing.T) {
	t.Parallel()
	topology := stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{fraud}}
	for field := range reflect.TypeFor[jetstream.ConsumerConfig]().Fields() {
		w, known := wrongConsumers[field.Name]
		if !assert.True(t, known, "%s is new: is it compared, and what comes of a difference?", field.Name) || w.change == nil {
			continue
		}
		tag, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if w.reports != "" {
			tag = w.reports
		}
		want := topology.Consumer(fraud)
		have := want
		w.change(&have)
		err := stream.CheckConsumer(have, fraud)
		if w.fatal {
			require.ErrorContains(t, err, "consumer fraud: "+tag+" is ", field.Name)
		} else {
			require.NoError(t, err, field.Name)
		}
		assert.Equal(t, w.ignored || w.reports != "", stream.IgnoredConsumerField(field.Name) != "", field.Name)
		if w.pure {
			continue
		}
		t.Run(field.Name, func(t *testing.T) {
			t.Parallel()
			srv := natstest.New(t)
			_, js := srv.Connect()
			_, err := stream.Topology{Replicas: 1, MaxBytes: 1 << 30}.Ensure(t.Context(), js)
			require.NoError(t, err)
			_, err = js.CreateConsumer(t.Context(), stream.Events, have)
			if have.DeliverSubject != "" {
				_, err = js.CreatePushConsumer(t.Context(), stream.Events, have)
			}
			require.NoError(t, err)
			plan, err := topology.Check(t.Context(), js)
			require.NoError(t, err)
			if w.ignored {
				assert.Empty(t, plan.Differences)
				return
			}
			before := named(plan.Differences, tag)
			require.NotNil(t, before, "%v", plan.Differences)
			assert.Equal(t, w.fatal, before.Fatal, before)

			plan, err = topology.Apply(t.Context(), js)
			require.NoError(t, err)
			after, changed := named(plan.Differences, tag), named(plan.Changed, tag)
			if w.fixed {
				require.NotNil(t, after)
				assert.Nil(t, changed)
				assert.Regexp(t, "nats consumer (rm|resume) CLERK_EVENTS fraud", after.Fix)
				return
			}
			assert.Nil(t, after)
			assert.NotNil(t, changed)
			again, err := topology.Check(t.Context(), js)
			require.NoError(t, err)
			assert.Nil(t, named(again.Differences, tag))
		})
	}
}

// differing names the fields in which two configurations differ.
func differing[T any](a, b T) []string {
	var names []string
	x, y := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range x.NumField() {
		if !reflect.DeepEqual(x.Field(i).Interface(), y.Field(i).Interface()) {
			names = append(names, x.Type().Field(i).Name)
		}
	}
	return names
}

func named(diffs []stream.Difference, field string) *stream.Difference {
	for _, d := range diffs {
		if d.Field == field {
			return &d
		}
	}
	return nil
}

func TestApplyNeverSetsALimitBelowWhatIsStored(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	_, js := srv.Setup(fraud)
	for range 40 {
		_, err := js.Publish(t.Context(), "clerk.evt.clerk.user.created.user_1", make([]byte, 64<<10))
		require.NoError(t, err)
	}
	small := stream.Topology{Replicas: 1, MaxBytes: 1 << 20, Handlers: []stream.HandlerSpec{fraud}}
	for range 2 {
		plan, err := small.Apply(t.Context(), js)
		require.NoError(t, err)
		left := named(plan.Differences, "max_bytes")
		require.NotNil(t, left)
		assert.Contains(t, left.Fix, "bytes are stored")
		s, err := js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		info := s.CachedInfo()
		assert.LessOrEqual(t, info.Config.MaxBytes, stream.LeastMaxBytes(info.State.Bytes))
		assert.Greater(t, info.Config.MaxBytes, int64(info.State.Bytes))
		_, err = js.Publish(t.Context(), "clerk.evt.clerk.user.created.user_1", make([]byte, 64))
		require.NoError(t, err, "it still takes events")
	}
	s, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	require.NoError(t, s.Purge(t.Context()))
	plan, err := small.Apply(t.Context(), js)
	require.NoError(t, err)
	assert.Empty(t, plan.Differences)
	plan, err = stream.Topology{Replicas: 1, MaxBytes: 2 << 30, Handlers: []stream.HandlerSpec{fraud}}.Apply(t.Context(), js)
	require.NoError(t, err)
	assert.Empty(t, plan.Differences)
	assert.Len(t, plan.Changed, 2)
}

// TestApplyDeliversWhatAFaultyConsumerPassedOver: a filter that is only corrected would leave them undelivered.
func TestApplyDeliversWhatAFaultyConsumerPassedOver(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	all := stream.HandlerSpec{Name: "all"}
	_, js := srv.Setup(all)
	c, err := js.Consumer(t.Context(), stream.Events, "all")
	require.NoError(t, err)
	narrow := c.CachedInfo().Config
	narrow.FilterSubjects = []string{"clerk.evt.*.user.>"}
	c, err = js.UpdateConsumer(t.Context(), stream.Events, narrow)
	require.NoError(t, err)
	for _, subject := range []string{"clerk.evt.clerk.session.created.user_1", "clerk.evt.clerk.user.created.user_1"} {
		_, err := js.Publish(t.Context(), subject, nil)
		require.NoError(t, err)
	}
	msg, err := c.Next()
	require.NoError(t, err)
	require.NoError(t, msg.DoubleAck(t.Context()))

	_, err = stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: []stream.HandlerSpec{all}}.Apply(t.Context(), js)
	require.NoError(t, err)
	c, err = js.Consumer(t.Context(), stream.Events, "all")
	require.NoError(t, err)
	msg, err = c.Next()
	require.NoError(t, err)
	assert.Equal(t, "clerk.evt.clerk.session.created.user_1", msg.Subject())
}

func TestLeasesAndDeadLettersAreComparedToo(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	_, js := srv.Connect()
	topology := stream.Topology{Replicas: 1, MaxBytes: 1 << 30}
	_, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: stream.Leases, TTL: time.Minute})
	require.NoError(t, err)
	letters := topology.Streams()[1]
	letters.MaxAge, letters.Duplicates, letters.Discard = time.Hour, time.Hour, jetstream.DiscardOld
	_, err = js.CreateStream(t.Context(), letters)
	require.NoError(t, err)
	plan, err := topology.Check(t.Context(), js)
	require.NoError(t, err)
	var fatal []string
	for _, d := range plan.Differences {
		if d.Fatal {
			fatal = append(fatal, d.Object+" "+d.Field)
		}
	}
	assert.Equal(t, []string{"stream CLERK_DLQ discard", "stream CLERK_DLQ max_age", "bucket CLERK_LEASES max_age", "bucket CLERK_LEASES allow_msg_ttl"}, fatal)
	plan, err = topology.Apply(t.Context(), js)
	require.NoError(t, err)
	assert.Empty(t, plan.Differences)
	_, err = js.KeyValue(t.Context(), stream.Leases)
	require.NoError(t, err)
}
