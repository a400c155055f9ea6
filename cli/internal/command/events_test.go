package command

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/usherhq/usher/cli/internal/allinone"
	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/redact"
	"github.com/usherhq/usher/pkg/stream"
)

// row is a row of the delivery log.
type row struct {
	Handler, EventID, Type, Source, Origin, Status string
	ObjectID, UserID, Error, Reason, Effect        *string
	Attempts                                       int
	ReceivedAt, ProcessedAt                        time.Time
	DurationMS                                     int64 `gorm:"column:duration_ms"`
	StreamSeq                                      int64
}

func ptr(s string) *string { return &s }

// filledLog is a log of 23 events of one and the same moment and 3 others, and a harness to list them.
func filledLog(t *testing.T, url string) (*harness, time.Time) {
	t.Helper()
	db := openDatabase(t, url)
	_, err := database.Migrate(t.Context(), db)
	require.NoError(t, err)
	moment := time.Now().UTC().Truncate(time.Millisecond).Add(-time.Hour)
	var rows []row
	add := func(id, typ string, at time.Time, more ...func(*row)) {
		r := row{
			Handler: "mirror", EventID: id, Type: typ, Source: "clerk", Origin: "webhook", Status: "processed", Attempts: 1,
			ObjectID: ptr("obj_" + id), UserID: ptr("user_1"), ReceivedAt: at, ProcessedAt: at.Add(time.Second), DurationMS: 3, StreamSeq: int64(len(rows) + 1),
		}
		for _, f := range more {
			f(&r)
		}
		rows = append(rows, r)
	}
	for i := range 23 { // letters of both cases: the order is that of bytes in both databases
		add(fmt.Sprintf("msg_%c%02d", "aBc"[i%3], i), "user.updated", moment)
	}
	add("msg_old", "session.created", moment.Add(-48*time.Hour), func(r *row) { r.UserID, r.Effect = ptr("user_2"), ptr("older") })
	add("msg_new", "user.deleted", moment.Add(30*time.Minute), func(r *row) { r.Source, r.Origin = "staging", "replay" })
	add("msg_bad", "", moment.Add(10*time.Minute), func(r *row) {
		r.Status, r.Error, r.Reason, r.UserID, r.ObjectID, r.Attempts = "dead", ptr("malformed event"), ptr("undecodable"), nil, nil, 4
	})
	add("msg_new", "user.deleted", moment.Add(30*time.Minute), func(r *row) {
		r.Source, r.Handler, r.Status, r.Error, r.Reason = "staging", "onboarding", "retrying", ptr("no mail"), ptr("handler_error")
	})
	require.NoError(t, db.Table("deliveries").Create(&rows).Error)
	return newHarness(t, "USHER_DATABASE_URL="+url), moment
}

func ids(events []listedEvent) []string {
	var list []string
	for _, e := range events {
		list = append(list, e.ID)
	}
	return list
}

