// Package clerk reads Clerk's Backend API: whole tables in pages, single objects, counts. It hands objects out as the
// raw JSON that Clerk gave, spends no more than its share of the instance's request quota, waits as long as Clerk asks,
// and retries what may be repeated.
//
// What it guarantees is that silence is never taken for absence: an answer that is not what was asked for (no JSON, nothing
// in it, fewer objects than promised, objects without an id) is an error, and [ErrNotFound] is only Clerk's own word on that one object. A sweep
// that ended without an error has passed every object that existed from its beginning to its end.
//
// It refuses to write. The one exception, [Client.RefreshPortalURL], makes a link.
package clerk

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/tidwall/gjson"
	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// Every error of a [Client] wraps exactly one of these, or the context's error.
var (
	// ErrNotFound is Clerk's word that the one object asked for does not exist (in the instance of this key).
	ErrNotFound = errors.New("not found")
	// ErrUnauthorized is a key that Clerk does not accept, or not for this.
	ErrUnauthorized = errors.New("unauthorized")
	// ErrNotEnabled is Clerk's word that the instance does without the feature that the resource belongs to, as most do without
	// organizations. Nothing follows from it for objects that there were when it had the feature.
	ErrNotEnabled = errors.New("not enabled in the instance")
	// ErrLimited is Clerk's rate limit, after all the waiting that a call may do.
	ErrLimited = errors.New("rate limited")
	// ErrUnavailable is an API that cannot be reached or that fails, after all tries.
	ErrUnavailable = errors.New("unavailable")
	// ErrUnreadable is an answer that does not say what was asked, or that contradicts itself. Nothing follows from it.
	ErrUnreadable = errors.New("unreadable")
)

const (
	// DefaultBaseURL is Clerk's.
	DefaultBaseURL = "https://api.clerk.com/v1"
	// DefaultShare is how much of the quota a client spends unless told otherwise: the rest is the application's.
	DefaultShare = 0.2

	productionQuota  = 1000
	developmentQuota = 100
	quotaWindow      = 10 * time.Second

	// apiVersion is the one whose objects equal those of the webhooks.
	apiVersion = "2026-05-12"
	userAgent  = "usher"

	requestTimeout = 20 * time.Second
)

// Config describes how an instance is read. Its zero values are documented defaults, but for SecretKey.
type Config struct {
	BaseURL   string // default DefaultBaseURL; one without a path, as Clerk's own libraries take it, gets "/v1"
	SecretKey string // sk_…
	// Quota is how many requests the instance is allowed in 10 s, by all who have its key: 0 is 1000 for a key of
	// production (sk_live_), else 100. Below 0 nothing is limited, which is for an emulator.
	Quota int
	Share float64 // of the quota that this client may spend, above 0 to 1; 0 is DefaultShare
	// PageSize is how many objects a request for a list asks for, 40 to 500; 0 is 500, the most that Clerk allows. Less
	// is for tests, which show pages with fewer objects then.
	PageSize int
	// HTTPClient is used with redirects switched off. Nil is one of its own, with 20 s for a request.
	HTTPClient *http.Client
	Log        *zap.Logger           // nil: none
	Registerer prometheus.Registerer // nil: no metrics. Clients may share one
}

// Client reads one instance. It is safe for concurrent use; all its calls share one limiter.
type Client struct {
	base    string
	key     string
	http    *http.Client
	log     *zap.Logger
	limiter *rate.Limiter
	metrics *metrics

	pageSize int

	mu    sync.Mutex
	pause time.Time // until when Clerk wants no requests

	withoutCursor atomic.Bool // the API is too old for starting_after
}

// New checks the configuration and reports everything that is wrong with it. It makes no request.
func New(cfg Config) (*Client, error) {
	base := strings.TrimRight(cmp.Or(cfg.BaseURL, DefaultBaseURL), "/")
	share := cmp.Or(cfg.Share, DefaultShare)
	pageSize := cmp.Or(cfg.PageSize, maxPageSize)
	var problems []error
	u, err := url.Parse(base)
	if err == nil && u.Path == "" {
		base += "/v1"
	}
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" {
		problems = append(problems, errors.New("API URL: want http://… or https://… with a path such as /v1"))
	}
	switch {
	case cfg.SecretKey == "":
		problems = append(problems, errors.New("secret key: missing"))
	case strings.HasPrefix(cfg.SecretKey, "pk_"):
		problems = append(problems, errors.New("secret key: this is the publishable key (pk_…), want sk_…"))
	case strings.HasPrefix(cfg.SecretKey, "whsec_"):
		problems = append(problems, errors.New("secret key: this is a webhook signing secret (whsec_…), want sk_…"))
	case strings.ContainsFunc(cfg.SecretKey, func(r rune) bool { return r <= ' ' || r > '~' }):
		problems = append(problems, errors.New("secret key: holds a space, a line break or something not ASCII"))
	}
	if !(share > 0 && share <= 1) {
		problems = append(problems, fmt.Errorf("share %v: want above 0 to 1", share))
	}
	if pageSize < minPageSize || pageSize > maxPageSize {
		problems = append(problems, fmt.Errorf("page size %d: want %d to %d", pageSize, minPageSize, maxPageSize))
	}
	m, err := newMetrics(cfg.Registerer)
	if err = errors.Join(append(problems, err)...); err != nil {
		return nil, fmt.Errorf("configure Clerk's API: %w", err)
	}
	c := &Client{base: base, key: cfg.SecretKey, log: cfg.Log, metrics: m, limiter: newLimiter(cfg.Quota, share, cfg.SecretKey), pageSize: pageSize}
	if c.log == nil {
		c.log = zap.NewNop()
	}
	if cfg.HTTPClient == nil {
		transport := http.DefaultTransport.(*http.Transport).Clone()
		transport.MaxIdleConnsPerHost = 8
		c.http = &http.Client{Transport: transport, Timeout: requestTimeout}
	} else {
		own := *cfg.HTTPClient
		c.http = &own
	}
	// A redirect is no answer, and the key must not follow one.
	c.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return c, nil
}

