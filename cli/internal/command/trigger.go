package command

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"github.com/tidwall/gjson"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/usherhq/usher/ingest"
	"github.com/usherhq/usher/pkg/emulator"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/fixture"
)

type triggerOptions struct {
	sets     []string
	count    int
	rate     float64
	parallel int
	url      string
	fromFile string
	list     bool
	output   output
}

func (c *cli) trigger() *cobra.Command {
	var o triggerOptions
	cmd := &cobra.Command{
		Use:   "trigger [TYPE]",
		Short: "Send signed events as Clerk would",
		Long: "trigger makes events of a type from canonical payloads, each of another person, signs them as Clerk's deliveries\n" +
			"are signed, and posts them to the ingest: the running `usher dev` or `usher serve` of the data folder, or --url.\n" +
			"They take the road of a real event.\n\n" +
			"Beside `usher dev` they happen at its offline Clerk: a session belongs to a user who is there, a membership to a\n" +
			"user and an organization, and what is missing for that is sent first; an update, an end or a deletion is of the\n" +
			"newest object, or of --set data.id=…; and `usher verify` finds no drift. Elsewhere every event has objects of its\n" +
			"own, which Clerk does not know.\n\n" +
			"The signing secret is CLERK_WEBHOOK_SIGNING_SECRET (the first of several), for the URL of another source\n" +
			"USHER_SOURCE_<NAME>_SIGNING_SECRET, else the one that the running `usher dev` made up.\n\n" +
			"Exit code 0: all were accepted. 1: some were refused. 2: wrong use, or the ingest could not be reached.",
		Example: "  usher trigger user.created\n" +
			"  usher trigger user.updated --set data.first_name=Zoë --set 'data.public_metadata={\"plan\":\"pro\"}'\n" +
			"  usher trigger session.created --count 1000 --rate 50 --output ndjson\n" +
			"  usher trigger --from-file captured.json\n" +
			"  usher trigger --list",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.list {
				return c.listTypes(o.output)
			}
			return c.runTrigger(cmd.Context(), args, o)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.sets, "set", nil, "set a value of the envelope, `PATH=VALUE` such as data.first_name=Ada (JSON where it is valid JSON; a path that the event does not have is added, and said); repeatable")
	f.IntVar(&o.count, "count", 1, "events to send")
	f.Float64Var(&o.rate, "rate", 0, "most events per second (0: as fast as they are answered)")
	f.IntVar(&o.parallel, "parallel", 8, "events on their way at once")
	f.StringVar(&o.url, "url", "", "webhook URL to post to (default: the running instance's)")
	f.StringVar(&o.fromFile, "from-file", "", "send the envelope in this `FILE` as it is instead of a canonical one (- for stdin)")
	f.BoolVar(&o.list, "list", false, "print the types and variants that can be sent")
	outputFlag(cmd, &o.output)
	return cmd
}

// triggerType is one line of `usher trigger --list`.
type triggerType struct {
	Type string `json:"type"`
	Kind string `json:"kind"` // event, or variant: an odd but possible payload
}

func (c *cli) listTypes(o output) error {
	var list listing[triggerType]
	for _, name := range fixture.Types() {
		list.Items = append(list.Items, triggerType{name, "event"})
	}
	for _, name := range fixture.Variants() {
		list.Items = append(list.Items, triggerType{name, "variant"})
	}
	return printListing(c.env.Stdout, o, list, []string{"type", "kind"}, func(t triggerType) []string { return []string{t.Type, t.Kind} })
}

// sent is what became of one event.
type sent struct {
	ID         string  `json:"id"`
	Type       string  `json:"type"`
	Status     int     `json:"status"` // of HTTP
	Duplicate  bool    `json:"duplicate"`
	DurationMS float64 `json:"duration_ms"`
	Error      string  `json:"error"` // code and message of a refusal

	object string // the id of what it is about
	before bool   // it was not asked for: another one needs it
}

func (s sent) accepted() bool { return s.Status/100 == 2 }

