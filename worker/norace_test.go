//go:build !race

package worker_test

const flood = 20_000
