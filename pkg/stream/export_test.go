package stream

import "time"

// MinBatch is for tests that must reach or avoid a batch.
const MinBatch = minBatch

// Forget drops the publisher's memory of what it stored, as a restart does.
func (p *Publisher) Forget() { p.recent = newRecent(1<<15, 10*time.Minute) }
