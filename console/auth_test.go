package console_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// html is a request of a browser that has no token.
func html(r *http.Request) {
	stranger(r)
	r.Header.Set("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8")
}

func stranger(r *http.Request) { r.Header.Del("Authorization") }

func header(pairs ...string) func(*http.Request) {
	return func(r *http.Request) {
		stranger(r)
		for i := 0; i < len(pairs); i += 2 {
			r.Header.Set(pairs[i], pairs[i+1])
		}
	}
}

func TestNobodyReadsWithoutTheToken(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	r := start(t, broker, console.Config{}, console.Deps{})
	for _, path := range []string{"/", "/admin", "/admin/admin.css", "/api/consumers", "/api/users/user_1/ensure", "/api/unknown", "/unknown"} {
		for name, change := range map[string]func(*http.Request){
			"none": stranger, "empty": bearer("Bearer "), "basic": bearer("Basic " + token), "bare": bearer(token),
			"in the query":     func(r *http.Request) { stranger(r); r.URL.RawQuery = "token=" + token },
			"forwarded":        header("X-Forwarded-For", "127.0.0.1", "X-Real-IP", "127.0.0.1", "Forwarded", "for=127.0.0.1", "Via", "1.1 proxy"),
			"from another":     header("Origin", "http://localhost:3000", "Sec-Fetch-Site", "same-site"),
			"to another host":  func(r *http.Request) { stranger(r); r.Host = "evil.example" },
			"a foreign cookie": header("Cookie", "usher_session=1"),
		} {
			got := r.do(t, http.MethodGet, path, change)
			assert.Equal(t, http.StatusUnauthorized, got.status, "%s with %s token", path, name)
			assert.JSONEq(t, `{"error":{"code":"unauthorized","message":"send the admin token as Authorization: Bearer …"}}`, got.body)
			assert.Contains(t, got.header.Get("WWW-Authenticate"), "Bearer")
		}
	}
	assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/api/consumers", bearer("Bearer "+token)).status)
	assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/admin", bearer("bearer "+token)).status)
	t.Run("AnyHostAndProxyWithTheToken", func(t *testing.T) {
		got := r.do(t, http.MethodGet, "/api/consumers", func(r *http.Request) {
			r.Host = "usher.example.com"
			r.Header.Set("X-Forwarded-For", "203.0.113.9")
		})
		assert.Equal(t, http.StatusOK, got.status)
	})
}

func TestWrongTokensAreSlowedCountedAndLogged(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	core, logs := observer.New(zapcore.WarnLevel)
	registry := prometheus.NewRegistry()
	r := start(t, broker, console.Config{}, console.Deps{Registerer: registry, Log: zap.New(core)})
	refusals := func(reason string) float64 { return value(t, registry, "usher_console_refusals_total", reason) }
	for _, reason := range []string{"missing", "wrong", "cross_site", "forbidden", "limited"} {
		assert.Zero(t, refusals(reason), "it is there from the start")
	}
	began := time.Now()
	for _, wrong := range []string{token + "x", token[1:], "x", strings.ToUpper(token), appToken + "x", token + " " + token, "", token + "y"} {
		assert.Equal(t, http.StatusUnauthorized, r.do(t, http.MethodGet, "/api/consumers", bearer("Bearer "+wrong)).status, wrong)
	}
	assert.Greater(t, time.Since(began), 1500*time.Millisecond, "five at once, then one a second")
	assert.InDelta(t, 7, refusals("wrong"), 0)
	assert.InDelta(t, 1, refusals("missing"), 0)
	assert.Equal(t, 3, logs.FilterMessageSnippet("wrong token refused").Len(), "three a minute")
	entry := logs.FilterMessageSnippet("wrong token refused").All()[0]
	assert.Equal(t, "127.0.0.1", entry.ContextMap()["remote_addr"])
	for _, e := range logs.All() {
		for _, field := range e.Context {
			assert.NotContains(t, field.String, token[1:])
		}
	}
	assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/api/consumers", nil).status)
}

