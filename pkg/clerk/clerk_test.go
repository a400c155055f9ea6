package clerk_test

import (
	"context"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/emulator"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// crowded is an instance with a small story and about so many users besides.
func crowded(users int) *emulator.Clerk {
	c := told(60)
	one := alive(c, "users")[0]
	for range users {
		c.Twin("users", one)
	}
	return c
}

// world is an instance with a story and its API.
type world struct {
	*emulator.Clerk
	api *emulator.API
	url string
}

func told(users int) *emulator.Clerk {
	c := emulator.New(emulator.Config{Seed: 3})
	for range c.Story(users) {
	}
	return c
}

func serve(t testing.TB, c *emulator.Clerk, cfg emulator.APIConfig) *world {
	t.Helper()
	w := &world{Clerk: c, api: c.API(cfg)}
	server := httptest.NewServer(w.api)
	t.Cleanup(server.Close)
	w.url = server.URL + "/v1"
	return w
}

// reader is a client without a limit.
func (w *world) reader(t testing.TB, change ...func(*clerk.Config)) *clerk.Client {
	t.Helper()
	cfg := clerk.Config{BaseURL: w.url, SecretKey: emulator.DefaultKey, Quota: -1}
	for _, do := range change {
		do(&cfg)
	}
	c, err := clerk.New(cfg)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

// read reads all pages from a cursor on.
func read(ctx context.Context, c *clerk.Client, resource string, order clerk.Order, cursor string) (ids []string, pages []clerk.Page, err error) {
	for page, err := range c.Pages(ctx, resource, order, cursor) {
		if err != nil {
			return ids, pages, err
		}
		pages = append(pages, page)
		for _, o := range page.Objects {
			ids = append(ids, o.ID)
		}
	}
	return ids, pages, nil
}

func alive(c *emulator.Clerk, table string) (ids []string) {
	for o := range c.Objects(table) {
		ids = append(ids, o.ID)
	}
	return ids
}

func TestEveryResourceIsReadWhole(t *testing.T) {
	t.Parallel()
	w := serve(t, crowded(700), emulator.APIConfig{})
	c := w.reader(t)
	for _, resource := range clerk.Resources() {
		t.Run(resource, func(t *testing.T) {
			t.Parallel()
			want := alive(w.Clerk, resource)
			require.NotEmpty(t, want)
			got, pages, err := read(t.Context(), c, resource, clerk.Created, "")
			require.NoError(t, err)
			if clerk.Sorted(resource, clerk.Created) {
				require.Equal(t, want, got)
			} else {
				require.ElementsMatch(t, want, got)
			}
			require.Empty(t, pages[len(pages)-1].Cursor)
			for _, page := range pages {
				for _, o := range page.Objects {
					there, _ := w.Object(resource, o.ID)
					require.Equal(t, string(there.JSON), string(o.Raw), "raw is kept whole")
					require.Equal(t, there.CreatedAt, o.CreatedAt)
					require.Equal(t, there.UpdatedAt, o.UpdatedAt)
				}
			}
			n, err := c.Count(t.Context(), resource)
			require.NoError(t, err)
			require.EqualValues(t, len(want), n)
		})
	}
}

func TestAnAddressWithoutAVersionGetsOne(t *testing.T) {
	t.Parallel()
	w := serve(t, told(3), emulator.APIConfig{})
	for _, address := range []string{w.url, w.url + "/", strings.TrimSuffix(w.url, "/v1"), strings.TrimSuffix(w.url, "v1")} {
		n, err := w.reader(t, func(c *clerk.Config) { c.BaseURL = address }).Count(t.Context(), "users")
		require.NoError(t, err, address)
		require.Positive(t, n)
	}
}