func TestEventsList(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		t.Helper()
		h, moment := filledLog(t, url)
		list := func(args ...string) listing[listedEvent] {
			t.Helper()
			return into[listing[listedEvent]](h.Run(append([]string{"events", "list", "--output", "json"}, args...)...).want(exitOK))
		}
		all := list()
		require.Len(t, all.Items, 26)
		assert.Empty(t, all.Next)

		// Newest first, and events of one moment by id, downwards by bytes.
		assert.True(t, slices.IsSortedFunc(all.Items, func(a, b listedEvent) int {
			if c := b.ReceivedAt.Compare(a.ReceivedAt); c != 0 {
				return c
			}
			return strings.Compare(b.ID, a.ID)
		}), ids(all.Items))

		for _, size := range []string{"1", "4", "13", "25", "26"} {
			var paged []string
			pages, cursor := 0, ""
			for {
				page := list("--limit", size, "--cursor", cursor)
				paged = append(paged, ids(page.Items)...)
				pages++
				if cursor = page.Next; cursor == "" {
					break
				}
			}
			assert.Equal(t, ids(all.Items), paged, "pages of %s", size)
			if size == "4" {
				assert.Equal(t, 7, pages)
			}
		}

		newest := all.Items[0]
		assert.Equal(t, Head{
			ID: "msg_new", Type: "user.deleted", Source: "staging", Origin: "replay", ObjectID: "obj_msg_new", UserID: "user_1",
			ReceivedAt: moment.Add(30 * time.Minute), StreamSeq: 25,
		}, newest.Head)
		at := moment.Add(30*time.Minute + time.Second)
		assert.Equal(t, []delivery{
			{Handler: "mirror", Status: "processed", Attempts: 1, DurationMS: 3, ProcessedAt: &at},
			{Handler: "onboarding", Status: "retrying", Attempts: 1, DurationMS: 3, Error: "no mail", Reason: "handler_error", ProcessedAt: &at},
		}, newest.Deliveries)

		for args, want := range map[string][]string{
			"--type user.deleted":                     {"msg_new"},
			"--type *.deleted":                        {"msg_new"},
			"--type session.*":                        {"msg_old"},
			"--type use.*":                            nil,
			"--type USER.*":                           nil,
			"--user user_2":                           {"msg_old"},
			"--source staging":                        {"msg_new"},
			"--status dead":                           {"msg_bad"},
			"--status retrying":                       {"msg_new"},
			"--status discarded":                      nil,
			"--handler onboarding":                    {"msg_new"},
			"--handler onboarding --status processed": nil,
			"--since 45m":                             {"msg_new"},
			"--since 55m":                             {"msg_new", "msg_bad"},
			"--since " + moment.Add(20*time.Minute).Format(time.RFC3339): {"msg_new"},
			"--status processed --source staging":                        nil, // another handler retries it
			"--status processed --handler mirror --source staging":       {"msg_new"},
			"--effect older": {"msg_old"},
			"--effect older --user user_2 --status processed":      {"msg_old"},
			"--effect older --handler onboarding":                  nil,
			"--effect unknown_type":                                nil,
			"--effect unknown_type --status dead --handler mirror": nil,
			"--effect applied":                                     nil,
			"--status dead --handler mirror":                       {"msg_bad"},
			"--status retrying --handler mirror":                   nil,
			"--status retrying --user user_1":                      {"msg_new"},
			"--status processed --user user_2 --type session.*":    {"msg_old"},
			"--status dead --handler mirror --user user_1":         nil,
			"--status processed --user user_2":                     {"msg_old"},
		} {
			assert.Equal(t, want, ids(list(strings.Fields(args)...).Items), args)
		}
		assert.Len(t, list("--type", "*").Items, 26)
		assert.Len(t, list("--type", "user.*").Items, 24)
		assert.Len(t, list("--status", "processed").Items, 24)
		assert.Equal(t, "[]", gjson.Get(h.Run("events", "list", "--user", "x", "-o", "json").out, "items").Raw)

		assert.Len(t, lines[listedEvent](h.Run("events", "list", "-o", "ndjson").want(exitOK)), 26)
		page := h.Run("events", "list", "--limit", "2").want(exitOK)
		text := page.out
		assert.Regexp(t, `RECEIVED +ID +TYPE +USER +SOURCE +ORIGIN +DELIVERIES\n`, text)
		assert.Regexp(t, `msg_new +user.deleted +user_1 +staging +replay +mirror=processed onboarding=retrying\n`, text)
		assert.Regexp(t, `msg_bad +\(undecodable\) +- +clerk +webhook +mirror=dead\n$`, text)
		assert.Regexp(t, `^more: --cursor \S+\n$`, page.err)
		assert.Contains(t, h.Run("events", "list", "--cursor", "nonsense").want(exitUsage).err, "--cursor")
	})
}

func TestEventsWithoutADatabaseSayWhatToDo(t *testing.T) {
	t.Parallel()
	r := newHarness(t).Run("events", "list").want(exitUsage)
	assert.Contains(t, r.err, "does not exist")
	assert.Contains(t, r.err, "start one")

	file := filepath.Join(t.TempDir(), "usher.db")
	r = newHarness(t, "USHER_DATABASE_URL=sqlite:"+file).Run("events", "list").want(exitUsage)
	assert.Contains(t, r.err, "usher setup")
	assert.NoFileExists(t, file)

	openDatabase(t, "sqlite:"+file)
	r = newHarness(t, "USHER_DATABASE_URL=sqlite:"+file).Run("events", "list").want(exitUsage)
	assert.Contains(t, r.err, "migrations are pending")
}

