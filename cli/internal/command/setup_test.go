package command

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

func TestSetupPlansThenCreatesThenFindsNothingToDo(t *testing.T) {
	t.Parallel()
	each := func(t *testing.T, url string) {
		t.Helper()
		srv := natstest.New(t)
		h := newHarness(t, "USHER_NATS_URL="+srv.URL(), "USHER_DATABASE_URL="+url)

		plan := into[allinone.SetupReport](h.Run("setup", "--plan", "--output", "json").want(exitOK))
		assert.NotEmpty(t, plan.Migrations.Pending)
		assert.Empty(t, plan.Migrations.Applied)
		assert.Equal(t, []string{"stream CLERK_EVENTS", "stream CLERK_DLQ", "bucket CLERK_LEASES", "consumer mirror"}, plan.Streams.Missing)
		assert.Empty(t, plan.Streams.Created)
		_, js := srv.Connect()
		_, err := js.Stream(t.Context(), stream.Events)
		require.Error(t, err, "a plan creates nothing")
		if path, ok := strings.CutPrefix(url, "sqlite:"); ok {
			assert.NoFileExists(t, path)
		}

		text := h.Run("setup", "--plan").want(exitOK).out
		assert.Contains(t, text, "would be applied")
		assert.Regexp(t, `consumer mirror +would create`, text)
		assert.Contains(t, text, "Nothing was changed")

		done := into[allinone.SetupReport](h.Run("setup", "--output", "json").want(exitOK))
		assert.Equal(t, plan.Migrations.Pending, done.Migrations.Applied)
		assert.Empty(t, done.Migrations.Pending)
		assert.Equal(t, plan.Streams.Missing, done.Streams.Created)
		assert.Empty(t, done.Streams.Missing)
		require.NoError(t, database.CheckMigrated(t.Context(), openDatabase(t, url)))

		again := h.Run("setup").want(exitOK).out
		assert.Regexp(t, `migrations +all applied before`, again)
		assert.Regexp(t, `stream CLERK_EVENTS +present`, again)
		assert.NotContains(t, again, "created")
	}
	for name, empty := range map[string]func(testing.TB) string{"sqlite": dbtest.EmptySQLiteURL, "postgres": dbtest.EmptyPostgresURL} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			each(t, empty(t))
		})
	}
}

func TestSetupAsksWhetherTheBrokerSyncs(t *testing.T) {
	t.Parallel()
	monitored := func(o *server.Options) { o.HTTPHost, o.HTTPPort = "127.0.0.1", server.RANDOM_PORT }
	lazy, always := natstest.New(t, monitored), natstest.New(t, monitored, natstest.WithSync)
	on := func(srv *natstest.Server, env ...string) *harness {
		return newHarness(t, append(env, "USHER_NATS_URL="+srv.URL(), "USHER_DATABASE_URL=sqlite:"+filepath.Join(t.TempDir(), "usher.db"))...)
	}
	monitor := func(srv *natstest.Server) string {
		return "USHER_NATS_MONITOR_URL=http://" + srv.Server().MonitorAddr().String()
	}

	unknown := on(lazy).Run("setup", "--plan", "--output", "json").want(exitOK)
	assert.Equal(t, stream.Unknown, into[allinone.SetupReport](unknown).Broker.State)
	for _, want := range []string{"NOT VERIFIED", "sync_interval: always", "USHER_NATS_MONITOR_URL"} {
		assert.Contains(t, unknown.err, want)
	}

	h := on(lazy, monitor(lazy))
	plan := h.Run("setup", "--plan", "--output", "json").want(exitOK)
	assert.Equal(t, stream.Unsynced, into[allinone.SetupReport](plan).Broker.State)
	assert.Contains(t, plan.err, "DOES NOT SYNC")
	refused := h.Run("setup").want(exitUsage)
	assert.Contains(t, refused.err, "USHER_ALLOW_UNSYNCED_BROKER")
	_, js := lazy.Connect()
	_, err := js.Stream(t.Context(), stream.Events)
	require.ErrorIs(t, err, jetstream.ErrStreamNotFound, "nothing was created")
	serve := h.with("CLERK_WEBHOOK_SIGNING_SECRET="+stagingSecret, "USHER_INGEST_ADDR=127.0.0.1:0", "USHER_CONSOLE_ADDR=127.0.0.1:0", "USHER_OPS_ADDR=127.0.0.1:0").Run("serve").want(exitUsage)
	assert.Contains(t, serve.err, "USHER_ALLOW_UNSYNCED_BROKER")
	allowed := h.with("USHER_ALLOW_UNSYNCED_BROKER=true").Run("setup").want(exitOK)
	assert.Regexp(t, `durability of the broker +unsynced`, allowed.out)

	synced := on(always, monitor(always)).Run("setup").want(exitOK)
	assert.Regexp(t, `durability of the broker +synced`, synced.out)
	assert.NotContains(t, synced.err, "SYNC")
}

