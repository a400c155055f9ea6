package clerk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/tidwall/gjson"
	"go.uber.org/zap"
)

const (
	tries    = 8
	patience = 2 * time.Minute // for one call with all its tries
	// misreadings are how often an answer that contradicts itself is asked for again: two queries of Clerk's may have
	// seen two states.
	misreadings = 3
	// longestPause is what is believed of a Retry-After.
	longestPause = time.Hour

	maxBody = 64 << 20 // of which a page needs two or three
)

// fault is an error of one request.
type fault struct {
	kind   error // one of those in clerk.go
	status int
	code   string // Clerk's own, of a JSON error
	cause  error
}

func (f *fault) Error() string {
	text := f.kind.Error()
	if f.status != 0 {
		text += " (status " + strconv.Itoa(f.status)
		if f.code != "" {
			text += ", " + f.code
		}
		text += ")"
	}
	if f.cause != nil {
		text = f.cause.Error() + ": " + text
	}
	return text
}

func (f *fault) Unwrap() error { return f.kind }

// once marks an error of a call that may have done something: only a refusal by the rate limit proves that it did not.
func once(err error) error {
	if errors.Is(err, ErrLimited) {
		return err
	}
	return backoff.Permanent(err) //nolint:wrapcheck // a mark
}

// Code is Clerk's own code of an error, such as organization_not_enabled_in_instance; empty where Clerk gave none.
func Code(err error) string {
	var f *fault
	if errors.As(err, &f) {
		return f.code
	}
	return ""
}

// retry repeats do while its error may pass, with jittered backoff, at most tries times and within patience.
func retry[T any](ctx context.Context, c *Client, do func(context.Context) (T, error)) (T, error) {
	exponential := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(250*time.Millisecond), backoff.WithMaxInterval(20*time.Second), backoff.WithMaxElapsedTime(patience))
	until := time.Now().Add(patience)
	misread := 0
	patient := context.WithValue(ctx, patienceKey{}, until)
	result, err := backoff.RetryNotifyWithData(func() (T, error) {
		result, err := do(patient)
		switch {
		case err == nil, errors.Is(err, ErrLimited), errors.Is(err, ErrUnavailable):
		case errors.Is(err, ErrUnreadable) && misread < misreadings-1 && mayPass(err):
			misread++
		default:
			err = backoff.Permanent(err)
		}
		return result, err //nolint:wrapcheck // marked, and callers wrap it
	}, backoff.WithContext(backoff.WithMaxRetries(exponential, tries-1), ctx), func(err error, delay time.Duration) {
		c.log.Warn("call of Clerk's API failed, will retry", zap.Error(err), zap.Duration("delay", delay))
	})
	if err == nil {
		return result, nil
	}
	if ended := ctx.Err(); ended != nil {
		err = ended // whatever the last try said, this is why there is no other
	}
	return result, err // ours, or the context's; callers wrap it
}

type patienceKey struct{}

// mayPass tells whether an unreadable answer may be readable when asked for again: not one of a 4xx, which is a verdict.
func mayPass(err error) bool {
	var f *fault
	return !errors.As(err, &f) || f.status < 400
}

// call makes one request, within the share and not before Clerk wants one, and returns the body of a 2xx that
// holds JSON, and when it was asked for.
// id is the object that the path is about, if it is about one.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, id string) (body string, asked time.Time, err error) {
	if err := c.admit(ctx); err != nil {
		return "", asked, err
	}
	asked = time.Now()
	body, err = c.request(ctx, method, path, query, id)
	c.metrics.observe(time.Since(asked), err)
	return body, asked, err
}

func (c *Client) request(ctx context.Context, method, path string, query url.Values, id string) (string, error) {
	address := c.base + path
	if len(query) > 0 {
		address += "?" + query.Encode() // which writes + as %2B
	}
	req, err := http.NewRequestWithContext(ctx, method, address, nil)
	if err != nil {
		return "", &fault{kind: ErrUnreadable, cause: errors.New("make request")}
	}
	req.Header.Set("Authorization", "Bearer "+c.key)
	req.Header.Set("Clerk-API-Version", apiVersion)
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", userAgent)
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return "", c.broken(ctx, err)
	}
	defer resp.Body.Close()  // it was only read
	var body strings.Builder // whose bytes become the string without a copy
	body.Grow(int(min(max(resp.ContentLength, 512), maxBody)))
	_, err = io.Copy(&body, io.LimitReader(resp.Body, maxBody))
	if resp.StatusCode == http.StatusTooManyRequests {
		c.hold(resp.Header)
	}
	if err != nil && resp.StatusCode < 300 {
		return "", c.broken(ctx, err)
	}
	if f := judge(resp.StatusCode, body.String(), path, id); f != nil {
		return "", f
	}
	return body.String(), nil
}

// broken is a request without an answer: the context's error where that ended it.
func (c *Client) broken(ctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return fmt.Errorf("wait for answer: %w", cause)
	}
	var timeout *url.Error
	if errors.As(err, &timeout) {
		err = timeout.Err // without the address, whose query may name a person
	}
	return &fault{kind: ErrUnavailable, cause: err}
}

var named = regexp.MustCompile(`with id ['"]?([A-Za-z0-9_-]+)`)

// kinds are what a 404 may be about, and places where it may come from.
var kinds = regexp.MustCompile(`(?i)\b(user|organization|session|instance|application|client|domain|invitation|membership|role|permission|environment|route|endpoint|path|url|host|page)s?\b`)

