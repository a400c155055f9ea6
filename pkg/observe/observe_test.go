package observe_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/usherhq/usher/pkg/observe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs what until the test ends and wants it to stop without an error.
func serve(t *testing.T, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	var stopped bool
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			assert.NoError(t, err)
		case <-time.After(15 * time.Second):
			t.Error("it did not stop within 15 s")
		}
	}
	t.Cleanup(stop)
	return stop
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	res, err := client.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res.StatusCode, string(body)
}

func TestACheckThatDoesNotAnswerHoldsNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var health observe.Health
		var calls atomic.Int64
		release := make(chan struct{})
		health.Add("stuck", func() error {
			calls.Add(1)
			<-release
			return nil
		})
		health.Add("fine", func() error { return nil })
		health.Add("bad", func() error { return errors.New("away") })
		health.Add("broken", func() error { panic("oops") })
		want := map[string]string{"bad": "away", "broken": "check panicked: oops"}
		var group sync.WaitGroup
		for range 3 {
			group.Go(func() {
				asked := time.Now()
				problems := health.Problems()
				assert.Less(t, time.Since(asked), time.Second)
				assert.Equal(t, "no answer within 800ms", problems["stuck"])
				delete(problems, "stuck")
				assert.Equal(t, want, problems)
			})
		}
		group.Wait()
		health.Problems()
		assert.EqualValues(t, 1, calls.Load(), "it is not asked again before it has answered")
		health.Add("another", func() error { return nil })
		close(release)
		synctest.Wait()
		assert.Equal(t, want, health.Problems())
		assert.EqualValues(t, 2, calls.Load())
	})
}

func TestOpsSaysWhatIsReadyAndWhatIsNot(t *testing.T) {
	t.Parallel()
	health, reg := &observe.Health{}, observe.NewRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "usher_test_total", Help: "for this test"})
	reg.MustRegister(counter)
	ops, err := observe.NewOps("127.0.0.1:0", health, reg, zap.NewNop())
	require.NoError(t, err)
	assert.Equal(t, "ops", ops.Name())
	serve(t, ops.Run)
	url := "http://" + ops.Addr()

	status, body := get(t, url+"/readyz")
	assert.Equal(t, http.StatusOK, status, "nothing to check is ready")
	assert.JSONEq(t, `{"status":"ready"}`, body)

	health.Add("broker", func() error { return errors.New("away") })
	health.Add("database", func() error { return nil })
	status, body = get(t, url+"/readyz")
	assert.Equal(t, http.StatusServiceUnavailable, status)
	assert.JSONEq(t, `{"status":"not ready","problems":{"broker":"away"}}`, body)
	status, _ = get(t, url+"/healthz")
	assert.Equal(t, http.StatusOK, status, "a process that waits for its broker must not be restarted")

	health.Add("broker", func() error { return nil })
	status, _ = get(t, url+"/readyz")
	assert.Equal(t, http.StatusOK, status, "a check of the same name replaces the first")

	status, body = get(t, url+"/metrics")
	assert.Equal(t, http.StatusOK, status)
	assert.Contains(t, body, "usher_test_total 0", "series are there at zero")
	assert.Contains(t, body, "go_goroutines")
	status, _ = get(t, url+"/else")
	assert.Equal(t, http.StatusNotFound, status)
}

// TestOpsIsBounded: whoever reaches the listener needs no token, and may neither fill it, hold it nor learn how the process works inside.
func TestOpsIsBounded(t *testing.T) {
	t.Parallel()
	reg := observe.NewRegistry()
	ops, err := observe.NewOps("127.0.0.1:0", &observe.Health{}, reg, zap.NewNop())
	require.NoError(t, err)
	serve(t, ops.Run)
	url := "http://" + ops.Addr()
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/vars", "/", "/metrics/", "/healthz/x"} {
		status, _ := get(t, url+path)
		assert.Equal(t, http.StatusNotFound, status, path)
	}
	require.Len(t, ops.Routes(), 3)
	for _, pattern := range ops.Routes() {
		path := strings.TrimPrefix(pattern, "GET ")
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodPatch, http.MethodOptions} {
			req, err := http.NewRequestWithContext(t.Context(), method, url+path, nil)
			require.NoError(t, err)
			req.Close = true
			res, err := http.DefaultClient.Do(req)
			require.NoError(t, err)
			require.NoError(t, res.Body.Close())
			assert.Equal(t, http.StatusMethodNotAllowed, res.StatusCode, "%s %s", method, path)
			assert.Contains(t, res.Header.Get("Allow"), http.MethodGet)
		}
	}

	dial := func(text string) net.Conn {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", ops.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = conn.Write([]byte(text)) // it may be closed already
		return conn
	}
	var silent []net.Conn
	for range 200 { // more than it takes
		silent = append(silent, dial("GET /metrics HTTP/1.1\r\nX-Slow: "))
	}
	status, _ := get(t, url+"/healthz")
	assert.Equal(t, http.StatusOK, status, "there is room for who asks")
	_, body := get(t, url+"/metrics")
	var open float64
	_, err = fmt.Sscanf(body[strings.Index(body, "\nusher_connections{")+1:], `usher_connections{listener="ops"} %g`, &open)
	require.NoError(t, err)
	assert.LessOrEqual(t, open, 64.0)
	for _, conn := range silent {
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(time.Minute)))
		_, err := io.Copy(io.Discard, conn)
		var timeout net.Error
		require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "a sender who does not end the headers is cut off")
	}
	long := dial("GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("x", 64<<10) + "\r\n\r\n")
	answer, _ := io.ReadAll(long)
	assert.NotContains(t, string(answer), "200 OK")
}

