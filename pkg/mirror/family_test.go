package mirror_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
)

const at = int64(1_768_471_200_000)

// world is a user, an organization, and every kind of child they have, as events of the time at.
func world(t testing.TB) []event.Event {
	t.Helper()
	organization := map[string]any{"id": "org_1", "name": "Acme", "updated_at": at}
	return []event.Event{
		decode(t, "msg_user", bodyOf(t, "user.created", at, map[string]any{"id": "user_1", "updated_at": at})),
		decode(t, "msg_org", bodyOf(t, "organization.created", at, organization)),
		decode(t, "msg_mem", bodyOf(t, "organizationMembership.created", at, map[string]any{"id": "orgmem_1", "updated_at": at, "organization": organization, "public_user_data": map[string]any{"user_id": "user_1"}})),
		decode(t, "msg_inv", bodyOf(t, "organizationInvitation.created", at, map[string]any{"id": "orginv_1", "updated_at": at, "organization_id": "org_1"})),
		decode(t, "msg_dmn", bodyOf(t, "organizationDomain.created", at, map[string]any{"id": "orgdmn_1", "updated_at": at, "organization_id": "org_1"})),
		decode(t, "msg_sess", bodyOf(t, "session.created", at, map[string]any{"id": "sess_1", "updated_at": at, "user_id": "user_1", "status": "active"})),
	}
}

func gone(t testing.TB, resource, id string, when int64) event.Event {
	t.Helper()
	return decode(t, "msg_gone_"+id+strconv.FormatInt(when, 10), bodyOf(t, resource+".deleted", when, map[string]any{"id": id, "deleted": true}))
}

func back(t testing.TB, resource, id string, when int64) event.Event {
	t.Helper()
	return decode(t, "msg_back_"+id, bodyOf(t, resource+".updated", when, map[string]any{"id": id, "updated_at": when}))
}

// family are the children and with whom each was deleted: "-" for one that lives, "self".
func family(t testing.TB, db *gorm.DB) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, table := range []string{"organization_memberships", "organization_invitations", "organization_domains", "sessions"} {
		var rows []struct{ ID, Fate string }
		require.NoError(t, db.Raw("SELECT id, CASE WHEN deleted_at IS NULL THEN '-' ELSE COALESCE(deleted_with, 'self') END AS fate FROM "+table).Scan(&rows).Error)
		for _, r := range rows {
			found[r.ID] = r.Fate
		}
	}
	return found
}

func TestChildrenAreDeletedWithTheirParentInAnyOrder(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		events []event.Event
		want   map[string]string
	}{
		"the organization":                    {[]event.Event{gone(t, "organization", "org_1", at+10)}, map[string]string{"orgmem_1": "org_1", "orginv_1": "org_1", "orgdmn_1": "org_1", "sess_1": "-"}},
		"the user":                            {[]event.Event{gone(t, "user", "user_1", at+10)}, map[string]string{"orgmem_1": "user_1", "orginv_1": "-", "orgdmn_1": "-", "sess_1": "user_1"}},
		"both":                                {[]event.Event{gone(t, "user", "user_1", at+10), gone(t, "organization", "org_1", at+20)}, map[string]string{"orgmem_1": "org_1", "orginv_1": "org_1", "orgdmn_1": "org_1", "sess_1": "user_1"}},
		"both, and one returns":               {[]event.Event{gone(t, "user", "user_1", at+10), gone(t, "organization", "org_1", at+20), back(t, "organization", "org_1", at+30)}, map[string]string{"orgmem_1": "user_1", "orginv_1": "-", "orgdmn_1": "-", "sess_1": "user_1"}},
		"a child that deletes itself too":     {[]event.Event{gone(t, "organization", "org_1", at+10), gone(t, "organizationMembership", "orgmem_1", at+5), back(t, "organization", "org_1", at+30)}, map[string]string{"orgmem_1": "self", "orginv_1": "-", "orgdmn_1": "-", "sess_1": "-"}},
		"a child that changes after the fact": {[]event.Event{gone(t, "user", "user_1", at+10), decode(t, "msg_late", bodyOf(t, "session.removed", at+50, map[string]any{"id": "sess_1", "updated_at": at + 50, "user_id": "user_1", "status": "removed"}))}, map[string]string{"orgmem_1": "user_1", "orginv_1": "-", "orgdmn_1": "-", "sess_1": "user_1"}},
		"a child that moves away":             {[]event.Event{gone(t, "organization", "org_1", at+10), decode(t, "msg_late", bodyOf(t, "organizationDomain.updated", at+50, map[string]any{"id": "orgdmn_1", "updated_at": at + 50, "organization_id": "org_2"}))}, map[string]string{"orgmem_1": "org_1", "orginv_1": "org_1", "orgdmn_1": "-", "sess_1": "-"}},
		"two deletes of one":                  {[]event.Event{gone(t, "user", "user_1", at+10), gone(t, "user", "user_1", at+20)}, map[string]string{"orgmem_1": "user_1", "orginv_1": "-", "orgdmn_1": "-", "sess_1": "user_1"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
				events := append(world(t), test.events...)
				want := ""
				for seed := range uint64(12) { // the property test has the many
					random := rand.New(rand.NewPCG(seed, 0))
					shuffled := slices.Clone(events)
					if seed > 0 {
						random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
					}
					tx := db.Begin()
					require.NoError(t, tx.Error)
					for len(shuffled) > 0 {
						n := 1 + random.IntN(len(shuffled))
						require.NoError(t, applyTo(t.Context(), tx, shuffled[:n]...))
						shuffled = shuffled[n:]
					}
					require.Equal(t, test.want, family(t, tx), "seed %d", seed)
					rows := dump(t, tx)
					if want == "" {
						want = rows
					}
					require.Equal(t, want, rows, "seed %d", seed)
					require.NoError(t, tx.Rollback().Error)
				}
			})
		})
	}
}

