package command

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"

	"github.com/spf13/cobra"
)

// output is how a command prints its data.
type output string

const (
	outputTable  output = "table"
	outputJSON   output = "json"
	outputNDJSON output = "ndjson"
)

// outputFlag adds --output to a command.
func outputFlag(cmd *cobra.Command, o *output) {
	*o = outputTable
	cmd.Flags().VarP(o, "output", "o", "table, json or ndjson")
}

// Set implements pflag.Value.
func (o *output) Set(value string) error {
	if !slices.Contains([]output{outputTable, outputJSON, outputNDJSON}, output(value)) {
		return fmt.Errorf("%q is not table, json or ndjson", value)
	}
	*o = output(value)
	return nil
}

func (o *output) String() string { return string(*o) }

// Type implements pflag.Value.
func (o *output) Type() string { return "format" }

// listing is what a listing prints: as JSON {"items":[…],"next":"cursor or empty"}.
type listing[T any] struct {
	Items []T    `json:"items"`
	Next  string `json:"next"`
}

// print writes a listing; header and row make the table.
func printListing[T any](w io.Writer, o output, list listing[T], header []string, row func(T) []string) error {
	switch o {
	case outputJSON:
		if list.Items == nil {
			list.Items = []T{}
		}
		return printJSON(w, list)
	case outputNDJSON:
		for _, item := range list.Items {
			if err := encoder(w).Encode(item); err != nil {
				return fmt.Errorf("print: %w", err)
			}
		}
		return nil
	default:
		tw := newTable(w, header...)
		for _, item := range list.Items {
			tw.row(row(item)...)
		}
		if err := tw.Flush(); err != nil {
			return fmt.Errorf("print: %w", err)
		}
		return nil
	}
}

// paging are the flags of a listing that comes in pages.
type paging struct {
	output output
	limit  int
	cursor string
	given  bool // the limit was
}

// maxLimit bounds one page.
const maxLimit = 1000

func (p *paging) addFlags(cmd *cobra.Command, what string) {
	f := cmd.Flags()
	f.IntVar(&p.limit, "limit", 50, what+" per page; ndjson without it lists all")
	f.StringVar(&p.cursor, "cursor", "", "where the last page ended (its `next`)")
	outputFlag(cmd, &p.output)
}

func (p *paging) check(cmd *cobra.Command) error {
	p.given = cmd.Flags().Changed("limit")
	if p.limit < 1 || p.limit > maxLimit {
		return fmt.Errorf("--limit %d: want 1 to %d; --cursor goes on from page to page", p.limit, maxLimit)
	}
	return nil
}

// printPages writes a listing: one page and, where that is not all, how to see the next one (on stderr, as flags to add to the same
// command; JSON has it in itself). NDJSON without a limit is all pages; one of them is held at a time.
func printPages[T any](c *cli, p paging, header []string, row func(T) []string, fetch func(cursor string, limit int) (listing[T], error)) error {
	all := p.output == outputNDJSON && !p.given
	if all {
		p.limit = maxLimit
	}
	for {
		list, err := fetch(p.cursor, p.limit)
		if err != nil {
			return err
		}
		if err := printListing(c.env.Stdout, p.output, list, header, row); err != nil {
			return err
		}
		p.cursor = list.Next
		switch {
		case p.cursor != "" && all:
			continue
		case p.cursor != "" && p.output != outputJSON:
			c.say("more: --cursor %s", p.cursor)
		}
		return nil
	}
}

// printSome writes a listing that has no pages, of which a limit is the beginning.
func printSome[T any](c *cli, p paging, items []T, header []string, row func(T) []string) error {
	total := len(items)
	if p.given {
		items = items[:min(p.limit, total)]
	}
	if err := printListing(c.env.Stdout, p.output, listing[T]{Items: items}, header, row); err != nil {
		return err
	}
	if len(items) < total {
		c.say("%d of %d are shown; without --limit all are", len(items), total)
	}
	return nil
}

// printObject writes one value as JSON: indented, or on one line.
func printObject(w io.Writer, o output, value any) error {
	if o != outputNDJSON {
		return printJSON(w, value)
	}
	if err := encoder(w).Encode(value); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// printJSON writes one indented JSON value.
func printJSON(w io.Writer, value any) error {
	enc := encoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(value); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// encoder writes JSON that every reader takes: what is kept of a body as it came may have bytes that are not UTF-8.
func encoder(w io.Writer) *json.Encoder { return json.NewEncoder(validUTF8{w}) }

type validUTF8 struct{ w io.Writer }

// Write implements io.Writer for whole values, as an encoder writes them.
func (v validUTF8) Write(p []byte) (int, error) {
	_, err := v.w.Write(bytes.ToValidUTF8(p, []byte("\uFFFD")))
	return len(p), err
}

// table aligns columns.
type table struct{ *tabwriter.Writer }

func newTable(w io.Writer, header ...string) table {
	t := table{tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)}
	if len(header) > 0 {
		for i, h := range header {
			header[i] = strings.ToUpper(h)
		}
		t.row(header...)
	}
	return t
}

func (t table) row(cells ...string) {
	shown := make([]string, len(cells))
	for i, cell := range cells {
		shown[i] = printable(cell)
	}
	_, _ = fmt.Fprintln(t, strings.TrimRight(strings.Join(shown, "\t"), "\t"))
}

// printable is a text from outside as a terminal may be given it: on one line, with every character that would steer the terminal or
// change how others read (control and format characters) written as JSON does. To repeat it changes nothing.
func printable(text string) string { return escape(text, "") }

// printableLines is printable for a text of several lines.
func printableLines(text string) string { return escape(text, "\n") }

func escape(text, keep string) string {
	text = strings.ToValidUTF8(text, "\uFFFD")
	if !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsGraphic(r) }) {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		switch short := strings.IndexRune("\n\r\t", r); {
		case unicode.IsGraphic(r), strings.ContainsRune(keep, r):
			b.WriteRune(r)
		case short >= 0:
			b.WriteString(`\` + "nrt"[short:short+1])
		default:
			for _, unit := range utf16.AppendRune(nil, r) {
				_, _ = fmt.Fprintf(&b, `\u%04x`, unit)
			}
		}
	}
	return b.String()
}