func (c *cli) runTrigger(ctx context.Context, args []string, o triggerOptions) error {
	switch {
	case o.count < 1:
		return fmt.Errorf("--count %d: want at least 1", o.count)
	case o.rate < 0:
		return fmt.Errorf("--rate %v: want events per second, or 0 for no limit", o.rate)
	case o.parallel < 1 || o.parallel > 256:
		return fmt.Errorf("--parallel %d: want 1 to 256", o.parallel)
	}
	wish, err := c.wish(args, o)
	if err != nil {
		return err
	}
	to, err := c.target(o)
	if err != nil {
		return err
	}
	out := newSentPrinter(c.env.Stdout, o.output)
	bar := c.bar(o)
	start := time.Now()
	err = to.sendAll(ctx, o, wish, func(s sent) {
		if s.before {
			c.say("note: %s %s was sent first (%s, status %d): %s needs it", s.Type, s.object, s.ID, s.Status, wish.Type)
			return
		}
		out.add(s)
		_ = bar.Add(1)
	})
	took := time.Since(start)
	_ = bar.Finish()
	err = errors.Join(err, out.end())
	c.summary(out, took)
	switch {
	case err != nil:
		return err
	case ctx.Err() != nil:
		return ctx.Err() //nolint:wrapcheck // an interrupt, which Run reports
	case out.refused > 0:
		if out.unauthorized {
			_, _ = fmt.Fprintf(c.env.Stderr, "The signature was not accepted; events were signed with the secret of %s.\n", to.secretOf)
		}
		return errNo
	}
	return nil
}

func (c *cli) summary(out *sentPrinter, took time.Duration) {
	text := fmt.Sprintf("%d sent: %d accepted", out.sent, out.sent-out.refused)
	if out.duplicates > 0 {
		text += fmt.Sprintf(" (%d duplicates)", out.duplicates)
	}
	text += fmt.Sprintf(", %d refused", out.refused)
	if out.sent > 1 {
		text += fmt.Sprintf(", %.1f events/s", float64(out.sent)/took.Seconds())
	}
	_, _ = fmt.Fprintln(c.env.Stderr, text)
}

// bar is a progress bar where a person looks at it and the events themselves do not scroll by.
func (c *cli) bar(o triggerOptions) *progressbar.ProgressBar {
	if o.count == 1 || !isTerminal(c.env.Stderr) || isTerminal(c.env.Stdout) && o.output != outputJSON {
		return progressbar.DefaultSilent(int64(o.count))
	}
	return progressbar.NewOptions(o.count, progressbar.OptionSetWriter(c.env.Stderr), progressbar.OptionShowCount(),
		progressbar.OptionShowIts(), progressbar.OptionSetItsString("events"), progressbar.OptionClearOnFinish())
}

// wish says which events are to be made.
func (c *cli) wish(args []string, o triggerOptions) (emulator.Wish, error) {
	if o.fromFile != "" {
		if len(args) > 0 || len(o.sets) > 0 {
			return emulator.Wish{}, errors.New("--from-file sends a whole envelope: leave out TYPE and --set, and change the file instead")
		}
		var body []byte
		var err error
		if o.fromFile == "-" {
			body, err = io.ReadAll(c.env.Stdin)
		} else {
			body, err = os.ReadFile(o.fromFile)
		}
		if err != nil {
			return emulator.Wish{}, fmt.Errorf("read envelope: %w", err)
		}
		if _, err := event.Decode(body); err != nil {
			_, _ = fmt.Fprintf(c.env.Stderr, "%s is no event (%v); it is sent all the same\n", o.fromFile, err)
		}
		return emulator.Wish{Type: o.fromFile, Body: append([]byte{}, body...)}, nil
	}
	if len(args) == 0 {
		return emulator.Wish{}, errors.New("which TYPE? `usher trigger --list` prints all; `usher trigger user.created` is a good first")
	}
	typ := args[0]
	if err := knownType(typ); err != nil {
		return emulator.Wish{}, err
	}
	sets := make([]fixture.PathValue, len(o.sets))
	for i, text := range o.sets {
		var err error
		if sets[i], err = fixture.ParseSet(text); err != nil {
			return emulator.Wish{}, fmt.Errorf("--%w, such as data.first_name=Ada", err)
		}
	}
	// A wrong path is wrong use, known before anything is sent.
	plain, err := fixture.Make(typ)
	if err != nil {
		return emulator.Wish{}, err
	}
	for _, s := range sets {
		if err := c.checkPath(typ, plain, s.Path); err != nil {
			return emulator.Wish{}, err
		}
		if plain, err = fixture.Apply(plain, s); err != nil {
			return emulator.Wish{}, err
		}
	}
	return emulator.Wish{Type: typ, Set: sets}, nil
}

