package lag

import "time"

// LookEvery changes the time between two looks, before Run.
func (w *Watch) LookEvery(d time.Duration) { w.every = d }
