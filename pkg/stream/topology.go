package stream

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
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

// Plan says what exists, what is missing and what differs from a topology. Its lists are never nil.
type Plan struct {
	Present     []string     `json:"present"`
	Missing     []string     `json:"missing"`
	Differences []Difference `json:"differences"`
	Changed     []Difference `json:"changed"` // differences that [Topology.Apply] ended; Want is what it is now
}

// Check compares the broker with t and changes nothing.
func (t Topology) Check(ctx context.Context, js jetstream.JetStream) (Plan, error) {
	return t.walk(ctx, js, look)
}

// Ensure creates what is missing and changes nothing that exists: a difference is in the Plan, for
// an operator to decide on. It may run at any time and from several places at once.
func (t Topology) Ensure(ctx context.Context, js jetstream.JetStream) (Plan, error) {
	return t.walk(ctx, js, create)
}

// Apply creates what is missing and changes what differs, where the broker changes it in place; the rest stays in Plan.Differences
// with what to do. A limit of bytes is never set below what is stored and a quarter more. A consumer that lost events by what was
// changed gets all of the stream again, of which the delivery log knows what was applied.
func (t Topology) Apply(ctx context.Context, js jetstream.JetStream) (Plan, error) {
	return t.walk(ctx, js, apply)
}

type mode int

const (
	look mode = iota
	create
	apply
)

// object is a stream with the name by which operators know it.
type object struct {
	name     string
	config   jetstream.StreamConfig
	recreate string // what to do about a field that the broker does not change, without losing what is stored
	make     func(context.Context, jetstream.JetStream) error
}

// objects are the streams and the bucket [Leases], which is a stream too.
func (t Topology) objects() []object {
	recreate := map[string]string{
		Events: "to lose nothing: stop ingest and the reconciler (Clerk sends again what it gets no answer to), wait until usher_consumer_pending is 0 for every handler, " +
			"stop the workers, `nats stream rm CLERK_EVENTS`, `usher setup`, start all again, `usher reconcile --full`",
		DeadLetters: "to lose nothing: replay or discard every dead letter (`usher dlq list`), stop the workers, `nats stream rm CLERK_DLQ`, `usher setup`, start the workers",
	}
	var list []object
	for _, cfg := range t.Streams() {
		list = append(list, object{"stream " + cfg.Name, cfg, recreate[cfg.Name], func(ctx context.Context, js jetstream.JetStream) error {
			_, err := js.CreateStream(ctx, cfg)
			return err //nolint:wrapcheck // walk says what it was for
		}})
	}
	kv := t.leases()
	return append(list, object{
		"bucket " + Leases,
		jetstream.StreamConfig{ // what the client library makes of kv
			Name: "KV_" + Leases, Subjects: []string{"$KV." + Leases + ".>"}, MaxMsgsPerSubject: int64(kv.History), MaxBytes: kv.MaxBytes,
			Storage: kv.Storage, Replicas: kv.Replicas, AllowRollup: true, DenyDelete: true, Duplicates: 2 * time.Minute, AllowDirect: true,
			Discard: jetstream.DiscardNew, AllowMsgTTL: true, SubjectDeleteMarkerTTL: kv.LimitMarkerTTL,
		},
		"stop the reconcilers, `nats kv del " + Leases + "`, `usher setup`, start them again; no event is in it",
		func(ctx context.Context, js jetstream.JetStream) error {
			_, err := js.CreateKeyValue(ctx, kv)
			if errors.Is(err, jetstream.ErrBucketExists) {
				return nil
			}
			return err //nolint:wrapcheck // walk says what it was for
		},
	})
}

func (t Topology) walk(ctx context.Context, js jetstream.JetStream, how mode) (Plan, error) {
	plan := Plan{Present: []string{}, Missing: []string{}, Differences: []Difference{}, Changed: []Difference{}}
	missing := map[string]bool{}
	for _, want := range t.objects() {
		s, err := js.Stream(ctx, want.config.Name)
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			plan.Missing = append(plan.Missing, want.name)
			missing[want.config.Name] = true
			if how != look {
				if err := want.make(ctx, js); err != nil {
					return plan, fmt.Errorf("create %s: %w", want.name, err)
				}
			}
		case err != nil:
			return plan, fmt.Errorf("look up %s: %w", want.name, err)
		default:
			plan.Present = append(plan.Present, want.name)
			info := s.CachedInfo()
			diffs := compare(want.name, info.Config, want.config, streamRules, want.recreate)
			if err := plan.take(diffs, how, func(change []Difference) error {
				return changeStream(ctx, js, info, want.config, change)
			}); err != nil {
				return plan, err
			}
		}
	}
	for _, h := range t.Handlers {
		want, name := t.Consumer(h), "consumer "+h.Name
		if missing[Events] && how == look {
			plan.Missing = append(plan.Missing, name)
			continue
		}
		info, err := LookUpConsumer(ctx, js, h.Name)
		switch {
		case errors.Is(err, jetstream.ErrConsumerNotFound):
			plan.Missing = append(plan.Missing, name)
			if how != look {
				if _, err := js.CreateConsumer(ctx, Events, want); err != nil {
					return plan, fmt.Errorf("create %s: %w", name, err)
				}
			}
		case err != nil:
			return plan, fmt.Errorf("look up %s: %w", name, err)
		default:
			plan.Present = append(plan.Present, name)
			have := normal(info.Config)
			if err := plan.take(compareConsumer(have, want), how, func(change []Difference) error {
				return changeConsumer(ctx, js, &have, want, change)
			}); err != nil {
				return plan, err
			}
		}
	}
	return plan, nil
}

