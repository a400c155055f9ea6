package console

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/time/rate"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/listen"
)

// TokenFile is the file in the data folder that keeps the admin token which was made because none was set.
const TokenFile = "admin-token"

const (
	loginPath   = "/admin/login"
	sessionTime = 24 * time.Hour // of a login

	// Wrong tokens are answered at this rate once a burst of them came, each after wrongDelay at most: every one that waits
	// holds a connection. A right one never waits.
	wrongEvery = time.Second
	wrongBurst = 5
	wrongDelay = 2 * time.Second

	// An address may try this many wrong tokens at once, and one more each triesEvery. Further ones are not looked at, right or wrong: else the
	// delay would bound nothing, since many can wait at a time. Sessions are no tries: nobody guesses one.
	triesBurst = 100
	triesEvery = time.Second
	triesKept  = 10_000 // addresses
)

// role is what a caller may do; a higher one includes the lower ones.
type role int

const (
	anyone role = iota
	application
	administrator
)

// Why a request was refused: the label of the metric.
const (
	refusedMissing   = "missing"    // no token
	refusedWrong     = "wrong"      // a wrong token, or a session that this token did not make
	refusedCrossSite = "cross_site" // a session, sent by a page of another site
	refusedForbidden = "forbidden"  // the application's token, where it does not suffice
	refusedLimited   = "limited"    // a token that was not looked at, after many wrong ones from its address
)

// access knows the tokens and who has shown one.
type access struct {
	admin, app [sha256.Size]byte // of the tokens; of the same length whatever theirs is
	hasApp     bool
	key        []byte // of sessions: a new token ends them all
	cookie     string
	wrong      *rate.Limiter
	refusals   *prometheus.CounterVec
	trusted    []netip.Prefix // proxies
	log        *zap.Logger

	mu    sync.Mutex
	tries map[string]*rate.Limiter // by address
}

func newAccess(cfg Config, addr net.Addr, deps Deps, log *zap.Logger) *access {
	_, port, _ := net.SplitHostPort(addr.String())
	a := &access{
		admin: sha256.Sum256([]byte(cfg.AdminToken)), app: sha256.Sum256([]byte(cfg.AppToken)), hasApp: cfg.AppToken != "",
		cookie:  "usher_session_" + port, // a browser sends the cookies of a host to all of its ports
		trusted: cfg.TrustedProxies,
		wrong:   rate.NewLimiter(rate.Every(wrongEvery), wrongBurst),
		tries:   map[string]*rate.Limiter{},
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_console_refusals_total", Help: "Requests to the console that were refused for want of a right token, by reason.",
		}, []string{"reason"}),
		// Who tries tokens must not flood the log; the metric counts everything.
		log: log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, time.Minute, 3, 0)
		})),
	}
	mac := hmac.New(sha256.New, []byte(cfg.AdminToken))
	mac.Write([]byte("usher console sessions"))
	a.key = mac.Sum(nil)
	if deps.Registerer != nil {
		deps.Registerer.MustRegister(a.refusals)
	}
	for _, reason := range []string{refusedMissing, refusedWrong, refusedCrossSite, refusedForbidden, refusedLimited} {
		a.refusals.WithLabelValues(reason)
	}
	return a
}

// caller says as whom a request comes, and for anyone why it is no more than that. A bearer token counts before a session.
func (a *access) caller(r *http.Request) (role, string) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	// Another scheme is meant for a proxy that stands before the console.
	if token = strings.TrimSpace(token); token != "" && strings.EqualFold(scheme, "Bearer") {
		return a.try(r, token)
	}
	// A program on another port of the host can set one of this name too, which a browser may send first.
	reason := refusedMissing
	for _, cookie := range r.CookiesNamed(a.cookie) {
		if reason = a.session(cookie.Value, time.Now()); reason == "" {
			break
		}
	}
	if reason != "" {
		return anyone, reason
	}
	if crossSite(r) {
		return anyone, refusedCrossSite
	}
	return administrator, ""
}