func TestTheChildrenOfAnotherSourceStay(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		apply(t, db, world(t)[3])
		other := gone(t, "organization", "org_1", at+10)
		other.Source = "other"
		apply(t, db, other)
		late := world(t)[4]
		apply(t, db, late)
		assert.Equal(t, map[string]string{"orginv_1": "-", "orgdmn_1": "-"}, family(t, db))
	})
}

// TestAChildAndTheDeleteOfItsParentAtOnce has many transactions of both kinds at the same time: whoever comes second sees the first.
func TestAChildAndTheDeleteOfItsParentAtOnce(t *testing.T) {
	t.Parallel()
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		const families = 40
		var all sync.WaitGroup
		run := func(e event.Event) {
			all.Go(func() { assert.NoError(t, tryApply(t.Context(), db, e)) })
		}
		for i := range families {
			user := fmt.Sprintf("user_%d", i)
			run(decode(t, "msg_s"+user, bodyOf(t, "session.created", at, map[string]any{"id": "sess_" + user, "updated_at": at, "user_id": user, "status": "active"})))
			run(gone(t, "user", user, at+10))
			run(decode(t, "msg_m"+user, bodyOf(t, "organizationMembership.created", at, map[string]any{"id": "orgmem_" + user, "updated_at": at, "public_user_data": map[string]any{"user_id": user}})))
			if i%2 == 0 {
				run(back(t, "user", user, at+20))
			}
		}
		all.Wait()
		fates := family(t, db)
		for i := range families {
			user := fmt.Sprintf("user_%d", i)
			want := user
			if i%2 == 0 {
				want = "-"
			}
			assert.Equal(t, want, fates["sess_"+user])
			assert.Equal(t, want, fates["orgmem_"+user])
		}
	})
}

