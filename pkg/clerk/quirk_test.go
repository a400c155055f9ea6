package clerk_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/emulator"
)

// direct calls a handler without a network, so that a fake clock can run.
type direct struct{ handler http.Handler }

func (d direct) RoundTrip(r *http.Request) (resp *http.Response, err error) {
	w := httptest.NewRecorder()
	defer func() {
		if recover() != nil { // the handler broke the connection
			resp, err = nil, io.ErrUnexpectedEOF
		}
	}()
	d.handler.ServeHTTP(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

// near is a client in the same clock as the API.
func near(t *testing.T, api http.Handler, change ...func(*clerk.Config)) *clerk.Client {
	t.Helper()
	cfg := clerk.Config{SecretKey: emulator.DefaultKey, Quota: -1, HTTPClient: &http.Client{Transport: direct{api}, Timeout: 20 * time.Second}}
	for _, do := range change {
		do(&cfg)
	}
	c, err := clerk.New(cfg)
	require.NoError(t, err)
	return c
}

var kinds = []error{clerk.ErrNotFound, clerk.ErrUnauthorized, clerk.ErrNotEnabled, clerk.ErrLimited, clerk.ErrUnavailable, clerk.ErrUnreadable, context.Canceled, context.DeadlineExceeded}

// isOnly asserts that an error wraps exactly this one of the kinds.
func isOnly(t *testing.T, err, kind error) {
	t.Helper()
	require.Error(t, err)
	for _, other := range kinds {
		assert.Equal(t, errors.Is(kind, other), errors.Is(err, other), "%v is %v", err, other)
	}
}

func TestMistakesInTheConfigurationAreNamedWithoutTheKey(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		cfg  clerk.Config
		want string
	}{
		"no key":          {clerk.Config{}, "missing"},
		"publishable key": {clerk.Config{SecretKey: "pk_live_hidden"}, "publishable"},
		"signing secret":  {clerk.Config{SecretKey: "whsec_hidden"}, "signing secret"},
		"line break":      {clerk.Config{SecretKey: "sk_live_hidden\n"}, "line break"},
		"share":           {clerk.Config{SecretKey: "sk_live_hidden", Share: 1.5}, "share 1.5"},
		"negative share":  {clerk.Config{SecretKey: "sk_live_hidden", Share: -1}, "share -1"},
		"no scheme":       {clerk.Config{SecretKey: "sk_live_hidden", BaseURL: "api.clerk.com/v1"}, "API URL"},
	} {
		_, err := clerk.New(test.cfg)
		require.ErrorContains(t, err, test.want, name)
		require.NotContains(t, err.Error(), "hidden", name)
	}
	_, err := clerk.New(clerk.Config{SecretKey: "sk_live_x"})
	require.NoError(t, err)
}

func TestMoodsThatStayAreErrorsOfTheirKind(t *testing.T) {
	t.Parallel()
	story := told(30)
	user := alive(story, "users")[0]
	for mood, kind := range map[emulator.Mood]error{
		emulator.Limited: clerk.ErrLimited, emulator.LimitedText: clerk.ErrLimited, emulator.LimitedDate: clerk.ErrLimited, emulator.LimitedBare: clerk.ErrLimited,
		emulator.BadGateway: clerk.ErrUnavailable, emulator.Unavailable: clerk.ErrUnavailable, emulator.Cut: clerk.ErrUnavailable,
		emulator.Redirect: clerk.ErrUnreadable, emulator.Empty: clerk.ErrUnreadable, emulator.Garbled: clerk.ErrUnreadable,
	} {
		synctest.Test(t, func(t *testing.T) {
			api := story.API(emulator.APIConfig{Moods: map[emulator.Mood]float64{mood: 1}})
			c := near(t, api)
			for name, do := range map[string]func() error{
				"get":    func() error { _, err := c.Get(t.Context(), "users", user); return err },
				"count":  func() error { _, err := c.Count(t.Context(), "users"); return err },
				"list":   func() error { _, _, err := read(t.Context(), c, "users", clerk.Created, ""); return err },
				"totals": func() error { _, _, err := read(t.Context(), c, "organizations", clerk.Created, ""); return err },
				"latest": func() error { _, _, err := c.Latest(t.Context(), "users"); return err },
				"find":   func() error { _, _, err := c.Find(t.Context(), "roles", "role_x", ""); return err },
			} {
				before, started := api.Requests(), time.Now()
				err := do()
				t.Log(mood, name, err)
				isOnly(t, err, kind)
				require.Less(t, time.Since(started), 3*time.Minute)
				require.LessOrEqual(t, api.Requests()-before, 8)
				require.Greater(t, api.Requests()-before, 1, "%s: it is asked again", mood)
			}
		})
	}
}

func TestOneBadAnswerIsAskedForAgain(t *testing.T) {
	t.Parallel()
	story := told(30)
	want := alive(story, "users")
	for _, mood := range []emulator.Mood{
		emulator.Limited, emulator.LimitedText, emulator.LimitedDate, emulator.LimitedBare, emulator.BadGateway, emulator.Unavailable,
		emulator.Cut, emulator.Redirect, emulator.Empty, emulator.Garbled, emulator.NoID, emulator.Slow,
	} {
		synctest.Test(t, func(t *testing.T) {
			api := story.API(emulator.APIConfig{})
			api.Next(mood)
			got, _, err := read(t.Context(), near(t, api), "users", clerk.Created, "")
			require.NoError(t, err, mood)
			require.Equal(t, want, got, mood)
		})
	}
}

func TestAWrongKeyIsSaidAtOnce(t *testing.T) {
	t.Parallel()
	api := told(20).API(emulator.APIConfig{})
	c := near(t, api, func(cfg *clerk.Config) { cfg.SecretKey = "sk_live_wrong" })
	_, err := c.Get(t.Context(), "users", "user_x")
	isOnly(t, err, clerk.ErrUnauthorized)
	require.Equal(t, "clerk_key_invalid", clerk.Code(err))
	require.NotContains(t, err.Error(), "sk_live_wrong")
	require.Equal(t, 1, api.Requests())
}

func TestTheKeyOfAnotherInstanceOpensThatOne(t *testing.T) {
	t.Parallel()
	other := emulator.New(emulator.Config{Seed: 99})
	for range other.Story(25) {
	}
	mine := told(20)
	api := mine.API(emulator.APIConfig{Others: map[string]*emulator.Clerk{"sk_test_other": other}})
	c := near(t, api, func(cfg *clerk.Config) { cfg.SecretKey = "sk_test_other" })
	got, _, err := read(t.Context(), c, "users", clerk.Created, "")
	require.NoError(t, err)
	require.Equal(t, alive(other, "users"), got)
	_, err = c.Get(t.Context(), "users", alive(mine, "users")[0])
	isOnly(t, err, clerk.ErrNotFound) // which is why the share of extras is guarded
}

func TestGetBelievesOnlyClerksOwnWord(t *testing.T) {
	t.Parallel()
	story := told(40)
	c := near(t, story.API(emulator.APIConfig{}))
	for table, missing := range map[string]string{"users": "user_none", "organizations": "org_none", "sessions": "sess_none"} {
		ids := alive(story, table)
		o, err := c.Get(t.Context(), table, ids[0])
		require.NoError(t, err)
		require.Equal(t, ids[0], o.ID)
		require.NotZero(t, o.UpdatedAt)
		_, err = c.Get(t.Context(), table, missing)
		isOnly(t, err, clerk.ErrNotFound)
	}
	for o := range story.Deleted("users") {
		_, err := c.Get(t.Context(), "users", o.ID)
		isOnly(t, err, clerk.ErrNotFound)
	}
	for _, bad := range [][2]string{{"roles", "role_x"}, {"users", ""}, {"users", "../organizations"}, {"users", "user_x?limit=1"}, {"emails", "x"}} {
		_, err := c.Get(t.Context(), bad[0], bad[1])
		isOnly(t, err, clerk.ErrUnreadable)
	}

	const notFound = `{"errors":[{"message":"not found","long_message":"No user was found with id user_b","code":"resource_not_found"}]}`
	for name, test := range map[string]struct {
		status int
		body   string
		kind   error
	}{
		"about this one":          {404, strings.ReplaceAll(notFound, "user_b", "user_a"), clerk.ErrNotFound},
		"without an id":           {404, strings.ReplaceAll(notFound, " with id user_b", ""), clerk.ErrNotFound},
		"about another one":       {404, notFound, clerk.ErrUnreadable},
		"about an organization":   {404, strings.ReplaceAll(notFound, "No user was found with id user_b", "Given organization not found."), clerk.ErrUnreadable},
		"about a session":         {404, strings.ReplaceAll(notFound, "No user was found with id user_b", "Session not found"), clerk.ErrUnreadable},
		"about the instance":      {404, strings.ReplaceAll(notFound, `"not found"`, `"Instance not found"`), clerk.ErrUnreadable},
		"in few words":            {404, strings.ReplaceAll(notFound, "No user was found with id user_b", "Resource not found"), clerk.ErrNotFound},
		"deleted":                 {200, `{"id":"user_a","object":"user","deleted":true}`, clerk.ErrUnreadable},
		"deleted, in a word":      {200, `{"id":"user_a","object":"user","deleted":"true"}`, clerk.ErrUnreadable},
		"not deleted":             {200, `{"id":"user_a","object":"user","deleted":false}`, nil},
		"a proxy's page":          {404, "<html>not found</html>", clerk.ErrUnreadable},
		"nothing":                 {404, "", clerk.ErrUnreadable},
		"another code":            {404, `{"errors":[{"code":"not_found"}]}`, clerk.ErrUnreadable},
		"in a 200":                {200, notFound, clerk.ErrUnreadable},
		"another object":          {200, `{"id":"user_b"}`, clerk.ErrUnreadable},
		"a zero object":           {200, `{}`, clerk.ErrUnreadable},
		"null":                    {200, `null`, clerk.ErrUnreadable},
		"half of it":              {200, `{"id":"user_a",`, clerk.ErrUnreadable},
		"gone":                    {410, notFound, clerk.ErrUnreadable},
		"no content":              {204, "", clerk.ErrUnreadable},
		"forbidden":               {403, `{"errors":[{"code":"authorization_invalid"}]}`, clerk.ErrUnauthorized},
		"the version is too old":  {400, `{"errors":[{"code":"api_version_invalid"}]}`, clerk.ErrUnreadable},
		"not found by the server": {503, strings.ReplaceAll(notFound, "user_b", "user_a"), clerk.ErrUnavailable},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := near(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(test.status)
				_, _ = io.WriteString(w, test.body)
			}))
			_, err := c.Get(t.Context(), "users", "user_a")
			t.Log(name, err)
			if test.kind == nil {
				require.NoError(t, err)
				return
			}
			isOnly(t, err, test.kind)
		})
	}
}