// newLimiter spreads the allowed requests evenly. One in fifty is held back, and at least one, so that any ten seconds, however they
// are cut, stay within the share, also where requests arrive less evenly than they left.
func newLimiter(quota int, share float64, key string) *rate.Limiter {
	if quota < 0 {
		return rate.NewLimiter(rate.Inf, 1)
	}
	if quota == 0 {
		quota = developmentQuota
		if strings.HasPrefix(key, "sk_live_") {
			quota = productionQuota
		}
	}
	allowed := float64(quota) * share
	return rate.NewLimiter(rate.Limit(max(allowed-max(1, allowed/50), allowed/2)/quotaWindow.Seconds()), 1)
}

// Close closes the connections that are idle. The client can still be used.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Object is one of Clerk's objects as the API gave it.
type Object struct {
	ID                   string
	CreatedAt, UpdatedAt int64           // ms, 0 where the object does not say
	Raw                  json.RawMessage // whole
}

// Get reads one object of a resource that has an address of its own (see [Addressable]; sessions have one too). It is
// ErrNotFound only where Clerk says, in its own form, that this very object is not there.
func (c *Client) Get(ctx context.Context, resource, id string) (Object, error) {
	r, err := lookup(resource)
	if err == nil && !r.addressable {
		err = fmt.Errorf("clerk has no address for one of them: %w", ErrUnreadable)
	}
	if err == nil && !plausibleID(id) {
		err = fmt.Errorf("the id is none: %w", ErrUnreadable)
	}
	if err != nil {
		return Object{}, fmt.Errorf("get %s %s: %w", resource, id, err)
	}
	o, err := c.one(ctx, r.path+"/"+id, id)
	if err != nil {
		return Object{}, fmt.Errorf("get %s %s: %w", resource, id, err)
	}
	return o, nil
}

func (c *Client) one(ctx context.Context, path, id string) (Object, error) {
	return retry(ctx, c, func(ctx context.Context) (Object, error) {
		body, _, err := c.call(ctx, http.MethodGet, path, nil, id)
		if err != nil {
			return Object{}, err
		}
		o, err := object(gjson.Parse(body))
		if err == nil && o.ID != id {
			err = fmt.Errorf("another object came: %w", ErrUnreadable)
		}
		return o, err
	})
}

// plausibleID keeps what could change the path out of it.
func plausibleID(id string) bool {
	return id != "" && !strings.ContainsFunc(id, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-')
	})
}

func object(v gjson.Result) (Object, error) {
	if !v.IsObject() {
		return Object{}, fmt.Errorf("not an object: %w", ErrUnreadable)
	}
	o, deleted := Object{Raw: json.RawMessage(v.Raw)}, false
	v.ForEach(func(key, value gjson.Result) bool {
		switch key.Str {
		case "id":
			o.ID = value.String()
		case "created_at":
			o.CreatedAt = value.Int()
		case "updated_at":
			o.UpdatedAt = value.Int()
		case "deleted":
			deleted = value.Type != gjson.False && value.Type != gjson.Null
		}
		return true
	})
	if !plausibleID(o.ID) {
		return Object{}, fmt.Errorf("an object without id: %w", ErrUnreadable)
	}
	if deleted {
		// Whoever read it as content would write a tombstone, and Clerk's word for what is gone is a 404.
		return Object{}, fmt.Errorf("%s says that it is deleted: %w", o.ID, ErrUnreadable)
	}
	return o, nil
}

// Count asks Clerk how many objects of a resource there are. It is Clerk's number, not a count of anything read.
func (c *Client) Count(ctx context.Context, resource string) (int64, error) {
	return c.count(ctx, resource, nil)
}

