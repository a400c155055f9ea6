package stream

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Leases is the key-value bucket whose keys say which process may do what only one may do at a time. A key
// has a time to live of its own, so that a dead process gives way.
const Leases = "CLERK_LEASES"

// DedupeWindow is how long the stream remembers an event id. Svix tries for about 28 hours and a
// manual replay may come days later; past the window the inbox decides.
const DedupeWindow = 72 * time.Hour

// DeadLetterAge is how long a dead letter is kept.
const DeadLetterAge = 90 * 24 * time.Hour

// AckWait is how long a worker may hold an event before another one gets it.
const AckWait = 60 * time.Second

// MaxAckPending bounds what one handler holds or waits to retry. It is far above a worker's batches,
// since an event that waits for its retry counts too and must not stop the healthy ones.
const MaxAckPending = 100_000

// Topology says which streams and consumers exist and how large they may grow.
type Topology struct {
	Replicas int           // 1, 3 or 5
	MaxBytes int64         // of CLERK_EVENTS; dead letters get a tenth of it
	Handlers []HandlerSpec // one durable consumer each
}

// HandlerSpec is what a handler wants to see: Filters are subjects without the "clerk.evt." prefix and the
// source, such as "user.>"; none means every event.
type HandlerSpec struct {
	Name    string
	Filters []string
}

// Streams returns the wanted configuration of every stream.
func (t Topology) Streams() []jetstream.StreamConfig {
	return []jetstream.StreamConfig{
		{
			Name:               Events,
			Description:        "Usher: Clerk's events, as they were signed",
			Subjects:           []string{"clerk.evt.>", "clerk.replay.>"},
			Retention:          jetstream.LimitsPolicy,
			Discard:            jetstream.DiscardNew,
			MaxBytes:           t.MaxBytes,
			Storage:            jetstream.FileStorage,
			Replicas:           t.Replicas,
			Duplicates:         DedupeWindow,
			AllowAtomicPublish: t.Replicas == 1,
			AllowDirect:        true,
		},
		{
			Name:        DeadLetters,
			Description: "Usher: events that a handler could not apply",
			Subjects:    []string{"clerk.dlq.>"},
			Retention:   jetstream.LimitsPolicy,
			Discard:     jetstream.DiscardNew,
			MaxAge:      DeadLetterAge,
			MaxBytes:    t.MaxBytes / 10,
			Storage:     jetstream.FileStorage,
			Replicas:    t.Replicas,
			Duplicates:  DedupeWindow,
			AllowDirect: true,
		},
	}
}

// leases returns the wanted configuration of the bucket [Leases].
func (t Topology) leases() jetstream.KeyValueConfig {
	return jetstream.KeyValueConfig{
		Bucket: Leases, Description: "Usher: who may do what only one may do", History: 1, MaxBytes: 1 << 20,
		Storage: jetstream.FileStorage, Replicas: t.Replicas,
		LimitMarkerTTL: time.Second, // what makes a key's own time to live possible
	}
}

// Consumer returns the wanted configuration of a handler's consumer on [Events].
func (t Topology) Consumer(h HandlerSpec) jetstream.ConsumerConfig {
	filters := []string{"clerk.replay." + Token(h.Name) + ".>"}
	if len(h.Filters) == 0 {
		filters = append(filters, "clerk.evt.>")
	}
	for _, f := range h.Filters {
		filters = append(filters, "clerk.evt.*."+f)
	}
	slices.Sort(filters)
	return jetstream.ConsumerConfig{
		Durable:        h.Name,
		Description:    "Usher: handler " + h.Name,
		DeliverPolicy:  jetstream.DeliverAllPolicy,
		AckPolicy:      jetstream.AckExplicitPolicy,
		AckWait:        AckWait,
		MaxDeliver:     -1, // attempts are counted in deliveries; a consumer at its limit loses events in silence
		MaxAckPending:  MaxAckPending,
		FilterSubjects: filters,
	}
}

// ListenPrefix begins the name of a consumer that only looks on, such as that of a developer who listens from a laptop. It may
// sleep for weeks and miss what happened: it holds no event back from the retention.
const ListenPrefix = "listen-"

// Holds tells whether a consumer on [Events] keeps what it has not settled in the stream, be it older than the retention: every
// durable consumer that acks does, also one that users of Usher made, unless its name begins with [ListenPrefix].
func Holds(c *jetstream.ConsumerInfo) bool {
	return c.Config.Durable != "" && c.Config.AckPolicy != jetstream.AckNonePolicy && !strings.HasPrefix(c.Name, ListenPrefix)
}