// take files differences, and has those changed that are to be and can be. What the broker refuses is tried field by field: one that it
// refuses must not keep the others from being changed.
func (p *Plan) take(diffs []Difference, how mode, change func([]Difference) error) error {
	var changes []Difference
	for _, d := range diffs {
		if how == apply && !d.fixed {
			changes = append(changes, d)
		} else {
			p.Differences = append(p.Differences, d)
		}
	}
	if len(changes) == 0 {
		return nil
	}
	err := change(changes)
	var refused *jetstream.APIError
	switch {
	case errors.As(err, &refused) && len(changes) > 1:
		for i := range changes {
			if err := p.take(changes[i:i+1], how, change); err != nil {
				return err
			}
		}
		return nil
	case refused != nil:
		changes[0].Fix = "the broker refuses the change: " + refused.Description
		p.Differences = append(p.Differences, changes...)
		return nil //nolint:nilerr // it is told as a difference
	case err != nil:
		return fmt.Errorf("change %s: %w", changes[0].Object, err)
	}
	for _, d := range changes {
		if d.Have != d.Want { // else there was no room for it yet
			p.Changed = append(p.Changed, d)
		}
		if d.left != nil {
			p.Differences = append(p.Differences, *d.left)
		}
	}
	return nil
}

// changeStream sets the fields named in changes to what is wanted, and no other. One that is only set half-way gets what is left of its
// difference.
func changeStream(ctx context.Context, js jetstream.JetStream, info *jetstream.StreamInfo, want jetstream.StreamConfig, changes []Difference) error {
	cfg := info.Config
	for i := range changes {
		d := &changes[i]
		if d.Field != "max_bytes" {
			continue
		}
		least := LeastMaxBytes(info.State.Bytes)
		if want.MaxBytes <= 0 || want.MaxBytes >= least {
			continue
		}
		left := *d
		left.Fix = fmt.Sprintf("%d bytes are stored: once the workers have purged what is settled, %s again", info.State.Bytes, applies)
		want.MaxBytes = least
		if cfg.MaxBytes > 0 {
			want.MaxBytes = min(least, cfg.MaxBytes)
		}
		left.Have, d.Want, d.left = strconv.FormatInt(want.MaxBytes, 10), strconv.FormatInt(want.MaxBytes, 10), &left
	}
	set(&cfg, want, changes)
	if reflect.DeepEqual(cfg, info.Config) {
		return nil
	}
	if _, err := js.UpdateStream(ctx, cfg); err != nil {
		return err //nolint:wrapcheck // take says what it was for
	}
	info.Config = cfg // for what is changed next
	return nil
}

// LeastMaxBytes is the smallest limit that a stream may get which holds so many bytes: one below what is stored would refuse everything.
func LeastMaxBytes(stored uint64) int64 { return int64(stored + stored/4) }

// changeConsumer is changeStream for a consumer.
func changeConsumer(ctx context.Context, js jetstream.JetStream, have *jetstream.ConsumerConfig, want jetstream.ConsumerConfig, changes []Difference) error {
	cfg := *have
	set(&cfg, want, changes)
	if _, err := js.UpdateConsumer(ctx, Events, cfg); err != nil {
		return err //nolint:wrapcheck // take says what it was for
	}
	*have = cfg // for what is changed next
	if !slices.ContainsFunc(changes, func(d Difference) bool { return d.Fatal }) {
		return nil
	}
	// What it has passed over would stay undelivered.
	s, err := js.Stream(ctx, Events)
	if err != nil {
		return err //nolint:wrapcheck // take says what it was for
	}
	_, err = js.ResetConsumerToSequence(ctx, Events, want.Durable, max(s.CachedInfo().State.FirstSeq, 1))
	return err //nolint:wrapcheck // take says what it was for
}

// set copies the fields of changes from want to config.
func set[T any](config *T, want T, changes []Difference) {
	c, w := reflect.ValueOf(config).Elem(), reflect.ValueOf(want)
	for i := range w.NumField() {
		tag, _, _ := strings.Cut(w.Type().Field(i).Tag.Get("json"), ",")
		if slices.ContainsFunc(changes, func(d Difference) bool { return d.Field == tag }) {
			c.Field(i).Set(w.Field(i))
		}
	}
}

// LookUpConsumer is what the broker knows of a consumer on [Events], be it pulled from or, by mistake, pushed.
func LookUpConsumer(ctx context.Context, js jetstream.JetStream, name string) (*jetstream.ConsumerInfo, error) {
	c, err := js.Consumer(ctx, Events, name)
	if err == nil {
		return c.CachedInfo(), nil
	}
	if !errors.Is(err, jetstream.ErrNotPullConsumer) {
		return nil, err //nolint:wrapcheck // the caller says what it was for
	}
	pushed, err := js.PushConsumer(ctx, Events, name)
	if err != nil {
		return nil, err //nolint:wrapcheck // the caller says what it was for
	}
	return pushed.CachedInfo(), nil
}
