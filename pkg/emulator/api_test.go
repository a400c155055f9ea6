package emulator_test

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

// ask makes one request with the right key.
func ask(t testing.TB, api http.Handler, path string, header ...string) (int, string, http.Header) {
	t.Helper()
	method := http.MethodGet
	if rest, post := strings.CutPrefix(path, "POST "); post {
		method, path = http.MethodPost, rest
	}
	r := httptest.NewRequestWithContext(t.Context(), method, "/v1"+path, nil)
	r.Header.Set("Authorization", "Bearer "+emulator.DefaultKey)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	api.ServeHTTP(w, r)
	return w.Code, w.Body.String(), w.Header()
}

func ids(body string) []string {
	list := gjson.Parse(body)
	if list.IsObject() {
		list = list.Get("data")
	}
	result := []string{}
	for _, o := range list.Array() {
		result = append(result, o.Get("id").Str)
	}
	return result
}

func living(c *emulator.Clerk, table string) []string {
	result := []string{}
	for o := range c.Objects(table) {
		result = append(result, o.ID)
	}
	return result
}

func reversed(list []string) []string {
	list = slices.Clone(list)
	slices.Reverse(list)
	return list
}

// fieldsOf is the fields of a JSON value with their types, at any depth; null and an empty array fit any type.
func fieldsOf(v gjson.Result, at string, into map[string]string) {
	switch {
	case v.IsObject():
		if strings.HasSuffix(at, "_metadata") {
			return
		}
		v.ForEach(func(key, value gjson.Result) bool { fieldsOf(value, at+"."+key.Str, into); return true })
	case v.IsArray():
		if len(v.Array()) == 0 {
			into[at+"[]"] = "null"
		}
		for _, element := range v.Array() {
			fieldsOf(element, at+"[]", into)
		}
	case v.Type == gjson.Null:
		if _, known := into[at]; !known {
			into[at] = "null"
		}
	case v.Type == gjson.True || v.Type == gjson.False:
		into[at] = "bool"
	default:
		into[at] = v.Type.String()
	}
}

// empty tells whether something around a field is null or an empty array.
func empty(field string, in map[string]string) bool {
	for i := range field {
		if field[i] == '.' && in[field[:i]] == "null" {
			return true
		}
	}
	return in[field+"[]"] != "" || in[strings.TrimSuffix(field, "[]")] == "null"
}

// allowed are fields that the canonical bodies show in other places.
var allowed = []string{".public_organization_data.has_image", ".public_organization_data.id", ".public_organization_data.image_url", ".public_organization_data.name", ".public_organization_data.slug", ".user_id", ".phone_numbers.verification.channel"}

func TestAPIAnswersHaveTheShapeOfClerks(t *testing.T) {
	t.Parallel()
	clerk, _ := story(emulator.Config{Seed: 7}, 150)
	api := clerk.API(emulator.APIConfig{})
	user, session := living(clerk, "users")[0], living(clerk, "sessions")[0]
	organization, member := "", ""
	for o := range clerk.Objects("organization_memberships") {
		organization, member = gjson.GetBytes(o.JSON, "organization.id").Str, gjson.GetBytes(o.JSON, "public_user_data.user_id").Str
	}
	for name, path := range map[string]string{
		"user_get": "/users/" + user, "users_list": "/users?limit=500", "users_count": "/users/count", "organizations_list": "/organizations?limit=100",
		"instance_organization_memberships_list": "/organization_memberships", "instance_organization_invitations_list": "/organization_invitations?limit=100",
		"organization_memberships_list": "/organizations/" + organization + "/memberships", "user_organization_memberships_list": "/users/" + member + "/organization_memberships",
		"session_get": "/sessions/" + session, "sessions_list": "/sessions?user_id=" + user, "sessions_list_paginated": "/sessions?paginated=true&user_id=" + user,
	} {
		canonical, ok := fixture.API(name)
		require.True(t, ok, name)
		status, body, _ := ask(t, api, path)
		require.Equal(t, http.StatusOK, status, name)
		want, got := map[string]string{}, map[string]string{}
		fieldsOf(gjson.ParseBytes(canonical), "", want)
		fieldsOf(gjson.Parse(body), "", got)
		for field, kind := range want {
			if got[field] == "" && empty(field, got) {
				continue
			}
			if assert.NotEmpty(t, got[field], "%s lacks %s", name, field) && kind != "null" && got[field] != "null" {
				assert.Equal(t, kind, got[field], "%s: %s", name, field)
			}
		}
		for field := range got {
			if want[field] == "" && !empty(field, want) && got[field] != "null" {
				assert.Contains(t, allowed, strings.NewReplacer(".data", "", "[]", "").Replace(field), "%s has more than Clerk", name)
			}
		}
	}
}

