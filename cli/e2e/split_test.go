package e2e

import (
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// TestTheOrderOfStartDoesNotMatter starts broker, database, services and `usher setup` in several orders: what is not there yet is waited for and
// said, and every service becomes ready by itself.
func TestTheOrderOfStartDoesNotMatter(t *testing.T) {
	t.Parallel()
	dir, err := programs()
	require.NoError(t, err)
	services := []string{"ingest", "worker", "reconciler", "console"}
	for name, order := range map[string]string{
		"services first":   "console reconciler worker ingest nats-server database setup",
		"setup between":    "ingest database nats-server worker setup reconciler console",
		"broker last":      "database worker console ingest reconciler setup-fails nats-server setup",
		"as the page says": "database nats-server setup ingest worker reconciler console",
		"database last":    "nats-server reconciler console worker ingest database setup",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := dbtest.NewServer(t)
			url := server.Create(t, "usher")
			server.Stop()
			in := freeAddr(t)
			c := &cluster{t: t, dir: dir, processes: map[string]*process{}, args: map[string][]string{}, ops: map[string]string{}, monitors: map[string]string{}}
			c.configureBrokers(clusterConfig{})
			for _, service := range services {
				c.ops[service] = freeAddr(t)
			}
			c.env = []string{
				"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "CLERK_SECRET_KEY=sk_test_none", "CLERK_API_URL=http://127.0.0.1:1", "USHER_DATABASE_URL=" + url, "USHER_NATS_URL=" + c.natsURL,
				"USHER_NATS_MONITOR_URL=" + strings.Join(slices.Sorted(maps.Values(c.monitors)), ","), "USHER_ADMIN_TOKEN=0123456789abcdef",
				"USHER_INGEST_ADDR=" + in, "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_LOG_FORMAT=json", "USHER_STREAM_MAX_BYTES=64MiB",
			}
			usher := func(args ...string) (int, string) {
				code, out, stderr := run(t, append([]string{"USHER_DATA_DIR=" + filepath.Join(t.TempDir(), "none")}, c.env...), args...)
				return code, out + stderr
			}
			setUp := false
			for _, step := range strings.Fields(order) {
				switch step {
				case "database":
					server.Start(t)
				case "setup-fails":
					code, text := usher("setup", "--apply")
					require.Equal(t, 2, code, text)
				case "setup": // the broker may be about to start
					code, text := usher("setup", "--apply")
					require.Equal(t, 0, code, text)
					setUp = true
				default:
					c.start(step)
				}
				for service := range c.processes {
					if setUp || c.ops[service] == "" {
						continue
					}
					require.Eventually(t, func() bool {
						problems := c.problems(service)
						return len(problems) > 0 && problems[""] == ""
					}, time.Minute, 20*time.Millisecond, "%s answers, and is not ready, after %s", service, step)
				}
				if c.processes["ingest"] != nil && !setUp {
					require.Eventually(t, func() bool {
						status, err := postOne("http://" + in + "/webhooks/clerk")
						return err == nil && status == http.StatusServiceUnavailable
					}, time.Minute, 20*time.Millisecond, "after %s", step)
				}
			}
			for _, service := range services {
				require.Eventually(t, func() bool { return c.problems(service) == nil }, time.Minute, 20*time.Millisecond, "%s: %s", service, &c.processes[service].stderr)
			}
			status, err := postOne("http://" + in + "/webhooks/clerk")
			require.NoError(t, err)
			assert.Equal(t, http.StatusAccepted, status)
			db, err := database.Open(t.Context(), url, "usher")
			require.NoError(t, err)
			defer func() { _ = database.Close(db) }()
			require.Eventually(t, func() bool {
				var n int64
				return db.Table("deliveries").Where("status = 'processed'").Count(&n).Error == nil && n == 1
			}, time.Minute, 20*time.Millisecond)
			for _, service := range services {
				assert.Equal(t, 0, c.processes[service].stop(), "%s: %s", service, &c.processes[service].stderr)
			}
		})
	}
}

// TestTheBrokersFilesWork runs the broker by the files of deploy/nats, alone and as three, as docs/deploy.md does.
func TestTheBrokersFilesWork(t *testing.T) {
	t.Parallel()
	dir, err := programs()
	require.NoError(t, err)
	folder, err := filepath.Abs("../../deploy/nats")
	require.NoError(t, err)
	const password = "u0123456789abcdef"
	for name, brokers := range map[string]int{"one": 1, "three": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := dbtest.EmptyPostgresURL(t)
			var urls, monitors, routes, listens []string
			for range brokers {
				listen, monitor := freeAddr(t), freeAddr(t)
				listens, monitors, routes = append(listens, listen), append(monitors, "http://"+monitor), append(routes, freeAddr(t))
				if brokers > 1 {
					listen = "usher:" + password + "@" + listen
				}
				urls = append(urls, "nats://"+listen)
			}
			for i := range brokers {
				var args, env []string
				if brokers == 1 {
					conf := filepath.Join(t.TempDir(), "nats.conf")
					text, err := os.ReadFile(filepath.Join(folder, "nats.conf"))
					require.NoError(t, err)
					require.NoError(t, os.WriteFile(conf, []byte(strings.ReplaceAll(string(text), "/var/lib/nats", t.TempDir())), 0o600))
					args = []string{"-c", conf, "-p", listens[i][len("127.0.0.1:"):], "-m", monitors[i][len("http://127.0.0.1:"):]}
				} else {
					args = []string{"-c", filepath.Join(folder, "cluster.conf")}
					env = []string{
						"NATS_NAME=nats-" + strconv.Itoa(i+1), "NATS_LISTEN=" + listens[i], "NATS_MONITOR=" + monitors[i][len("http://"):], "NATS_CLUSTER=" + routes[i],
						"NATS_ROUTES=[nats://" + strings.Join(routes, ", nats://") + "]", "NATS_STORE=" + t.TempDir(), "NATS_PASSWORD=" + password,
					}
				}
				startProgram(t, env, filepath.Join(dir, "nats-server"), args...)
			}
			env := []string{
				"USHER_NATS_URL=" + strings.Join(urls, ","), "USHER_NATS_MONITOR_URL=" + strings.Join(monitors, ","), "USHER_STREAM_REPLICAS=" + strconv.Itoa(brokers),
				"USHER_STREAM_MAX_BYTES=64MiB", "USHER_DATABASE_URL=" + url, "USHER_DATA_DIR=" + t.TempDir(),
			}
			require.Eventually(t, func() bool { // a cluster elects a leader first
				code, _, _ := run(t, env, "setup", "--apply")
				return code == 0
			}, time.Minute, 200*time.Millisecond)
			code, out, stderr := run(t, env, "setup", "--apply", "-o", "json")
			require.Equal(t, 0, code, stderr)
			assert.Contains(t, out, `"synced"`)
		})
	}
}
