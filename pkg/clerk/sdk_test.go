package clerk_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	sdk "github.com/clerk/clerk-sdk-go/v2"
	"github.com/clerk/clerk-sdk-go/v2/organization"
	"github.com/clerk/clerk-sdk-go/v2/organizationmembership"
	"github.com/clerk/clerk-sdk-go/v2/session"
	"github.com/clerk/clerk-sdk-go/v2/svixwebhook"
	"github.com/clerk/clerk-sdk-go/v2/user"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/emulator"
)

// official is Clerk's own SDK against an emulated API.
func official(t *testing.T, api *emulator.API) *sdk.ClientConfig {
	t.Helper()
	server := httptest.NewServer(api)
	t.Cleanup(server.Close)
	cfg := &sdk.ClientConfig{}
	cfg.URL, cfg.Key, cfg.HTTPClient = sdk.String(server.URL+"/v1"), sdk.String(emulator.DefaultKey), server.Client()
	return cfg
}

// The SDK takes the emulator for Clerk: what this package learns from the emulator is not only its own idea of it.
func TestClerksOwnSDKReadsTheEmulator(t *testing.T) {
	t.Parallel()
	story := told(60)
	cfg := official(t, story.API(emulator.APIConfig{}))
	users, err := user.NewClient(cfg).List(t.Context(), &user.ListParams{ListParams: sdk.ListParams{Limit: sdk.Int64(500)}, OrderBy: sdk.String("+created_at")})
	require.NoError(t, err)
	want := alive(story, "users")
	require.EqualValues(t, len(want), users.TotalCount)
	require.Len(t, users.Users, len(want))
	for i, u := range users.Users {
		require.Equal(t, want[i], u.ID)
	}
	one, err := user.NewClient(cfg).Get(t.Context(), want[3])
	require.NoError(t, err)
	require.Equal(t, want[3], one.ID)
	_, err = user.NewClient(cfg).Get(t.Context(), "user_none")
	var refused *sdk.APIErrorResponse
	require.ErrorAs(t, err, &refused)
	require.Equal(t, http.StatusNotFound, refused.HTTPStatusCode)
	require.Equal(t, "resource_not_found", refused.Errors[0].Code)

	organizations, err := organization.NewClient(cfg).List(t.Context(), &organization.ListParams{})
	require.NoError(t, err)
	live, _ := story.Count("organizations")
	require.EqualValues(t, live, organizations.TotalCount)
	require.Len(t, organizations.Organizations, min(live, 10), "the default limit")
	members, err := organizationmembership.NewClient(cfg).List(t.Context(), &organizationmembership.ListParams{OrganizationID: organizations.Organizations[0].ID})
	require.NoError(t, err)
	require.NotEmpty(t, members.OrganizationMemberships)
	sessions, err := session.NewClient(cfg).List(t.Context(), &session.ListParams{UserID: sdk.String(want[3])})
	require.NoError(t, err)
	require.EqualValues(t, len(sessions.Sessions), sessions.TotalCount)
	link, err := svixwebhook.NewClient(cfg).RefreshURL(t.Context())
	require.NoError(t, err)
	require.NotEmpty(t, link.SvixURL)
}

// Why docs/decisions/0004-clerk-reader.md reads without the SDK. Where this fails with a newer SDK, the decision can be
// thought over.
func TestWhatTheSDKLoses(t *testing.T) {
	t.Parallel()
	story := told(60)
	api := story.API(emulator.APIConfig{})
	users := user.NewClient(official(t, api))
	id := alive(story, "users")[0]

	api.Next(emulator.BadGateway)
	_, err := users.Get(t.Context(), id)
	var refused *sdk.APIErrorResponse
	require.Error(t, err)
	require.NotErrorAs(t, err, &refused, "the status of an error that is not JSON")

	api.Next(emulator.LimitedText)
	_, err = users.Get(t.Context(), id)
	require.NotErrorAs(t, err, &refused, "the Retry-After of a plain 429")

	api.Next(emulator.Redirect)
	got, err := users.Get(t.Context(), id)
	require.NoError(t, err, "an empty 3xx is a success")
	require.Empty(t, got.ID)
	api.Next(emulator.Empty)
	got, err = users.Get(t.Context(), id)
	require.NoError(t, err, "an empty answer is a success")
	require.Empty(t, got.ID)

	before := api.Requests()
	_, err = users.List(t.Context(), &user.ListParams{})
	require.NoError(t, err)
	require.Equal(t, before+2, api.Requests(), "a page costs two requests")
}
