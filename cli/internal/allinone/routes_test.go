package allinone

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open are the routes that answer 200 without a token, since those who ask have none: an orchestrator and a metrics collector. They
// are on a listener of their own, on loopback unless USHER_OPS_ADDR says otherwise, and show nothing secret or personal.
var open = []string{"/healthz", "/readyz", "/metrics"}

// TestNoListenerAnswersAStrangerBehindAProxy walks the routes of every listener, at every listener, as a default nginx forwards a
// stranger's request: from loopback, to the address that proxy_pass names, with nothing that tells it from a request made here.
func TestNoListenerAnswersAStrangerBehindAProxy(t *testing.T) {
	t.Parallel()
	settings, err := config.Load(config.Environ{
		"USHER_DATA_DIR=" + t.TempDir(), "CLERK_WEBHOOK_SIGNING_SECRET=whsec_MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0",
		"USHER_INGEST_ADDR=127.0.0.1:0", "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0",
	}, nil)
	require.NoError(t, err)
	i, err := New(t.Context(), Config{Settings: settings, Mode: "serve", Dir: settings.DataDir, Log: zap.NewNop()})
	require.NoError(t, err)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- i.Run(ctx) }()
	defer func() {
		stop()
		assert.NoError(t, <-ended)
		assert.NoError(t, i.Close())
	}()
	require.NoError(t, i.WaitReady(t.Context()))
	require.Len(t, i.routes, 3, "console, ops, ingest")

	var paths []string
	for address, patterns := range i.routes {
		require.NotEmpty(t, patterns, address)
		for _, pattern := range patterns {
			paths = append(paths, example(pattern))
		}
	}
	paths = append(paths, "/", "/admin/", "/admin/../admin", "//admin", "/api/unknown", "*", "/debug/pprof/", "/unknown")
	slices.Sort(paths)
	paths = slices.Compact(paths)
	answered := map[string]bool{}
	for address := range i.routes {
		u, err := url.Parse(address)
		require.NoError(t, err)
		for _, path := range paths {
			for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"} {
				for name, headers := range map[string]string{
					"as a default nginx": "",
					"for a browser":      "Accept: text/html\r\nSec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\n",
					"with its marks": "X-Forwarded-For: 203.0.113.9\r\nX-Real-IP: 203.0.113.9\r\nX-Forwarded-Host: usher.example.com\r\n" +
						"X-Forwarded-Proto: https\r\nForwarded: for=203.0.113.9\r\nVia: 1.1 nginx\r\n",
					"from another site": "Origin: https://evil.example\r\nSec-Fetch-Site: cross-site\r\n",
					"from another port": "Origin: http://127.0.0.1:3000\r\nSec-Fetch-Site: same-site\r\n",
				} {
					status := forward(t, u.Host, method, path, headers)
					if slices.Contains(open, path) && address == i.State.OpsURL && status == http.StatusOK {
						answered[path] = true
						continue
					}
					assert.NotEqual(t, 2, status/100, "%s %s%s %s: %d", method, address, path, name, status)
				}
			}
		}
	}
	assert.Len(t, answered, len(open))
}

// example is a path that a pattern matches.
func example(pattern string) string {
	_, path, ok := strings.Cut(pattern, " ")
	if !ok {
		path = pattern
	}
	path = strings.ReplaceAll(path, "{$}", "")
	return regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(path, "user_1")
}

// forward sends what nginx sends with nothing but proxy_pass, and returns the status.
func forward(t *testing.T, host, method, path, headers string) int {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", host)
	require.NoError(t, err)
	defer conn.Close()
	_, err = fmt.Fprintf(conn, "%s %s HTTP/1.0\r\nHost: %s\r\nConnection: close\r\nContent-Length: 0\r\n%s\r\n", method, path, host, headers)
	require.NoError(t, err)
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	require.NoError(t, err)
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode
}
