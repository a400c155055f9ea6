package worker

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
)

func TestPositionTellsWhatTheBrokerSkipped(t *testing.T) {
	t.Parallel()
	type delivery struct{ consumer, stream, times uint64 }
	for name, c := range map[string]struct {
		deliveries []delivery
		want       []span
	}{
		"one by one":                           {[]delivery{{11, 101, 1}, {12, 102, 1}, {13, 103, 1}}, nil},
		"the first":                            {[]delivery{{11, 102, 1}}, []span{{101, 101}}},
		"several":                              {[]delivery{{11, 101, 1}, {12, 105, 1}}, []span{{102, 104}}},
		"behind redeliveries":                  {[]delivery{{11, 101, 1}, {12, 50, 2}, {13, 51, 3}, {14, 103, 1}}, []span{{102, 102}}},
		"redeliveries alone":                   {[]delivery{{11, 101, 1}, {12, 50, 2}, {13, 51, 3}, {14, 102, 1}}, nil},
		"deliveries of another worker":         {[]delivery{{11, 101, 1}, {15, 105, 1}, {25, 109, 1}}, nil},
		"in the midst of another worker's":     {[]delivery{{11, 101, 1}, {15, 106, 1}}, []span{{102, 105}}},
		"the consumer was recreated":           {[]delivery{{11, 101, 1}, {1, 150, 1}, {2, 151, 1}}, nil},
		"the stream was recreated":             {[]delivery{{11, 101, 1}, {12, 5, 1}, {13, 6, 1}, {14, 8, 1}}, []span{{7, 7}}},
		"another leader delivers the same":     {[]delivery{{11, 101, 1}, {12, 102, 1}, {12, 102, 1}, {13, 103, 1}}, nil},
		"redelivered from before the position": {[]delivery{{9, 99, 2}, {11, 101, 1}, {12, 102, 1}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var p position
			p.opened(&jetstream.ConsumerInfo{Delivered: jetstream.SequenceInfo{Consumer: 10, Stream: 100}})
			var got []span
			for _, d := range c.deliveries {
				s := p.passed(&jetstream.MsgMetadata{Sequence: jetstream.SequencePair{Consumer: d.consumer, Stream: d.stream}, NumDelivered: d.times})
				if !s.empty() {
					got = append(got, s)
				}
			}
			assert.Equal(t, c.want, got)
		})
	}
}
