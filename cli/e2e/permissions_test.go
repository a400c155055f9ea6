package e2e

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/client"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

// secured is a cluster whose broker is configured as deploy/nats/secure.conf has it: TLS with certificates of the clients, and for each part of
// Usher a user with the permissions that it needs.
type secured struct {
	*cluster
	address      string
	certificates natstest.Certificates
	log          string // of the broker
}

// login is how a user reaches the broker. The password is the name twice.
func (s *secured) login(user string) []string {
	return []string{"USHER_NATS_URL=tls://" + user + ":" + user + user + "@" + s.address}
}

func newSecured(t *testing.T, env ...string) *secured {
	t.Helper()
	dir, err := programs()
	require.NoError(t, err)
	folder, monitor, in := t.TempDir(), freeAddr(t), freeAddr(t)
	s := &secured{address: freeAddr(t), certificates: natstest.NewCertificates(t), log: filepath.Join(folder, "nats.log")}
	s.cluster = &cluster{
		t: t, dir: dir, processes: map[string]*process{}, args: map[string][]string{}, own: map[string][]string{}, ops: map[string]string{},
		brokers: []string{"nats-server"}, webhooks: "http://" + in + "/webhooks/clerk", databaseURL: dbtest.EmptyPostgresURL(t),
	}
	for _, name := range []string{"permissions.conf", "secure.conf"} { // to the letter, but for what belongs to the machine
		text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "nats", name))
		require.NoError(t, err)
		changed := strings.NewReplacer("0.0.0.0:4222", s.address, "0.0.0.0:8222", monitor, "/var/lib/nats", filepath.Join(folder, "store"),
			"/etc/nats/tls/ca.pem", s.certificates.CA, "/etc/nats/tls/server.pem", s.certificates.ServerCert, "/etc/nats/tls/server.key", s.certificates.ServerKey).Replace(string(text))
		require.NoError(t, os.WriteFile(filepath.Join(folder, name), []byte(changed), 0o600))
	}
	s.args["nats-server"] = []string{"-c", filepath.Join(folder, "secure.conf"), "-l", s.log}
	for _, user := range users {
		s.own["nats-server"] = append(s.own["nats-server"], "NATS_PASSWORD_"+strings.ToUpper(user)+"="+user+user)
	}
	s.env = append([]string{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATABASE_URL=" + s.databaseURL, "USHER_NATS_MONITOR_URL=https://" + monitor,
		"USHER_NATS_CA=" + s.certificates.CA, "USHER_NATS_CERT=" + s.certificates.ClientCert, "USHER_NATS_KEY=" + s.certificates.ClientKey,
		"USHER_INGEST_ADDR=" + in, "USHER_LOG_FORMAT=json", "USHER_STREAM_MAX_BYTES=1GiB",
	}, env...)
	s.start("nats-server")
	for _, name := range []string{"ingest", "worker", "reconciler", "console"} {
		s.ops[name], s.own[name] = freeAddr(t), s.login(name)
	}
	return s
}

// users are those of deploy/nats/permissions.conf.
var users = []string{"ingest", "worker", "reconciler", "console", "setup", "operator"}

// usher runs a command as a user of the broker.
func (s *secured) usher(user string, wantCode int, args ...string) (stdout string) {
	s.t.Helper()
	code, stdout, stderr := run(s.t, slices.Concat(s.env, s.login(user), []string{"USHER_DATA_DIR=" + s.t.TempDir()}), args...)
	require.Equal(s.t, wantCode, code, "%s: %s\n%s", args, stdout, stderr)
	return stdout
}

// connect is a connection of a user's, as the part of that name has it.
func (s *secured) connect(user string) (*nats.Conn, jetstream.JetStream) {
	s.t.Helper()
	name := user
	if user == "setup" || user == "operator" {
		name = "ops" // as of every command
	}
	url := strings.TrimPrefix(s.login(user)[0], "USHER_NATS_URL=")
	nc, err := stream.Connect(url, "", name, zap.NewNop(), stream.TLS(s.certificates.CA, s.certificates.ClientCert, s.certificates.ClientKey))
	require.NoError(s.t, err)
	s.t.Cleanup(nc.Close)
	require.Eventually(s.t, nc.IsConnected, time.Minute, 10*time.Millisecond, "%s: %v", user, nc.LastError())
	js, err := stream.JetStream(nc)
	require.NoError(s.t, err)
	return nc, js
}