// checkPath says what a set would add, and refuses a path that looks like a slip of one that is there.
func (c *cli) checkPath(typ string, body []byte, path string) error {
	if gjson.GetBytes(body, path).Exists() {
		return nil
	}
	parts := strings.Split(path, ".")
	if slices.Contains(parts, "") {
		return fmt.Errorf("--set %s: a name in the path is empty: want names with a dot between, such as data.first_name", path)
	}
	slip := func(meant string) error {
		return fmt.Errorf("--set %s: %s has no such field; did you mean %s? (--from-file sends any envelope as it is)", path, typ, meant)
	}
	if first := gjson.GetBytes(body, parts[0]); !first.Exists() && gjson.GetBytes(body, "data."+parts[0]).Exists() {
		return slip("data." + path)
	}
	// The deepest value that is there, and the first name that it does not have.
	depth := 0
	for depth < len(parts)-1 && gjson.GetBytes(body, strings.Join(parts[:depth+1], ".")).Exists() {
		depth++
	}
	parent := gjson.ParseBytes(body)
	if depth > 0 {
		parent = gjson.GetBytes(body, strings.Join(parts[:depth], "."))
	}
	free := slices.ContainsFunc(parts[:depth], func(part string) bool { return strings.HasSuffix(part, "_metadata") }) // keys of the application's own
	if parent.IsObject() && !free {
		var names []string
		for name := range parent.Map() {
			names = append(names, name)
		}
		if near := nearest(parts[depth], names, slips(parts[depth])); len(near) > 0 {
			meant := append(slices.Clone(parts[:depth]), near[0])
			if parent.Get(near[0] + ".0." + parts[depth]).Exists() { // as email_address, of which there are several
				meant = append(meant, "0", parts[depth])
			}
			return slip(strings.Join(append(meant, parts[depth+1:]...), "."))
		}
		if depth == 0 {
			for name := range gjson.GetBytes(body, "data").Map() {
				names = append(names, name)
			}
			if near := nearest(parts[0], names, slips(parts[0])); len(near) > 0 {
				return slip("data." + strings.Join(append(near[:1], parts[1:]...), "."))
			}
		}
	}
	c.say("note: --set %s: %s has no such field: it is added", path, typ)
	return nil
}

// slips is how many letters of a name may be wrong.
func slips(name string) int { return min(2, len(name)/3) }

// nearest are the names that one may have been meant for, the nearest ones first. cobra knows which are near: it does the same for commands.
func nearest(name string, names []string, distance int) []string {
	parent := &cobra.Command{SuggestionsMinimumDistance: distance}
	for _, known := range names {
		parent.AddCommand(&cobra.Command{Use: known, Run: func(*cobra.Command, []string) {}})
	}
	near := parent.SuggestionsFor(name)
	slices.Sort(near)
	return near
}

// knownType names the near ones where there is no payload of a type.
func knownType(typ string) error {
	names := append(fixture.Types(), fixture.Variants()...)
	if slices.Contains(names, typ) {
		return nil
	}
	near := nearest(typ, names, 4)
	if len(near) == 0 {
		resource := strings.ToLower(event.Type(typ).Resource())
		for _, name := range names {
			if resource != "" && strings.HasPrefix(strings.ToLower(name), resource) {
				near = append(near, name)
			}
		}
	}
	if len(near) == 0 {
		return fmt.Errorf("there is no payload of type %q: `usher trigger --list` prints all", typ)
	}
	slices.Sort(near)
	return fmt.Errorf("there is no payload of type %q; did you mean %s? (`usher trigger --list` prints all)", typ, strings.Join(near, ", "))
}