func TestAPIErrorsAreClerks(t *testing.T) {
	t.Parallel()
	clerk, _ := story(emulator.Config{Seed: 7}, 25)
	api := clerk.API(emulator.APIConfig{})
	canned := func(name string) string {
		body, ok := fixture.API(name)
		require.True(t, ok)
		return string(body)
	}
	const ada, sess = "user_38HzI2pYfb8qPaRGOtjol4SEChQ", "sess_38HzI2dPeXzWRdy57JvM1bWBcuB"
	for _, test := range []struct {
		path   string
		header []string
		status int
		body   string
	}{
		{"/users", []string{"Authorization", "Bearer sk_test_other"}, 401, canned("error_401_secret_key")},
		{"/users/" + ada, nil, 404, canned("error_404_user")},
		{"/users/user_x", nil, 404, strings.ReplaceAll(canned("error_404_user"), ada, "user_x")},
		{"/organizations/org_x", nil, 404, canned("error_404_organization")},
		{"/organizations/org_x/memberships", nil, 404, canned("error_404_organization")},
		{"/sessions/" + sess, nil, 404, canned("error_404_session")},
		{"/users", []string{"Clerk-API-Version", "1999-01-01"}, 400, canned("error_400_api_version")},
		{"/users?__clerk_api_version=2025-04-10", []string{"Clerk-API-Version", "2025-04-10"}, 400, canned("error_400_api_version")},
	} {
		status, body, header := ask(t, api, test.path, test.header...)
		require.Equal(t, test.status, status, test.path)
		require.Equal(t, test.body, body, test.path)
		require.NotEmpty(t, header.Get("Clerk-Trace-Id"))
	}
	for path, want := range map[string]int{
		"/users?__clerk_api_version=2025-04-10": 200, "/users?limit=0": 422, "/users?limit=x": 422, "/users?offset=-1": 422, "/users?order_by=shoe_size": 422,
		"/users?order_by=+created_at": 422, "/users?order_by=%2Bcreated_at": 200, "/users?color=red": 422, "/sessions": 422, "/nothing": 404, "POST /users": 404,
		"/users?starting_after=" + living(clerk, "users")[0] + "&offset=1": 422, "/users?starting_after=" + living(clerk, "users")[0] + "&order_by=-updated_at": 422,
		"/users?starting_after=user_x": 404, "/users?" + url.Values{"user_id": make([]string, 101)}.Encode(): 422, "POST /webhooks/svix_url": 200, "/organizations?order_by=updated_at": 422,
	} {
		status, body, _ := ask(t, api, path)
		require.Equal(t, want, status, "%s: %s", path, body)
		require.True(t, gjson.Valid(body))
	}
	status, _, _ := ask(t, api, "/users", "Authorization", emulator.DefaultKey)
	require.Equal(t, http.StatusUnauthorized, status)
}