func TestATakenPortIsAnErrorOfNewOps(t *testing.T) {
	t.Parallel()
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	_, err = observe.NewOps(taken.Addr().String(), &observe.Health{}, observe.NewRegistry(), zap.NewNop())
	require.ErrorContains(t, err, "listen for operations")
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return listener
}

func TestServeLetsARequestFinish(t *testing.T) {
	t.Parallel()
	listener := listen(t)
	began, finish := make(chan struct{}), make(chan struct{})
	server := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(began)
		<-finish
		_, _ = io.WriteString(w, "finished")
	})}
	stop := serve(t, func(ctx context.Context) error { return observe.Serve(ctx, server, listener, 10*time.Second) })
	answered := make(chan string, 1)
	go func() {
		_, body := get(t, "http://"+listener.Addr().String())
		answered <- body
	}()
	<-began
	go func() {
		// No new connection is taken any more: then the one in flight may finish.
		for {
			conn, err := (&net.Dialer{Timeout: time.Second}).Dial("tcp", listener.Addr().String())
			if err != nil {
				close(finish)
				return
			}
			_ = conn.Close()
			time.Sleep(time.Millisecond)
		}
	}()
	stop()
	assert.Equal(t, "finished", <-answered)
}

func TestServeCutsOffWhatOutlastsTheGrace(t *testing.T) {
	t.Parallel()
	listener := listen(t)
	began := make(chan struct{})
	server := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(began)
		<-r.Context().Done()
	})}
	stop := serve(t, func(ctx context.Context) error { return observe.Serve(ctx, server, listener, 20*time.Millisecond) })
	cut := make(chan error, 1)
	go func() {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
		req, _ := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+listener.Addr().String(), nil)
		res, err := client.Do(req)
		if err == nil {
			_ = res.Body.Close()
		}
		cut <- err
	}()
	<-began
	stop()
	assert.Error(t, <-cut)
}

func TestServeReportsAListenerThatFails(t *testing.T) {
	t.Parallel()
	listener := listen(t)
	require.NoError(t, listener.Close())
	err := observe.Serve(t.Context(), &http.Server{ReadHeaderTimeout: time.Second}, listener, time.Second)
	require.ErrorContains(t, err, "serve")
}

func TestNewLoggerTakesLevelAndFormat(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"debug", "info", "warn", "error"} {
		for _, format := range []string{"", "json", "console"} {
			log, err := observe.NewLogger(level, format)
			require.NoError(t, err)
			want, err := zapcore.ParseLevel(level)
			require.NoError(t, err)
			assert.Equal(t, want, log.Level())
		}
	}
	_, err := observe.NewLogger("loud", "json")
	require.ErrorContains(t, err, "log level")
	_, err = observe.NewLogger("info", "xml")
	require.ErrorContains(t, err, "build logger")
}

// It changes os.Stderr, so it does not run beside others.
func TestLogLinesAreJSONWithoutSampling(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	old := os.Stderr
	os.Stderr = w
	log, err := observe.NewLogger("info", "") // a pipe is no terminal
	os.Stderr = old
	require.NoError(t, err)
	for range 200 {
		log.Info("the same", zap.Duration("delay", 1500*time.Millisecond))
	}
	log.Debug("too quiet")
	require.NoError(t, w.Close())
	out, err := io.ReadAll(r)
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	assert.Len(t, lines, 200)
	assert.Contains(t, lines[0], `"delay":"1.5s"`)
	assert.Contains(t, lines[0], `"time":"`)
}