func TestARedirectIsNotFollowed(t *testing.T) {
	t.Parallel()
	var keys []string
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { keys = append(keys, r.Header.Get("Authorization")) }))
	defer elsewhere.Close()
	synctest.Test(t, func(t *testing.T) {
		c := near(t, http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect))
		_, err := c.Count(t.Context(), "users")
		isOnly(t, err, clerk.ErrUnreadable)
	})
	require.Empty(t, keys)
}

func TestAListThatContradictsItselfIsAnError(t *testing.T) {
	t.Parallel()
	story := told(60)
	for _, test := range []struct {
		resource string
		mood     emulator.Mood
	}{
		{"organizations", emulator.Short},
		{"organizations", emulator.CountHigh},
		{"organizations", emulator.CountLow},
		{"organization_memberships", emulator.NoID},
		{"organization_memberships", emulator.Short},
		{"users", emulator.NoID},
		{"users", emulator.SaysDeleted},
		{"organization_memberships", emulator.SaysDeleted},
		{"users", emulator.TenOnly},
		{"organization_memberships", emulator.TenOnly},
	} {
		synctest.Test(t, func(t *testing.T) {
			api := story.API(emulator.APIConfig{Moods: map[emulator.Mood]float64{test.mood: 1}})
			ids, _, err := read(t.Context(), near(t, api), test.resource, clerk.Created, "")
			t.Log(test.resource, test.mood, len(ids), err)
			isOnly(t, err, clerk.ErrUnreadable)
		})
	}
}