// try says whose a token is, unless its address has tried too many wrong ones.
func (a *access) try(r *http.Request, token string) (role, string) {
	address := listen.Remote(r, a.trusted)
	if at, err := netip.ParseAddr(address); err == nil && at.Is6() { // a host has a network of them
		network, _ := at.Prefix(64)
		address = network.String()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	tries := a.tries[address]
	if tries != nil && tries.Tokens() < 1 {
		return anyone, refusedLimited
	}
	who, reason := a.token(token)
	if who != anyone {
		return who, reason
	}
	if tries == nil {
		a.forgetTries()
		tries = rate.NewLimiter(rate.Every(triesEvery), triesBurst)
		a.tries[address] = tries
	}
	tries.Allow()
	return who, reason
}

// forgetTries makes room for another address, under the lock: where an attack comes from very many, by forgetting any one.
func (a *access) forgetTries() {
	if len(a.tries) < triesKept {
		return
	}
	maps.DeleteFunc(a.tries, func(_ string, l *rate.Limiter) bool { return l.Tokens() >= triesBurst })
	for address := range a.tries {
		if len(a.tries) < triesKept {
			return
		}
		delete(a.tries, address)
	}
}

// token says whose a token is. It takes the same time for every one.
func (a *access) token(token string) (role, string) {
	have := sha256.Sum256([]byte(token))
	admin, app := subtle.ConstantTimeCompare(have[:], a.admin[:]), subtle.ConstantTimeCompare(have[:], a.app[:])
	switch {
	case admin == 1:
		return administrator, ""
	case app == 1 && a.hasApp:
		return application, ""
	default:
		return anyone, refusedWrong
	}
}

// newSession is what a browser keeps instead of the token: when it ends, and proof that a holder of the token began it.
func (a *access) newSession(now time.Time) string {
	end := strconv.FormatInt(now.Add(sessionTime).Unix(), 10)
	return end + "." + base64.RawURLEncoding.EncodeToString(a.sign(end))
}

// session says why a session does not count, "" where it does.
func (a *access) session(value string, now time.Time) string {
	end, proof, _ := strings.Cut(value, ".")
	have, err := base64.RawURLEncoding.DecodeString(proof)
	if err != nil || !hmac.Equal(have, a.sign(end)) {
		return refusedWrong
	}
	if seconds, err := strconv.ParseInt(end, 10, 64); err != nil || now.Unix() >= seconds {
		return refusedMissing
	}
	return ""
}

func (a *access) sign(end string) []byte {
	mac := hmac.New(sha256.New, a.key)
	mac.Write([]byte(end))
	return mac.Sum(nil)
}

// crossSite reports whether a page of another site sent the request. A link that opens a page of the console is allowed: the site
// that has the link can neither read nor frame what it opens.
func crossSite(r *http.Request) bool {
	read := r.Method == http.MethodGet || r.Method == http.MethodHead
	if read && r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document" {
		return false
	}
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" {
		return site != "same-origin" && site != "none"
	}
	origin := r.Header.Get("Origin") // of browsers that know no Sec-Fetch-Site, or over http
	if origin == "" {
		return false
	}
	u, err := url.Parse(origin)
	return err != nil || u.Host != r.Host
}

// refused counts a refusal. One for a wrong token is logged, and slowed: it returns when the answer may be sent.
func (a *access) refused(r *http.Request, reason string) {
	a.refusals.WithLabelValues(reason).Inc()
	if reason != refusedWrong {
		return
	}
	a.log.Warn("wrong token refused: see usher_console_refusals_total for how many", zap.String("remote_addr", listen.Remote(r, a.trusted)))
	turn := a.wrong.Reserve()
	delay := turn.Delay()
	if delay > wrongDelay {
		turn.Cancel()
		delay = wrongDelay
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.Context().Done():
	}
}