// target is where events go and how they are signed.
type target struct {
	url      string
	signer   *fixture.Signer
	secretOf string // where the secret comes from
	client   *http.Client
	clerk    offlineClerk
}

// offlineClerk is where events happen before they are sent.
type offlineClerk interface {
	wish(ctx context.Context, w emulator.Wish) ([]emulator.Event, error)
}

// alone is a Clerk that nobody can ask.
type alone struct{ *emulator.Clerk }

func (a alone) wish(_ context.Context, w emulator.Wish) ([]emulator.Event, error) {
	w.Alone = true
	return a.Trigger(w)
}

// running is the offline Clerk of a running dev.
type running struct {
	url, key string
	client   *http.Client
}

func (r running) wish(ctx context.Context, w emulator.Wish) ([]emulator.Event, error) {
	body, err := json.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("make the event: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.url, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("make the event: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+r.key)
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("no answer from the offline Clerk of `usher dev`: does it still run? %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read the offline Clerk's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the offline Clerk of `usher dev` does not make this event: %s",
			cmp.Or(gjson.GetBytes(answer, "errors.0.long_message").String(), resp.Status))
	}
	var made emulator.Wished
	if err := json.Unmarshal(answer, &made); err != nil || len(made.Events) == 0 {
		return nil, errors.New("read the offline Clerk's answer: it is no list of events")
	}
	return made.Events, nil
}

func (c *cli) target(o triggerOptions) (*target, error) {
	r, err := c.reach()
	if err != nil {
		return nil, err
	}
	t := &target{url: cmp.Or(o.url, r.state.IngestURL)}
	if t.url == "" {
		if r.stateErr != nil {
			return nil, fmt.Errorf("find the ingest: %w; or give --url", r.stateErr)
		}
		return nil, errors.New("find the ingest: the running instance names none; give --url")
	}
	u, err := url.Parse(t.url)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, errors.New("--url: want an http(s) URL such as http://127.0.0.1:8080" + ingest.Path)
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = ingest.Path
		t.url = u.String()
	}
	secret, source := "", r.settings.Source
	if name, ok := strings.CutPrefix(u.Path, ingest.Path+"/"); ok {
		source = name
		for _, src := range r.settings.Sources[1:] {
			if src.Name == name && len(src.SigningSecrets) > 0 {
				secret, t.secretOf = src.SigningSecrets[0], "USHER_SOURCE_"+strings.ToUpper(name)+"_SIGNING_SECRET"
			}
		}
	}
	switch {
	case secret != "":
	case len(r.settings.WebhookSigningSecret) > 0:
		secret, t.secretOf = r.settings.WebhookSigningSecret[0], "CLERK_WEBHOOK_SIGNING_SECRET" //nolint:gosec // its name
	case r.state.SigningSecret != "":
		secret, t.secretOf = r.state.SigningSecret, "the running `usher dev`"
	default:
		return nil, errors.New("no signing secret: set CLERK_WEBHOOK_SIGNING_SECRET to the one that the ingest has")
	}
	if t.signer, err = fixture.NewSigner(secret); err != nil {
		return nil, fmt.Errorf("secret of %s: %w", t.secretOf, err)
	}
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, MaxIdleConnsPerHost: o.parallel, IdleConnTimeout: time.Minute}
	t.client = &http.Client{Transport: transport, Timeout: 20 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // Svix follows none: a redirect is a refusal
	}}
	if t.url == r.state.IngestURL && r.state.ClerkAPIURL != "" {
		t.clerk = running{strings.TrimSuffix(r.state.ClerkAPIURL, "/v1") + emulator.TriggerPath, r.state.ClerkSecretKey, t.client}
	} else {
		t.clerk = alone{emulator.New(emulator.Config{InstanceID: r.instances()[source]})}
	}
	return t, nil
}