// TestAParentThatIsBeingDeletedHoldsUpItsOwnChildrenOnly has the delete of an organization in an open transaction, as one of very many children is
// for long.
func TestAParentThatIsBeingDeletedHoldsUpItsOwnChildrenOnly(t *testing.T) {
	t.Parallel()
	db := dbtest.Postgres(t)
	apply(t, db, world(t)...)
	member := func(id, organization, user string) event.Event {
		return decode(t, "msg_"+id, bodyOf(t, "organizationMembership.created", at, map[string]any{
			"id": id, "updated_at": at, "organization": map[string]any{"id": organization, "updated_at": at}, "public_user_data": map[string]any{"user_id": user},
		}))
	}
	session := func(id, user string) event.Event {
		return decode(t, "msg_"+id, bodyOf(t, "session.created", at, map[string]any{"id": id, "updated_at": at, "user_id": user, "status": "active"}))
	}
	locked := func(events ...event.Event) error {
		return database.InTx(t.Context(), db, func(tx *gorm.DB) error {
			if err := tx.Exec("SET LOCAL lock_timeout = '250ms'").Error; err != nil {
				return err
			}
			_, err := mirror.Apply(t.Context(), tx, events)
			return err
		})
	}
	var many []event.Event
	for i := range 200 {
		many = append(many, session(fmt.Sprintf("sess_many_%d", i), fmt.Sprintf("user_many_%d", i)))
	}
	invited := decode(t, "msg_late", bodyOf(t, "organizationInvitation.created", at, map[string]any{"id": "orginv_late", "updated_at": at, "organization_id": "org_1"}))
	require.NoError(t, database.InTx(t.Context(), db, func(tx *gorm.DB) error {
		_, err := mirror.Apply(t.Context(), tx, []event.Event{gone(t, "organization", "org_1", at+10)})
		require.NoError(t, err)
		require.NoError(t, locked(member("orgmem_2", "org_2", "user_1"), session("sess_2", "user_1")), "children of other parents")
		require.ErrorContains(t, locked(invited), "lock families", "its own child")
		require.ErrorContains(t, locked(many...), "lock families", "more parents than single locks are taken for")
		return nil
	}))
	require.NoError(t, locked(append(many, invited)...))
	fates := family(t, db)
	assert.Equal(t, "org_1", fates["orginv_late"])
	assert.Equal(t, "-", fates["orgmem_2"])
	assert.Equal(t, "-", fates["sess_many_199"])

	t.Run("many parents at once hold up children of each", func(t *testing.T) {
		var all []event.Event
		for i := range 200 {
			all = append(all, gone(t, "user", fmt.Sprintf("user_many_%d", i), at+10))
		}
		require.NoError(t, database.InTx(t.Context(), db, func(tx *gorm.DB) error {
			_, err := mirror.Apply(t.Context(), tx, all)
			require.NoError(t, err)
			require.ErrorContains(t, locked(session("sess_late", "user_many_7")), "lock families")
			return nil
		}))
		require.NoError(t, locked(session("sess_late", "user_many_7")))
		assert.Equal(t, "user_many_7", family(t, db)["sess_late"])
	})
}

func TestEffects(t *testing.T) {
	t.Parallel()
	user := func(id, verb string, updated int64, extra ...any) event.Event {
		data := map[string]any{"id": "user_1", "object": "user", "updated_at": updated}
		for i := 0; i < len(extra); i += 2 {
			data[extra[i].(string)] = extra[i+1]
		}
		return decode(t, id, bodyOf(t, "user."+verb, updated, data))
	}
	session := decode(t, "msg_s", bodyOf(t, "session.created", at, map[string]any{"id": "sess_1", "updated_at": at, "status": "active", "user": map[string]any{"id": "user_2", "updated_at": at}}))
	older := decode(t, "msg_o", bodyOf(t, "session.created", at, map[string]any{"id": "sess_1", "updated_at": at - 1, "status": "active", "user": map[string]any{"id": "user_3", "updated_at": at}}))
	effects := func(of ...event.Effect) []event.Effect { return of }
	for name, test := range map[string]struct {
		batches [][]event.Event
		want    []event.Effect // of the last
	}{
		"new":                           {[][]event.Event{{user("msg_1", "created", at)}}, effects(event.EffectApplied)},
		"newer":                         {[][]event.Event{{user("msg_1", "created", at)}, {user("msg_2", "updated", at+1)}}, effects(event.EffectApplied)},
		"older":                         {[][]event.Event{{user("msg_2", "updated", at+1)}, {user("msg_1", "created", at)}}, effects(event.EffectOlder)},
		"older in the batch":            {[][]event.Event{{user("msg_2", "updated", at+1), user("msg_1", "created", at)}}, effects(event.EffectApplied, event.EffectOlder)},
		"the same again":                {[][]event.Event{{user("msg_1", "created", at)}, {user("msg_1", "created", at)}}, effects(event.EffectUnchanged)},
		"the same from another":         {[][]event.Event{{user("msg_2", "created", at)}, {user("msg_1", "created", at)}}, effects(event.EffectUnchanged)},
		"a delete":                      {[][]event.Event{{user("msg_1", "created", at)}, {gone(t, "user", "user_1", at+1)}}, effects(event.EffectDeleted)},
		"older than a delete":           {[][]event.Event{{gone(t, "user", "user_1", at+1)}, {user("msg_1", "created", at)}}, effects(event.EffectOlder)},
		"a child of the deleted":        {[][]event.Event{{gone(t, "user", "user_1", at+1)}, {world(t)[5]}}, effects(event.EffectDeleted)},
		"a new verb":                    {[][]event.Event{{user("msg_1", "created", at)}, {user("msg_2", "banned", at+1, "banned", true)}}, effects(event.EffectApplied)},
		"an old object of a new verb":   {[][]event.Event{{user("msg_1", "created", at)}, {user("msg_2", "banned", at-1)}}, effects(event.EffectOlder)},
		"a new verb with another thing": {[][]event.Event{{user("msg_1", "noticed", at, "object", "notice")}}, effects(event.EffectUnknownType)},
		"a new verb with a part":        {[][]event.Event{{decode(t, "msg_1", bodyOf(t, "user.noticed", at, map[string]any{"id": "user_1", "object": "user"}))}}, effects(event.EffectUnknownType)},
		"a new verb with a part, no id": {[][]event.Event{{decode(t, "msg_1", bodyOf(t, "user.noticed", at, map[string]any{"object": "user", "updated_at": at}))}}, effects(event.EffectUnknownType)},
		"a new resource":                {[][]event.Event{{decode(t, "msg_1", bodyOf(t, "robot.built", at, map[string]any{"id": "robot_1", "object": "robot", "updated_at": at}))}}, effects(event.EffectUnknownType)},
		"a mail":                        {[][]event.Event{{decode(t, "msg_1", bodyOf(t, "email.created", at, map[string]any{"id": "ema_1"}))}}, effects(event.EffectUnchanged)},
		"only a stub":                   {[][]event.Event{{session}, {older}}, effects(event.EffectStub)},
		"neither row nor stub":          {[][]event.Event{{session}, {older}, {older}}, effects(event.EffectOlder)},
		"many at once":                  {[][]event.Event{{session}, {older, user("msg_1", "created", at), gone(t, "user", "user_9", at)}}, effects(event.EffectStub, event.EffectApplied, event.EffectDeleted)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
				var got []event.Effect
				for _, batch := range test.batches {
					got = effectsOf(t, db, batch...)
					time.Sleep(time.Until(time.Now().Truncate(time.Millisecond).Add(time.Millisecond))) // synced_at has ms
				}
				assert.Equal(t, test.want, got)
			})
		})
	}
}