func TestEventsFindTheDatabaseOfTheDataFolder(t *testing.T) {
	t.Parallel()
	// Nothing runs: the file of the last serve is read.
	h := newHarness(t)
	dir := strings.TrimPrefix(h.env[0], "USHER_DATA_DIR=")
	filledLog(t, "sqlite:"+filepath.Join(dir, "usher.db"))
	h.Run("events", "list").want(exitOK)

	// A running instance comes before the application's DATABASE_URL, and after USHER_DATABASE_URL.
	url := "sqlite:" + filepath.Join(t.TempDir(), "other.db")
	filledLog(t, url)
	running := newHarness(t, "DATABASE_URL=postgres://joe:hunter2@127.0.0.1:1/app")
	assert.Contains(t, running.Run("events", "list").want(exitUsage).err, "127.0.0.1:1")
	running.pretendRunning(allinone.State{DatabaseURL: url, DatabaseSchema: "usher"})
	running.Run("events", "list").want(exitOK)
	running.with("USHER_DATABASE_URL=sqlite:/does/not/exist.db").Run("events", "list").want(exitUsage)
}

func TestEventsShow(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, url string) {
		t.Helper()
		r := newRoad(t, url)
		user := r.trigger("user.created")[0].ID
		mail := r.trigger("email.created", "--set", `data.data.magic_link="https://x/?ticket=hunter2"`)[0].ID
		sms := r.trigger("sms.created")[0].ID
		r.settled(user, mail, sms)

		shown := r.Run("events", "show", user, "-o", "json").want(exitOK)
		e := into[shownEvent](shown)
		assert.Equal(t, user, e.ID)
		assert.Equal(t, "user.created", e.Type)
		assert.Equal(t, gjson.GetBytes(e.Body, "data.id").String(), e.UserID)
		require.Len(t, e.Deliveries, 1)
		assert.Equal(t, "processed", e.Deliveries[0].Status)
		assert.Empty(t, e.BodyNote)
		assert.Len(t, strings.Split(strings.TrimSpace(r.Run("events", "show", user, "-o", "ndjson").out), "\n"), 1)
		text := r.Run("events", "show", user).want(exitOK).out
		assert.Regexp(t, `mirror +processed +applied +1`, text)
		assert.Contains(t, text, "\n  \"data\": {\n")

		for _, id := range []string{mail, sms} {
			for _, format := range []string{"table", "json", "ndjson"} {
				out := r.Run("events", "show", id, "-o", format).want(exitOK).out
				assert.Contains(t, out, redact.Masked)
				assert.Contains(t, out, "verification_code")
				for _, secret := range []string{"123456", "hunter2", "Do not share"} {
					assert.NotContains(t, out, secret)
				}
			}
		}

		missing := r.Run("events", "show", "msg_nowhere").want(exitNo)
		assert.Empty(t, missing.out)
		assert.Contains(t, missing.err, "msg_nowhere")

		// A purged body and an absent broker leave what the log knows.
		s, err := r.js.Stream(t.Context(), stream.Events)
		require.NoError(t, err)
		require.NoError(t, s.Purge(t.Context()))
		e = into[shownEvent](r.Run("events", "show", user, "-o", "json").want(exitOK))
		assert.Contains(t, e.BodyNote, "no longer in the stream")
		assert.Equal(t, "null", string(e.Body))
		r.nats.Stop()
		e = into[shownEvent](r.Run("events", "show", user, "-o", "json").want(exitOK))
		assert.Contains(t, e.BodyNote, "no broker answers")
		r.nats.Start()
	})
}

