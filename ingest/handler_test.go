package ingest

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

const userCreated = `{"data":{"id":"user_1","object":"user","created_at":1700000000000,"updated_at":1700000000000},"object":"event","type":"user.created","timestamp":1700000000000,"instance_id":"ins_1"}`

// TestAnswers is the table of the contract, case by case.
func TestAnswers(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_768_471_201, 0)
	b := setup(t, func(_ *Config, d *Deps) { d.Now = func() time.Time { return now } })
	set := func(kv ...string) http.Header {
		h := http.Header{}
		for i := 0; i < len(kv); i += 2 {
			h[http.CanonicalHeaderKey(kv[i])] = []string{kv[i+1]}
		}
		return h
	}
	without := func(names ...string) http.Header {
		h := http.Header{}
		for _, n := range names {
			h[http.CanonicalHeaderKey(n)] = nil
		}
		return h
	}
	for name, c := range map[string]struct {
		delivery
		status int
		code   result
	}{
		"verified":                          {delivery{body: []byte(userCreated)}, 202, accepted},
		"default source by its name":        {delivery{path: Path + "/clerk", body: []byte(userCreated)}, 202, accepted},
		"other source":                      {delivery{path: Path + "/eu", secret: euSecret, body: []byte(userCreated)}, 202, accepted},
		"older secret":                      {delivery{secret: oldSecret, body: []byte(userCreated)}, 202, accepted},
		"unknown type":                      {delivery{body: []byte(`{"type":"moon.landed","data":{}}`)}, 202, accepted},
		"not JSON":                          {delivery{body: []byte("\x00\xff not JSON")}, 202, undecodable},
		"empty body":                        {delivery{}, 202, undecodable},
		"a type that no header can hold":    {delivery{body: []byte(`{"type":"a\r\nNats-Rollup: all","data":{}}`)}, 202, undecodable},
		"a type of a megabyte":              {delivery{body: []byte(`{"type":"` + strings.Repeat("a", 900_000) + `","data":{}}`)}, 202, undecodable},
		"largest body":                      {delivery{body: make([]byte, 1<<20)}, 202, undecodable},
		"longest id":                        {delivery{id: strings.Repeat("i", 255)}, 202, undecodable},
		"a clock 300 s behind":              {delivery{at: now.Add(-300 * time.Second)}, 202, undecodable},
		"a clock 300 s ahead":               {delivery{at: now.Add(300 * time.Second)}, 202, undecodable},
		"a query":                           {delivery{path: Path + "?a=b"}, 202, undecodable},
		"secret of another source":          {delivery{path: Path + "/eu"}, 401, signatureMismatch},
		"other source's on the default":     {delivery{secret: euSecret}, 401, signatureMismatch},
		"no id":                             {delivery{header: without("svix-id")}, 400, headerMissing},
		"no timestamp":                      {delivery{header: without("svix-timestamp")}, 400, headerMissing},
		"no signature":                      {delivery{header: without("svix-signature")}, 400, headerMissing},
		"no headers at all":                 {delivery{header: without("svix-id", "svix-timestamp", "svix-signature")}, 400, headerMissing},
		"empty signature":                   {delivery{header: set("svix-signature", "")}, 400, headerMissing},
		"timestamp is no number":            {delivery{header: set("svix-timestamp", "2026-01-15T10:00:01Z")}, 400, headerMalformed},
		"timestamp over 64 bits":            {delivery{header: set("svix-timestamp", "99999999999999999999")}, 400, headerMalformed},
		"id too long":                       {delivery{id: strings.Repeat("i", 257)}, 400, headerMalformed},
		"id with a space":                   {delivery{id: "msg_1 2"}, 400, headerMalformed},
		"id that is not ASCII":              {delivery{id: "msg_é"}, 400, headerMalformed},
		"timestamp at the end of time":      {delivery{header: set("svix-timestamp", "9223372036854775807")}, 401, outOfTolerance},
		"timestamp at its beginning":        {delivery{header: set("svix-timestamp", "-9223372036854775808")}, 401, outOfTolerance},
		"too old":                           {delivery{at: now.Add(-301 * time.Second)}, 401, outOfTolerance},
		"too new":                           {delivery{at: now.Add(301 * time.Second)}, 401, outOfTolerance},
		"forged signature":                  {delivery{header: set("svix-signature", "v1,AAAA")}, 401, signatureMismatch},
		"signature of another body":         {delivery{body: []byte("x"), header: set("svix-signature", sign(t, secret, "msg_2", now, nil))}, 401, signatureMismatch},
		"unknown source":                    {delivery{path: Path + "/us"}, 404, unknownSource},
		"source without a secret":           {delivery{path: Path + "/silent"}, 404, unknownSource},
		"source name with another case":     {delivery{path: Path + "/EU"}, 404, unknownSource},
		"GET":                               {delivery{method: http.MethodGet}, 405, methodNotAllowed},
		"HEAD":                              {delivery{method: http.MethodHead}, 405, methodNotAllowed},
		"OPTIONS":                           {delivery{method: http.MethodOptions}, 405, methodNotAllowed},
		"PUT at an unknown source":          {delivery{method: http.MethodPut, path: Path + "/us"}, 405, methodNotAllowed},
		"DELETE at a source":                {delivery{method: http.MethodDelete, path: Path + "/eu"}, 405, methodNotAllowed},
		"root":                              {delivery{path: "/"}, 404, notFound},
		"slash at the end":                  {delivery{path: Path + "/", body: []byte(userCreated)}, 202, accepted},
		"slash behind a source":             {delivery{path: Path + "/eu/", secret: euSecret, body: []byte(userCreated)}, 202, accepted},
		"two slashes at the end":            {delivery{path: Path + "//"}, 404, notFound},
		"deeper path":                       {delivery{path: Path + "/eu/x"}, 404, notFound},
		"path that only begins alike":       {delivery{path: Path + "x"}, 404, notFound},
		"encoded slash":                     {delivery{path: Path + "/eu%2Fx"}, 404, notFound},
		"dots":                              {delivery{path: Path + "/../clerk/eu"}, 404, notFound},
		"body over 1 MiB":                   {delivery{body: make([]byte, 1<<20+1)}, 413, bodyTooLarge},
		"too large comes before the time":   {delivery{body: make([]byte, 1<<20+1), at: now.Add(-time.Hour)}, 413, bodyTooLarge},
		"header comes before the size":      {delivery{body: make([]byte, 1<<20+1), header: without("svix-id")}, 400, headerMissing},
		"source comes before the header":    {delivery{path: Path + "/us", header: without("svix-id")}, 404, unknownSource},
		"time comes before the signature":   {delivery{at: now.Add(-time.Hour), header: set("svix-signature", "v1,AAAA")}, 401, outOfTolerance},
		"valid webhook-*, forged svix-*":    {delivery{header: set("svix-signature", "v1,AAAA", "webhook-id", "x", "webhook-timestamp", "1", "webhook-signature", "v1,BBBB")}, 401, signatureMismatch},
		"svix-* incomplete, webhook-* none": {delivery{header: set("svix-id", "", "webhook-id", "x")}, 400, headerMissing},
	} {
		t.Run(name, func(t *testing.T) {
			if c.id == "" {
				c.id = newID()
			}
			if c.at.IsZero() {
				c.at = now
			}
			before := b.counted(c.code)
			a := b.send(c.delivery)
			require.Equal(t, c.status, a.status, a.body.Error.Code)
			assert.InDelta(t, before+1, b.counted(c.code), 0, "metric")
			if c.status == http.StatusAccepted {
				assert.Equal(t, c.id, a.body.ID)
				require.NotNil(t, a.body.Duplicate)
				assert.False(t, *a.body.Duplicate)
				m := b.stored(c.id)
				assert.True(t, bytes.Equal(c.body, m.Data), "stored as sent")
				return
			}
			if c.method != http.MethodHead {
				assert.Equal(t, string(c.code), a.body.Error.Code)
				assert.NotEmpty(t, a.body.Error.Message)
			}
		})
	}
	for _, m := range b.all() {
		assert.Empty(t, m.Header.Get("Nats-Rollup"))
	}
}

