package config

import (
	"fmt"
	"regexp"
	"strconv"
	"time"
)

var daysRE = regexp.MustCompile(`(\d+\.?\d*|\.\d+)([dw])`)

// ParseDuration reads a duration as people type it: that of Go (90s, 1h30m), with days of 24 hours and weeks: 7d, 2w, 1d12h. The error names
// the text. It is what every setting, flag and parameter takes.
func ParseDuration(text string) (time.Duration, error) {
	hours := daysRE.ReplaceAllStringFunc(text, func(part string) string {
		n, err := strconv.ParseFloat(part[:len(part)-1], 64)
		if err != nil {
			return part
		}
		n *= 24
		if part[len(part)-1] == 'w' {
			n *= 7
		}
		return strconv.FormatFloat(n, 'f', -1, 64) + "h"
	})
	d, err := time.ParseDuration(hours)
	if err != nil {
		return 0, fmt.Errorf("%q is not a duration such as 90s, 12h, 7d or 2w", text)
	}
	return d, nil
}

// Duration is a duration that a flag sets. It implements pflag.Value.
type Duration time.Duration

// Set reads it with [ParseDuration].
func (d *Duration) Set(text string) error {
	parsed, err := ParseDuration(text)
	*d = Duration(parsed)
	return err
}

// String is what Go prints.
func (d *Duration) String() string { return time.Duration(*d).String() }

// Type names it in the help.
func (d *Duration) Type() string { return "duration" }
