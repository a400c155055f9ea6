package e2e

import (
	"context"
	"math/rand/v2"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/client"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/emulator"
)

// beside is `usher serve` beside an emulated Clerk that it may read.
type beside struct {
	*process
	state
	dataDir string
	clerk   *emulator.Clerk
	db      *gorm.DB
}

func serveBeside(t *testing.T, databaseURL string, extra ...string) *beside {
	t.Helper()
	b := &beside{clerk: emulator.New(emulator.Config{Seed: rand.Uint64()})}
	server := httptest.NewServer(b.clerk.API(emulator.APIConfig{Key: "sk_live_e2e"}))
	t.Cleanup(server.Close)
	dataDir := t.TempDir()
	env := append([]string{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_DATA_DIR=" + dataDir, "USHER_DATABASE_URL=" + databaseURL,
		"CLERK_SECRET_KEY=sk_live_e2e", "CLERK_API_URL=" + server.URL + "/v1",
	}, slices.Concat(randomPorts, extra)...)
	b.dataDir = dataDir
	b.process = start(t, env, "serve")
	b.state = b.process.ready(dataDir)
	var err error
	b.db, err = database.Open(t.Context(), databaseURL, "usher")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, database.Close(b.db)) })
	return b
}

type notice struct{ Kind, Status, Subject, Body string }

func (b *beside) notices() []notice {
	b.t.Helper()
	var all []notice
	require.NoError(b.t, b.db.Table("notifications").Order("created_at").Find(&all).Error)
	return all
}

// TestDisabledEndpointRaisesOneAlert lets Clerk's sender disable the endpoint, as Svix does in silence.
func TestDisabledEndpointRaisesOneAlert(t *testing.T) {
	t.Parallel()
	for name, url := range map[string]string{"postgres": dbtest.EmptyPostgresURL(t), "sqlite": "sqlite:" + filepath.Join(t.TempDir(), "usher.db")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := serveBeside(t, url, "USHER_SILENCE_AFTER=3s", "USHER_RECONCILE_INTERVAL=1s", "USHER_ALERT_EMAIL=ops@example.com")
			sender, err := emulator.NewSender(emulator.SenderConfig{URL: b.IngestURL, Secret: secret, Compress: 1000})
			require.NoError(t, err)
			deliver := func(users int) {
				require.NoError(t, sender.Deliver(t.Context(), b.clerk.Story(users)))
			}
			deliver(20)
			quiet := time.Now()
			require.Eventually(t, func() bool { return time.Since(quiet) > 4*time.Second }, 60*time.Second, 50*time.Millisecond)
			assert.Empty(t, b.notices(), "nothing happens at Clerk: no silence")

			sender.Disable()
			disabled := time.Now()
			id, events := b.clerk.SignUp()
			require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
			require.Eventually(t, func() bool { return len(b.notices()) > 0 }, 60*time.Second, 20*time.Millisecond)
			t.Logf("alert %s after the endpoint was disabled; 3 s are set", time.Since(disabled).Round(100*time.Millisecond))
			require.Eventually(t, func() bool {
				var rows int64
				return b.db.Table("users").Where("id = ?", id).Count(&rows).Error == nil && rows == 1
			}, 60*time.Second, 20*time.Millisecond, "the reconciler heals what was missed, although no webhook comes")

			sender.Enable()
			id, events = b.clerk.SignUp()
			require.NoError(t, sender.Deliver(t.Context(), slices.Values(events)))
			require.Eventually(t, func() bool { return len(b.notices()) > 1 }, 60*time.Second, 20*time.Millisecond)
			looked := time.Now()
			require.Eventually(t, func() bool { return time.Since(looked) > 2*time.Second }, 60*time.Second, 50*time.Millisecond)
			got := b.notices()
			require.Len(t, got, 2, "one alert, one notice of its end")
			assert.Equal(t, "silence", got[0].Kind)
			assert.Equal(t, "suppressed", got[0].Status, "no mail server is set")
			assert.Contains(t, got[0].Body, "usher portal --from ")
			assert.NotContains(t, got[0].Body, "svix.com", "a link is a credential")
			assert.Contains(t, got[0].Body, "since then: 1.")
			assert.Equal(t, "silence_over", got[1].Kind)
			assert.NotEmpty(t, id)
			assert.Equal(t, 0, b.stop(), b.stderr.String())
			assert.NotContains(t, b.stderr.String(), "#key=", "the link is a credential")
			assert.Equal(t, 1, strings.Count(b.stderr.String(), "no webhook comes"))
		})
	}
}

// TestUserIsThereBeforeTheWebhook is what an application does after a sign-up.
func TestUserIsThereBeforeTheWebhook(t *testing.T) {
	t.Parallel()
	b := serveBeside(t, dbtest.EmptyPostgresURL(t), "USHER_APP_TOKEN=a-token-for-tests", "USHER_RECONCILE_INTERVAL=1h")
	c, err := client.New(b.ConsoleURL, "a-token-for-tests")
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	// The first sweep of a new mirror takes what is there; those who come after it are nobody's but theirs.
	require.Eventually(t, func() bool {
		var n int64
		return b.db.Table("reconcile_runs").Where("status = 'succeeded'").Count(&n).Error == nil && n > 0
	}, 60*time.Second, 20*time.Millisecond)
	id, events := b.clerk.SignUp()
	began := time.Now()
	user, err := c.EnsureUser(ctx, id, 100*time.Millisecond)
	require.NoError(t, err)
	t.Logf("the row was there after %s, of which 100 ms were given to the webhook", time.Since(began).Round(time.Millisecond))
	assert.Equal(t, id, user.ID)
	assert.Nil(t, user.PrivateMetadata)
	admin, err := client.Local(b.dataDir)
	require.NoError(t, err)
	user, err = admin.EnsureUser(ctx, id, 0, client.PrivateMetadata)
	require.NoError(t, err)
	assert.NotNil(t, user.PrivateMetadata)
	admin.HTTP.CloseIdleConnections()
	var origin string
	require.NoError(t, b.db.Raw("SELECT origin FROM users WHERE id = ?", id).Scan(&origin).Error)
	assert.Equal(t, "reconcile", origin)
	for _, e := range events {
		status, err := send(b.IngestURL, e)
		require.NoError(t, err)
		assert.Equal(t, 202, status)
	}
	_, err = c.EnsureUser(ctx, "user_nobody", 0)
	require.ErrorIs(t, err, client.ErrNotFound)
	wrong, err := client.New(b.ConsoleURL, "another")
	require.NoError(t, err)
	_, err = wrong.EnsureUser(ctx, id, 0)
	require.ErrorIs(t, err, client.ErrUnauthorized)
	c.HTTP.CloseIdleConnections()
	wrong.HTTP.CloseIdleConnections()
}