func TestTenUsersAreTenUsers(t *testing.T) {
	t.Parallel()
	story := emulator.New(emulator.Config{Seed: 5})
	for range 10 {
		story.SignUp()
	}
	for _, cfg := range []emulator.APIConfig{{}, {NoCursor: true}, {IgnoreCursor: true}} {
		grown := 0
		api := story.API(cfg)
		got, _, err := read(t.Context(), near(t, api), "users", clerk.Created, "")
		require.NoError(t, err)
		require.Equal(t, alive(story, "users"), got)

		// The eleventh signs up between the page of ten and the question whether more follow.
		cfg.Hook = func(r *http.Request) {
			if grown++; grown == 3 {
				story.SignUp()
			}
		}
		got, _, err = read(t.Context(), near(t, story.API(cfg)), "users", clerk.Created, "")
		require.NoError(t, err)
		require.Equal(t, alive(story, "users")[:10], got[:10])
		if newest := alive(story, "users"); len(newest) > 10 {
			story.Leave(newest[10])
		}
	}
}

func TestAnEmptyInstanceIsOneEmptyPage(t *testing.T) {
	t.Parallel()
	c := near(t, emulator.New(emulator.Config{}).API(emulator.APIConfig{}))
	for _, resource := range clerk.Resources() {
		ids, pages, err := read(t.Context(), c, resource, clerk.Created, "")
		require.NoError(t, err)
		require.Empty(t, ids)
		require.Len(t, pages, 1)
	}
	_, found, err := c.Latest(t.Context(), "users")
	require.NoError(t, err)
	require.False(t, found)
}