func TestEveryRefusalIsAMetricFromTheStart(t *testing.T) {
	t.Parallel()
	b := setup(t)
	got := testutil.CollectAndCount(b.metrics.duration)
	assert.Equal(t, 1, got)
	families, err := b.registry.Gather()
	require.NoError(t, err)
	labels := map[string]bool{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetValue()] = true
			}
		}
	}
	for res, r := range refusals {
		assert.True(t, labels[string(res)], res)
		assert.Equal(t, r.status == http.StatusServiceUnavailable, r.retryAfter > 0, res)
		assert.NotEmpty(t, r.message, res)
	}
	assert.Subset(t, slices.Collect(maps.Keys(labels)), []string{"accepted", "duplicate", "undecodable"})
}

func TestStoredEventHoldsHeadersAndRawBytes(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 15, 10, 0, 1, 2, time.UTC)
	b := setup(t, func(_ *Config, d *Deps) { d.Now = func() time.Time { return at } })
	const trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	body := []byte(" \n" + strings.ReplaceAll(userCreated, ",", ", ") + "\n")
	a := b.send(delivery{path: Path + "/eu", secret: euSecret, id: "msg_raw", at: at, body: body, header: http.Header{"Traceparent": {trace}}})
	require.Equal(t, 202, a.status)
	m := b.stored("msg_raw")
	assert.Equal(t, body, m.Data)
	assert.Equal(t, "clerk.evt.eu.user.created.user_1", m.Subject)
	for name, want := range map[string]string{
		stream.HeaderEventID: "msg_raw", stream.HeaderType: "user.created", stream.HeaderSource: "eu", stream.HeaderOrigin: "webhook",
		stream.HeaderReceivedAt: "2026-01-15T10:00:01.000000002Z", stream.HeaderTraceParent: trace,
	} {
		assert.Equal(t, want, m.Header.Get(name), name)
	}
	require.Equal(t, 202, b.send(delivery{id: "msg_bad", at: at, body: []byte("{"), header: http.Header{"Traceparent": {"00-" + trace}}}).status)
	m = b.stored("msg_bad")
	assert.Equal(t, "clerk.evt.clerk._._._", m.Subject)
	assert.Empty(t, m.Header.Values(stream.HeaderTraceParent))
	assert.Equal(t, "{", string(m.Data))
}