// guard lets everyone do what their token allows, and tells browsers to keep everything to themselves.
func (c *Console) guard(routes []route) http.Handler {
	mux, needs := http.NewServeMux(), map[string]role{}
	for _, r := range routes {
		mux.HandleFunc(r.pattern, r.handler)
		needs[r.pattern] = r.need
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy("self"))
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "same-origin") // with no-referrer a form of ours would be sent with Origin: null
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		need := administrator // also for a path that nobody knows
		if _, pattern := mux.Handler(r); pattern != "" {
			need = needs[pattern]
		}
		if need == anyone {
			mux.ServeHTTP(w, r)
			return
		}
		who, reason := c.access.caller(r)
		if who != anyone {
			listen.Known(r)
		}
		switch {
		case who >= need:
			mux.ServeHTTP(w, r)
		case who != anyone:
			c.access.refused(r, refusedForbidden)
			writeError(w, http.StatusForbidden, "forbidden", "USHER_APP_TOKEN is for GET /api/users/{id}/ensure only; send the admin token")
		default:
			c.access.refused(r, reason)
			c.unauthorized(w, r, reason)
		}
	})
}

// unauthorized asks for the token: a browser by a page, everyone else by the API's error.
func (c *Console) unauthorized(w http.ResponseWriter, r *http.Request, reason string) {
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		page := loginForm{Next: "/admin"}
		if r.Method == http.MethodGet {
			page.Next = landing(r.URL.RequestURI())
		}
		c.loginForm(w, page)
		return
	}
	if reason == refusedLimited {
		w.Header().Set("Retry-After", "60")
		writeError(w, http.StatusTooManyRequests, "too_many_attempts", "too many wrong tokens came from this address: wait a minute; behind a proxy set USHER_TRUSTED_PROXIES")
		return
	}
	message := "send the admin token as Authorization: Bearer …"
	if reason == refusedCrossSite {
		message = "a page of another site sent this request: send the admin token as Authorization: Bearer …; a proxy must pass the browser's Host on"
	}
	w.Header().Set("WWW-Authenticate", `Bearer realm="usher"`)
	writeError(w, http.StatusUnauthorized, "unauthorized", message)
}

// loginForm is what the login page shows.
type loginForm struct {
	Next    string
	Problem string
	Style   template.CSS
}

var loginPage = template.Must(template.ParseFS(assets, "assets/login.html"))

// loginStyle stands in the page, since a stranger gets no other file; loginPolicy names it by its hash.
var loginStyle, loginPolicy = func() (template.CSS, string) {
	css, err := assets.ReadFile("assets/admin.css")
	if err != nil {
		panic(err) // embedded
	}
	sum := sha256.Sum256(css)
	return template.CSS(css), policy("sha256-" + base64.StdEncoding.EncodeToString(sum[:])) //nolint:gosec // our own file
}()

// policy is the Content-Security-Policy of a page whose styles come from style.
func policy(style string) string {
	return "default-src 'none'; style-src '" + style + "'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
}

// loginForm answers with the login page. Its status is 401: nothing of Usher is shown.
func (c *Console) loginForm(w http.ResponseWriter, form loginForm) {
	form.Style = loginStyle
	var body bytes.Buffer
	if err := loginPage.Execute(&body, form); err != nil {
		c.log.Error("login page could not be made", zap.Error(err))
		writeError(w, http.StatusInternalServerError, "internal", "the page could not be made")
		return
	}
	w.Header().Set("Content-Security-Policy", loginPolicy)
	w.Header().Set("WWW-Authenticate", `Bearer realm="usher"`)
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(http.StatusUnauthorized)
	_, _ = w.Write(body.Bytes())
}

