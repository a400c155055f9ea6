package stream

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Difference is one field of a stream, bucket or consumer that is not as Usher wants it.
type Difference struct {
	Object string `json:"object"` // "stream CLERK_EVENTS", "consumer mirror"
	Field  string `json:"field"`
	Have   string `json:"have"`
	Want   string `json:"want"`
	Fatal  bool   `json:"fatal"`  // events are lost or never delivered while it is so: no service that needs the object is ready
	Effect string `json:"effect"` // what comes of it; empty where nothing is lost
	Fix    string `json:"fix"`    // what to do

	fixed bool        // the broker does not change it in place
	left  *Difference // what remains after it was changed half-way
}

func (d Difference) String() string {
	effect := ""
	if d.Effect != "" {
		effect = " (" + d.Effect + ")"
	}
	return fmt.Sprintf("%s: %s is %s, want %s%s: %s", d.Object, d.Field, d.Have, d.Want, effect, d.Fix)
}

// CheckStream reports whether a stream of Usher's, as the broker has it, would lose events or never deliver them. A service that needs the
// stream is not ready then; the error names every such field with what is there, what is wanted and what to do.
func CheckStream(have jetstream.StreamConfig) error {
	t := Topology{Replicas: have.Replicas, MaxBytes: have.MaxBytes}
	for _, s := range t.objects() {
		if s.config.Name == have.Name {
			return fatal(compare(s.name, have, s.config, streamRules, s.recreate))
		}
	}
	return nil
}

// CheckConsumer is [CheckStream] for the consumer of a handler.
func CheckConsumer(have jetstream.ConsumerConfig, h HandlerSpec) error {
	return fatal(compareConsumer(have, Topology{}.Consumer(h)))
}

