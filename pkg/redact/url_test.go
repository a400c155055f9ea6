package redact

import (
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestURL(t *testing.T) {
	for in, want := range map[string]string{
		"": "",
		"postgres://ann:hush@h:5432/db?sslmode=require":    "postgres://ann:redacted@h:5432/db?sslmode=require",
		"postgres://h/db?user=ann&password=hush":           "postgres://h/db?user=redacted&password=redacted",
		"postgres://ann@h/db":                              "postgres://ann@h/db",
		"postgres://ann:hush@h1:1,h2:2/db":                 "postgres://ann:redacted@h1:1,h2:2/db",
		"postgres:///db?host=/run/postgresql":              "postgres:///db?host=redacted",
		"nats://hush@h:4222":                               "nats://redacted@h:4222",
		"nats://u:hush@h1:4222,nats://u:hush@h2:4222":      "nats://u:redacted@h1:4222,nats://u:redacted@h2:4222",
		"nats://u:hush@h1:4222, nats://u:hush@h2:4222":     "nats://u:redacted@h1:4222,nats://u:redacted@h2:4222",
		"nats://h1:4222,nats://h2:4222":                    "nats://h1:4222,nats://h2:4222",
		"nats://u:hush@h1:4222,u:hush@h2:4222":             "nats://u:redacted@h2:4222",
		"u:hush@h1:4222,u:hush@h2:4222":                    "u:redacted@h2:4222",
		"h1:4222,h2:4222":                                  "h1:4222,h2:4222",
		"u:hush@h:4222":                                    "u:redacted@h:4222",
		"nats://u:hush@h1,nats://v:hush@h2":                Masked, // "hush@h1,nats://v" may be a part of a password
		"nats://[::1]:4222":                                "nats://[::1]:4222",
		"sqlite:usher-data/usher.db":                       "sqlite:usher-data/usher.db",
		"sqlite:postgres://u:hush@h":                       Masked,
		"postgres://ann:hu sh@h/%zz":                       Masked,
		"postgres://ann:hu@sh@h/db":                        "postgres://ann:redacted@h/db",
		"postgres://ann:hu/sh@h/db":                        Masked,
		"postgres://ann:12#hush@h/db":                      Masked,
		"postgres://ann:12?hush@h/db":                      Masked,
		"postgres://ann:12?a=hush@h/db":                    Masked,
		"postgres://h/db?user=ann&password=12,nats://hush": Masked,
		"joe:hush": Masked,
		"smtp://me@example.com:hush@mail.example.com?tls=none":  "smtp://redacted@mail.example.com?tls=none",
		"postgres://h/db?sslmode=hu%20sh":                       "postgres://h/db?sslmode=redacted",
		"postgres://h/db?hush":                                  Masked,
		"postgres://joe:hush@db.example.com/app?options=-c%20x": "postgres://joe:redacted@db.example.com/app?options=redacted",
	} {
		assert.Equal(t, want, URL(in), in)
	}
}

func TestHasPassword(t *testing.T) {
	for in, want := range map[string]bool{
		"": false, "nats://h:1": false, "sqlite:x": false, "postgres://u@h/db": false, "nats://h:1,h:2": false,
		"nats://tok@h": true, "postgres://u:p@h/db": true, "u:p@h": true, "postgres://h/db?password=x": true, "postgres://u:p/q@h": true,
	} {
		assert.Equal(t, want, HasPassword(in), in)
	}
}

// shapes are URLs around a password.
var shapes = []func(password string) string{
	func(p string) string { return "postgres://user1:" + p + "@db.example.com:5432/app?sslmode=require" },
	func(p string) string { return "postgresql://user1:" + p + "@db.example.com" },
	func(p string) string { return "postgres://db.example.com/app?user=user1&password=" + p },
	func(p string) string { return "nats://user1:" + p + "@nats.example.com:4222" },
	func(p string) string { return "nats://" + p + "@nats.example.com:4222" },
	func(p string) string {
		return "nats://user1:" + p + "@nats1.example.com:4222,nats://user1:" + p + "@nats2.example.com:4222"
	},
	func(p string) string {
		return "nats://user1:" + p + "@nats1.example.com:4222, user1:" + p + "@nats2.example.com:4222"
	},
	func(p string) string { return "user1:" + p + "@nats1.example.com,user1:" + p + "@nats2.example.com" },
	func(p string) string { return p + "@nats.example.com:4222" },
	func(p string) string { return "http://user1:" + p + "@127.0.0.1:8222" },
	func(p string) string { return "smtps://user1@example.com:" + p + "@mail.example.com" },
	func(p string) string { return "smtp://user1:" + p + "@mail.example.com:587?tls=required" },
}

func TestCheckURL(t *testing.T) {
	for _, bad := range []string{
		"postgres://ann:hu/sh@h/db", "postgres://ann:hu@sh@h/db", "postgres://ann:12#hush@h/db", "postgres://ann:12?hush@h/db", "postgres://ann:12?a=hush@h/db", "nats://a,nats://u:p/q@h",
	} {
		err := CheckURL(bad)
		require.ErrorIs(t, err, ErrAmbiguous, bad)
		assert.NotContains(t, err.Error(), "hush")
		require.Error(t, CheckURLs(bad), bad)
	}
	for _, good := range []string{"", "sqlite:/srv/a@b#c", "postgres://ann:hu%2Fsh@h/db?sslmode=require", "nats://a,nats://b", "a:1,b:2"} {
		require.NoError(t, CheckURL(good), good)
	}
	require.Error(t, CheckURLs("nats://u:12,hush@h"), "the client reads two servers")
	require.NoError(t, CheckURLs("nats://u:p@a, nats://u:p@b,u:p@c"))
}

// TestNoTailOfAPasswordIsShown: whatever its characters, and however it was written. What a client would read otherwise than it was
// meant is refused, unless it reads only the password otherwise.
func TestNoTailOfAPasswordIsShown(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		password := rapid.StringOfN(rapid.OneOf(rapid.RuneFrom([]rune("XYZQ0189@:/?#,%&= [].\\+é")), rapid.Rune()), 4, 24, -1).Draw(t, "password")
		shape := rapid.SampledFrom(shapes).Draw(t, "shape")
		written := password
		switch rapid.IntRange(0, 2).Draw(t, "encoding") {
		case 1:
			written = url.QueryEscape(password)
		case 2:
			written = url.PathEscape(password)
		}
		in := shape(written)
		NoTail(t, in, shape("w"), URL(in), password, written)
	})
}

// NoTail fails where shown has a tail of a password that is not in frame, the URL around it.
func NoTail(t require.TestingT, in, frame, shown string, passwords ...string) {
	for _, password := range passwords {
		runes := []rune(password)
		if len(runes) < 4 {
			continue
		}
		tail := string(runes[len(runes)-4:])
		if strings.Contains(URL(frame), tail) {
			continue
		}
		require.NotContains(t, shown, tail, "%q shows a tail of its password", in)
	}
}

func FuzzURL(f *testing.F) {
	for _, seed := range []string{"hunter2", "p@ss", "a/b@c", "12#34", "12?a=3456", "a,b", "%zz", ":::::"} {
		f.Add(seed, uint8(0))
	}
	f.Fuzz(func(t *testing.T, password string, shape uint8) {
		with := shapes[int(shape)%len(shapes)]
		in := with(password)
		NoTail(t, in, with("w"), URL(in), password)
		_ = CheckURL(in)
		_ = CheckURLs(in)
	})
}
