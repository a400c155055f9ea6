package clerk_test

import (
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/emulator"
)

func TestATallyTellsOldFromYoung(t *testing.T) {
	t.Parallel()
	story := told(60)
	api := story.API(emulator.APIConfig{})
	c := near(t, api)
	for _, resource := range []string{"users", "organizations", "organization_memberships", "roles", "organization_invitations"} {
		all, newest := int64(0), int64(0)
		for o := range story.Objects(resource) {
			all, newest = all+1, max(newest, o.CreatedAt)
		}
		before := api.Requests()
		tally, err := c.Tally(t.Context(), resource, time.UnixMilli(newest))
		require.NoError(t, err)
		requests := map[string]int{"users": 2}[resource]
		require.Equal(t, max(requests, 1), api.Requests()-before, resource)
		require.Equal(t, all, tally.All, resource)
		if resource == "organization_invitations" { // in no order
			require.Equal(t, clerk.Tally{All: all, Old: all}, tally)
			continue
		}
		require.Equal(t, newest-time.Minute.Milliseconds(), tally.Until.UnixMilli(), resource)
		old := int64(0)
		for o := range story.Objects(resource) {
			if o.CreatedAt < tally.Until.UnixMilli() {
				old++
			}
		}
		require.Equal(t, old, tally.Old, resource)
		require.Less(t, old, all, resource)
	}

	// So many came lately that the newest hundred are all young.
	one := alive(story, "organizations")[0]
	for range 150 {
		_, _, ok := story.Twin("organizations", one)
		require.True(t, ok)
	}
	tally, err := c.Tally(t.Context(), "organizations", time.Time{})
	require.NoError(t, err)
	old := int64(0)
	for o := range story.Objects("organizations") {
		if o.CreatedAt < tally.Until.UnixMilli() {
			old++
		}
	}
	require.Equal(t, old, tally.Old)
	require.LessOrEqual(t, tally.Old, tally.All-100)

	// Nobody knows what is new; nothing is there.
	tally, err = c.Tally(t.Context(), "users", time.Time{})
	require.NoError(t, err)
	require.Zero(t, tally.Until)
	require.Equal(t, tally.All, tally.Old)
	empty := near(t, emulator.New(emulator.Config{}).API(emulator.APIConfig{}))
	for _, resource := range clerk.Resources() {
		tally, err = empty.Tally(t.Context(), resource, time.Now())
		require.NoError(t, err)
		require.Zero(t, tally.All+tally.Old)
	}
	// An API that cannot count by time.
	whole := near(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("created_at_before") {
			w.WriteHeader(http.StatusUnprocessableEntity)
			_, _ = io.WriteString(w, `{"errors":[{"code":"form_param_unknown"}]}`)
			return
		}
		api.ServeHTTP(w, r)
	}))
	tally, err = whole.Tally(t.Context(), "users", time.Now())
	require.NoError(t, err)
	require.Zero(t, tally.Until)
	require.Positive(t, tally.All)
	require.Equal(t, tally.All, tally.Old)
	_, err = c.Tally(t.Context(), "emails", time.Time{})
	isOnly(t, err, clerk.ErrUnreadable)
}