func TestAnAddressThatTriesManyTokensIsLookedAtNoMore(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	r := start(t, broker, console.Config{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}, console.Deps{})
	from := func(address, authorization string) int {
		return r.do(t, http.MethodGet, "/api/consumers", func(r *http.Request) {
			r.Header.Set("X-Forwarded-For", address)
			r.Header.Set("Authorization", authorization)
		}).status
	}
	assert.Equal(t, http.StatusOK, from("2001:db8::1", "Bearer "+token))
	var stop atomic.Bool
	var tries sync.WaitGroup
	for n := range 150 { // each but the first few waits for its answer
		tries.Go(func() {
			for !stop.Load() {
				from(fmt.Sprintf("2001:db8::%d", n), fmt.Sprintf("Bearer wrong-token-%d", n))
			}
		})
	}
	assert.Eventually(t, func() bool { return from("2001:db8::ff", "Bearer "+token) == http.StatusTooManyRequests }, time.Minute, time.Millisecond,
		"the right one is not looked at either, from any address of the network")
	assert.Equal(t, http.StatusOK, from("203.0.113.9", "Bearer "+token), "others are not held up")
	stop.Store(true)
	tries.Wait()
}

// value is a counter's, by its only label.
func value(t *testing.T, registry *prometheus.Registry, name, label string) float64 {
	t.Helper()
	families, err := registry.Gather()
	require.NoError(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no %s for %s", name, label)
	return 0
}

func TestApplicationsTokenIsForEnsureOnly(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	r := start(t, broker, console.Config{}, console.Deps{})
	got := r.do(t, http.MethodGet, "/api/users/user_1/ensure", bearer("Bearer "+appToken))
	assert.Equal(t, http.StatusServiceUnavailable, got.status)
	assert.Contains(t, got.body, "no_database", "it was let in")
	for _, path := range []string{"/", "/admin", "/admin/admin.css", "/api/consumers", "/api/unknown", "/api/users/user_1", "/api/users/user_1/ensure/x"} {
		got := r.do(t, http.MethodGet, path, bearer("Bearer "+appToken))
		assert.Equal(t, http.StatusForbidden, got.status, path)
		assert.Contains(t, got.body, `"code":"forbidden"`)
	}
	page := r.login(t, url.Values{"token": {appToken}})
	assert.Equal(t, http.StatusUnauthorized, page.status, "it opens no page")
	assert.Empty(t, page.header.Get("Set-Cookie"))
}

// login sends the form as a browser does; redirects are followed where the client has a jar.
func (r *running) login(t *testing.T, form url.Values) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.url+"/admin/login", strings.NewReader(form.Encode()))
	require.NoError(t, err)
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return r.send(t, req)
}

// browser is a client that keeps cookies and shows redirects.
func (r *running) browser(t *testing.T) *running {
	t.Helper()
	jar, err := cookiejar.New(nil)
	require.NoError(t, err)
	client := *r.client
	client.Jar = jar
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &running{url: r.url, health: r.health, client: &client}
}