func TestShortPagesOfUsersLoseNobody(t *testing.T) {
	t.Parallel()
	story := crowded(1300)
	want := alive(story, "users")
	for _, cfg := range []emulator.APIConfig{{}, {NoCursor: true}} {
		for seed := range uint64(10) {
			synctest.Test(t, func(t *testing.T) {
				cfg.Seed, cfg.Moods = seed, map[emulator.Mood]float64{emulator.Short: .3, emulator.Limited: .1, emulator.BadGateway: .1, emulator.Cut: .1}
				got, _, err := read(t.Context(), near(t, story.API(cfg)), "users", clerk.Created, "")
				if err == nil {
					require.Equal(t, want, got)
				} else {
					isOnly(t, err, clerk.ErrUnreadable)
				}
			})
		}
	}
}

// moved reads a list while others change it and asserts that whoever was there all the time was read once.
func moved(t *testing.T, story *emulator.Clerk, resource string, cfg emulator.APIConfig, change func(request int)) {
	t.Helper()
	before := alive(story, resource)
	request := 0
	cfg.Hook = func(*http.Request) {
		request++
		change(request)
	}
	got, _, err := read(t.Context(), near(t, story.API(cfg)), resource, clerk.Created, "")
	require.NoError(t, err)
	seen := map[string]int{}
	for _, id := range got {
		seen[id]++
		require.Equal(t, 1, seen[id], "%s came twice", id)
	}
	for _, id := range before {
		if o, _ := story.Object(resource, id); o.DeletedAt == 0 {
			require.Equal(t, 1, seen[id], "%s was skipped", id)
		}
	}
}

func TestNobodyIsSkippedWhileTheListMoves(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]emulator.APIConfig{
		"cursor": {}, "lasting cursor": {LastingCursor: true}, "no cursor": {NoCursor: true}, "cursor not looked at": {IgnoreCursor: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			story := crowded(1700)
			ids := alive(story, "users")
			moved(t, story, "users", cfg, func(request int) {
				for range 3 {
					story.SignUp()
				}
				// Some of those already read, the one read last among them, and some that are still to come.
				at := min(request*500, len(ids))
				for _, i := range []int{0, 7, at - 3, at - 2, at - 1, at, at + 30} {
					if i += request; i >= 0 && i < len(ids) {
						story.Remove("users", ids[i])
					}
				}
				for i := range 30 {
					story.Remove("users", ids[(request*31+i)%len(ids)])
				}
			})
		})
	}
	for _, resource := range []string{"organization_memberships", "organization_invitations"} {
		t.Run(resource, func(t *testing.T) {
			t.Parallel()
			story := told(30)
			one := alive(story, resource)[0]
			for range 1600 {
				story.Twin(resource, one)
			}
			ids := alive(story, resource)
			moved(t, story, resource, emulator.APIConfig{}, func(request int) {
				story.Twin(resource, one)
				if request > 1 && request < 4 { // more than the overlap
					for i := range 60 {
						story.Remove(resource, ids[request*70+i])
						story.Remove(resource, ids[len(ids)-1-request*70-i])
					}
				}
			})
		})
	}
}

func TestMostOfThoseReadMayLeaveMeanwhile(t *testing.T) {
	t.Parallel()
	for _, cfg := range []emulator.APIConfig{{}, {NoCursor: true}} {
		story := crowded(1700)
		ids := alive(story, "users")
		moved(t, story, "users", cfg, func(request int) {
			if request == 3 {
				for _, id := range ids[:900] {
					story.Remove("users", id)
				}
			}
		})
	}
}