// login answers GET and POST /admin/login: the page, or a session in exchange for the token, from the form or from a login link.
func (c *Console) login(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 8<<10)
	token, form := strings.TrimSpace(r.FormValue("token")), loginForm{Next: landing(r.FormValue("next"))}
	if token == "" && r.Method != http.MethodPost {
		c.loginForm(w, form)
		return
	}
	who, reason := anyone, refusedMissing
	if token != "" {
		who, reason = c.access.try(r, token)
	}
	if who != administrator {
		c.access.refused(r, cmp.Or(reason, refusedWrong)) // the application's token opens no page
		form.Problem = "This is not the admin token."
		if reason == refusedLimited {
			form.Problem = "Too many wrong tokens came from your address. Wait a minute."
		}
		c.loginForm(w, form)
		return
	}
	c.setSession(w, r, c.access.newSession(time.Now()), int(sessionTime.Seconds()))
	http.Redirect(w, r, form.Next, http.StatusSeeOther)
}

// logout answers POST /admin/logout. It asks for no session: one that does not count, as behind a proxy that changes Host, is to go too.
func (c *Console) logout(w http.ResponseWriter, r *http.Request) {
	c.setSession(w, r, "", -1)
	http.Redirect(w, r, loginPath, http.StatusSeeOther)
}

func (c *Console) setSession(w http.ResponseWriter, r *http.Request, value string, seconds int) {
	http.SetCookie(w, &http.Cookie{ //nolint:gosec // Secure where that works
		Name: c.access.cookie, Value: value, Path: "/", MaxAge: seconds, HttpOnly: true, SameSite: http.SameSiteStrictMode,
		Secure: r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https", // over http a browser would not keep it
	})
}

// landing is where a login leads: a page of ours, and never elsewhere.
func landing(next string) string {
	if u, err := url.Parse(next); err == nil && u.Host == "" && u.Scheme == "" && u.Path != loginPath &&
		(u.Path == "/admin" || strings.HasPrefix(u.Path, "/admin/") || strings.HasPrefix(u.Path, "/api/")) {
		return u.RequestURI()
	}
	return "/admin"
}

// madeToken returns the token that the data folder keeps; where it keeps none, one is made. fresh reports whether that was now.
func madeToken(dir string, log *zap.Logger) (token string, fresh bool, err error) {
	path := filepath.Join(dir, TokenFile)
	body, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		token, err = writeToken(dir)
		return token, true, err
	}
	if err != nil {
		return "", false, fmt.Errorf("read the admin token: %w", err)
	}
	token = strings.TrimRight(string(body), "\r\n")
	if err := config.CheckToken(token); err != nil {
		return "", false, fmt.Errorf("read the admin token: %s %w: delete the file, and a new one is made", path, err)
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return "", false, fmt.Errorf("read the admin token: %w", err)
	case !config.HasModes:
	case config.Foreign(info), info.Mode().Perm()&0o002 != 0: // they chose the token, perhaps before Usher was here
		return "", false, fmt.Errorf("read the admin token: another user of this machine can have written %s: delete the file, and a new one is made", path)
	case info.Mode().Perm()&0o077 != 0:
		log.Warn("others on this machine can read the admin token: delete the file and restart, and a new one is made", zap.String("file", path), zap.String("mode", info.Mode().Perm().String()))
	}
	return token, false, nil
}

// tokenError is why no token could be made or read. Only a change of the settings or of the file helps.
type tokenError struct{ error }

func (e tokenError) Unwrap() error { return e.error }

// WrongSettings makes a process end with the code that tells a supervisor not to try again.
func (tokenError) WrongSettings() bool { return true }

// writeToken makes a token and keeps it in one step, so that a reader never sees half of it.
func writeToken(dir string) (string, error) {
	random := make([]byte, 20)
	_, _ = rand.Read(random) // never fails
	token := hex.EncodeToString(random)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("keep the admin token: %w: set USHER_ADMIN_TOKEN, or USHER_DATA_DIR to a folder that can be written", err)
	}
	tmp, err := os.CreateTemp(dir, TokenFile+".*") // created with mode 0600
	if err != nil {
		return "", fmt.Errorf("keep the admin token: %w: set USHER_ADMIN_TOKEN, or USHER_DATA_DIR to a folder that can be written", err)
	}
	_, err = tmp.WriteString(token + "\n")
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(dir, TokenFile))
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return "", fmt.Errorf("keep the admin token: %w", err)
	}
	return token, nil
}
