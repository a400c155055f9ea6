package event

// Effect is what an event changed at a handler.
type Effect string

// The effects.
const (
	// EffectApplied: the event is what the object's row says now.
	EffectApplied Effect = "applied"
	// EffectOlder: nothing was written, since the row, or another event of the same batch, is of a newer version.
	EffectOlder Effect = "older"
	// EffectUnchanged: nothing was written, since the row is of this version already, or since the type changes no row (e-mail, SMS).
	EffectUnchanged Effect = "unchanged"
	// EffectDeleted: what was written is a tombstone, of a delete or of a child whose parent is deleted.
	EffectDeleted Effect = "deleted"
	// EffectUnknownType: nothing was written, since neither the type nor the object tells what the event is about.
	EffectUnknownType Effect = "unknown_type"
	// EffectStub: only the copy of another object inside the event made a row.
	EffectStub Effect = "stub"
)

// Effects are all effects.
func Effects() []Effect {
	return []Effect{EffectApplied, EffectOlder, EffectUnchanged, EffectDeleted, EffectUnknownType, EffectStub}
}
