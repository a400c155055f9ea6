package worker

import (
	"context"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/semaphore"
)

// queueBytes bounds the bodies that wait for a lane, and batchBytes those of one transaction, which holds each several times over:
// events of 1 MiB would else take a gigabyte. A batch of usual events, of 2 to 3 KB, stays below both.
const queueBytes, batchBytes = 4 << 20, 4 << 20

// queue is what waits for a lane, bounded in number and in bytes. Whoever receives from messages says so by took or collect.
type queue struct {
	messages chan jetstream.Msg
	room     *semaphore.Weighted
}

func newQueue(length int) *queue {
	return &queue{messages: make(chan jetstream.Msg, length), room: semaphore.NewWeighted(queueBytes)}
}

// weight is a message's share of the room. One that is larger than all of it waits alone.
func weight(msg jetstream.Msg) int64 { return int64(min(max(len(msg.Data()), 1), queueBytes)) }

// put waits for room. False means that ctx is done.
func (q *queue) put(ctx context.Context, msg jetstream.Msg) bool {
	if q.room.Acquire(ctx, weight(msg)) != nil {
		return false
	}
	select {
	case q.messages <- msg:
		return true
	case <-ctx.Done():
		q.took(msg)
		return false
	}
}

// offer does not wait. False means that there is no room.
func (q *queue) offer(msg jetstream.Msg) bool {
	if !q.room.TryAcquire(weight(msg)) {
		return false
	}
	select {
	case q.messages <- msg:
		return true
	default:
		q.took(msg)
		return false
	}
}

func (q *queue) took(msg jetstream.Msg) jetstream.Msg {
	q.room.Release(weight(msg))
	return msg
}

// collect takes what is there right now, up to limit messages, or batchBytes and the message that exceeds it.
func (q *queue) collect(first jetstream.Msg, limit int) []jetstream.Msg {
	batch := []jetstream.Msg{q.took(first)}
	for size := len(first.Data()); len(batch) < limit && size < batchBytes; {
		select {
		case msg, ok := <-q.messages:
			if !ok {
				return batch
			}
			batch, size = append(batch, q.took(msg)), size+len(msg.Data())
		default:
			return batch
		}
	}
	return batch
}