// aboutAnother tells whether a 404 names another kind of thing than the one that was asked for, such as an organization where it
// was a user, or the instance: then it is not the answer to the question.
func aboutAnother(body, path, id string) bool {
	first := gjson.Get(body, "errors.0")
	text := strings.ReplaceAll(first.Get("message").Str+" "+first.Get("long_message").Str, id, "")
	if about := named.FindStringSubmatch(first.Get("long_message").Str); about != nil && about[1] != id {
		return true
	}
	return slices.ContainsFunc(kinds.FindAllStringSubmatch(text, -1), func(kind []string) bool {
		return !strings.HasPrefix(path, "/"+strings.ToLower(kind[1])+"s/")
	})
}

// switchedOff tells whether an error says that the instance does without a feature. Clerk's catalogue has a code for each of them:
// organization_not_enabled_in_instance (organizations_… in older ones) for all that belongs to organizations,
// organization_domains_not_enabled, billing_not_enabled, and feature_not_enabled for the rest. It says 403 with most of them. Some instances
// have been seen to answer for the list of a whole table as if there were no such thing, with 404 and resource_not_found.
func switchedOff(status int, code, path string) bool {
	if status < 400 || status >= 500 {
		return false
	}
	switch code {
	case "organization_domains_not_enabled", "billing_not_enabled", "feature_not_enabled":
		return true
	case "resource_not_found":
		return status == http.StatusNotFound && slices.ContainsFunc(resources, func(r resource) bool { return r.optional && r.path == path })
	default:
		return strings.HasSuffix(code, "_not_enabled_in_instance")
	}
}

// judge decides what an answer is. The status decides first, the body only where the status leaves a doubt.
func judge(status int, body, path, id string) *fault {
	f := &fault{status: status}
	if gjson.Valid(body) {
		if status >= 400 {
			f.code = gjson.Get(body, "errors.0.code").Str
		}
	} else {
		f.cause = errors.New("the body is not JSON")
		if len(body) == 0 {
			f.cause = errors.New("the body is empty")
		}
	}
	switch {
	case status != http.StatusUnauthorized && status != http.StatusTooManyRequests && switchedOff(status, f.code, path):
		f.kind = ErrNotEnabled
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		f.kind = ErrUnauthorized
	case status == http.StatusTooManyRequests:
		f.kind, f.cause = ErrLimited, nil
	case status >= 500, status == http.StatusRequestTimeout:
		f.kind = ErrUnavailable
	case status >= 200 && status < 300:
		if f.cause == nil {
			return nil
		}
		f.kind = ErrUnreadable
	case status == http.StatusNotFound && id != "" && f.code == "resource_not_found":
		f.kind = ErrNotFound
		if aboutAnother(body, path, id) {
			f.kind, f.cause = ErrUnreadable, errors.New("the answer is about another object")
		}
	default:
		f.kind = ErrUnreadable
	}
	return f
}

// admit waits until a request may be made: until Clerk's pause is over and the share allows it.
func (c *Client) admit(ctx context.Context) error {
	started := time.Now()
	defer func() { c.metrics.waited.Add(time.Since(started).Seconds()) }()
	for {
		if err := c.rest(ctx); err != nil {
			return err
		}
		if err := c.limiter.Wait(ctx); err != nil {
			if cause := ctx.Err(); cause != nil {
				return fmt.Errorf("wait for share: %w", cause)
			}
			// The turn would come after the context's deadline.
			return fmt.Errorf("wait for share: %w", context.DeadlineExceeded)
		}
		if c.restUntil().IsZero() {
			return nil
		}
	}
}

func (c *Client) restUntil() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.pause.After(time.Now()) {
		c.pause = time.Time{}
	}
	return c.pause
}

func (c *Client) rest(ctx context.Context) error {
	for {
		until := c.restUntil()
		if until.IsZero() {
			return nil
		}
		if limit, ok := ctx.Value(patienceKey{}).(time.Time); ok && until.After(limit) {
			return backoff.Permanent(&fault{kind: ErrLimited, cause: fmt.Errorf("clerk wants no requests for %s", time.Until(until).Round(time.Second))}) //nolint:wrapcheck // a mark
		}
		timer := time.NewTimer(time.Until(until))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("wait as Clerk asked: %w", ctx.Err())
		}
	}
}

// hold lets all calls wait as long as a 429 says, in seconds or until a date by Clerk's own clock.
func (c *Client) hold(header http.Header) {
	now := time.Now()
	text := header.Get("Retry-After")
	var wait time.Duration
	if seconds, err := strconv.ParseFloat(text, 64); err == nil && seconds >= 0 {
		wait = time.Duration(min(seconds, longestPause.Seconds()) * float64(time.Second))
	} else if at, err := http.ParseTime(text); err == nil {
		clock := now
		if date, err := http.ParseTime(header.Get("Date")); err == nil {
			clock = date
		}
		wait = at.Sub(clock)
	}
	wait = min(wait, longestPause)
	if wait <= 0 {
		return // the backoff waits
	}
	c.mu.Lock()
	if until := now.Add(wait); until.After(c.pause) {
		c.pause = until
	}
	c.mu.Unlock()
	c.log.Warn("Clerk limits requests, waiting", zap.Duration("delay", wait))
}