func TestAPIPages(t *testing.T) {
	t.Parallel()
	clerk, _ := story(emulator.Config{Seed: 7}, 40)
	one := living(clerk, "users")[0]
	for range 600 {
		clerk.Twin("users", one)
	}
	all := living(clerk, "users")
	newest := reversed(all)
	api := clerk.API(emulator.APIConfig{})
	for path, want := range map[string][]string{
		"/users":                  newest[:10],
		"/users?limit=500":        newest[:500],
		"/users?limit=501":        newest[:10],
		"/users?limit=3&offset=4": newest[4:7],
		"/users?limit=500&offset=" + fmt.Sprint(len(all)-2):                       newest[len(all)-2:],
		"/users?offset=100000":                                                    {},
		"/users?order_by=created_at&limit=4":                                      all[:4],
		"/users?order_by=-created_at&limit=4":                                     newest[:4],
		"/users?starting_after=" + newest[5]:                                      newest[6:16],
		"/users?starting_after=" + newest[len(all)-1]:                             {},
		"/users?limit=7&order_by=%2Bcreated_at&starting_after=" + all[3]:          all[4:11],
		"/users?limit=7&order_by=-created_at&starting_after=" + all[3]:            reversed(all[:3]),
		"/users?user_id=" + all[3] + "&user_id=user_unknown&user_id=%2B" + all[5]: {all[5], all[3]},
		"/users?limit=500&user_id=-" + newest[0]:                                  newest[1:501],
	} {
		status, body, _ := ask(t, api, path)
		require.Equal(t, http.StatusOK, status, path)
		require.Equal(t, want, ids(body), path)
	}
	status, _, _ := ask(t, clerk.API(emulator.APIConfig{Strict: true}), "/users?limit=501")
	require.Equal(t, http.StatusUnprocessableEntity, status)
	status, _, _ = ask(t, clerk.API(emulator.APIConfig{NoCursor: true}), "/users?starting_after="+all[0])
	require.Equal(t, http.StatusUnprocessableEntity, status)
	_, body, _ := ask(t, clerk.API(emulator.APIConfig{IgnoreCursor: true}), "/users?starting_after="+newest[5])
	require.Equal(t, newest[:10], ids(body))

	_, ok := clerk.Rename(all[4])
	require.True(t, ok)
	_, body, _ = ask(t, api, "/users?order_by=-updated_at&limit=1")
	require.Equal(t, all[4:5], ids(body))
	_, body, _ = ask(t, api, "/users/count")
	require.JSONEq(t, fmt.Sprintf(`{"object":"total_count","total_count":%d}`, len(all)), body)

	clerk.Remove("users", all[10])
	status, _, _ = ask(t, api, "/users?order_by=created_at&starting_after="+all[10])
	require.Equal(t, http.StatusNotFound, status)
	lasting := clerk.API(emulator.APIConfig{LastingCursor: true})
	_, body, _ = ask(t, lasting, "/users?order_by=created_at&limit=2&starting_after="+all[10])
	require.Equal(t, all[11:13], ids(body))
	_, body, _ = ask(t, lasting, "/users?order_by=-created_at&limit=2&starting_after="+all[10])
	require.Equal(t, []string{all[9], all[8]}, ids(body))
}

func TestAPIFollowsTheStory(t *testing.T) {
	t.Parallel()
	clerk := emulator.New(emulator.Config{Seed: 9})
	api := clerk.API(emulator.APIConfig{})
	n := 0
	for range clerk.Story(60) {
		if n++; n%50 != 0 {
			continue
		}
		for table, path := range map[string]string{"users": "/users", "organizations": "/organizations", "organization_memberships": "/organization_memberships", "roles": "/organization_roles", "permissions": "/organization_permissions", "organization_domains": "/organization_domains", "waitlist_entries": "/waitlist_entries"} {
			status, body, _ := ask(t, api, path+"?limit=500")
			require.Equal(t, http.StatusOK, status)
			require.ElementsMatch(t, living(clerk, table), ids(body))
		}
	}
}

