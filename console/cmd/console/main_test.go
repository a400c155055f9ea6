package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/console"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/process"
	"github.com/usherhq/usher/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWrongSettingsAreAllPrinted(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	assert.Equal(t, process.WrongSettings, process.Run(t.Context(), config.Environ{"USHER_CONSOLE_ADDR=:8081", "USHER_APP_TOKEN=short"}, &stderr, program))
	for _, want := range []string{"console: wrong settings", "USHER_CONSOLE_ADDR", "USHER_NATS_URL", "USHER_APP_TOKEN: has 5 characters"} {
		assert.Contains(t, stderr.String(), want)
	}
}

func TestAnswersFromBrokerAndDatabaseUntilItIsStopped(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	_, js := broker.Setup(stream.HandlerSpec{Name: "mirror"})
	_, err := js.Publish(t.Context(), "clerk.evt.clerk.user.created.user_1", []byte("{}"))
	require.NoError(t, err)
	addr, ops, data := freeAddr(t), freeAddr(t), filepath.Join(t.TempDir(), "data")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int, 1)
	go func() {
		code <- process.Run(ctx, config.Environ{
			"USHER_NATS_URL=" + broker.URL(), "USHER_DATABASE_URL=sqlite:" + filepath.Join(t.TempDir(), "usher.db"),
			"USHER_CONSOLE_ADDR=" + addr, "USHER_OPS_ADDR=" + ops, "USHER_LOG_LEVEL=error", "USHER_DATA_DIR=" + data,
		}, &bytes.Buffer{}, program)
	}()
	require.Eventually(t, func() bool { // with the token that it made
		made, err := os.ReadFile(filepath.Join(data, console.TokenFile))
		return err == nil && get(t, "http://"+addr+"/api/consumers", strings.TrimSpace(string(made))) != ""
	}, time.Minute, 20*time.Millisecond)
	assert.Empty(t, get(t, "http://"+addr+"/api/consumers", ""), "without one it is closed")
	// No worker lives, and that is seen here.
	require.Eventually(t, func() bool {
		return strings.Contains(get(t, "http://"+ops+"/metrics", ""), `usher_consumer_pending{handler="mirror"} 1`)
	}, time.Minute, 20*time.Millisecond)
	cancel()
	select {
	case got := <-code:
		assert.Equal(t, process.Stopped, got)
	case <-time.After(15 * time.Second):
		t.Fatal("it did not stop within 15 s")
	}
}

func TestTokenThatCannotBeKeptEndsTheStart(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	broker.Setup()
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, console.TokenFile), []byte("short\n"), 0o600))
	for _, data := range []string{dir, file, filepath.Join(file, "below")} {
		assert.Equal(t, process.WrongSettings, process.Run(t.Context(), config.Environ{
			"USHER_NATS_URL=" + broker.URL(), "USHER_DATABASE_URL=sqlite:" + filepath.Join(t.TempDir(), "usher.db"),
			"USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0", "USHER_LOG_LEVEL=error", "USHER_DATA_DIR=" + data,
		}, &bytes.Buffer{}, program), data)
	}
}

func freeAddr(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, listener.Close())
	return listener.Addr().String()
}

// get returns the body of a 200, else nothing.
func get(t *testing.T, url, token string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	req.Close = true
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return ""
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return ""
	}
	return string(body)
}
