package ingest

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/stream"
)

// publishFunc is a Publisher.
type publishFunc func(ctx context.Context, e *event.Event) (stream.Ack, error)

func (f publishFunc) Publish(ctx context.Context, e *event.Event) (stream.Ack, error) {
	return f(ctx, e)
}

func TestSignatureVectors(t *testing.T) {
	t.Parallel()
	vectors := fixture.Vectors()
	require.Len(t, vectors.Vectors, 34)
	require.EqualValues(t, Tolerance/time.Second, vectors.ToleranceSeconds)
	reasons := map[string][]result{
		"no_match": {signatureMismatch}, "missing_headers": {headerMissing}, "invalid_headers": {headerMalformed},
		"too_old": {outOfTolerance}, "too_new": {outOfTolerance},
	}
	for _, v := range vectors.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			t.Parallel()
			var stored []*event.Event
			s, err := newService(Config{Sources: []Source{{Name: "clerk", Secrets: []string{v.Secret}}}}, Deps{
				Now: func() time.Time { return time.Unix(v.Now, 0) },
				Publisher: publishFunc(func(_ context.Context, e *event.Event) (stream.Ack, error) {
					stored = append(stored, e)
					return stream.Ack{}, nil
				}),
			})
			require.NoError(t, err)
			r := httptest.NewRequest(http.MethodPost, Path, strings.NewReader(v.Body))
			r.Header = v.HTTPHeader()
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			a := readAnswer(t, w.Result())
			if v.Valid {
				require.Equal(t, http.StatusAccepted, a.status)
				require.Len(t, stored, 1)
				assert.Equal(t, v.Body, string(stored[0].Raw))
				return
			}
			assert.Contains(t, reasons[v.Reason], result(a.body.Error.Code))
			assert.Empty(t, stored)
		})
	}
}

func TestSecretRules(t *testing.T) {
	t.Parallel()
	rules := fixture.Vectors().SecretRules
	require.Len(t, rules, 6)
	for _, rule := range rules {
		// In the settings and, past them, in the service's own configuration. A short key is refused
		// trimmed or not.
		settings, err := config.Load(config.Environ{"CLERK_WEBHOOK_SIGNING_SECRET=" + rule.Secret}, nil)
		if err == nil { // an empty variable counts as unset
			_, err = ConfigFrom(settings)
		}
		require.Error(t, err, "%q", rule.Secret)
		_, err = New(Config{Addr: "127.0.0.1:0", Sources: []Source{{Name: "clerk", Secrets: []string{rule.Secret}}}}, Deps{})
		require.Error(t, err, "%q", rule.Secret)
		var problems config.Problems
		require.ErrorAs(t, err, &problems)
		if rule.Secret != "" {
			assert.NotContains(t, err.Error(), `"`+rule.Secret+`"`)
		}
	}
	// What is long enough is trimmed and taken.
	settings, err := config.Load(config.Environ{"CLERK_WEBHOOK_SIGNING_SECRET= " + secret + "\n"}, nil)
	require.NoError(t, err)
	_, err = ConfigFrom(settings)
	require.NoError(t, err)
}

func TestTolerance(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_768_471_201, 0)
	for offset, want := range map[time.Duration]bool{
		0: true, 300 * time.Second: true, -300 * time.Second: true, 301 * time.Second: false, -301 * time.Second: false,
	} {
		assert.Equal(t, want, inTime(now.Add(offset).Unix(), now), offset)
	}
	half := now.Add(500 * time.Millisecond)
	assert.False(t, inTime(now.Unix()-300, half), "300.5 s old")
	assert.True(t, inTime(now.Unix()-299, half))
	assert.True(t, inTime(now.Unix()+300, half))
	assert.False(t, inTime(now.Unix()+301, half), "300.5 s ahead")
}

func FuzzVerify(f *testing.F) {
	for _, v := range fixture.Vectors().Vectors {
		h := v.HTTPHeader()
		f.Add(h.Get("svix-id"), h.Get("svix-timestamp"), h.Get("svix-signature"), []byte(v.Body))
	}
	hooks, err := newVerifier([]string{secret, oldSecret})
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, id, timestamp, signature string, body []byte) {
		h := http.Header{"Svix-Id": {id}, "Svix-Timestamp": {timestamp}, "Svix-Signature": {signature}}
		s, res := readHeaders(h)
		if res != "" {
			assert.Zero(t, s)
			return
		}
		if !hooks.matches(s, body) {
			return
		}
		// What matches is really signed with one of the secrets, and only this very body is.
		at := time.Unix(s.seconds, 0)
		assert.True(t, strings.Contains(signature, sign(t, secret, s.id, at, body)) ||
			strings.Contains(signature, sign(t, oldSecret, s.id, at, body)))
		assert.False(t, hooks.matches(s, append(body, 0)))
	})
}

func FuzzHandler(f *testing.F) {
	now := time.Now()
	stored := 0
	s, err := newService(Config{Sources: []Source{{Name: "clerk", Secrets: []string{secret}}}}, Deps{
		Now: func() time.Time { return now },
		Publisher: publishFunc(func(_ context.Context, e *event.Event) (stream.Ack, error) {
			stored++
			_ = stream.Message(e)
			return stream.Ack{}, nil
		}),
	})
	require.NoError(f, err)
	for _, typ := range fixture.Types() {
		body, _ := fixture.Event(typ)
		f.Add(http.MethodPost, Path, "msg_1", "", "", "", body, true)
	}
	f.Add(http.MethodGet, "/", "", "x", "y", "z", []byte("{"), false)
	f.Fuzz(func(t *testing.T, method, path, id, timestamp, signature, trace string, body []byte, signIt bool) {
		r := httptest.NewRequest(http.MethodPost, Path, strings.NewReader(string(body)))
		r.Method, r.URL.Path = method, path
		if signIt {
			timestamp, signature = itoa(now), sign(t, secret, id, now, body)
		}
		r.Header = http.Header{"Svix-Id": {id}, "Svix-Timestamp": {timestamp}, "Svix-Signature": {signature}, "Traceparent": {trace}}
		w, before := httptest.NewRecorder(), stored
		s.ServeHTTP(w, r)
		resp := w.Result()
		resp.Request = &http.Request{}
		a := readAnswer(t, resp)
		assert.Less(t, a.status, 500)
		assert.Equal(t, a.status == http.StatusAccepted, stored > before)
		if stored > before {
			assert.True(t, signIt)
			assert.Equal(t, id, a.body.ID)
		}
		assert.Zero(t, s.bodies.used)
	})
}
