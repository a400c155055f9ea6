package event_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

// BenchmarkDecode is the price that every event pays twice: at the way in and in the worker.
func BenchmarkDecode(b *testing.B) {
	for _, typ := range []string{"user.created", "user.deleted", "session.created", "organizationMembership.created"} {
		body, ok := fixture.Event(typ)
		require.True(b, ok)
		b.Run(typ, func(b *testing.B) {
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := event.Decode(body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