func TestAReadGoesOnFromTheCursorOfAnyPage(t *testing.T) {
	t.Parallel()
	story := crowded(1700)
	for _, cfg := range []emulator.APIConfig{{}, {NoCursor: true}} {
		for _, order := range []clerk.Order{clerk.Created, clerk.Updated} {
			c := near(t, story.API(cfg))
			whole, pages, err := read(t.Context(), c, "users", order, "")
			require.NoError(t, err)
			require.Greater(t, len(pages), 3)
			passed := 0
			for _, page := range pages[:len(pages)-1] {
				passed += len(page.Objects)
				rest, _, err := read(t.Context(), near(t, story.API(cfg)), "users", order, page.Cursor)
				require.NoError(t, err)
				require.Equal(t, whole[passed:], append([]string{}, rest...))
			}
		}
	}
	c := near(t, story.API(emulator.APIConfig{}))
	_, pages, err := read(t.Context(), c, "users", clerk.Created, "")
	require.NoError(t, err)
	for i := range 400 { // the cursor's users leave before the read goes on
		story.Remove("users", pages[0].Objects[i+len(pages[0].Objects)-400].ID)
	}
	rest, _, err := read(t.Context(), near(t, story.API(emulator.APIConfig{})), "users", clerk.Created, pages[0].Cursor)
	require.NoError(t, err)
	require.Equal(t, alive(story, "users")[100:], rest)

	for _, bad := range []string{"x", "{}", `{"r":"organizations"}`, `{"r":"users","n":-1}`} {
		_, _, err := read(t.Context(), c, "users", clerk.Created, bad)
		isOnly(t, err, clerk.ErrUnreadable)
	}
	_, _, err = read(t.Context(), c, "roles", clerk.Updated, "")
	isOnly(t, err, clerk.ErrUnreadable)
}

func TestNewestChangesComeFirst(t *testing.T) {
	t.Parallel()
	story := crowded(1100)
	ids := alive(story, "users")
	_, ok := story.Rename(ids[5])
	require.True(t, ok)
	api := story.API(emulator.APIConfig{})
	c := near(t, api)
	latest, found, err := c.Latest(t.Context(), "users")
	require.NoError(t, err)
	require.True(t, found)
	require.Equal(t, ids[5], latest.ID)
	require.Equal(t, 1, api.Requests())

	got, pages, err := read(t.Context(), c, "users", clerk.Updated, "")
	require.NoError(t, err)
	require.ElementsMatch(t, ids, got)
	require.Equal(t, ids[5], got[0])
	last := int64(1 << 62)
	for _, page := range pages {
		for _, o := range page.Objects {
			require.LessOrEqual(t, o.UpdatedAt, last)
			last = o.UpdatedAt
		}
	}
	for page, err := range c.Pages(t.Context(), "users", clerk.Updated, "") { // a watermark needs one page
		require.NoError(t, err)
		require.Len(t, page.Objects, 500)
		break
	}
}

func TestAnUnsortedAnswerToASortedQuestionIsAnError(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := near(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `[{"id":"user_b","created_at":2},{"id":"user_a","created_at":1}]`)
		}))
		_, _, err := read(t.Context(), c, "users", clerk.Created, "")
		isOnly(t, err, clerk.ErrUnreadable)
	})
}

func TestSessionsOfAUser(t *testing.T) {
	t.Parallel()
	story := told(40)
	c := near(t, story.API(emulator.APIConfig{}))
	of := map[string]int{}
	for o := range story.Objects("sessions") {
		of[userOf(o)]++
	}
	for _, id := range alive(story, "users") {
		sessions, err := c.Sessions(t.Context(), id)
		require.NoError(t, err)
		require.Len(t, sessions, of[id])
		for _, s := range sessions {
			require.Contains(t, string(s.Raw), `"user_id":"`+id+`"`)
		}
	}
	none, err := c.Sessions(t.Context(), "user_unknown")
	require.NoError(t, err)
	require.Empty(t, none)
}

func userOf(o emulator.Object) string {
	_, rest, _ := strings.Cut(string(o.JSON), `"user_id":"`)
	id, _, _ := strings.Cut(rest, `"`)
	return id
}