func TestATimeFarAheadDoesNotPinARow(t *testing.T) {
	t.Parallel()
	const years = 10 * 365 * 86_400_000
	dbtest.Each(t, func(t *testing.T, db *gorm.DB) {
		pin := decode(t, "msg_1", bodyOf(t, "user.updated", at+years, map[string]any{"id": "user_1", "updated_at": at + years, "first_name": "ahead"}))
		bury := gone(t, "user", "user_2", at+years)
		apply(t, db, pin, bury)
		var seen []string
		for _, id := range []string{"user_1", "user_2"} {
			e := decode(t, "msg_"+id, bodyOf(t, "user.updated", pin.ReceivedAt.UnixMilli()+1, map[string]any{"id": id, "updated_at": pin.ReceivedAt.UnixMilli() + 1, "first_name": "true"}))
			e.ReceivedAt = e.ReceivedAt.Add(time.Minute)
			apply(t, db, e)
		}
		require.NoError(t, db.Raw("SELECT first_name FROM users WHERE deleted_at IS NULL ORDER BY id").Scan(&seen).Error)
		assert.Equal(t, []string{"true", "true"}, seen)
	})
}

// BenchmarkDeleteParent deletes an organization of 50,000 members in one transaction; events/s counts children.
func BenchmarkDeleteParent(b *testing.B) {
	const members = 50_000
	eachDatabase(b, func(b *testing.B, db *gorm.DB) {
		when := at
		var spent time.Duration
		for i := 0; i < members; i += batchSize {
			batch := make([]event.Event, batchSize)
			for j := range batch {
				batch[j] = decode(b, fmt.Sprintf("msg_%d", i+j), bodyOf(b, "organizationMembership.created", at, map[string]any{
					"id": fmt.Sprintf("orgmem_%d", i+j), "updated_at": at, "role": "org:member", "organization": map[string]any{"id": "org_1", "updated_at": at},
					"public_user_data": map[string]any{"user_id": fmt.Sprintf("user_%d", i+j), "first_name": "Ada", "image_url": "https://img.example.com/some/longer/path/of/an/image"},
				}))
			}
			if err := tryApply(b.Context(), db, batch...); err != nil {
				b.Fatal(err)
			}
		}
		if database.IsPostgres(db) {
			require.NoError(b, db.Exec("VACUUM ANALYZE organization_memberships").Error)
		}
		for b.Loop() {
			when++
			started := time.Now()
			if err := tryApply(b.Context(), db, gone(b, "organization", "org_1", when)); err != nil {
				b.Fatal(err)
			}
			spent += time.Since(started)
		}
		b.ReportMetric(float64(members*b.N)/spent.Seconds(), "children/s")
		b.ReportMetric(spent.Seconds()/float64(b.N), "s/delete")
	})
}