func TestChangesBesideTheStory(t *testing.T) {
	t.Parallel()
	clerk, told := story(emulator.Config{Seed: 7}, 30)
	check := func(events []emulator.Event, ok bool) {
		t.Helper()
		require.True(t, ok)
		require.NotEmpty(t, events)
		for _, e := range events {
			require.True(t, json.Valid(e.Body))
			require.False(t, slices.ContainsFunc(told, func(other emulator.Event) bool { return other.ID == e.ID }))
			decoded, err := event.Decode(e.Body)
			require.NoError(t, err)
			require.Equal(t, e.Type, string(decoded.Type))
			if table := emulator.TableOf(e.Type); table != "" {
				o, _ := clerk.Object(table, e.ObjectID)
				user, known := clerk.Object("users", e.UserID)
				if gone := event.Type(e.Type).Deleted(); gone || !known || user.DeletedAt == 0 { // else it may have gone with its parent
					require.Equal(t, gone, o.DeletedAt != 0)
				}
			}
		}
	}
	id, events := clerk.SignUp()
	check(events, true)
	events, ok := clerk.Rename(id)
	check(events, ok)
	before, _ := clerk.Object("users", id)
	e, ok := clerk.Edit("users", id, map[string]any{"first_name": "Zoe"})
	check([]emulator.Event{e}, ok)
	after, _ := clerk.Object("users", id)
	require.Greater(t, after.UpdatedAt, before.UpdatedAt)
	require.Equal(t, "Zoe", gjson.GetBytes(after.JSON, "first_name").Str)
	e, ok = clerk.Edit("users", id, map[string]any{"first_name": "Ada", "updated_at": after.UpdatedAt})
	check([]emulator.Event{e}, ok)
	same, _ := clerk.Object("users", id)
	require.Equal(t, after.UpdatedAt, same.UpdatedAt, "the same version with other content")
	twin, e, ok := clerk.Twin("users", id)
	check([]emulator.Event{e}, ok)
	require.NotEqual(t, id, twin)
	events, ok = clerk.Leave(id)
	check(events, ok)
	require.Equal(t, "user.deleted", events[len(events)-1].Type)
	for table := range maps.Keys(clerk.State()) {
		for _, victim := range living(clerk, table)[:min(1, len(living(clerk, table)))] {
			if table == "sessions" || strings.HasPrefix(table, "sub") || table == "payment_attempts" {
				continue // these have no delete
			}
			e, ok := clerk.Remove(table, victim)
			check([]emulator.Event{e}, ok)
			_, ok = clerk.Remove(table, victim)
			require.False(t, ok)
		}
	}
	_, ok = clerk.Leave("user_none")
	require.False(t, ok)
	require.Empty(t, slices.Collect(clerk.Story(0)), "the story knows nothing of it")
}

func TestAPIRateLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		api := emulator.New(emulator.Config{}).API(emulator.APIConfig{Quota: 100})
		for range 100 {
			status, _, _ := ask(t, api, "/users/count")
			require.Equal(t, http.StatusOK, status)
		}
		time.Sleep(3500 * time.Millisecond)
		status, body, header := ask(t, api, "/users/count")
		require.Equal(t, http.StatusTooManyRequests, status)
		require.Equal(t, "7", header.Get("Retry-After"))
		canonical, _ := fixture.API("error_429")
		require.Equal(t, string(canonical), body)
		time.Sleep(7 * time.Second)
		status, _, _ = ask(t, api, "/users/count")
		require.Equal(t, http.StatusOK, status)
		require.Equal(t, 100, api.Peak())
		require.Equal(t, 102, api.RequestsTo("/v1/users/count"))
	})
}

func TestMoodsAreRead(t *testing.T) {
	t.Parallel()
	rates, err := emulator.ParseMoods("429=0.5, 502,,slow=0")
	require.NoError(t, err)
	require.Equal(t, map[emulator.Mood]float64{emulator.Limited: .5, emulator.BadGateway: 1, emulator.Slow: 0}, rates)
	_, err = emulator.ParseMoods("gloomy,429=2,502=x")
	require.ErrorContains(t, err, "gloomy")
	require.ErrorContains(t, err, "429")
	require.ErrorContains(t, err, "502")
	for _, mood := range emulator.Moods() {
		_, err := emulator.ParseMoods(string(mood))
		require.NoError(t, err)
	}
}

func TestACrowdIsLikeAStorysUsers(t *testing.T) {
	t.Parallel()
	crowd := emulator.NewCrowd(1234)
	canonical, _ := fixture.API("user_get")
	want, got := map[string]string{}, map[string]string{}
	fieldsOf(gjson.ParseBytes(canonical), "", want)
	fieldsOf(gjson.ParseBytes(crowd.Append(nil, 7)), "", got)
	for field := range want {
		if !empty(field, got) {
			assert.Contains(t, got, field)
		}
	}
	last := int64(0)
	seen := map[string]bool{}
	for o := range crowd.All() {
		require.True(t, json.Valid(o.JSON))
		require.Equal(t, o.ID, gjson.GetBytes(o.JSON, "id").Str)
		require.Equal(t, o.CreatedAt, gjson.GetBytes(o.JSON, "created_at").Int())
		require.Equal(t, o.UpdatedAt, gjson.GetBytes(o.JSON, "updated_at").Int())
		require.Greater(t, o.CreatedAt, last)
		require.False(t, seen[o.ID])
		last, seen[o.ID] = o.CreatedAt, true
		number, ok := crowd.Number(o.ID)
		require.True(t, ok)
		require.Equal(t, len(seen)-1, number)
	}
	for _, strange := range []string{"", "user_", "user_x", "user_38HzI2pYfb8qPaRGOtjol4SEChQ", emulator.NewCrowd(1235).ID(1234)} {
		_, ok := crowd.Number(strange)
		require.False(t, ok, strange)
	}
	api := emulator.New(emulator.Config{}).API(emulator.APIConfig{Crowd: crowd})
	for path, from := range map[string]int{"/users?limit=2": 1233, "/users?limit=2&order_by=-updated_at&offset=10": 1223, "/users?limit=2&starting_after=" + crowd.ID(500): 499} {
		_, body, _ := ask(t, api, path)
		require.Equal(t, []string{crowd.ID(from), crowd.ID(from - 1)}, ids(body), path)
	}
	status, body, _ := ask(t, api, "/users/"+crowd.ID(5))
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, string(crowd.Append(nil, 5)), body)
	status, _, _ = ask(t, api, "/users/user_x")
	require.Equal(t, http.StatusNotFound, status)
}

