package command

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

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
			if err := json.NewEncoder(w).Encode(item); err != nil {
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
		if list.Next != "" {
			_, _ = fmt.Fprintf(w, "\nmore: --cursor %s\n", list.Next)
		}
		return nil
	}
}

// printObject writes one value as JSON: indented, or on one line.
func printObject(w io.Writer, o output, value any) error {
	if o != outputNDJSON {
		return printJSON(w, value)
	}
	if err := json.NewEncoder(w).Encode(value); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// printJSON writes one indented JSON value.
func printJSON(w io.Writer, value any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(value); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
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
	_, _ = fmt.Fprintln(t, strings.TrimRight(strings.Join(cells, "\t"), "\t"))
}
