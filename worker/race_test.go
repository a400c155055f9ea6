//go:build race

package worker_test

// The race detector makes everything several times slower: the flood is as much smaller.
const flood = 1_500
