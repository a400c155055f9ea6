package reconciler

// A backlog longer than one look is quick to make.
func init() { listenMost = 2 * listenPage }