func TestSetupReportsDifferencesAndChangesNothing(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	h := newHarness(t, "USHER_NATS_URL="+srv.URL(), "USHER_DATABASE_URL=sqlite:"+filepath.Join(t.TempDir(), "usher.db"))
	h.Run("setup").want(exitOK)

	r := h.Run("setup", "--stream-max-bytes", "2GiB").want(exitNo)
	assert.Regexp(t, `stream CLERK_EVENTS +max_bytes +1073741824 +2147483648`, r.out)
	assert.Regexp(t, `stream CLERK_EVENTS +present, differs`, r.out)
	assert.Contains(t, r.err, "were not changed")
	report := into[allinone.SetupReport](h.Run("setup", "--stream-max-bytes", "2GiB", "-o", "json").want(exitNo))
	require.Len(t, report.Streams.Differences, 2)
	assert.Equal(t, stream.Difference{
		Object: "stream CLERK_EVENTS", Field: "max_bytes", Have: "1073741824", Want: "2147483648", Fix: "run `usher setup --apply`",
	}, report.Streams.Differences[0])
	h.Run("setup", "--plan", "--stream-max-bytes", "2GiB").want(exitOK)
	h.Run("setup").want(exitOK)
}

// TestSetupFindsWhatLosesEventsAndApplyEndsIt: most of these are zero where Usher made the object.
func TestSetupFindsWhatLosesEventsAndApplyEndsIt(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	_, js := srv.Connect()
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: stream.Events, Subjects: []string{"clerk.evt.>"}, MaxAge: time.Hour, MaxMsgsPerSubject: 1, Duplicates: time.Hour,
	})
	require.NoError(t, err)
	_, err = js.CreateConsumer(t.Context(), stream.Events, jetstream.ConsumerConfig{
		Durable: "mirror", AckPolicy: jetstream.AckAllPolicy, HeadersOnly: true, DeliverPolicy: jetstream.DeliverNewPolicy,
	})
	require.NoError(t, err)
	h := newHarness(t, "USHER_NATS_URL="+srv.URL(), "USHER_DATABASE_URL=sqlite:"+filepath.Join(t.TempDir(), "usher.db"))

	for _, args := range [][]string{{"setup", "--plan"}, {"setup"}} {
		r := h.Run(args...)
		for _, line := range []string{
			`stream CLERK_EVENTS +max_age +1h0m0s +unlimited +yes`, `stream CLERK_EVENTS +max_msgs_per_subject +1 +unlimited +yes`,
			`stream CLERK_EVENTS +discard +DiscardOld +DiscardNew +yes`, `stream CLERK_EVENTS +subjects .* yes`,
			`consumer mirror +headers_only +true +false +yes`, `consumer mirror +ack_policy +AckAll +AckExplicit +yes`,
			`consumer mirror +deliver_policy +new +all +yes`,
		} {
			assert.Regexp(t, line, r.out)
		}
		assert.Contains(t, r.err, "keep the services from being ready")
	}
	h.Run("setup", "--plan", "--apply").want(exitUsage)

	r := h.Run("setup", "--apply").want(exitNo)
	assert.Regexp(t, `stream CLERK_EVENTS +changed: max_age was 1h0m0s, is unlimited`, r.out)
	assert.Contains(t, r.out, "`nats consumer rm CLERK_EVENTS mirror`, `usher setup`")
	report := into[allinone.SetupReport](h.Run("setup", "--output", "json").want(exitNo))
	require.Len(t, report.Streams.Differences, 2)
	assert.Equal(t, "deliver_policy", report.Streams.Differences[0].Field)
	assert.Equal(t, "ack_policy", report.Streams.Differences[1].Field)

	require.NoError(t, js.DeleteConsumer(t.Context(), stream.Events, "mirror"))
	h.Run("setup").want(exitOK)
	h.Run("setup", "--apply").want(exitOK)
}

