package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/process"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const secret = "CLERK_WEBHOOK_SIGNING_SECRET=whsec_Y2xlcmstbWlycm9yLXRlc3Qta2V5LTI0"

// The edge stays thin: what verifies strangers' input links no database, no server and no test kit.
func TestDependencies(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	require.NoError(t, err)
	forbidden := regexp.MustCompile(`gorm|nats-server|testify|sqlite|pgx|goleak|natstest|clerk-sdk`)
	for dep := range strings.FieldsSeq(string(out)) {
		assert.NotRegexp(t, forbidden, dep)
	}
}

func TestWrongSettingsAreAllListed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		environ config.Environ
		want    []string
	}{
		"nothing set":  {nil, []string{"CLERK_WEBHOOK_SIGNING_SECRET", "USHER_NATS_URL"}},
		"empty secret": {config.Environ{"CLERK_WEBHOOK_SIGNING_SECRET=", "USHER_NATS_URL=nats://127.0.0.1:1"}, []string{"CLERK_WEBHOOK_SIGNING_SECRET"}},
		"short secret": {config.Environ{"CLERK_WEBHOOK_SIGNING_SECRET=whsec_YWJj"}, []string{"CLERK_WEBHOOK_SIGNING_SECRET", "16", "USHER_NATS_URL"}},
		"no secret, and what every process refuses": {config.Environ{"USHER_INGEST_ADDR=x"}, []string{"CLERK_WEBHOOK_SIGNING_SECRET", "USHER_INGEST_ADDR", "USHER_NATS_URL"}},
	} {
		var stderr bytes.Buffer
		assert.Equal(t, process.WrongSettings, process.Run(t.Context(), c.environ, &stderr, program), name)
		for _, want := range c.want {
			assert.Equal(t, 1, strings.Count(stderr.String(), want), "%s: %s in %s", name, want, stderr.String())
		}
		assert.NotContains(t, stderr.String(), "YWJj", name)
	}
}

func TestTakenPortFails(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	environ := config.Environ{secret, "USHER_NATS_URL=nats://127.0.0.1:1", "USHER_LOG_LEVEL=error", "USHER_OPS_ADDR=127.0.0.1:0", "USHER_INGEST_ADDR=" + l.Addr().String()}
	assert.Equal(t, process.Failed, process.Run(t.Context(), environ, io.Discard, program))
}

// It starts while the broker is away, becomes ready by itself, and stops in order.
func TestStartsBeforeTheBroker(t *testing.T) {
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "ingest")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	broker := natstest.New(t, natstest.WithSync)
	broker.Setup()
	url := broker.URL()
	broker.Stop()
	addr, ops := freeAddr(t), freeAddr(t)
	cmd := exec.Command(binary)
	cmd.Env = []string{secret, "USHER_NATS_URL=" + url, "USHER_INGEST_ADDR=" + addr, "USHER_OPS_ADDR=" + ops}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	require.NoError(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill() }()

	get := func(path string) int {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+ops+path, nil)
		require.NoError(t, err)
		r.Close = true
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			return 0
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	require.Eventually(t, func() bool { return get("/healthz") == 200 }, 60*time.Second, 20*time.Millisecond)
	assert.Equal(t, 503, get("/readyz"))
	broker.Start()
	require.Eventually(t, func() bool { return get("/readyz") == 200 }, 60*time.Second, 20*time.Millisecond)
	require.NoError(t, cmd.Process.Signal(os.Signal(syscall.SIGTERM)))
	require.NoError(t, cmd.Wait(), stderr.String())
	assert.NotContains(t, stderr.String(), "Y2xlcmst")
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}