func TestUndecodableEventsAreShownAsText(t *testing.T) {
	t.Parallel()
	r := newRoad(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"))
	res := r.RunIn(t.Context(), `{"type":`, "trigger", "--url", r.ingest, "--from-file", "-", "-o", "ndjson").want(exitOK)
	id := lines[sent](res)[0].ID
	r.settled(id)
	e := into[shownEvent](r.Run("events", "show", id, "-o", "json").want(exitOK))
	assert.Equal(t, "undecodable", e.Deliveries[0].Reason)
	var text string
	require.NoError(t, json.Unmarshal(e.Body, &text))
	assert.Equal(t, `{"type":`, text)
	assert.Contains(t, r.Run("events", "list").want(exitOK).out, "(undecodable)")
}

func TestACutMailIsRedactedWhole(t *testing.T) {
	t.Parallel()
	r := newRoad(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"))
	var cut []string
	for _, typ := range []string{"email.created", "sms.created"} {
		body, err := fixture.Make(typ)
		require.NoError(t, err)
		require.Contains(t, string(body), "123456")
		for _, n := range []int{3, 20, 60} { // the type, too, is cut, or gone
			res := r.RunIn(t.Context(), string(body[:len(body)-n]), "trigger", "--url", r.ingest, "--from-file", "-", "-o", "ndjson").want(exitOK)
			cut = append(cut, lines[sent](res)[0].ID)
		}
	}
	r.settled(cut...)
	for _, id := range cut {
		for _, command := range []string{"events", "dlq"} {
			for _, format := range []string{"table", "json", "ndjson"} {
				out := r.Run(command, "show", id, "-o", format).want(exitOK).out
				assert.NotContains(t, out, "123456")
				assert.Contains(t, out, redact.Masked)
			}
		}
	}
}

func TestMaskKeepsOtherBodiesAndHidesEveryCode(t *testing.T) {
	t.Parallel()
	body := []byte(`{"data":{"body":"kept"},"type":"user.created"}`)
	out, note := mask("user.created", body)
	assert.Equal(t, string(body), string(out))
	assert.Empty(t, note)

	out, note = mask("sms.created", []byte(`{"data":"123456`))
	assert.NotContains(t, string(out), "123456")
	assert.Contains(t, note, "redacted")
	out, _ = mask("sms.created", []byte(`{"data":"123456"}`))
	assert.NotContains(t, string(out), "123456")
	out, _ = mask("", []byte(`{"data":{"object":"sms_message","message":"123456"}}`)) // without a type
	assert.NotContains(t, string(out), "123456")
	out, note = mask("", []byte(`{"data":{"object":"user","email_addresses":[{"object":"email_address"}]},"type":"user.cr`))
	assert.NotEmpty(t, out)
	assert.Equal(t, "no JSON", note)
	out, _ = mask("sms.created", []byte(`["123456"]`))
	assert.NotContains(t, string(out), "123456")
}

// publish stores a canonical event.
func publish(t *testing.T, js jetstream.JetStream, typ string, set ...fixture.PathValue) event.Event {
	t.Helper()
	body, err := fixture.Make(typ, set...)
	require.NoError(t, err)
	e, err := event.Decode(body)
	require.NoError(t, err)
	e.ID, e.Source, e.Origin, e.ReceivedAt = fixture.NewID(), "clerk", event.OriginWebhook, time.Now()
	_, err = js.PublishMsg(t.Context(), stream.Message(&e))
	require.NoError(t, err)
	return e
}

func TestTailShowsWhatIsStored(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	_, js := srv.Setup()
	h := newHarness(t, "USHER_NATS_URL="+srv.URL())
	created := publish(t, js, "user.created")
	ended := publish(t, js, "session.ended")
	deleted := publish(t, js, "user.deleted")
	mail := publish(t, js, "email.created")

	tail := func(args string) []string {
		t.Helper()
		var got []string
		for _, e := range lines[Head](h.Run(append([]string{"events", "tail", "--since", "1h", "-o", "json"}, strings.Fields(args)...)...).want(exitOK)) {
			got = append(got, e.ID)
		}
		return got
	}
	assert.Equal(t, []string{created.ID, ended.ID, deleted.ID, mail.ID}, tail("--limit 4"))
	assert.Equal(t, []string{created.ID, deleted.ID}, tail("--limit 2 --type user.*"))
	assert.Equal(t, []string{deleted.ID}, tail("--limit 1 --type *.deleted"))
	assert.Equal(t, []string{ended.ID}, tail("--limit 1 --type session.ended --source clerk"))
	assert.Equal(t, []string{ended.ID}, tail("--limit 1 --user "+ended.Object.UserID))

	events, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	infos, err := stream.ConsumerInfos(t.Context(), events)
	require.NoError(t, err)
	assert.Empty(t, infos, "it leaves no trace on the broker")

	out := h.Run("events", "tail", "--since", "1h", "--limit", "1").want(exitOK).out
	assert.Regexp(t, `^\d{4}-\S+Z  `+created.ID+`  user.created +`+created.Object.UserID+` +webhook\n$`, out)
	srv.Stop()
	assert.Contains(t, h.Run("events", "tail").want(exitUsage).err, "no broker answers")
}

// TestABrokerWithoutJetStreamIsNamed: whatever a command asks the broker for, the answer is no word of its client library's.
func TestABrokerWithoutJetStreamIsNamed(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t, func(o *server.Options) { o.JetStream = false })
	url := "sqlite:" + filepath.Join(t.TempDir(), "usher.db")
	db := openDatabase(t, url)
	_, err := database.Migrate(t.Context(), db)
	require.NoError(t, err)
	h := newHarness(t, "USHER_NATS_URL="+srv.URL(), "USHER_DATABASE_URL="+url)
	for _, args := range [][]string{
		{"events", "tail"},
		{"replay", "--handler", "mirror", "--since", "1h", "--yes"},
		{"events", "list", "--handler", "unknown"}, // asks for the consumers
		{"setup"},
	} {
		got := h.Run(args...)
		assert.NotEqual(t, exitOK, got.code, "%s", args)
		assert.Contains(t, got.err, stream.ErrNoJetStream.Error(), "%s", args)
		assert.NotContains(t, got.err, "nats: ", "%s", args)
	}
}

func TestTailFollowsUntilInterrupted(t *testing.T) {
	t.Parallel()
	r := newRoad(t, "sqlite:"+filepath.Join(t.TempDir(), "usher.db"))
	r.trigger("user.created") // before it began: not shown
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	var out, messages lockedBuffer
	code := make(chan int, 1)
	go func() {
		code <- Run(ctx, []string{"events", "tail", "-o", "ndjson"}, Env{Environ: r.env, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &messages})
	}()
	eventually := func(condition func() bool) {
		t.Helper()
		require.Eventually(t, condition, 60*time.Second, 5*time.Millisecond)
	}
	eventually(func() bool { return strings.Contains(messages.String(), "Following") })
	id := r.trigger("session.created")[0].ID
	eventually(func() bool { return strings.Contains(out.String(), id) })
	assert.Equal(t, 1, strings.Count(out.String(), "\n"))

	// The broker goes away and comes back: it goes on where it was.
	r.nats.Stop()
	r.nats.Start()
	var next string
	eventually(func() bool {
		res := r.Run("trigger", "user.updated", "--url", r.ingest, "-o", "ndjson")
		if res.code != exitOK {
			return false
		}
		next = lines[sent](res)[0].ID
		return true
	})
	eventually(func() bool { return strings.Contains(out.String(), next) })

	interrupt()
	assert.Equal(t, exitInterrupted, <-code)
}

func TestTailWithoutStreamsSaysSetup(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	assert.Contains(t, newHarness(t, "USHER_NATS_URL="+srv.URL()).Run("events", "tail").want(exitUsage).err, "usher setup")
}

// held is an output that nobody reads until it is closed.
type held chan struct{}

func (h held) Write(p []byte) (int, error) {
	<-h
	return len(p), nil
}

func TestTailHoldsAFewOfTheLargestEvents(t *testing.T) {
	t.Parallel()
	srv := natstest.New(t)
	_, js := srv.Setup()
	const n = 40
	for i := range n {
		e := event.Event{ID: fmt.Sprintf("msg_%d", i), Type: "user.created", Source: "clerk", Raw: make([]byte, 1<<20)}
		_, err := js.PublishMsg(t.Context(), stream.Message(&e))
		require.NoError(t, err)
	}
	h := newHarness(t, "USHER_NATS_URL="+srv.URL())
	out, code := make(held), make(chan int, 1)
	go func() {
		code <- Run(t.Context(), []string{"events", "tail", "--since", "1h", "--limit", fmt.Sprint(n)}, Env{Environ: h.env, Stdin: strings.NewReader(""), Stdout: out, Stderr: io.Discard})
	}()
	events, err := js.Stream(t.Context(), stream.Events)
	require.NoError(t, err)
	var sent uint64
	require.Eventually(t, func() bool { // until the broker has answered all that was asked for
		for info := range events.ListConsumers(t.Context()).Info() {
			sent = info.Delivered.Consumer
			return sent > 0 && (info.NumWaiting == 0 || info.NumPending == 0)
		}
		return false
	}, 60*time.Second, 5*time.Millisecond)
	assert.LessOrEqual(t, sent, uint64(8))
	close(out)
	assert.Equal(t, exitOK, <-code)
}