// Difference is one field of a stream or consumer that is not as Usher wants it.
type Difference struct {
	Object string `json:"object"` // "stream CLERK_EVENTS", "consumer mirror"
	Field  string `json:"field"`
	Have   string `json:"have"`
	Want   string `json:"want"`
}

func (d Difference) String() string {
	return fmt.Sprintf("%s: %s is %s, want %s", d.Object, d.Field, d.Have, d.Want)
}

// Plan says what exists, what is missing and what differs from a topology.
type Plan struct {
	Present     []string     `json:"present"`
	Missing     []string     `json:"missing"`
	Differences []Difference `json:"differences"`
}

// Check compares the broker with t and changes nothing.
func (t Topology) Check(ctx context.Context, js jetstream.JetStream) (Plan, error) {
	return t.walk(ctx, js, false)
}

// Ensure creates what is missing and changes nothing that exists: a difference is in the Plan, for
// an operator to decide on. It may run at any time and from several places at once.
func (t Topology) Ensure(ctx context.Context, js jetstream.JetStream) (Plan, error) {
	return t.walk(ctx, js, true)
}

func (t Topology) walk(ctx context.Context, js jetstream.JetStream, create bool) (Plan, error) {
	plan := Plan{Present: []string{}, Missing: []string{}, Differences: []Difference{}}
	missing := map[string]bool{}
	for _, want := range t.Streams() {
		name := "stream " + want.Name
		s, err := js.Stream(ctx, want.Name)
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			plan.Missing = append(plan.Missing, name)
			missing[want.Name] = true
			if create {
				if _, err := js.CreateStream(ctx, want); err != nil {
					return plan, fmt.Errorf("create %s: %w", name, err)
				}
			}
		case err != nil:
			return plan, fmt.Errorf("look up %s: %w", name, err)
		default:
			plan.Present = append(plan.Present, name)
			plan.Differences = append(plan.Differences, compare(name, s.CachedInfo().Config, want)...)
		}
	}
	switch _, err := js.KeyValue(ctx, Leases); {
	case errors.Is(err, jetstream.ErrBucketNotFound):
		plan.Missing = append(plan.Missing, "bucket "+Leases)
		if create {
			if _, err := js.CreateKeyValue(ctx, t.leases()); err != nil && !errors.Is(err, jetstream.ErrBucketExists) {
				return plan, fmt.Errorf("create bucket %s: %w", Leases, err)
			}
		}
	case err != nil:
		return plan, fmt.Errorf("look up bucket %s: %w", Leases, err)
	default:
		plan.Present = append(plan.Present, "bucket "+Leases)
	}
	for _, h := range t.Handlers {
		want, name := t.Consumer(h), "consumer "+h.Name
		if missing[Events] && !create {
			plan.Missing = append(plan.Missing, name)
			continue
		}
		c, err := js.Consumer(ctx, Events, h.Name)
		switch {
		case errors.Is(err, jetstream.ErrConsumerNotFound):
			plan.Missing = append(plan.Missing, name)
			if create {
				if _, err := js.CreateConsumer(ctx, Events, want); err != nil {
					return plan, fmt.Errorf("create %s: %w", name, err)
				}
			}
		case err != nil:
			return plan, fmt.Errorf("look up %s: %w", name, err)
		default:
			plan.Present = append(plan.Present, name)
			have := c.CachedInfo().Config
			slices.Sort(have.FilterSubjects)
			plan.Differences = append(plan.Differences, compare(name, have, want)...)
		}
	}
	return plan, nil
}

// compare lists the fields that Usher sets (those that are not zero in want) and that are not as
// wanted. What Usher leaves at its default is the operator's to tune.
func compare(object string, have, want any) []Difference {
	var diffs []Difference
	h, w := reflect.ValueOf(have), reflect.ValueOf(want)
	for i := range w.NumField() {
		field := w.Type().Field(i)
		if w.Field(i).IsZero() || field.Name == "Description" {
			continue
		}
		if !reflect.DeepEqual(h.Field(i).Interface(), w.Field(i).Interface()) {
			tag, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			diffs = append(diffs, Difference{
				Object: object, Field: tag,
				Have: fmt.Sprint(h.Field(i).Interface()), Want: fmt.Sprint(w.Field(i).Interface()),
			})
		}
	}
	return diffs
}
