package command

import (
	"fmt"
	"strings"
	"time"

	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/stream"
)

// typePattern selects event types: user.created, user.*, *.deleted, or all (the zero value, "*"). A star stands for a
// whole resource or a whole verb, which is what the subjects of the stream can tell apart.
type typePattern struct{ resource, verb string }

// Set implements pflag.Value.
func (p *typePattern) Set(text string) error {
	resource, verb, _ := strings.Cut(text, ".")
	if text == "*" {
		verb = "*"
	}
	for _, part := range []string{resource, verb} {
		if part == "" || part != "*" && strings.ContainsAny(part, "*?> ") {
			return fmt.Errorf("%q is not a pattern such as user.created, user.* or *.deleted", text)
		}
	}
	*p = typePattern{resource, verb}
	return nil
}

func (p *typePattern) String() string {
	if *p == (typePattern{}) {
		return ""
	}
	return p.resource + "." + p.verb
}

// Type implements pflag.Value.
func (p *typePattern) Type() string { return "pattern" }

// where narrows a query to the types. Patterns are ranges and suffixes without LIKE's wildcards or folding of case,
// which differ between the databases.
func (p *typePattern) where(db *gorm.DB) *gorm.DB {
	switch every := p.resource == "*"; {
	case *p == typePattern{}, every && p.verb == "*":
		return db
	case every:
		suffix := "." + p.verb
		return db.Where("substr(type, length(type) - ? + 1) = ?", len([]rune(suffix)), suffix)
	case p.verb == "*":
		prefix := p.resource + "."
		return db.Where("substr(type, 1, ?) = ?", len([]rune(prefix)), prefix)
	default:
		return db.Where("type = ?", p.resource+"."+p.verb)
	}
}

// subject is the filter for the stream. Empty source and key mean every one.
func (p *typePattern) subject(source, key string) string {
	token := func(s string) string {
		if s == "" || s == "*" {
			return "*"
		}
		return stream.Token(s)
	}
	return strings.Join([]string{"clerk", "evt", token(source), token(p.resource), token(p.verb), token(key)}, ".")
}

// since reads a point in time: an age such as 24h or 7d, or RFC 3339.
type since struct{ at time.Time }

// Set implements pflag.Value.
func (s *since) Set(text string) error {
	if age, err := config.ParseDuration(text); err == nil && age >= 0 {
		s.at = time.Now().Add(-age)
		return nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return fmt.Errorf("%q is neither an age such as 10m, 24h or 7d nor a time such as 2026-01-31T08:00:00Z", text)
	}
	s.at = at
	return nil
}

func (s *since) String() string {
	if s.at.IsZero() {
		return ""
	}
	return s.at.Format(time.RFC3339)
}

// Type implements pflag.Value.
func (s *since) Type() string { return "age|time" }

// typeText is how a type is shown: an event that cannot be decoded has none.
func typeText(t string) string {
	if t == "" {
		return "(undecodable)"
	}
	return t
}