func TestFindNeedsTheWholeList(t *testing.T) {
	t.Parallel()
	story := told(200)
	api := story.API(emulator.APIConfig{})
	for resource, owner := range map[string]string{
		"organization_memberships": `"organization":{`, "organization_invitations": `"organization_id":"`, "organization_domains": `"organization_id":"`, "roles": "", "permissions": "", "waitlist_entries": "", "users": "",
	} {
		synctest.Test(t, func(t *testing.T) {
			c := near(t, api)
			var some emulator.Object
			for o := range story.Objects(resource) {
				some = o
			}
			organization := ""
			if owner != "" {
				_, rest, _ := strings.Cut(string(some.JSON), owner)
				organization = "org_" + strings.SplitN(strings.SplitN(rest, "org_", 2)[1], `"`, 2)[0]
			}
			o, found, err := c.Find(t.Context(), resource, some.ID, organization)
			require.NoError(t, err)
			require.True(t, found)
			require.JSONEq(t, string(some.JSON), string(o.Raw))
			_, found, err = c.Find(t.Context(), resource, "other_x", organization)
			require.NoError(t, err)
			require.False(t, found)
			_, found, err = c.Find(t.Context(), resource, "no id/of Clerk's", organization)
			require.NoError(t, err)
			require.False(t, found)
			if owner == "" {
				return
			}
			_, found, err = c.Find(t.Context(), resource, some.ID, "no id/of Clerk's")
			require.NoError(t, err)
			require.False(t, found)
			_, found, err = c.Find(t.Context(), resource, some.ID, "org_gone")
			require.NoError(t, err)
			require.False(t, found, "Clerk says that the organization does not exist")
			api.Next(slices.Repeat([]emulator.Mood{emulator.Garbled}, 40)...)
			_, _, err = c.Find(t.Context(), resource, some.ID, "org_gone")
			isOnly(t, err, clerk.ErrUnreadable)
			api.Next()
			for api.Pending() > 0 {
				_, _ = c.Count(t.Context(), "users")
			}
		})
	}
}

func TestThePortalLinkIsMadeOnce(t *testing.T) {
	t.Parallel()
	story := told(20)
	synctest.Test(t, func(t *testing.T) {
		api := story.API(emulator.APIConfig{})
		c := near(t, api)
		link, err := c.RefreshPortalURL(t.Context())
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(link, "https://"))
		api.Next(emulator.Limited) // a refusal: nothing was made
		_, err = c.RefreshPortalURL(t.Context())
		require.NoError(t, err)
		before := api.Requests()
		api.Next(emulator.BadGateway)
		_, err = c.RefreshPortalURL(t.Context())
		isOnly(t, err, clerk.ErrUnavailable)
		require.Equal(t, before+1, api.Requests(), "it may have been made")
	})
}

// --- limits ---

func TestRequestsStayWithinTheShare(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		key          string
		share        float64
		quota, allow int
	}{
		{"sk_test_a", 0, 100, 20},
		{"sk_live_a", 0, 1000, 200},
		{"sk_live_a", .5, 1000, 500},
		{"sk_test_a", .01, 100, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			api := emulator.New(emulator.Config{}).API(emulator.APIConfig{Key: test.key, Quota: test.quota})
			c := near(t, api, func(cfg *clerk.Config) { cfg.SecretKey, cfg.Quota, cfg.Share = test.key, 0, test.share })
			started := time.Now()
			n := 10 * test.allow
			var all sync.WaitGroup
			for range 10 {
				all.Go(func() {
					for range n / 10 {
						_, err := c.Count(t.Context(), "users")
						assert.NoError(t, err)
					}
				})
			}
			all.Wait()
			require.Equal(t, n, api.Requests())
			require.LessOrEqual(t, api.Peak(), test.allow)
			require.Less(t, time.Since(started), 230*time.Second, "the share is used")
		})
	}
}

func TestAQuotaThatOthersSpentIsWaitedFor(t *testing.T) {
	t.Parallel()
	story := crowded(1200)
	want := alive(story, "users")
	synctest.Test(t, func(t *testing.T) {
		// Five requests a window, and this client believes in its share of a thousand.
		api := story.API(emulator.APIConfig{Quota: 2})
		got, _, err := read(t.Context(), near(t, api), "users", clerk.Created, "")
		require.NoError(t, err)
		require.Equal(t, want, got)
	})
}