func (c *Client) count(ctx context.Context, resource string, query url.Values) (int64, error) {
	r, err := lookup(resource)
	if err != nil {
		return 0, fmt.Errorf("count %s: %w", resource, err)
	}
	path := r.path + "/count"
	if !r.array {
		path, query = r.path, url.Values{"limit": {"1"}}
	}
	n, err := retry(ctx, c, func(ctx context.Context) (int64, error) {
		body, _, err := c.call(ctx, http.MethodGet, path, query, "")
		if err != nil {
			return 0, err
		}
		total := gjson.Get(body, "total_count")
		if total.Type != gjson.Number || total.Int() < 0 {
			return 0, fmt.Errorf("no total_count: %w", ErrUnreadable)
		}
		return total.Int(), nil
	})
	if err != nil {
		return 0, fmt.Errorf("count %s: %w", resource, err)
	}
	return n, nil
}

// Latest reads, in one small request, the object that changed last, of resources that cannot be listed by change the one
// that was created last; false where there is none. See [Sorted].
func (c *Client) Latest(ctx context.Context, resource string) (Object, bool, error) {
	r, err := lookup(resource)
	if err != nil {
		return Object{}, false, fmt.Errorf("read latest of %s: %w", resource, err)
	}
	query := url.Values{}
	if r.updated {
		query.Set("order_by", "-updated_at")
	} else if r.created {
		query.Set("order_by", "-created_at")
	}
	page, err := c.list(ctx, r.path, query, -1, 1)
	if err != nil {
		return Object{}, false, fmt.Errorf("read latest of %s: %w", resource, err)
	}
	if len(page.objects) == 0 {
		return Object{}, false, nil
	}
	return page.objects[0], true, nil
}

// Newest reads, in one request, the objects that were created last, 100 at most, newest first; none where a resource cannot be listed
// by creation.
func (c *Client) Newest(ctx context.Context, resource string) ([]Object, error) {
	r, err := lookup(resource)
	if err != nil {
		return nil, fmt.Errorf("read newest of %s: %w", resource, err)
	}
	if !r.created {
		return nil, nil
	}
	page, err := c.list(ctx, r.path, url.Values{"order_by": {"-created_at"}}, -1, youngest)
	if err != nil {
		return nil, fmt.Errorf("read newest of %s: %w", resource, err)
	}
	return page.objects, nil
}

// Sessions reads the sessions of a user that Clerk still has. Old ones are cleaned up: absence is not deletion.
func (c *Client) Sessions(ctx context.Context, userID string) ([]Object, error) {
	objects, err := c.all(ctx, "/sessions", url.Values{"user_id": {userID}, "paginated": {"true"}})
	if err != nil {
		return nil, fmt.Errorf("read sessions of %s: %w", userID, err)
	}
	return objects, nil
}

// Find looks for one object of a resource that has no address of its own by reading the list it must be in: that of its organization,
// where organizationID is given and the resource belongs to one, else that of the instance. False only where that list was
// read whole, agreed with its own count and did not have it, or where Clerk says that the organization does not exist. Of what is
// [Partial] that is no proof. For an id that no object of Clerk's can have, since it has other characters than theirs, nothing is asked.
// It costs a request for each [Config].PageSize objects of the list.
func (c *Client) Find(ctx context.Context, resource, id, organizationID string) (Object, bool, error) {
	fail := func(err error) (Object, bool, error) {
		return Object{}, false, fmt.Errorf("find %s %s: %w", resource, id, err)
	}
	r, err := lookup(resource)
	if err != nil {
		return fail(err)
	}
	if id != "" && !plausibleID(id) || organizationID != "" && !plausibleID(organizationID) {
		return Object{}, false, nil
	}
	if r.addressable {
		o, err := c.Get(ctx, resource, id)
		if errors.Is(err, ErrNotFound) {
			return Object{}, false, nil
		}
		return o, err == nil, err
	}
	path := r.path
	if r.below != "" && organizationID != "" {
		path = "/organizations/" + organizationID + r.below
	}
	objects, err := c.all(ctx, path, url.Values{})
	if errors.Is(err, ErrUnreadable) && path != r.path {
		// Was it a 404? Only the organization itself can tell.
		if _, other := c.Get(ctx, "organizations", organizationID); errors.Is(other, ErrNotFound) {
			return Object{}, false, nil
		}
	}
	if err != nil {
		return fail(err)
	}
	for _, o := range objects {
		if o.ID == id {
			return o, true, nil
		}
	}
	return Object{}, false, nil
}

// RefreshPortalURL makes a link with which a person can log in to the webhook portal of the instance. The link is a
// credential: it is for an operator's eyes, not for a log.
func (c *Client) RefreshPortalURL(ctx context.Context) (string, error) {
	link, err := retry(ctx, c, func(ctx context.Context) (string, error) {
		body, _, err := c.call(ctx, http.MethodPost, "/webhooks/svix_url", nil, "")
		if err != nil {
			return "", once(err)
		}
		link := gjson.Get(body, "svix_url").Str
		if u, err := url.Parse(link); err != nil || u.Scheme != "https" || u.Host == "" {
			return "", once(fmt.Errorf("no svix_url: %w", ErrUnreadable))
		}
		return link, nil
	})
	if err != nil {
		return "", fmt.Errorf("make portal link: %w", err)
	}
	return link, nil
}
