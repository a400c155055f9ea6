package command

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/fixture"
)

func TestTriggerTakesTheRealRoad(t *testing.T) {
	t.Parallel()
	r := newRoad(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"))

	t.Run("EveryTypeAndVariantIsAccepted", func(t *testing.T) {
		seen := map[string]bool{}
		types := lines[triggerType](r.Run("trigger", "--list", "-o", "ndjson").want(exitOK))
		require.Len(t, types, 57)
		for _, typ := range types {
			all := r.trigger(typ.Type)
			require.Len(t, all, 1)
			assert.Equal(t, 202, all[0].Status)
			assert.False(t, all[0].Duplicate)
			assert.NotEmpty(t, all[0].Type)
			assert.False(t, seen[all[0].ID])
			seen[all[0].ID] = true
		}
	})
	t.Run("SetsReachTheBody", func(t *testing.T) {
		all := r.trigger("user.created", "--set", "data.first_name=Zoë", "--set", `data.public_metadata={"plan":"pro"}`)
		r.settled(all[0].ID)
		shown := r.Run("events", "show", all[0].ID, "-o", "json").want(exitOK)
		assert.Equal(t, "Zoë", gjson.Get(shown.out, "body.data.first_name").String())
		assert.Equal(t, "pro", gjson.Get(shown.out, "body.data.public_metadata.plan").String())
	})
	t.Run("CountSendsEventsOfTheirOwn", func(t *testing.T) {
		all := r.trigger("session.created", "--count", "25", "--parallel", "5")
		ids := map[string]bool{}
		for _, s := range all {
			ids[s.ID] = true
		}
		assert.Len(t, ids, 25)
		res := r.Run("trigger", "--url", r.ingest, "user.created", "--count", "3", "-o", "json").want(exitOK)
		assert.Len(t, into[listing[sent]](res).Items, 3)
		assert.Contains(t, res.err, "3 sent: 3 accepted, 0 refused")
	})
	t.Run("RateLimits", func(t *testing.T) {
		start := time.Now()
		r.trigger("user.created", "--count", "5", "--rate", "40")
		assert.GreaterOrEqual(t, time.Since(start), 4*time.Second/40)
	})
	t.Run("TableHasALinePerEvent", func(t *testing.T) {
		res := r.Run("trigger", "--url", r.ingest, "user.created", "--count", "2").want(exitOK)
		assert.Regexp(t, `^ID +TYPE +STATUS +DUPLICATE +ERROR\n(msg_\w{27}  user.created +202 +false\n){2}$`, res.out)
	})
	t.Run("FromFileSendsTheBytes", func(t *testing.T) {
		body := `{"type":"user.created","data":{"id":"user_file","created_at":1},  "object":"event"}`
		file := filepath.Join(t.TempDir(), "e.json")
		require.NoError(t, os.WriteFile(file, []byte(body), 0o600))
		all := r.trigger("--from-file", file)
		assert.Equal(t, "user.created", all[0].Type)
		res := r.RunIn(t.Context(), "not json", "trigger", "--url", r.ingest, "--from-file", "-", "-o", "ndjson").want(exitOK)
		assert.Contains(t, res.err, "is no event")
		assert.Equal(t, 202, lines[sent](res)[0].Status)
	})
	t.Run("WhatIsNoUTF8IsShownAsJSON", func(t *testing.T) {
		body := "{\"type\":\"user.created\",\"data\":{\"id\":\"user_odd\",\"first_name\":\"a\xff\"}}"
		id := lines[sent](r.RunIn(t.Context(), body, "trigger", "--url", r.ingest, "--from-file", "-", "-o", "ndjson").want(exitOK))[0].ID
		r.settled(id)
		for _, format := range []string{"json", "ndjson"} {
			shown := r.Run("events", "show", id, "-o", format).want(exitOK)
			assert.True(t, utf8.ValidString(shown.out), format)
			assert.Equal(t, "a\uFFFD", gjson.Get(shown.out, "body.data.first_name").String())
			assert.Contains(t, gjson.Get(shown.out, "body_note").String(), "not UTF-8")
		}
	})
	t.Run("AnotherSourceHasItsOwnSecret", func(t *testing.T) {
		staging := r.with("USHER_SOURCE_STAGING_SIGNING_SECRET=" + stagingSecret)
		res := staging.Run("trigger", "user.created", "--url", r.ingest+"/staging", "-o", "ndjson").want(exitOK)
		id := lines[sent](res)[0].ID
		r.settled(id)
		assert.Equal(t, "staging", gjson.Get(r.Run("events", "show", id, "-o", "json").out, "source").String())
	})
	t.Run("RefusedIsExitCode1", func(t *testing.T) {
		res := r.with("CLERK_WEBHOOK_SIGNING_SECRET="+stagingSecret).Run("trigger", "user.created", "--url", r.ingest, "-o", "json").want(exitNo)
		item := into[listing[sent]](res).Items[0]
		assert.Equal(t, 401, item.Status)
		assert.Contains(t, item.Error, "signature_mismatch")
		assert.Contains(t, res.err, "secret of CLERK_WEBHOOK_SIGNING_SECRET")
		assert.NotContains(t, res.err+res.out, stagingSecret)
		r.Run("trigger", "user.created", "--url", r.ingest+"/nowhere").want(exitNo)
	})
	t.Run("TheRunningInstanceIsFound", func(t *testing.T) {
		h := newHarness(t)
		h.pretendRunning(allinone.State{IngestURL: r.ingest, SigningSecret: fixture.Secret})
		h.Run("trigger", "user.created").want(exitOK)
		other := h.with("CLERK_WEBHOOK_SIGNING_SECRET=" + stagingSecret)
		other.Run("trigger", "user.created").want(exitNo) // the environment comes first
		serve := newHarness(t)
		serve.pretendRunning(allinone.State{IngestURL: r.ingest})
		assert.Contains(t, serve.Run("trigger", "user.created").want(exitUsage).err, "set CLERK_WEBHOOK_SIGNING_SECRET")
	})
}

func TestTriggerOfAnUnknownTypeNamesNearOnes(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	for typ, near := range map[string]string{
		"user.craeted":         "user.created",
		"User.Created":         "user.created",
		"sesion.created":       "session.created",
		"organizationX.gone":   "--list",
		"user.vanished":        "user.deleted",
		"session":              "session.ended",
		"paymentAttempt.creat": "paymentAttempt.created",
	} {
		r := h.Run("trigger", typ).want(exitUsage)
		assert.Contains(t, r.err, near, typ)
		assert.Contains(t, r.err, typ)
	}
}

func TestTriggerSaysWhatASetWouldAdd(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var bodies []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		bodies = append(bodies, string(body))
		mu.Unlock()
		w.WriteHeader(http.StatusAccepted)
	}))
	defer srv.Close()
	h := newHarness(t, "CLERK_WEBHOOK_SIGNING_SECRET="+fixture.Secret)
	for set, meant := range map[string]string{
		"first_name=Ada": "data.first_name", "data.frist_name=Ada": "data.first_name", "data.email_address=a@example.com": "data.email_addresses.0.email_address",
		"unsafe_metadata.plan=pro": "data.unsafe_metadata.plan", "frist_name=Ada": "data.first_name", "dta.first_name=Ada": "data.first_name",
	} {
		r := h.Run("trigger", "user.created", "--url", srv.URL, "--set", set).want(exitUsage)
		assert.Contains(t, r.err, "did you mean "+meant+"?", set)
	}
	for _, set := range []string{"data..first_name=Ada", ".data=1", "data.=1"} {
		assert.Contains(t, h.Run("trigger", "user.created", "--url", srv.URL, "--set", set).want(exitUsage).err, "a name in the path is empty", set)
	}
	assert.Empty(t, bodies, "nothing was sent")
	for set, path := range map[string]string{
		"data.shoe_size=42": "data.shoe_size", "data.unsafe_metadata.newsleter=1": "data.unsafe_metadata.newsleter", "data.email_addresses.1.email_address=b@example.com": "data.email_addresses.1.email_address",
	} {
		r := h.Run("trigger", "user.created", "--url", srv.URL, "--set", set).want(exitOK)
		assert.Contains(t, r.err, "note: --set "+path+": user.created has no such field: it is added", set)
		assert.True(t, gjson.Get(bodies[len(bodies)-1], path).Exists(), set)
	}
	r := h.Run("trigger", "user.created", "--url", srv.URL, "--set", "data.first_name=Ada").want(exitOK)
	assert.NotContains(t, r.err, "note:")
}

