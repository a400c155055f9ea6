package client_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// console answers the n-th request with the n-th of the answers, the last one for ever.
func console(t *testing.T, token string, answers ...func(http.ResponseWriter, *http.Request)) (*client.Client, *atomic.Int64) {
	t.Helper()
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := int(requests.Add(1))
		answers[min(n, len(answers))-1](w, r)
	}))
	t.Cleanup(server.Close)
	c, err := client.New(server.URL+"/", token)
	require.NoError(t, err)
	c.HTTP = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return c, &requests
}

func say(status int, body string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

func cut(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

const found = `{"result":"fetched","user":{"id":"user_1","source":"clerk","email":null,"username":"ada","banned":true,"public_metadata":{"plan":"pro"},"clerk_created_at":"2026-01-15T10:00:00Z"}}`

func TestRowIsReturnedOnceItIsThere(t *testing.T) {
	t.Parallel()
	c, requests := console(t, "secret", cut, say(502, "<html>"), say(503, `{"error":{"code":"clerk_timeout","message":"later"}}`), func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, "/api/users/user_1/ensure", r.URL.Path)
		assert.Equal(t, "750ms", r.URL.Query().Get("wait"))
		assert.Equal(t, "Bearer secret", r.Header.Get("Authorization"))
		say(200, found)(w, r)
	})
	user, err := c.EnsureUser(t.Context(), "user_1", 750*time.Millisecond)
	require.NoError(t, err)
	assert.Equal(t, "ada", user.Username)
	assert.Empty(t, user.Email)
	assert.True(t, user.Banned)
	assert.JSONEq(t, `{"plan":"pro"}`, string(user.PublicMetadata))
	assert.Equal(t, 2026, user.ClerkCreatedAt.Year())
	assert.EqualValues(t, 4, requests.Load())
}

func TestNotFoundIsClerksWordOnly(t *testing.T) {
	t.Parallel()
	c, _ := console(t, "", say(404, `{"error":{"code":"user_not_found","message":"no"}}`))
	_, err := c.EnsureUser(t.Context(), "user_1", 0)
	require.ErrorIs(t, err, client.ErrNotFound)
	for _, body := range []string{`{"error":{"code":"not_found","message":"there is no such resource"}}`, "404 page not found", ""} {
		c, _ := console(t, "", say(404, body))
		_, err := c.EnsureUser(t.Context(), "user_1", 0)
		require.Error(t, err)
		require.NotErrorIs(t, err, client.ErrNotFound, body)
	}
	c, _ = console(t, "", say(200, `{}`))
	_, err = c.EnsureUser(t.Context(), "user_1", 0)
	require.Error(t, err, "an answer without a user")
}

func TestWrongTokenIsNotTriedAgain(t *testing.T) {
	t.Parallel()
	c, requests := console(t, "", say(401, `{"error":{"code":"unauthorized"}}`))
	_, err := c.EnsureUser(t.Context(), "user_1", 0)
	require.ErrorIs(t, err, client.ErrUnauthorized)
	assert.EqualValues(t, 1, requests.Load())
}

func TestEndOfTheContextEndsTheTries(t *testing.T) {
	t.Parallel()
	c, requests := console(t, "", say(503, `{"error":{"code":"not_applied","message":"the worker is behind"}}`))
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	_, err := c.EnsureUser(ctx, "user_1", 0)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "the worker is behind")
	assert.GreaterOrEqual(t, requests.Load(), int64(2))
}

func TestLocalFindsTheTokenThatWasMade(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, "Bearer made-by-the-console", r.Header.Get("Authorization"))
		assert.Equal(t, []string{client.PrivateMetadata}, r.URL.Query()["include"])
		say(200, found)(w, r)
	}))
	t.Cleanup(server.Close)
	dir := t.TempDir()
	write := func(body string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "usher.json"), []byte(body), 0o600))
	}
	_, err := client.Local(dir)
	require.ErrorContains(t, err, "find a running")
	write("{")
	_, err = client.Local(dir)
	require.ErrorContains(t, err, "find a running")
	write(`{"console_url":"` + server.URL + `"}`)
	_, err = client.Local(dir)
	require.ErrorContains(t, err, "USHER_ADMIN_TOKEN is set")
	write(`{"console_url":"` + server.URL + `","admin_token":"made-by-the-console"}`)
	c, err := client.Local(dir)
	require.NoError(t, err)
	c.HTTP = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	_, err = c.EnsureUser(t.Context(), "user_1", 0, client.PrivateMetadata)
	require.NoError(t, err)
}

func TestAddressMustBeOne(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"", "127.0.0.1:8081", "ftp://x", "http://"} {
		_, err := client.New(address, "")
		require.Error(t, err, address)
	}
}