// BenchmarkAPI serves a crowd without a network.
func BenchmarkAPI(b *testing.B) {
	crowd := emulator.NewCrowd(100_000)
	api := emulator.New(emulator.Config{}).API(emulator.APIConfig{Crowd: crowd})
	for b.Loop() {
		for after := ""; ; {
			req := httptest.NewRequestWithContext(b.Context(), http.MethodGet, "/v1/users?limit=500&order_by=%2Bcreated_at&starting_after="+after, nil)
			if after == "" {
				req = httptest.NewRequestWithContext(b.Context(), http.MethodGet, "/v1/users?limit=500&order_by=%2Bcreated_at", nil)
			}
			req.Header.Set("Authorization", "Bearer "+emulator.DefaultKey)
			w := httptest.NewRecorder()
			api.ServeHTTP(w, req)
			require.Equal(b, http.StatusOK, w.Code)
			_, _ = io.Discard.Write(w.Body.Bytes())
			if after == crowd.ID(crowd.Size()-1) {
				break
			}
			number := 499
			if after != "" {
				n, _ := crowd.Number(after)
				number = min(n+500, crowd.Size()-1)
			}
			after = crowd.ID(number)
		}
	}
	b.ReportMetric(float64(b.N*crowd.Size())/b.Elapsed().Seconds(), "users/s")
	b.ReportMetric(0, "ns/op")
}

func TestAPIOfAnInstanceWithoutFeatures(t *testing.T) {
	t.Parallel()
	clerk, _ := story(emulator.Config{Seed: 7}, 40)
	user, organization := living(clerk, "users")[0], living(clerk, "organizations")[0]
	of := "/organizations/" + organization
	for _, test := range []struct {
		feature emulator.Feature
		code    string
		paths   []string
	}{
		{emulator.Organizations, "organization_not_enabled_in_instance", []string{
			"/organizations", of, of + "/memberships", of + "/invitations", of + "/domains", "/organization_memberships", "/organization_invitations",
			"/organization_domains", "/organization_roles", "/organization_permissions", "/users/" + user + "/organization_memberships",
		}},
		{emulator.OrganizationDomains, "organization_domains_not_enabled", []string{"/organization_domains", of + "/domains"}},
		{emulator.Waitlist, "feature_not_enabled", []string{"/waitlist_entries"}},
	} {
		api := clerk.API(emulator.APIConfig{Without: []emulator.Feature{test.feature}})
		hidden := clerk.API(emulator.APIConfig{Without: []emulator.Feature{test.feature}, AbsentIsNotFound: true})
		for _, path := range test.paths {
			status, body, _ := ask(t, api, path)
			require.Equal(t, http.StatusForbidden, status, path)
			require.Equal(t, test.code, gjson.Get(body, "errors.0.code").Str, path)
			status, body, _ = ask(t, hidden, path)
			require.Equal(t, http.StatusNotFound, status, path)
			require.Equal(t, "resource_not_found", gjson.Get(body, "errors.0.code").Str, path)
		}
		status, _, _ := ask(t, api, "/users")
		require.Equal(t, http.StatusOK, status)
		api.SwitchOff()
		for _, path := range test.paths {
			status, _, _ := ask(t, api, path)
			require.Equal(t, http.StatusOK, status, "%s: it is on again", path)
		}
	}
}
