package emulator

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"
)

// Faults are what goes wrong on the way, each with the share of events that it strikes, 0 to 1. Which
// ones is decided by the sender's seed and the event's id alone.
type Faults struct {
	Drop      float64 // is never sent
	Duplicate float64 // is sent twice: at once, or again after it was accepted
	Reorder   float64 // is sent after some of the events that follow it were answered
	Delay     float64 // is sent later, see SenderConfig.MaxDelay
	// Disable switches on Svix's rule that an endpoint which only failed for five days is disabled; it is
	// the chance that a failure after that time does it.
	Disable float64
}

func (f *Faults) byName() map[string]*float64 {
	return map[string]*float64{
		"drop": &f.Drop, "duplicate": &f.Duplicate, "reorder": &f.Reorder, "delay": &f.Delay, "disable": &f.Disable,
	}
}

// ParseFaults reads "duplicate=0.05,reorder=0.1,disable"; a name alone is a rate of 1. It reports every mistake.
func ParseFaults(text string) (Faults, error) {
	var f Faults
	var problems []error
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		name, value, given := strings.Cut(part, "=")
		rate := f.byName()[strings.TrimSpace(name)]
		if rate == nil {
			problems = append(problems, fmt.Errorf("fault %q: want drop, duplicate, reorder, delay or disable", name))
			continue
		}
		*rate = 1
		if given {
			parsed, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				problems = append(problems, fmt.Errorf("fault %s: rate %q is not a number", name, value))
				continue
			}
			*rate = parsed
		}
	}
	problems = append(problems, f.validate())
	return f, errors.Join(problems...)
}

func (f *Faults) validate() error {
	var problems []error
	for name, rate := range f.byName() {
		if !(*rate >= 0 && *rate <= 1) {
			problems = append(problems, fmt.Errorf("fault %s: rate %v is not between 0 and 1", name, *rate))
		}
	}
	return errors.Join(problems...)
}

// lot draws from [0, 1) for the event at a position of a story and a purpose, the same whenever it is drawn. Ids would not do: they hold
// the time of the story.
func lot(seed uint64, position int, purpose string) float64 {
	h := fnv.New64a()
	_, _ = h.Write(binary.BigEndian.AppendUint64(nil, uint64(position)))
	_, _ = h.Write([]byte(purpose))
	// FNV alone leaves the high bits of alike texts alike; the finish of SplitMix64 mixes them.
	x := h.Sum64() ^ (seed * 0x9e3779b97f4a7c15)
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return float64((x^x>>31)>>11) / (1 << 53)
}