func TestSetupThatCannotCheckIsWrongUse(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	for name, test := range map[string]struct {
		env  []string
		says string
	}{
		"nothing runs":       {nil, "no running `usher dev` or `usher serve`"},
		"broker away":        {[]string{"USHER_NATS_URL=nats://joe:hunter2@127.0.0.1:1"}, "no broker answers at 127.0.0.1:1"},
		"broker's URL wrong": {[]string{"USHER_NATS_URL=nats://joe:hun%zzter2@127.0.0.1:1"}, "USHER_NATS_URL: not nats://host:port"},
		"database away":      {[]string{"USHER_NATS_URL=" + srv.URL(), "USHER_DATABASE_URL=postgres://joe:hunter2@127.0.0.1:1/x"}, "no PostgreSQL answers"},
		"broker too small":   {[]string{"USHER_NATS_URL=" + srv.URL(), "USHER_STREAM_MAX_BYTES=1TiB"}, "USHER_STREAM_MAX_BYTES"},
		"database unusable":  {[]string{"USHER_NATS_URL=" + srv.URL(), "USHER_DATABASE_URL=sqlite:" + file + "/usher.db"}, file},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newHarness(t, test.env...).Run("setup").want(exitUsage)
			assert.Contains(t, r.err, test.says)
			assert.Empty(t, r.out)
			assert.NotContains(t, r.err, "hunter2")
			assert.NotContains(t, r.err, "zzter2")
		})
	}
}

func TestSetupNamesForeignKeysOfOthers(t *testing.T) {
	t.Parallel()
	srv, url := natstest.New(t), dbtest.PostgresURL(t)
	h := newHarness(t, "USHER_NATS_URL="+srv.URL(), "USHER_DATABASE_URL="+url)
	report := into[allinone.SetupReport](h.Run("setup", "-o", "json").want(exitOK))
	assert.NotNil(t, report.ForeignKeys)
	assert.Empty(t, report.ForeignKeys)

	db := openDatabase(t, url)
	require.NoError(t, db.Exec(`CREATE TABLE public."Post" (id text PRIMARY KEY, author text CONSTRAINT "Post_author_fkey" REFERENCES users (id))`).Error)
	outside := h.Run("setup").want(exitOK)
	assert.Regexp(t, `foreign key Post_author_fkey of public."Post" +in the way of the application`, outside.out)
	assert.Contains(t, outside.err, `keep the id in a plain column: ALTER TABLE public."Post" DROP CONSTRAINT "Post_author_fkey"`)

	require.NoError(t, db.Exec("ALTER TABLE sessions ADD CONSTRAINT sessions_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id)").Error)
	plan := h.Run("setup", "--plan").want(exitOK)
	assert.Regexp(t, `foreign key sessions_user_id_fkey of usher.sessions +in the way of events`, plan.out)
	assert.Contains(t, plan.err, "ALTER TABLE usher.sessions DROP CONSTRAINT sessions_user_id_fkey")
	report = into[allinone.SetupReport](h.Run("setup", "--apply", "-o", "json").want(exitNo))
	require.Len(t, report.ForeignKeys, 2)
	assert.True(t, report.ForeignKeys[0].Fatal)
	require.NoError(t, db.Exec("ALTER TABLE usher.sessions DROP CONSTRAINT sessions_user_id_fkey").Error)
	h.Run("setup").want(exitOK)
}