// violations are what the broker has refused, as "part subject".
func (s *secured) violations() []string {
	s.t.Helper()
	text, err := os.ReadFile(s.log)
	require.NoError(s.t, err)
	var list []string
	for _, m := range regexp.MustCompile(`:usher-([a-z]+)".* Violation - (?:Subject|Reply) "([^"]*)"`).FindAllStringSubmatch(string(text), -1) {
		list = append(list, m[1]+" "+m[2])
	}
	assert.Len(s.t, list, strings.Count(string(text), "Violation"), "%s", text)
	slices.Sort(list)
	return slices.Compact(list)
}

// TestEveryPartWorksWithItsPermissionsAlone runs all services and the commands as deploy/nats/permissions.conf lets them.
func TestEveryPartWorksWithItsPermissionsAlone(t *testing.T) {
	t.Parallel()
	clerk := newClerk()
	api := httptest.NewServer(clerk.API(emulator.APIConfig{Key: "sk_live_e2e"}))
	t.Cleanup(api.Close)
	consoleAddr := freeAddr(t)
	s := newSecured(t, "CLERK_SECRET_KEY=sk_live_e2e", "CLERK_API_URL="+api.URL+"/v1", "USHER_RECONCILE_INTERVAL=1s", "USHER_SILENCE_AFTER=5s",
		"USHER_APP_TOKEN=a-token-for-tests", "USHER_ADMIN_TOKEN=0123456789abcdef", "USHER_CONSOLE_ADDR="+consoleAddr)
	require.Eventually(t, func() bool {
		code, _, stderr := run(t, slices.Concat(s.env, s.login("setup")), "setup")
		if code != 0 && !strings.Contains(stderr, "no broker answers") {
			log, _ := os.ReadFile(s.log)
			t.Log(stderr, string(log))
		}
		return code == 0
	}, time.Minute, 100*time.Millisecond, "the broker starts")
	services := []string{"ingest", "worker", "reconciler", "console"}
	for _, name := range services {
		s.start(name)
	}
	for _, name := range services {
		require.Eventually(t, func() bool { return s.problems(name) == nil }, time.Minute, 20*time.Millisecond, "%s: %v", name, s.problems(name))
	}
	require.Eventually(t, func() bool { return s.metricOf("ingest", `usher_broker_durability{state="synced"}`) == "1" }, time.Minute, 50*time.Millisecond)
	var err error
	s.db, err = database.Open(t.Context(), s.databaseURL, "usher")
	require.NoError(t, err)
	t.Cleanup(func() { _ = database.Close(s.db) })
	_, s.js = s.connect("operator")
	exists := func(user string) bool {
		var n int64
		return s.db.Table("users").Where("id = ?", user).Count(&n).Error == nil && n == 1
	}

	// Webhooks, so many at once that they are stored in batches, and one that cannot be decoded.
	var events []emulator.Event
	var last string
	for range 20 {
		id, more := clerk.SignUp()
		last, events = id, append(events, more...)
	}
	bad := junk(3)
	var group sync.WaitGroup
	for _, e := range append(slices.Clone(events), bad) {
		group.Go(func() {
			status, err := send(s.webhooks, e)
			assert.NoError(t, err)
			assert.Equal(t, http.StatusAccepted, status)
		})
	}
	group.Wait()
	s.settled(len(events)+1, time.Minute)
	require.True(t, exists(last))

	// What no webhook says the reconciler publishes.
	missed, _ := clerk.SignUp()
	require.Eventually(t, func() bool { return exists(missed) }, time.Minute, 50*time.Millisecond)
	for _, name := range []string{"worker", "reconciler", "console"} {
		require.Eventually(t, func() bool { return s.metricOf(name, `usher_consumer_pending{handler="mirror"}`) == "0" }, time.Minute, 50*time.Millisecond, name)
	}
	require.Equal(t, 0, s.processes["reconciler"].stop())
	// And who is asked for before either, the console.
	early, _ := clerk.SignUp()
	app, err := client.New("http://"+consoleAddr, "a-token-for-tests")
	require.NoError(t, err)
	defer app.HTTP.CloseIdleConnections()
	user, err := app.EnsureUser(t.Context(), early, 0)
	require.NoError(t, err)
	assert.Equal(t, early, user.ID)

	// Commands of an operator.
	s.usher("operator", 0, "events", "list")
	assert.Contains(t, s.usher("operator", 0, "events", "show", events[0].ID), events[0].ID)
	assert.Contains(t, s.usher("operator", 0, "events", "tail", "--since", "1h", "--limit", "1"), "msg_")
	assert.Contains(t, s.usher("operator", 0, "dlq", "show", bad.ID), bad.ID)
	s.usher("operator", 1, "dlq", "replay", "--all", "--yes") // it cannot be decoded still
	s.usher("operator", 0, "dlq", "discard", "--all", "--yes")
	s.usher("operator", 0, "replay", "--since", "1h", "--yes")
	lost, _ := clerk.SignUp()
	s.usher("operator", 1, "verify")
	s.usher("operator", 0, "reconcile", "--full")
	require.Eventually(t, func() bool { return exists(lost) }, time.Minute, 50*time.Millisecond)
	s.usher("operator", 0, "verify")
	s.usher("operator", 0, "backfill")
	s.usher("operator", 0, "setup", "--plan")
	// And of whoever sets up: what differs is changed.
	var report struct {
		Streams struct{ Changed []struct{ Field string } } `json:"streams"`
	}
	require.NoError(t, json.Unmarshal([]byte(s.usher("setup", 0, "setup", "--apply", "--stream-max-bytes", "2GiB", "--output", "json")), &report))
	require.NotEmpty(t, report.Streams.Changed)

	assert.Equal(t, []string{"ingest $JS.API.STREAM.INFO.CLERK_EVENTS"}, s.violations(), "ingest asks, and works where it may not; nobody else is refused anything")
	for _, name := range []string{"ingest", "worker", "console"} {
		assert.Nil(t, s.problems(name), name)
		assert.Equal(t, 0, s.processes[name].stop(), name)
	}
	s.refusals()
}

