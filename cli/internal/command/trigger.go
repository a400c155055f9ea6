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
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/usherhq/usher/ingest"
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
		Long: "trigger makes events of a type from canonical payloads, with fresh ids and times that are the same wherever one\n" +
			"event names them, signs them as Clerk's deliveries are signed, and posts them to the ingest: the running\n" +
			"`usher dev` or `usher serve` of the data folder, or --url. They take the road of a real event.\n\n" +
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
	f.StringArrayVar(&o.sets, "set", nil, "set a value of the envelope, `PATH=VALUE` such as data.first_name=Ada (JSON where it is valid JSON); repeatable")
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
	newBody, err := c.bodies(args, o)
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
	err = to.sendAll(ctx, o, newBody, func(s sent) {
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

// bodies returns what makes the body of each event.
func (c *cli) bodies(args []string, o triggerOptions) (func() ([]byte, error), error) {
	if o.fromFile != "" {
		if len(args) > 0 || len(o.sets) > 0 {
			return nil, errors.New("--from-file sends a whole envelope: leave out TYPE and --set, and change the file instead")
		}
		var body []byte
		var err error
		if o.fromFile == "-" {
			body, err = io.ReadAll(c.env.Stdin)
		} else {
			body, err = os.ReadFile(o.fromFile)
		}
		if err != nil {
			return nil, fmt.Errorf("read envelope: %w", err)
		}
		if _, err := event.Decode(body); err != nil {
			_, _ = fmt.Fprintf(c.env.Stderr, "%s is no event (%v); it is sent all the same\n", o.fromFile, err)
		}
		return func() ([]byte, error) { return body, nil }, nil
	}
	if len(args) == 0 {
		return nil, errors.New("which TYPE? `usher trigger --list` prints all; `usher trigger user.created` is a good first")
	}
	typ := args[0]
	if err := knownType(typ); err != nil {
		return nil, err
	}
	sets := make([]fixture.PathValue, len(o.sets))
	for i, text := range o.sets {
		var err error
		if sets[i], err = fixture.ParseSet(text); err != nil {
			return nil, fmt.Errorf("--%w, such as data.first_name=Ada", err)
		}
	}
	newBody := func() ([]byte, error) { return fixture.Make(typ, sets...) }
	if _, err := newBody(); err != nil { // a wrong path is wrong use, known before anything is sent
		return nil, err
	}
	return newBody, nil
}

// knownType names the near ones where there is no payload of a type.
func knownType(typ string) error {
	names := append(fixture.Types(), fixture.Variants()...)
	if slices.Contains(names, typ) {
		return nil
	}
	// cobra knows which names are near: it does the same for commands.
	parent := &cobra.Command{SuggestionsMinimumDistance: 4}
	for _, name := range names {
		parent.AddCommand(&cobra.Command{Use: name, Run: func(*cobra.Command, []string) {}})
	}
	near := parent.SuggestionsFor(typ)
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
	secret := ""
	if name, ok := strings.CutPrefix(u.Path, ingest.Path+"/"); ok {
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
	return t, nil
}

// sendAll sends all events, done is called for each in turn. It stops at the first that gets no answer.
func (t *target) sendAll(ctx context.Context, o triggerOptions, newBody func() ([]byte, error), done func(sent)) error {
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
			for next.Add(1) <= int64(o.count) {
				if err := limiter.Wait(groupCtx); err != nil {
					return err //nolint:wrapcheck // the context's own
				}
				s, err := t.send(groupCtx, newBody)
				if err != nil {
					return err
				}
				results <- s
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
func (t *target) send(ctx context.Context, newBody func() ([]byte, error)) (sent, error) {
	body, err := newBody()
	if err != nil {
		return sent{}, err
	}
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
