package worker

import (
	"context"
	"testing"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type sized struct {
	jetstream.Msg
	data []byte
}

func (m sized) Data() []byte { return m.data }

func TestWhatWaitsForALaneIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	const large = 1 << 20
	q := newQueue(500)
	held := func() int {
		n := 0
		for q.offer(sized{data: make([]byte, large)}) {
			n++
		}
		return n
	}
	require.Equal(t, queueBytes/large, held())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	assert.False(t, q.put(ctx, sized{data: make([]byte, large)}), "a stop is not held up by a full queue")

	batch := q.collect(<-q.messages, 500)
	require.Len(t, batch, batchBytes/large)
	require.Equal(t, queueBytes/large, held(), "what was taken gives its room back")
	q.collect(<-q.messages, 500)

	require.True(t, q.put(t.Context(), sized{data: make([]byte, 2*queueBytes)}), "one that is larger than the room waits alone")
	require.False(t, q.offer(sized{data: []byte("{}")}))
	require.Len(t, q.collect(<-q.messages, 500), 1)

	small := 0
	for q.offer(sized{data: make([]byte, 3<<10)}) {
		small++
	}
	assert.Equal(t, 500, small, "of usual events the number is the bound")
	assert.Len(t, q.collect(<-q.messages, 500), 500)
}