func TestRetryAfterHoldsAllCalls(t *testing.T) {
	t.Parallel()
	for _, mood := range []emulator.Mood{emulator.Limited, emulator.LimitedText, emulator.LimitedDate} {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			var times []time.Duration
			started := time.Now()
			api := emulator.New(emulator.Config{}).API(emulator.APIConfig{RetryAfter: 30 * time.Second, Hook: func(*http.Request) {
				mu.Lock()
				defer mu.Unlock()
				times = append(times, time.Since(started))
			}})
			api.Next(mood)
			c := near(t, api)
			var all sync.WaitGroup
			for i := range 5 {
				all.Go(func() {
					time.Sleep(time.Duration(i) * time.Second)
					_, err := c.Count(t.Context(), "users")
					assert.NoError(t, err)
				})
			}
			all.Wait()
			require.Len(t, times, 6)
			for _, at := range times[1:] {
				require.GreaterOrEqual(t, at, 29*time.Second, mood) // a date has whole seconds
				require.Less(t, at, 40*time.Second, mood)
			}
		})
	}
}

func TestACallDoesNotWaitForHours(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		api := emulator.New(emulator.Config{}).API(emulator.APIConfig{RetryAfter: 30 * time.Minute})
		api.Next(emulator.Limited)
		c := near(t, api)
		started := time.Now()
		for range 3 {
			_, err := c.Count(t.Context(), "users")
			isOnly(t, err, clerk.ErrLimited)
		}
		require.Less(t, time.Since(started), 5*time.Second)
		require.Equal(t, 1, api.Requests(), "Clerk is left alone")
		time.Sleep(30 * time.Minute)
		_, err := c.Count(t.Context(), "users")
		require.NoError(t, err)
	})
}

func TestTheContextEndsEveryWait(t *testing.T) {
	t.Parallel()
	story := told(20)
	for name, test := range map[string]struct {
		cfg   emulator.APIConfig
		quota int
		moods []emulator.Mood
	}{
		"a slow answer":   {cfg: emulator.APIConfig{Delay: time.Hour}, quota: -1, moods: []emulator.Mood{emulator.Slow}},
		"the share":       {quota: 1, moods: nil},
		"the retry-after": {cfg: emulator.APIConfig{RetryAfter: time.Minute}, quota: -1, moods: []emulator.Mood{emulator.Limited}},
		"the backoff":     {quota: -1, moods: slices.Repeat([]emulator.Mood{emulator.BadGateway}, 10)},
	} {
		synctest.Test(t, func(t *testing.T) {
			api := story.API(test.cfg)
			c := near(t, api, func(cfg *clerk.Config) { cfg.Quota, cfg.HTTPClient.Timeout = test.quota, 0 })
			if test.quota > 0 {
				_, err := c.Count(t.Context(), "users")
				require.NoError(t, err)
			}
			api.Next(test.moods...)
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(3*time.Second, cancel)
			started := time.Now()
			_, err := c.Count(ctx, "users")
			t.Log(name, err)
			isOnly(t, err, context.Canceled)
			require.Equal(t, 3*time.Second, time.Since(started), name)

			if test.quota > 0 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				_, err := c.Count(ctx, "users")
				isOnly(t, err, context.DeadlineExceeded)
			}
		})
	}
}

func TestAnAnswerThatNeverComesIsUnavailable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		api := told(20).API(emulator.APIConfig{Delay: time.Hour, Moods: map[emulator.Mood]float64{emulator.Slow: 1}})
		_, err := near(t, api).Get(t.Context(), "users", "user_a")
		require.ErrorIs(t, err, clerk.ErrUnavailable)
		require.NotErrorIs(t, err, context.DeadlineExceeded)
	})
	c, err := clerk.New(clerk.Config{BaseURL: "http://127.0.0.1:1/v1", SecretKey: "sk_test_x", Quota: -1})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = c.Count(ctx, "users")
	isOnly(t, err, context.DeadlineExceeded)
}

func TestRequestsAreAsClerkWantsThem(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var seen []*http.Request
	story := told(20)
	api := story.API(emulator.APIConfig{Strict: true, Hook: func(r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r)
	}})
	c := near(t, api)
	for _, resource := range clerk.Resources() {
		_, _, err := read(t.Context(), c, resource, clerk.Created, "")
		require.NoError(t, err)
	}
	for _, r := range seen {
		require.Contains(t, []string{"500", "1"}, r.URL.Query().Get("limit"))
		require.NotContains(t, r.URL.RawQuery, "=+", "a plus must be encoded")
		require.Equal(t, []string{"2026-05-12"}, r.Header["Clerk-Api-Version"])
		require.Empty(t, r.URL.Query()["__clerk_api_version"])
	}
}

