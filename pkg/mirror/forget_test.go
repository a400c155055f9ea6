package mirror_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/mirror"
)

// TestNoRowNamesWhoIsDeleted has Ada's events of the corpus in many orders, her delete among them, and what another user has of the same kind.
func TestNoRowNamesWhoIsDeleted(t *testing.T) {
	t.Parallel()
	const ada, bob = "user_38HzI2pYfb8qPaRGOtjol4SEChQ", "user_36vFaO1pD0GYyXkXrkPOJn0zKuT"
	var events []event.Event
	for _, typ := range []string{
		"user.created", "user.updated", "user.deleted", "session.created", "organizationMembership.created",
		"organizationInvitation.created", "organizationInvitation.accepted", "subscription.active", "subscriptionItem.active", "paymentAttempt.created", "paymentAttempt.updated",
	} {
		body, ok := fixture.Event(typ)
		require.True(t, ok, typ)
		events = append(events, decode(t, "msg_"+typ, body))
	}
	bobs := map[string]any{"id": "sess_bob", "user_id": bob, "status": "active", "created_at": at, "updated_at": at, "latest_activity": map[string]any{"ip_address": "198.51.100.7"}}
	events = append(events,
		decode(t, "msg_bob", bodyOf(t, "session.created", at, bobs)),
		decode(t, "msg_invited", bodyOf(t, "organizationInvitation.accepted", at, map[string]any{"id": "orginv_ada", "user_id": ada, "email_address": "ada.lovelace@example.com", "url": "https://x/?ticket=ada", "status": "accepted", "created_at": at, "updated_at": at})),
		decode(t, "msg_theirs", bodyOf(t, "subscription.created", at, map[string]any{"id": "csub_org", "created_at": at, "updated_at": at, "payer": map[string]any{"organization_id": "org_1", "email": "billing@example.org"}})),
	)
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		want := ""
		for seed := range uint64(20) {
			random := rand.New(rand.NewPCG(seed, 0))
			left := slices.Clone(events)
			random.Shuffle(len(left), func(i, j int) { left[i], left[j] = left[j], left[i] })
			tx := db.Begin()
			require.NoError(t, tx.Error)
			for len(left) > 0 {
				n := 1 + random.IntN(min(len(left), 4))
				require.NoError(t, applyTo(t.Context(), tx, left[:n]...))
				left = left[n:]
			}
			rows := dump(t, tx)
			require.NoError(t, tx.Rollback().Error)
			if want == "" {
				want = rows
			}
			require.Equal(t, want, rows, "seed %d", seed)
		}
		for _, name := range []string{"Ada", "Lovelace", "ada.lovelace", "203.0.113.24", "London", "crm-20417", "ticket=ada"} {
			assert.NotContains(t, want, name)
		}
		for _, kept := range []string{
			ada, "bob@example.com", `"Bob"`, "198.51.100.7", "billing@example.org", `country: "GB"`, "inviter_id: \"" + ada, "payer_user_id: \"" + ada, `status: "paid"`, "amount: 2200",
		} {
			assert.Contains(t, want, kept)
		}
	})
}

// TestADeleteThatLosesForgetsWhatWasMadeBefore: the user lives, and what comes later names the user again.
func TestADeleteThatLosesForgetsWhatWasMadeBefore(t *testing.T) {
	t.Parallel()
	session := func(id string, made int64) event.Event {
		return decode(t, "msg_"+id, bodyOf(t, "session.created", made, map[string]any{"id": id, "user_id": "user_1", "status": "active", "created_at": made, "updated_at": made, "latest_activity": map[string]any{"ip_address": "192.0.2.1"}}))
	}
	events := []event.Event{
		session("sess_before", at), gone(t, "user", "user_1", at+10), back(t, "user", "user_1", at+20), session("sess_soon", at+30), session("sess_after", at+31*24*time.Hour.Milliseconds()),
		of("other", session("sess_others", at)),
	}
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		for _, order := range [][]int{{0, 1, 2, 3, 4, 5}, {5, 4, 3, 2, 1, 0}, {2, 3, 0, 4, 5, 1}, {1, 3, 4, 2, 0, 5}} {
			tx := db.Begin()
			require.NoError(t, tx.Error)
			for _, i := range order {
				require.NoError(t, applyTo(t.Context(), tx, events[i]))
			}
			var named []string
			require.NoError(t, tx.Raw("SELECT id FROM sessions WHERE ip_address IS NOT NULL AND deleted_at IS NULL ORDER BY id").Scan(&named).Error)
			assert.Equal(t, []string{"sess_after", "sess_others"}, named, order)
			require.NoError(t, tx.Rollback().Error)
		}
	})
}

// TestForgettingAndNamingAtOnce has transactions of both kinds at the same time: whoever comes second sees the first.
func TestForgettingAndNamingAtOnce(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		var all sync.WaitGroup
		run := func(e event.Event) {
			all.Go(func() { assert.NoError(t, tryApply(t.Context(), db, e)) })
		}
		for i := range 30 {
			user := fmt.Sprintf("user_%d", i)
			run(decode(t, "msg_p"+user, bodyOf(t, "subscription.created", at, map[string]any{"id": "csub_" + user, "updated_at": at, "payer": map[string]any{"user_id": user, "email": "ada@example.com"}})))
			run(gone(t, "user", user, at+10))
			run(decode(t, "msg_i"+user, bodyOf(t, "organizationInvitation.accepted", at, map[string]any{"id": "orginv_" + user, "updated_at": at, "user_id": user, "organization_id": "org_1", "email_address": "ada@example.com"})))
		}
		all.Wait()
		assert.NotContains(t, dump(t, db), "ada@example.com")
	})
}

func TestEveryFormWithoutNames(t *testing.T) {
	t.Parallel()
	for table, test := range map[string][]string{
		"sessions": {`{"id":"s", "user":{"id":"u","x":1},"user":7,"latest_activity":{"city":"x","country":"GB"}}`, `{"id":"s","user":{"id":"u"},"latest_activity":{"country":"GB"}}`},
		"organization_invitations": {
			`{"email_address":"a@b.c","url":null,"public_inviter_data":{"identifier":"x","user_id":"u"}}`,
			`{"url":null,"public_inviter_data":{"identifier":"x","user_id":"u"}}`,
			`{"email_address":"a@b.c","url":null,"public_inviter_data":{"user_id":"u"}}`,
			`{"url":null,"public_inviter_data":{"user_id":"u"}}`,
		},
		"subscriptions": {`{"payer":{"\u0065mail":"x","user_id":"u"}}`, `{"payer":{"user_id":"u"}}`},
		"users":         {`{"first_name": "x"}`},
	} {
		forms := mirror.Nameless(table, test[0])
		assert.Equal(t, test[1:], forms, table)
		if len(forms) > 0 {
			assert.Empty(t, mirror.Nameless(table, forms[len(forms)-1]), table)
		}
	}
}
