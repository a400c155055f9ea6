package emulator

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tidwall/sjson"

	"github.com/usherhq/usher/pkg/fixture"
)

// DefaultKey is the secret key of an emulated Backend API unless told otherwise.
const DefaultKey = "sk_test_emulator"

// apiVersions are the ones that Clerk knows.
var apiVersions = []string{"2021-02-05", "2024-10-01", "2025-03-12", "2025-04-10", "2025-11-10", "2026-05-12"}

// APIConfig shapes the Backend API of an emulated instance. The zero value is an API without rate limit and moods.
type APIConfig struct {
	Key string // the secret key, default DefaultKey
	// Others are further secret keys with the instances whose objects they open.
	Others map[string]*Clerk
	// Quota is how many requests of a key are answered within Window (default 10 s); 0 is no limit.
	// Clerk's are 1000 (production) and 100 (development).
	Quota  int
	Window time.Duration
	// Strict refuses a limit above 500 with 422. Clerk has been seen to fall back silently to 10.
	Strict bool
	// NoCursor is an older API: starting_after is refused with 422, or, with IgnoreCursor, not looked at.
	NoCursor, IgnoreCursor bool
	// LastingCursor lets starting_after name a user who is gone meanwhile; else that is a 404. What Clerk does is not known.
	LastingCursor bool
	// Unlisted tells which objects no list shows and no count counts, though they can be read by themselves. Cursors ignore it.
	Unlisted func(table string, o Object) bool
	// Crowd takes the place of the story's users: any number of them without memory.
	Crowd *Crowd
	// Moods are the rates of what goes wrong, by mood; Seed decides where.
	Moods map[Mood]float64
	Seed  uint64
	// Delay is how long a slow answer takes, default 100 ms; RetryAfter what a 429 of a mood says, default 1 s.
	Delay, RetryAfter time.Duration
	// Without names the features that the instance does without; see [API.SwitchOff]. Clerk answers 403 with a code that says so;
	// with AbsentIsNotFound 404, as has been seen too.
	Without          []Feature
	AbsentIsNotFound bool
	// Hook sees every request before anything is looked at, so that a test can change the state between two pages.
	// It runs on the request's goroutine, outside of all locks.
	Hook func(*http.Request)
}

// API serves the state of a [Clerk] as Clerk's Backend API does, below /v1, and takes wishes at [TriggerPath]. It is safe for concurrent use,
// also while a story is being told. What it does not implement it refuses with 404 or 422, never with a guess.
type API struct {
	cfg   APIConfig
	clerk *Clerk
	mux   *http.ServeMux

	mu      sync.Mutex
	rng     *rand.Rand
	rates   map[Mood]float64
	script  []Mood
	without []Feature
	windows map[string]*window // by key
	paths   map[string]int
	total   int
}

// API returns the Backend API of the instance.
func (c *Clerk) API(cfg APIConfig) *API {
	if cfg.Key == "" {
		cfg.Key = DefaultKey
	}
	if cfg.Window <= 0 {
		cfg.Window = 10 * time.Second
	}
	if cfg.Delay <= 0 {
		cfg.Delay = 100 * time.Millisecond
	}
	if cfg.RetryAfter <= 0 {
		cfg.RetryAfter = time.Second
	}
	a := &API{
		cfg: cfg, clerk: c, mux: http.NewServeMux(), rates: cfg.Moods, without: cfg.Without, windows: map[string]*window{}, paths: map[string]int{},
		rng: rand.New(rand.NewPCG(cfg.Seed, 0x617069)), // seeded on purpose
	}
	for path, serve := range map[string]func(*call){
		"GET /v1/users":                               a.users,
		"GET /v1/users/count":                         a.countUsers,
		"GET /v1/users/{id}":                          a.user,
		"GET /v1/users/{id}/organization_memberships": a.membershipsOfUser,
		"GET /v1/organizations":                       a.listOf("organizations", "created_at", "name", "members_count"),
		"GET /v1/organizations/{id}":                  a.organization,
		"GET /v1/organizations/{id}/memberships":      a.ofOrganization("organization_memberships"),
		"GET /v1/organizations/{id}/invitations":      a.ofOrganization("organization_invitations"),
		"GET /v1/organizations/{id}/domains":          a.ofOrganization("organization_domains"),
		"GET /v1/organization_memberships":            a.listOf("organization_memberships", "created_at"),
		"GET /v1/organization_invitations":            a.listOf("organization_invitations", "created_at", "email_address"),
		"GET /v1/organization_domains":                a.listOf("organization_domains"),
		"GET /v1/organization_roles":                  a.listOf("roles", "created_at", "name", "key"),
		"GET /v1/organization_permissions":            a.listOf("permissions", "created_at", "name", "key"),
		"GET /v1/waitlist_entries":                    a.listOf("waitlist_entries", "created_at", "email_address"),
		"GET /v1/sessions":                            a.sessions,
		"GET /v1/sessions/{id}":                       a.session,
		"POST /v1/webhooks/svix_url":                  a.portal,
		"POST " + TriggerPath:                         a.trigger,
		"/": func(c *call) {
			c.fail(http.StatusNotFound, "not_found", "not found", "The emulator does not serve this path.", "")
		},
	} {
		a.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { a.serve(w, r, serve) })
	}
	return a
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.mux.ServeHTTP(w, r) }