func TestBrowserLogsInByAPage(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	r := start(t, broker, console.Config{}, console.Deps{}).browser(t)
	for _, path := range []string{"/admin", "/api/consumers", "/", "/unknown", "/admin/login"} {
		page := r.do(t, http.MethodGet, path, html)
		assert.Equal(t, http.StatusUnauthorized, page.status, path)
		assert.Equal(t, "text/html; charset=utf-8", page.header.Get("Content-Type"))
		assert.Contains(t, page.body, `<form method="post" action="/admin/login">`)
		assert.Contains(t, page.header.Get("Content-Security-Policy"), "style-src 'sha256-")
		assert.NotContains(t, page.body, "Consumers")
	}
	assert.Contains(t, r.do(t, http.MethodGet, "/api/consumers?x=1", html).body, `name="next" value="/api/consumers?x=1"`)

	page := r.login(t, url.Values{"token": {"wrong"}, "next": {"/admin"}})
	assert.Equal(t, http.StatusUnauthorized, page.status)
	assert.Contains(t, page.body, "not the admin token")
	assert.NotContains(t, page.body, "wrong")

	in := r.login(t, url.Values{"token": {" " + token + "\n"}, "next": {"/api/consumers?x=1"}})
	assert.Equal(t, http.StatusSeeOther, in.status)
	assert.Equal(t, "/api/consumers?x=1", in.header.Get("Location"))
	cookie := in.header.Get("Set-Cookie")
	for _, want := range []string{"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=86400"} {
		assert.Contains(t, cookie, want)
	}
	assert.NotContains(t, cookie, token)
	assert.NotContains(t, cookie, "Secure", "over http a browser would drop it")

	assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/admin", html).status)
	assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/admin/admin.css", header("Sec-Fetch-Site", "same-origin")).status)
	assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/api/consumers", stranger).status)
	t.Run("BasicAuthenticationOfAProxyDoesNotDisturb", func(t *testing.T) {
		assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/admin", bearer("Basic dTpw")).status)
	})
	t.Run("APageOfAnotherSiteHasNoUseOfTheSession", func(t *testing.T) {
		for name, change := range map[string]func(*http.Request){
			"cross-site":     header("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors"),
			"same site":      header("Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "no-cors"),
			"in a frame":     header("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"),
			"only an origin": header("Origin", "https://evil.example"),
			"another port":   header("Origin", "http://127.0.0.1:3000"),
			"no origin":      header("Origin", "null"),
		} {
			got := r.do(t, http.MethodGet, "/api/consumers", change)
			assert.Equal(t, http.StatusUnauthorized, got.status, name)
			assert.Contains(t, got.body, "another site", name)
		}
		got := r.do(t, http.MethodGet, "/admin", header("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"))
		assert.Equal(t, http.StatusOK, got.status, "a link")
		got = r.do(t, http.MethodGet, "/api/consumers", func(req *http.Request) { header("Origin", r.url)(req) })
		assert.Equal(t, http.StatusOK, got.status, "its own origin")
	})
	out := r.do(t, http.MethodPost, "/admin/logout", header("Origin", "http://usher.example.com")) // as behind a proxy that changes Host
	assert.Equal(t, http.StatusSeeOther, out.status)
	assert.Equal(t, http.StatusUnauthorized, r.do(t, http.MethodGet, "/admin", html).status)
}

func TestLoginLeadsToAPageOfTheConsoleOnly(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	r := start(t, broker, console.Config{}, console.Deps{}).browser(t)
	for next, want := range map[string]string{
		"": "/admin", "/admin": "/admin", "/admin/x?y=z": "/admin/x?y=z", "https://evil.example/admin": "/admin", "//evil.example/admin": "/admin",
		`/\evil.example`: "/admin", `\\evil.example/admin`: "/admin", "javascript:alert(1)": "/admin", "/admin/login?token=x": "/admin", "/admin\r\nX: y": "/admin",
		"/administrator": "/admin",
	} {
		got := r.login(t, url.Values{"token": {token}, "next": {next}})
		require.Equal(t, http.StatusSeeOther, got.status, next)
		assert.Equal(t, want, got.header.Get("Location"), next)
	}
	t.Run("Link", func(t *testing.T) {
		link := strings.TrimPrefix(console.LoginURL(r.url, token), r.url)
		got := r.do(t, http.MethodGet, link, html)
		assert.Equal(t, http.StatusSeeOther, got.status)
		assert.Equal(t, "/admin", got.header.Get("Location"))
		assert.NotEmpty(t, got.header.Get("Set-Cookie"))
	})
	t.Run("BehindAProxyWithTLS", func(t *testing.T) {
		got := r.do(t, http.MethodGet, console.LoginURL("", token), header("X-Forwarded-Proto", "https"))
		assert.Contains(t, got.header.Get("Set-Cookie"), "Secure")
	})
}

func TestSessionEndsAndCannotBeMade(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	r := start(t, broker, console.Config{}, console.Deps{})
	port := r.url[strings.LastIndex(r.url, ":")+1:]
	session := func(value string) int {
		return r.do(t, http.MethodGet, "/admin", header("Cookie", "usher_session_"+port+"="+value)).status
	}
	assert.Equal(t, http.StatusOK, session(console.SessionAt(token, time.Now())))
	assert.Equal(t, http.StatusUnauthorized, session(console.SessionAt(token, time.Now().Add(-25*time.Hour))), "over")
	assert.Equal(t, http.StatusUnauthorized, session(console.SessionAt("another-token-than-that", time.Now())), "the token was changed")
	end, proof, _ := strings.Cut(console.SessionAt(token, time.Now()), ".")
	for _, value := range []string{"", ".", end, end + ".", "9" + end + "." + proof, end + "." + proof + "x"} {
		assert.Equal(t, http.StatusUnauthorized, session(value), value)
	}
	mine := console.SessionAt(token, time.Now())
	assert.Equal(t, http.StatusOK, session("x; usher_session_"+port+"="+mine), "another port of the host has set a cookie of the name")
	assert.Equal(t, http.StatusOK, session(mine+"; usher_session_"+port+"=x"))
}

func TestTokenIsMadeWhereNoneIsSet(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	dir := filepath.Join(t.TempDir(), "data")
	open := func() (*console.Console, error) {
		_, js := broker.Connect()
		return console.New(console.Config{Addr: "127.0.0.1:0", DataDir: dir}, console.Deps{JetStream: js, Log: zap.NewNop(), Health: &observe.Health{}})
	}
	c, err := open()
	require.NoError(t, err)
	made, fresh := c.MadeToken()
	c.Close()
	assert.True(t, fresh)
	assert.GreaterOrEqual(t, len(made), 32)
	path := filepath.Join(dir, console.TokenFile)
	info, err := os.Stat(path)
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, files, 1)
	folder, err := os.Stat(dir)
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o700), folder.Mode().Perm())

	c, err = open()
	require.NoError(t, err)
	again, fresh := c.MadeToken()
	c.Close()
	assert.Equal(t, made, again)
	assert.False(t, fresh, "it is shown once")

	t.Run("AnotherUserMayHaveChosenIt", func(t *testing.T) {
		refused := func() {
			_, err := open()
			require.ErrorContains(t, err, "another user of this machine can have written "+path)
			assert.NotContains(t, err.Error(), made)
		}
		if config.HasModes {
			require.NoError(t, os.Chmod(path, 0o602))
			refused()
			require.NoError(t, os.Chmod(path, 0o600))
		}
		if os.Geteuid() == 0 { // who alone can give a file away
			require.NoError(t, os.Chown(path, 4711, 4711))
			refused()
			require.NoError(t, os.Chown(path, 0, 0))
		}
	})
	require.NoError(t, os.WriteFile(path, []byte("short\n"), 0o600))
	_, err = open()
	require.ErrorContains(t, err, "delete the file")
	assert.NotContains(t, err.Error(), "short")
	require.NoError(t, os.Remove(path))
	require.NoError(t, os.Mkdir(path, 0o700))
	_, err = open()
	require.ErrorContains(t, err, "read the admin token")
}

func TestMadeTokenOpensTheConsole(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup(stream.HandlerSpec{Name: "mirror"})
	_, js := broker.Connect()
	core, logs := observer.New(zapcore.InfoLevel)
	c, err := console.New(console.Config{Addr: "127.0.0.1:0", DataDir: t.TempDir()}, console.Deps{JetStream: js, Log: zap.New(core), Health: &observe.Health{}})
	require.NoError(t, err)
	made, _ := c.MadeToken()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	defer func() { cancel(); assert.NoError(t, <-done) }()
	r := &running{url: "http://" + c.Addr(), client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	assert.Equal(t, http.StatusUnauthorized, r.do(t, http.MethodGet, "/api/consumers", stranger).status)
	assert.Equal(t, http.StatusOK, r.do(t, http.MethodGet, "/api/consumers", bearer("Bearer "+made)).status)
	require.Equal(t, 1, logs.FilterFieldKey("admin_token_file").Len())
	for _, e := range logs.All() {
		for _, field := range e.Context {
			assert.NotContains(t, field.String, made)
		}
	}
}