// sendAll sends all events, done is called for each in turn. It stops at the first that gets no answer.
func (t *target) sendAll(ctx context.Context, o triggerOptions, wish emulator.Wish, done func(sent)) error {
	defer t.client.CloseIdleConnections()
	limiter := rate.NewLimiter(rate.Inf, 1)
	if o.rate > 0 {
		limiter = rate.NewLimiter(rate.Limit(o.rate), 1)
	}
	results := make(chan sent)
	group, groupCtx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range min(o.parallel, o.count) {
		group.Go(func() error {
			for n := next.Add(1); n <= int64(o.count); n = next.Add(1) {
				if err := limiter.Wait(groupCtx); err != nil {
					return err //nolint:wrapcheck // the context's own
				}
				one := wish
				one.Nth = int(n - 1)
				events, err := t.clerk.wish(groupCtx, one)
				if err != nil {
					return err
				}
				for i, e := range events {
					s, err := t.send(groupCtx, e.Body)
					if err != nil {
						return err
					}
					s.object, s.before = e.ObjectID, i < len(events)-1
					results <- s
				}
			}
			return nil
		})
	}
	finished := make(chan error, 1)
	go func() {
		finished <- group.Wait()
		close(results)
	}()
	for s := range results {
		done(s)
	}
	return <-finished
}

// send delivers one event. The error is about an ingest that gave no answer.
func (t *target) send(ctx context.Context, body []byte) (sent, error) {
	s := sent{ID: fixture.NewID()}
	if e, err := event.Decode(body); err == nil {
		s.Type = string(e.Type)
	}
	header, err := t.signer.Sign(s.ID, time.Now(), body)
	if err != nil {
		return sent{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.url, bytes.NewReader(body))
	if err != nil {
		return sent{}, fmt.Errorf("send %s: %w", s.ID, err)
	}
	req.Header = header
	req.Header.Set("User-Agent", "usher-trigger/"+Version())
	start := time.Now()
	resp, err := t.client.Do(req)
	if err != nil {
		return sent{}, fmt.Errorf("no answer from the ingest: is it running? %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return sent{}, fmt.Errorf("read the ingest's answer: %w", err)
	}
	s.Status, s.DurationMS = resp.StatusCode, float64(time.Since(start).Microseconds())/1000
	var said struct {
		Duplicate bool `json:"duplicate"`
		Error     struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	_ = json.Unmarshal(answer, &said) // what is not ours has a status at least
	s.Duplicate = said.Duplicate
	if !s.accepted() {
		s.Error = cmp.Or(strings.Trim(said.Error.Code+": "+said.Error.Message, ": "), http.StatusText(s.Status))
	}
	return s, nil
}

// sentPrinter prints events as they are answered, except as one JSON value, which needs all of them.
type sentPrinter struct {
	w                         io.Writer
	output                    output
	items                     []sent
	sent, refused, duplicates int
	unauthorized              bool
	err                       error
}

func newSentPrinter(w io.Writer, o output) *sentPrinter { return &sentPrinter{w: w, output: o} }

func (p *sentPrinter) add(s sent) {
	p.sent++
	if !s.accepted() {
		p.refused++
	}
	if s.Duplicate {
		p.duplicates++
	}
	p.unauthorized = p.unauthorized || s.Status == http.StatusUnauthorized
	switch p.output {
	case outputJSON:
		p.items = append(p.items, s)
	case outputNDJSON:
		p.err = cmp.Or(p.err, printObject(p.w, p.output, s))
	default: // columns of fixed width: a table would wait for the last event
		if p.sent == 1 {
			_, _ = fmt.Fprintf(p.w, "%-31s  %-32s  %-6s  %-9s  %s\n", "ID", "TYPE", "STATUS", "DUPLICATE", "ERROR")
		}
		line := printable(fmt.Sprintf("%-31s  %-32s  %-6d  %-9t  %s", s.ID, s.Type, s.Status, s.Duplicate, s.Error))
		_, _ = fmt.Fprintln(p.w, strings.TrimRight(line, " "))
	}
}

func (p *sentPrinter) end() error {
	if p.output != outputJSON {
		return p.err
	}
	return printListing(p.w, p.output, listing[sent]{Items: p.items}, nil, nil)
}