// call is one request that is being answered.
type call struct {
	api   *API
	clerk *Clerk
	w     http.ResponseWriter
	r     *http.Request
	mood  Mood
	query map[string][]string
	crowd *Crowd
}

func (a *API) serve(w http.ResponseWriter, r *http.Request, serve func(*call)) {
	if a.cfg.Hook != nil {
		a.cfg.Hook(r)
	}
	mood := a.mood()
	if mood == Slow {
		timer := time.NewTimer(a.cfg.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
			return
		}
	}
	a.note(r)
	w.Header().Set("Clerk-Trace-Id", traceID)
	if a.spoil(w, mood) {
		return
	}
	c := &call{api: a, clerk: a.clerk, w: w, r: r, mood: mood, query: r.URL.Query(), crowd: a.cfg.Crowd}
	key, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		c.fail(http.StatusUnauthorized, "authorization_header_format_invalid", "Invalid Authorization header format", `Invalid Authorization header format. Must be "Bearer <YOUR_API_KEY>"`, "")
		return
	}
	if key != a.cfg.Key {
		if c.clerk, c.crowd = a.cfg.Others[key], nil; c.clerk == nil {
			c.canned(http.StatusUnauthorized, "error_401_secret_key", "", "")
			return
		}
	}
	if wait := a.admit(key, r.URL.Path); wait > 0 {
		a.limited(w, Limited, wait)
		return
	}
	header, param := r.Header.Get("Clerk-Api-Version"), c.query["__clerk_api_version"]
	delete(c.query, "__clerk_api_version")
	if (header != "" && param != nil) || (header != "" && !slices.Contains(apiVersions, header)) || (param != nil && !slices.Contains(apiVersions, param[0])) {
		c.canned(http.StatusBadRequest, "error_400_api_version", "", "")
		return
	}
	if a.absent(c) {
		return
	}
	serve(c)
}

const traceID = "4a1f0c9be2d64b0f8f6d5f3a2b1c0d9e"

// window counts the requests of one key.
type window struct {
	times   []time.Time // of those within the last window
	blocked map[string]time.Time
	peak    int
}

// admit counts a request and returns how long its caller must wait, 0 where it may pass.
func (a *API) admit(key, path string) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	w := a.windows[key]
	if w == nil {
		w = &window{blocked: map[string]time.Time{}}
		a.windows[key] = w
	}
	old := 0
	for old < len(w.times) && now.Sub(w.times[old]) >= a.cfg.Window {
		old++
	}
	w.times = w.times[old:]
	if until := w.blocked[path]; a.cfg.Quota > 0 && until.After(now) {
		return until.Sub(now)
	}
	if a.cfg.Quota > 0 && len(w.times) >= a.cfg.Quota {
		until := w.times[0].Add(a.cfg.Window)
		w.blocked[path] = until
		return until.Sub(now)
	}
	w.times = append(w.times, now)
	w.peak = max(w.peak, len(w.times))
	return 0
}

func (a *API) limited(w http.ResponseWriter, mood Mood, wait time.Duration) {
	switch mood {
	case LimitedBare:
	case LimitedDate:
		now := time.Now()
		w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
		w.Header().Set("Retry-After", now.Add(wait).UTC().Format(http.TimeFormat))
	default:
		w.Header().Set("Retry-After", strconv.Itoa(int((wait+time.Second-1)/time.Second)))
	}
	if mood == LimitedText {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusTooManyRequests)
		_, _ = w.Write([]byte("Too many requests"))
		return
	}
	body, _ := fixture.API("error_429")
	write(w, http.StatusTooManyRequests, body)
}

