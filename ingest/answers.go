package ingest

import (
	"cmp"
	"slices"
)

// Answer is one of the answers that a webhook can get: Code is the error code in the body and the result label of
// usher_ingest_requests_total.
type Answer struct {
	Status     int
	Code       string
	RetryAfter int // seconds, 0 for no such header
	Message    string
}

// Refusals lists every answer but 202, by status and code.
func Refusals() []Answer {
	var list []Answer
	for code, r := range refusals {
		list = append(list, Answer{Status: r.status, Code: string(code), RetryAfter: r.retryAfter, Message: r.message})
	}
	slices.SortFunc(list, func(a, b Answer) int { return cmp.Or(a.Status-b.Status, cmp.Compare(a.Code, b.Code)) })
	return list
}
