package outbox_test

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/outbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, dbtest.IgnoreLeaks()...) }

func rows(t *testing.T, db *gorm.DB) []outbox.Notification {
	t.Helper()
	var all []outbox.Notification
	require.NoError(t, db.Order("created_at, channel").Find(&all).Error)
	return all
}

func TestEffectIsEnqueuedOnceOnEachChannel(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		n := outbox.Notification{EffectKey: "welcome/user_1", Kind: "welcome", Channel: outbox.Email, Recipient: "a@example.com", Subject: "Welcome", Body: "Hello", UserID: "user_1"}
		for i := range 3 {
			err := database.InTx(t.Context(), db, func(tx *gorm.DB) error {
				is, err := outbox.Enqueue(tx, n)
				assert.Equal(t, i == 0, is)
				return err
			})
			require.NoError(t, err)
		}
		n.Channel = outbox.Slack
		is, err := outbox.Enqueue(db, n)
		require.NoError(t, err)
		assert.True(t, is)
		all := rows(t, db)
		require.Len(t, all, 2)
		assert.Equal(t, outbox.Pending, all[0].Status)
		assert.Equal(t, "Hello", all[0].Body)
		assert.NotEmpty(t, all[0].ID)
	})
}

func TestWhatIsRolledBackWasNeverEnqueued(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		broken := errors.New("the cause did not happen")
		n := outbox.Notification{EffectKey: "k", Kind: "welcome", Channel: outbox.Email, Subject: "s", Body: "b"}
		err := database.InTx(t.Context(), db, func(tx *gorm.DB) error {
			_, err := outbox.Enqueue(tx, n)
			require.NoError(t, err)
			return broken
		})
		require.ErrorIs(t, err, broken)
		assert.Empty(t, rows(t, db))
	})
}

func TestAlertGoesWhereTheSettingsHaveAReceiver(t *testing.T) {
	t.Parallel()
	type row struct {
		channel   outbox.Channel
		recipient string
		status    outbox.Status
	}
	const ops = "ops@example.com"
	for name, c := range map[string]struct {
		alerts outbox.Alerts
		want   []row
	}{
		"Nothing":          {outbox.Alerts{}, []row{{outbox.Email, "", outbox.Suppressed}}},
		"Receiver":         {outbox.Alerts{Email: ops}, []row{{outbox.Email, ops, outbox.Suppressed}}},
		"Server":           {outbox.Alerts{Mail: true}, []row{{outbox.Email, "", outbox.Suppressed}}},
		"Mail":             {outbox.Alerts{Mail: true, Email: ops}, []row{{outbox.Email, ops, outbox.Pending}}},
		"Slack":            {outbox.Alerts{Slack: true, Mail: true}, []row{{outbox.Slack, "", outbox.Pending}}},
		"Both":             {outbox.Alerts{Slack: true, Mail: true, Email: ops}, []row{{outbox.Email, ops, outbox.Pending}, {outbox.Slack, "", outbox.Pending}}},
		"ReceiverAndSlack": {outbox.Alerts{Slack: true, Email: ops}, []row{{outbox.Email, ops, outbox.Suppressed}, {outbox.Slack, "", outbox.Pending}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := dbtest.SQLite(t)
			for i := range 2 {
				is, err := c.alerts.Enqueue(db, outbox.Notification{EffectKey: "silence/1", Kind: "silence", Subject: "s", Body: "b"})
				require.NoError(t, err)
				assert.Equal(t, i == 0, is)
			}
			var got []row
			for _, n := range rows(t, db) {
				got = append(got, row{n.Channel, n.Recipient, n.Status})
			}
			assert.ElementsMatch(t, c.want, got)
		})
	}
}