func (a *API) note(r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.total++
	a.paths[r.URL.Path]++
}

// Requests is how many requests came, those that were refused included.
func (a *API) Requests() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.total
}

// RequestsTo is how many requests came to one path, such as /v1/users/count.
func (a *API) RequestsTo(path string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.paths[path]
}

// Peak is the most requests with one key that were let in within any window.
func (a *API) Peak() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	peak := 0
	for _, w := range a.windows {
		peak = max(peak, w.peak)
	}
	return peak
}

// --- answers ---

func write(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

func (c *call) answer(body []byte) {
	if c.mood == Cut {
		c.w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = c.w.Write(body[:len(body)/2])
		panic(http.ErrAbortHandler)
	}
	write(c.w, http.StatusOK, body)
}

// canned answers with one of the recorded errors, in which old is replaced.
func (c *call) canned(status int, name, old, with string) {
	body, ok := fixture.API(name)
	if !ok {
		panic(fmt.Sprintf("no fixture %s", name)) // they are embedded
	}
	write(c.w, status, bytes.ReplaceAll(body, []byte(old), []byte(with)))
}

func (c *call) fail(status int, code, message, long, param string) {
	c.api.problem(c.w, status, code, message, long, param)
}

func (a *API) problem(w http.ResponseWriter, status int, code, message, long, param string) {
	type meta struct {
		ParamName string `json:"param_name"`
	}
	type problem struct {
		Message string `json:"message"`
		Long    string `json:"long_message"`
		Code    string `json:"code"`
		Meta    *meta  `json:"meta,omitempty"`
	}
	p := problem{Message: message, Long: long, Code: code}
	if param != "" {
		p.Meta = &meta{ParamName: param}
	}
	body := (&Clerk{}).render(struct {
		Errors  []problem `json:"errors"`
		TraceID string    `json:"clerk_trace_id"`
	}{[]problem{p}, traceID})
	write(w, status, body)
}

func (c *call) unprocessable(param, long string) {
	c.fail(http.StatusUnprocessableEntity, "form_param_value_invalid", "is invalid", long, param)
}

func (c *call) noUser(id string) {
	c.canned(http.StatusNotFound, "error_404_user", "user_38HzI2pYfb8qPaRGOtjol4SEChQ", id)
}

func (a *API) user(c *call) {
	id := c.r.PathValue("id")
	if c.crowd != nil {
		number, ok := c.crowd.Number(id)
		if !ok {
			c.noUser(id)
			return
		}
		c.answer(c.crowd.Append(nil, number))
		return
	}
	o, ok := c.clerk.Object("users", id)
	if !ok || o.DeletedAt != 0 {
		c.noUser(id)
		return
	}
	if c.mood == SaysDeleted {
		c.answer(c.clerk.render(deleted{Deleted: true, ID: id, Object: "user"}))
		return
	}
	c.answer(o.JSON)
}

func (a *API) organization(c *call) {
	if o, ok := c.organization(); ok {
		c.answer(o.JSON)
	}
}

// organization is the one that the path names by id or slug; where there is none the request is answered.
func (c *call) organization() (Object, bool) {
	id := c.r.PathValue("id")
	if o, ok := c.clerk.Object("organizations", id); ok && o.DeletedAt == 0 {
		return o, true
	}
	if !strings.HasPrefix(id, "org_") {
		for o := range c.clerk.Objects("organizations") {
			if field(o.JSON, "slug") == id {
				return o, true
			}
		}
	}
	c.canned(http.StatusNotFound, "error_404_organization", "", "")
	return Object{}, false
}

func (a *API) session(c *call) {
	id := c.r.PathValue("id")
	o, ok := c.clerk.Object("sessions", id)
	if !ok || o.DeletedAt != 0 {
		c.canned(http.StatusNotFound, "error_404_session", "sess_38HzI2dPeXzWRdy57JvM1bWBcuB", id)
		return
	}
	c.answer(bareSession(o.JSON))
}

// bareSession is a session as the API gives it: with tasks, and without the user that the webhook carries.
func bareSession(data []byte) []byte {
	data, _ = sjson.DeleteBytes(bytes.Clone(data), "user")
	data, _ = sjson.SetRawBytes(data, "tasks", []byte("null"))
	return data
}

func (a *API) portal(c *call) {
	c.answer([]byte(`{"svix_url":"https://app.svix.com/login#key=emulated"}`))
}