func fatal(diffs []Difference) error {
	var errs []string
	for _, d := range diffs {
		if d.Fatal {
			errs = append(errs, d.String())
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return errors.New(strings.Join(errs, "; "))
}

// rule says what a difference in one field of a stream or consumer means. have and want differ where its functions are asked.
type rule[T any] struct {
	ignored string                  // why the field is not compared; everything else is
	limit   bool                    // 0, -1: no limit
	same    func(have, want T) bool // written differently, or as good; nil: never
	fatal   func(have, want T) bool // nil: never
	effect  string                  // what comes of a fatal difference
	fixed   func(have T) bool       // the broker does not change it in place; nil: it does
	fix     string                  // what to do about one that is fixed, where that is not to create the object again; %s: its name
}

type (
	streamRule   = rule[jetstream.StreamConfig]
	consumerRule = rule[jetstream.ConsumerConfig]
)

func always[T any](T, T) bool { return true }
func never[T any](T) bool     { return true }

// maxStored is what an event with its headers may take.
const maxStored = 1<<20 + HeaderRoom

// minLetterAge is how long a letter must be kept at least, so that it can be seen before it expires.
const minLetterAge = 24 * time.Hour

// streamRules has a rule for every field of a stream, so that a new one of the library cannot be forgotten.
var streamRules = map[string]streamRule{
	"Name":        {ignored: "it is how the stream was found"},
	"Description": {ignored: "for people"},
	"Subjects": {
		same: func(have, want jetstream.StreamConfig) bool { return sameSet(have.Subjects, want.Subjects) },
		fatal: func(have, want jetstream.StreamConfig) bool {
			return !coversAll(have.Subjects, want.Subjects)
		},
		effect: "what is published under the others is not stored",
	},
	"Retention": {
		fatal: always[jetstream.StreamConfig], effect: "events are removed once they are acknowledged, or at once where nobody listens",
		fixed: func(have jetstream.StreamConfig) bool { return have.Retention == jetstream.WorkQueuePolicy },
	},
	"MaxConsumers": {limit: true},
	"MaxMsgs":      {limit: true},
	"MaxBytes":     {limit: true},
	"Discard":      {fatal: always[jetstream.StreamConfig], effect: "a full stream drops the oldest events, settled or not"},
	"DiscardNewPerSubject": {
		fatal: always[jetstream.StreamConfig], effect: "later events of the same subject are refused",
	},
	"MaxAge": {
		limit: true,
		fatal: func(have, want jetstream.StreamConfig) bool {
			return have.MaxAge > 0 && (want.MaxAge == 0 || have.MaxAge < minLetterAge)
		},
		effect: "it expires what is not settled",
	},
	"MaxMsgsPerSubject": {
		limit: true,
		fatal: func(_, want jetstream.StreamConfig) bool { return want.MaxMsgsPerSubject <= 0 }, effect: "only the newest events of a subject are kept, settled or not",
	},
	"MaxMsgSize": {
		limit: true,
		fatal: func(have, want jetstream.StreamConfig) bool {
			return want.MaxMsgSize <= 0 && have.MaxMsgSize < maxStored
		},
		effect: "larger events are refused",
	},
	"Storage": {fatal: always[jetstream.StreamConfig], effect: "a restart of the broker loses all of it", fixed: never[jetstream.StreamConfig]},
	"Replicas": {same: func(have, want jetstream.StreamConfig) bool {
		return max(have.Replicas, 1) == max(want.Replicas, 1)
	}},
	"NoAck":       {fatal: always[jetstream.StreamConfig], effect: "nobody learns whether an event was stored"},
	"Duplicates":  {},
	"Placement":   {ignored: "where the stream lies is the operator's"},
	"Mirror":      {fatal: always[jetstream.StreamConfig], effect: "a mirror takes no events"},
	"Sources":     {},
	"Sealed":      {fatal: always[jetstream.StreamConfig], effect: "a sealed stream takes no events", fixed: never[jetstream.StreamConfig]},
	"DenyDelete":  {fixed: func(have jetstream.StreamConfig) bool { return have.DenyDelete }},
	"DenyPurge":   {fixed: func(have jetstream.StreamConfig) bool { return have.DenyPurge }},
	"AllowRollup": {},
	"Compression": {ignored: "the same events take less room"},
	"FirstSeq":    {ignored: "of the stream's creation only"},
	"SubjectTransform": {
		fatal: always[jetstream.StreamConfig], effect: "events are stored under subjects that no consumer asks for",
	},
	"RePublish":      {},
	"AllowDirect":    {},
	"MirrorDirect":   {ignored: "of a mirror only, which is fatal by itself"},
	"ConsumerLimits": {},
	"Metadata":       {ignored: "for people and tools"},
	"Template":       {ignored: "no broker uses it any more"},
	"AllowMsgTTL": {
		fatal:  func(_, want jetstream.StreamConfig) bool { return want.AllowMsgTTL },
		effect: "a lease of a process that has died never ends",
		fixed:  func(have jetstream.StreamConfig) bool { return have.AllowMsgTTL },
	},
	"SubjectDeleteMarkerTTL": {},
	"AllowMsgCounter":        {fatal: always[jetstream.StreamConfig], effect: "a stream of counters takes no events", fixed: never[jetstream.StreamConfig]},
	"AllowAtomicPublish": {same: func(_, want jetstream.StreamConfig) bool {
		return !want.AllowAtomicPublish // more than is needed
	}},
	"AllowMsgSchedules": {fixed: func(have jetstream.StreamConfig) bool { return have.AllowMsgSchedules }},
	"PersistMode":       {fatal: always[jetstream.StreamConfig], effect: "events are acknowledged before they are on disk", fixed: never[jetstream.StreamConfig]},
	"AllowBatchPublish": {ignored: "another way to publish, which Usher does not use"},
}

// consumerRules has a rule for every field of a consumer.
var consumerRules = map[string]consumerRule{
	"Name":        {ignored: "it is how the consumer was found"},
	"Durable":     {fatal: always[jetstream.ConsumerConfig], effect: "the broker deletes the consumer when its worker stops", fixed: never[jetstream.ConsumerConfig]},
	"Description": {ignored: "for people"},
	"DeliverPolicy": {
		fatal: always[jetstream.ConsumerConfig], effect: "events from before the consumer's creation are never delivered", fixed: never[jetstream.ConsumerConfig],
	},
	"OptStartSeq":  {fatal: always[jetstream.ConsumerConfig], effect: "earlier events are never delivered", fixed: never[jetstream.ConsumerConfig]},
	"OptStartTime": {fatal: always[jetstream.ConsumerConfig], effect: "earlier events are never delivered", fixed: never[jetstream.ConsumerConfig]},
	"AckPolicy": {
		fatal: always[jetstream.ConsumerConfig], effect: "events that were not applied count as settled", fixed: never[jetstream.ConsumerConfig],
	},
	"AckWait": {},
	"MaxDeliver": {
		limit: true,
		fatal: always[jetstream.ConsumerConfig], effect: "an event that was delivered so often is dropped in silence",
	},
	"BackOff":       {same: func(have, want jetstream.ConsumerConfig) bool { return len(have.BackOff)+len(want.BackOff) == 0 }},
	"FilterSubject": {ignored: "compared as one of filter_subjects"},
	"ReplayPolicy":  {fixed: never[jetstream.ConsumerConfig]},
	"RateLimit":     {},
	"SampleFrequency": {
		ignored: "how often the broker tells of acknowledgements",
	},
	"MaxWaiting": {
		same: func(have, _ jetstream.ConsumerConfig) bool {
			return have.MaxWaiting == 0 || have.MaxWaiting >= defaultMaxWaiting
		},
		fixed: never[jetstream.ConsumerConfig],
	},
	"MaxAckPending": {},
	"HeadersOnly":   {fatal: always[jetstream.ConsumerConfig], effect: "events are delivered without their body"},
	"MaxRequestBatch": {
		fatal: always[jetstream.ConsumerConfig], effect: "the broker refuses the worker's requests",
	},
	"MaxRequestExpires": {
		fatal: always[jetstream.ConsumerConfig], effect: "the broker refuses the worker's requests",
	},
	"MaxRequestMaxBytes": {
		fatal: always[jetstream.ConsumerConfig], effect: "the broker refuses the worker's requests",
	},
	"InactiveThreshold": {fatal: always[jetstream.ConsumerConfig], effect: "the broker deletes the consumer while no worker runs"},
	"Replicas":          {same: func(have, _ jetstream.ConsumerConfig) bool { return have.Replicas == 0 }},
	"MemoryStorage": {
		fatal: always[jetstream.ConsumerConfig], effect: "a restart of the broker loses the consumer", fixed: never[jetstream.ConsumerConfig],
	},
	"FilterSubjects": {
		same: func(have, want jetstream.ConsumerConfig) bool {
			return sameSet(have.FilterSubjects, want.FilterSubjects)
		},
		fatal: func(have, want jetstream.ConsumerConfig) bool {
			return len(have.FilterSubjects) > 0 && !coversAll(have.FilterSubjects, want.FilterSubjects)
		},
		effect: "the others are never delivered",
	},
	"Metadata": {ignored: "for people and tools"},
	"PauseUntil": {
		same: func(have, _ jetstream.ConsumerConfig) bool {
			return have.PauseUntil == nil || have.PauseUntil.Before(time.Now())
		},
		fixed: never[jetstream.ConsumerConfig], fix: "an operator paused it: `nats consumer resume " + Events + " %s`",
	},
	"PriorityPolicy": {fatal: always[jetstream.ConsumerConfig], effect: "the broker refuses the worker's requests"},
	"PinnedTTL":      {ignored: "of priority_policy only, which is fatal by itself"},
	"PriorityGroups": {
		same: func(have, want jetstream.ConsumerConfig) bool {
			return len(have.PriorityGroups)+len(want.PriorityGroups) == 0
		},
		fatal: always[jetstream.ConsumerConfig], effect: "the broker refuses the worker's requests",
	},
	"DeliverSubject": {
		fatal: always[jetstream.ConsumerConfig], effect: "the broker pushes its events elsewhere", fixed: never[jetstream.ConsumerConfig],
	},
	"DeliverGroup":  {ignored: "of deliver_subject only, which is fatal by itself"},
	"FlowControl":   {ignored: "of deliver_subject only, which is fatal by itself"},
	"IdleHeartbeat": {ignored: "of deliver_subject only, which is fatal by itself"},
}

// defaultMaxWaiting is how many requests the broker lets wait at a consumer where nobody says otherwise.
const defaultMaxWaiting = 512

// noLimit is what the broker writes as 0 or -1.
const noLimit = "unlimited"

const applies = "run `usher setup --apply`"

// compare lists the fields that are not as wanted, zero or not. recreate says what to do about one that the broker does not change.
func compare[T any](object string, have, want T, rules map[string]rule[T], recreate string) []Difference {
	var diffs []Difference
	h, w := reflect.ValueOf(have), reflect.ValueOf(want)
	for i := range w.NumField() {
		field := w.Type().Field(i)
		r := rules[field.Name] // one that nobody has thought of is compared
		if r.ignored != "" || reflect.DeepEqual(h.Field(i).Interface(), w.Field(i).Interface()) || r.same != nil && r.same(have, want) {
			continue
		}
		tag, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		d := Difference{Object: object, Field: tag, Have: printed(h.Field(i)), Want: printed(w.Field(i)), Fix: applies}
		if r.limit {
			unlimited := [2]bool{h.Field(i).Int() <= 0, w.Field(i).Int() <= 0}
			switch {
			case unlimited[0] && unlimited[1]:
				continue
			case unlimited[0]:
				d.Have = noLimit
			case unlimited[1]:
				d.Want = noLimit
			}
		}
		if r.fatal != nil && r.fatal(have, want) {
			d.Fatal, d.Effect = true, r.effect
		}
		if r.fixed != nil && r.fixed(have) {
			d.fixed, d.Fix = true, "the broker does not change it in place; "+recreate
			if r.fix != "" {
				_, name, _ := strings.Cut(object, " ")
				d.Fix = fmt.Sprintf(r.fix, name)
			}
		}
		diffs = append(diffs, d)
	}
	return diffs
}

// compareConsumer compares a consumer's one filter as one of several.
func compareConsumer(have, want jetstream.ConsumerConfig) []Difference {
	have = normal(have)
	recreate := fmt.Sprintf("to lose nothing: stop the workers, `nats consumer rm %s %s`, `usher setup`, start the workers; every event of the stream is delivered again, and those that were applied are skipped", Events, want.Durable)
	return compare("consumer "+want.Durable, have, want, consumerRules, recreate)
}

func normal(c jetstream.ConsumerConfig) jetstream.ConsumerConfig {
	if c.FilterSubject != "" {
		c.FilterSubjects, c.FilterSubject = []string{c.FilterSubject}, ""
	}
	c.FilterSubjects = slices.Sorted(slices.Values(c.FilterSubjects))
	return c
}

// printed is a value as an operator reads it.
func printed(v reflect.Value) string {
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return "none"
		}
		v = v.Elem()
	}
	if v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Pointer {
		return fmt.Sprintf("%d of them", v.Len())
	}
	return fmt.Sprintf("%v", v.Interface())
}

func sameSet(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// coversAll reports whether every subject is matched by one of the patterns.
func coversAll(patterns, subjects []string) bool {
	for _, subject := range subjects {
		if !slices.ContainsFunc(patterns, func(p string) bool { return Covers(p, subject) }) {
			return false
		}
	}
	return true
}

// Covers reports whether a pattern matches every subject that another one does.
func Covers(pattern, subject string) bool {
	p, s := strings.Split(pattern, "."), strings.Split(subject, ".")
	for i, token := range p {
		switch {
		case token == ">":
			return len(s) > i
		case i >= len(s), s[i] == ">", token != "*" && token != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}