// refusals tries what each user may not do, and what a service does too seldom for a test.
func (s *secured) refusals() {
	t := s.t
	t.Helper()
	const api = "$JS.API."
	reading := []string{
		api + "DIRECT.GET.CLERK_EVENTS", api + "STREAM.MSG.GET.CLERK_EVENTS", api + "CONSUMER.MSG.NEXT.CLERK_EVENTS.mirror",
		api + "CONSUMER.CREATE.CLERK_EVENTS.spy", api + "STREAM.SNAPSHOT.CLERK_EVENTS", api + "STREAM.CREATE.SPY",
	}
	destroying := []string{
		api + "STREAM.DELETE.CLERK_EVENTS", api + "STREAM.DELETE.CLERK_DLQ", api + "STREAM.UPDATE.CLERK_EVENTS", api + "STREAM.MSG.DELETE.CLERK_EVENTS",
		api + "STREAM.PURGE.CLERK_DLQ", api + "CONSUMER.DELETE.CLERK_EVENTS.mirror", api + "CONSUMER.RESET.CLERK_EVENTS.mirror",
		api + "CONSUMER.CREATE.CLERK_EVENTS.mirror", api + "CONSUMER.DURABLE.CREATE.CLERK_EVENTS.mirror", api + "STREAM.RESTORE.CLERK_EVENTS",
	}
	const purge, ack = api + "STREAM.PURGE.CLERK_EVENTS", "$JS.ACK.CLERK_EVENTS.mirror.1.1.1.0.0"
	const evt, dlq, replayed, kv = "clerk.evt.clerk.user.created.user_1", "clerk.dlq.mirror.clerk.user.created.user_1", "clerk.replay.mirror.clerk.user.created.user_1", "$KV.CLERK_LEASES.sweep"
	without := func(list []string, names ...string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(names, s) })
	}
	for user, subjects := range map[string][]string{
		"ingest":     slices.Concat(reading, destroying, []string{purge, ack, dlq, replayed, kv, api + "STREAM.INFO.CLERK_EVENTS", api + "INFO"}),
		"worker":     slices.Concat(without(reading, api+"DIRECT.GET.CLERK_EVENTS", api+"CONSUMER.MSG.NEXT.CLERK_EVENTS.mirror"), destroying, []string{evt, replayed, kv}),
		"reconciler": slices.Concat(without(reading, api+"DIRECT.GET.CLERK_EVENTS"), destroying, []string{purge, ack, dlq, replayed}),
		"console":    slices.Concat(without(reading, api+"DIRECT.GET.CLERK_EVENTS"), destroying, []string{purge, ack, dlq, replayed, kv}),
		"setup": slices.Concat(without(reading, api+"CONSUMER.CREATE.CLERK_EVENTS.spy"),
			without(destroying, api+"STREAM.UPDATE.CLERK_EVENTS", api+"CONSUMER.RESET.CLERK_EVENTS.mirror", api+"CONSUMER.CREATE.CLERK_EVENTS.mirror"), []string{purge, ack, evt, dlq, replayed, kv}),
		"operator": slices.Concat(without(reading, api+"DIRECT.GET.CLERK_EVENTS", api+"CONSUMER.CREATE.CLERK_EVENTS.spy"), destroying, []string{purge, ack, dlq}),
	} {
		nc, _ := s.connect(user)
		for _, subject := range subjects {
			require.NoError(t, nc.Publish(subject, nil))
			require.NoError(t, nc.Flush())
			require.ErrorIs(t, nc.LastError(), nats.ErrPermissionViolation, "%s publishes to %s", user, subject)
			require.Contains(t, nc.LastError().Error(), strconv.Quote(subject), user)
		}
		for _, subject := range []string{">", "clerk.>", "clerk.evt.>", "_INBOX.>", "_INBOX_other.>", "$JS.API.>", "$KV.>", "$SYS.>"} {
			_, err := nc.SubscribeSync(subject)
			require.NoError(t, err)
			require.NoError(t, nc.Flush())
			require.Contains(t, nc.LastError().Error(), strconv.Quote(subject), "%s subscribes to", user)
		}
	}
	_, js := s.connect("worker")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	events, err := js.Stream(ctx, stream.Events)
	require.NoError(t, err)
	before := events.CachedInfo().State.Msgs
	require.Positive(t, before)
	// Nor can ingest have the broker do it, which answers to whatever subject a message names.
	nc, publisher := s.connect("ingest")
	for _, subject := range slices.Concat(reading, destroying, []string{purge, ack}) {
		require.NoError(t, nc.PublishRequest(evt, subject, []byte("{}")))
	}
	_, err = publisher.Publish(ctx, evt, []byte("{}"))
	require.NoError(t, err)
	require.NoError(t, events.Purge(ctx, jetstream.WithPurgeSequence(2)), "the worker removes what is past its retention")
	info, err := events.Info(ctx)
	require.NoError(t, err)
	assert.Equal(t, before, info.State.Msgs, "one event was stored, and one removed")
	consumer, err := js.Consumer(ctx, stream.Events, "mirror")
	require.NoError(t, err)
	assert.EqualValues(t, 1, consumer.CachedInfo().NumPending, "the consumer is as it was")
	letters, err := js.Stream(ctx, stream.DeadLetters)
	require.NoError(t, err)
	err = letters.DeleteMsg(ctx, 1) // it is gone already
	require.ErrorIs(t, err, jetstream.ErrMsgDeleteUnsuccessful, "the worker may ask for it")
}