func TestRequestsAreCounted(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewPedanticRegistry()
	api := told(20).API(emulator.APIConfig{})
	c := near(t, api, func(cfg *clerk.Config) { cfg.Registerer = reg })
	near(t, api, func(cfg *clerk.Config) { cfg.Registerer = reg }) // a second source
	_, err := c.Count(t.Context(), "users")
	require.NoError(t, err)
	_, err = c.Get(t.Context(), "users", "user_none")
	require.ErrorIs(t, err, clerk.ErrNotFound)
	var want strings.Builder
	want.WriteString("# HELP usher_clerk_requests_total Requests to Clerk's Backend API, retries included, by what became of them.\n# TYPE usher_clerk_requests_total counter\n")
	for _, result := range []string{"canceled", "limited", "not_enabled", "not_found", "ok", "unauthorized", "unavailable", "unreadable"} {
		n := 0
		if result == "ok" || result == "not_found" {
			n = 1
		}
		fmt.Fprintf(&want, "usher_clerk_requests_total{result=%q} %d\n", result, n)
	}
	require.NoError(t, testutil.GatherAndCompare(reg, strings.NewReader(want.String()), "usher_clerk_requests_total"))
}

// An absent feature is neither a wrong key nor an absent object.
func TestAFeatureThatIsOffIsNotEnabled(t *testing.T) {
	t.Parallel()
	story := told(40)
	member := alive(story, "organization_memberships")[0]
	off := []emulator.Feature{emulator.Organizations, emulator.Waitlist}
	for name, api := range map[string]*emulator.API{
		"forbidden": story.API(emulator.APIConfig{Without: off}), "not found": story.API(emulator.APIConfig{Without: off, AbsentIsNotFound: true}),
	} {
		synctest.Test(t, func(t *testing.T) {
			c := near(t, api)
			for _, resource := range clerk.Resources() {
				before := api.Requests()
				_, countErr := c.Count(t.Context(), resource)
				_, _, listErr := read(t.Context(), c, resource, clerk.Created, "")
				_, _, latestErr := c.Latest(t.Context(), resource)
				if !clerk.Optional(resource) {
					require.NoError(t, errors.Join(countErr, listErr, latestErr), resource)
					continue
				}
				isOnly(t, countErr, clerk.ErrNotEnabled)
				isOnly(t, listErr, clerk.ErrNotEnabled)
				isOnly(t, latestErr, clerk.ErrNotEnabled)
				require.Equal(t, 3, api.Requests()-before, "%s, %s: it is not asked again", name, resource)
			}
			_, _, err := c.Find(t.Context(), "organization_memberships", member, "")
			isOnly(t, err, clerk.ErrNotEnabled)
		})
	}
	require.False(t, clerk.Optional("users"))
	require.False(t, clerk.Optional("sessions"))

	for name, test := range map[string]struct {
		resource string
		status   int
		code     string
		kind     error
	}{
		"as Clerk says it":         {"organizations", 403, "organization_not_enabled_in_instance", clerk.ErrNotEnabled},
		"as Clerk said it":         {"organizations", 403, "organizations_not_enabled_in_instance", clerk.ErrNotEnabled},
		"of domains":               {"organization_domains", 403, "organization_domains_not_enabled", clerk.ErrNotEnabled},
		"of another feature":       {"waitlist_entries", 403, "feature_not_enabled", clerk.ErrNotEnabled},
		"with another status":      {"roles", 400, "billing_not_enabled", clerk.ErrNotEnabled},
		"no such list":             {"roles", 404, "resource_not_found", clerk.ErrNotEnabled},
		"no such list of users":    {"users", 404, "resource_not_found", clerk.ErrUnreadable},
		"no such path":             {"roles", 404, "not_found", clerk.ErrUnreadable},
		"forbidden":                {"roles", 403, "authorization_invalid", clerk.ErrUnauthorized},
		"the key, whatever else":   {"roles", 401, "feature_not_enabled", clerk.ErrUnauthorized},
		"the limit, whatever else": {"roles", 429, "feature_not_enabled", clerk.ErrLimited},
		"not by the server":        {"roles", 503, "feature_not_enabled", clerk.ErrUnavailable},
		"in a 200":                 {"roles", 200, "feature_not_enabled", clerk.ErrUnreadable},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := near(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(test.status)
				_, _ = fmt.Fprintf(w, `{"errors":[{"message":"no","code":%q}]}`, test.code)
			}))
			_, err := c.Count(t.Context(), test.resource)
			t.Log(name, err)
			isOnly(t, err, test.kind)
		})
	}
}
