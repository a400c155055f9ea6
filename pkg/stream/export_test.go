package stream

import "time"

// MinBatch is for tests that must reach or avoid a batch.
const MinBatch = minBatch

// Forget drops the publisher's memory of what it stored, as a restart does.
func (p *Publisher) Forget() { p.recent = newRecent(1<<15, 10*time.Minute) }

// IgnoredStreamField is why a field of a stream is not compared, empty where it is.
func IgnoredStreamField(name string) string { return streamRules[name].ignored }

// IgnoredConsumerField is why a field of a consumer is not compared, empty where it is.
func IgnoredConsumerField(name string) string { return consumerRules[name].ignored }