func TestTriggerWithCountIsOfDifferentPeople(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	names, addresses, ids := map[string]bool{}, map[string]bool{}, map[string]bool{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		data := gjson.GetBytes(body, "data")
		mu.Lock()
		names[data.Get("first_name").String()+data.Get("last_name").String()] = true
		addresses[data.Get("email_addresses.0.email_address").String()] = true
		ids[data.Get("id").String()] = true
		mu.Unlock()
		w.WriteHeader(http.StatusAccepted)
	}))
	defer srv.Close()
	h := newHarness(t, "CLERK_WEBHOOK_SIGNING_SECRET="+fixture.Secret)
	h.Run("trigger", "user.created", "--url", srv.URL, "--count", "100").want(exitOK)
	assert.Len(t, names, 100)
	assert.Len(t, addresses, 100)
	assert.Len(t, ids, 100)
}

func TestTriggerWithoutAnIngestSaysWhatToDo(t *testing.T) {
	t.Parallel()
	assert.Contains(t, newHarness(t).Run("trigger", "user.created").want(exitUsage).err, "--url")

	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	h := newHarness(t, "CLERK_WEBHOOK_SIGNING_SECRET="+fixture.Secret)
	r := h.Run("trigger", "user.created", "--count", "100", "--url", strings.Replace(closed.URL, "http://", "http://joe:hunter2@", 1)).want(exitUsage)
	assert.Contains(t, r.err, "no answer from the ingest")
	assert.NotContains(t, r.err, "hunter2")
}

func TestTriggerEndsWhenInterrupted(t *testing.T) {
	t.Parallel()
	ctx, interrupt := context.WithCancel(t.Context())
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusAccepted)
		interrupt()
	}))
	defer srv.Close()
	h := newHarness(t, "CLERK_WEBHOOK_SIGNING_SECRET="+fixture.Secret)
	r := h.RunIn(ctx, "", "trigger", "user.created", "--count", "1000", "--rate", "10", "--url", srv.URL, "-o", "json").want(exitInterrupted)
	assert.LessOrEqual(t, len(into[listing[sent]](r).Items), 2)
}