func TestCodesAreNotStored(t *testing.T) {
	t.Parallel()
	b := setup(t)
	keeps := setup(t, func(c *Config, _ *Deps) { c.KeepMessages = true })
	for _, typ := range []string{"email.created", "sms.created"} {
		body, ok := fixture.Event(typ)
		require.True(t, ok)
		require.Contains(t, string(body), "123456")
		for name, sent := range map[string][]byte{"msg_" + typ: body, "msg_cut_" + typ: body[:len(body)-3]} {
			require.Equal(t, 202, b.send(delivery{id: name, body: sent}).status)
			first := b.stored(name)
			assert.NotContains(t, string(first.Data), "123456", name)
			require.Equal(t, 202, keeps.send(delivery{id: name, body: sent}).status)
			assert.Equal(t, sent, keeps.stored(name).Data, name)
			require.Equal(t, 202, b.send(delivery{id: name + "_again", body: sent}).status)
			assert.Equal(t, string(first.Data), string(b.stored(name+"_again").Data), "sent again it is the same")
		}
		m := b.stored("msg_" + typ)
		assert.Equal(t, typ, m.Header.Get(stream.HeaderType))
		e, err := event.Decode(body)
		require.NoError(t, err)
		e.Source = "clerk"
		assert.Equal(t, stream.Subject(&e), m.Subject)
		assert.Contains(t, string(m.Data), "verification_code")
	}
}

func TestDuplicateIsSaidSo(t *testing.T) {
	t.Parallel()
	b := setup(t)
	d := delivery{id: newID(), body: []byte(userCreated)}
	assert.False(t, *b.send(d).body.Duplicate)
	assert.True(t, *b.send(d).body.Duplicate)

	// A new process knows nothing of it: the broker does.
	again := setupOn(t, b.nats)
	a := again.send(d)
	assert.Equal(t, 202, a.status)
	assert.True(t, *a.body.Duplicate)
	assert.EqualValues(t, 1, b.count())
}

func TestStandardWebhooksHeaders(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := delivery{id: "msg_std", body: []byte(userCreated)}.request(t, "http://"+b.Addr())
	for _, n := range []string{"Id", "Timestamp", "Signature"} {
		r.Header.Set("Webhook-"+n, r.Header.Get("Svix-"+n))
		r.Header.Del("Svix-" + n)
	}
	a := b.do(r)
	assert.Equal(t, 202, a.status)
	assert.Equal(t, "msg_std", a.body.ID)
}

func TestUnannouncedBodies(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for size, status := range map[int]int{0: 202, 1: 202, firstRead: 202, firstRead + 1: 202, 100_000: 202, 1 << 20: 202, 1<<20 + 1: 413} {
		body := bytes.Repeat([]byte{'x'}, size)
		r := delivery{body: body}.request(t, "http://"+b.Addr())
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), -1
		assert.Equal(t, status, b.do(r).status, "%d bytes", size)
	}
	assert.Zero(t, b.bodies.used)
}

func TestBodyLimitFollowsTheBroker(t *testing.T) {
	t.Parallel()
	const most = 64 << 10
	b := setupOn(t, natstest.New(t, natstest.WithSync, func(o *server.Options) { o.MaxPayload = most }))
	assert.Equal(t, 202, b.send(delivery{body: make([]byte, most-stream.HeaderRoom), id: strings.Repeat("i", 255)}).status)
	assert.Equal(t, 413, b.send(delivery{body: make([]byte, most-stream.HeaderRoom+1)}).status)
}

func TestTraceParent(t *testing.T) {
	t.Parallel()
	const good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	assert.Equal(t, good, traceParent(http.Header{"Traceparent": {good}}))
	for _, bad := range []string{
		"", good + "0", good[1:], strings.ToUpper(good), "ff" + good[2:], strings.Replace(good, "-", "_", 1),
		"00-" + strings.Repeat("0", 32) + good[35:], good[:36] + strings.Repeat("0", 16) + good[52:], strings.Replace(good, "a", "\n", 1),
	} {
		assert.Empty(t, traceParent(http.Header{"Traceparent": {bad}}), strconv.Quote(bad))
	}
}
