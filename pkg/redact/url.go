// Package redact hides what must not be shown or kept: the secrets in the URLs of settings, and what mails and text messages told their
// receivers.
//
// It guarantees that what it does not fully understand is hidden whole. It imports only the standard library, so that every package
// may use it.
package redact

import (
	"errors"
	"io/fs"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Masked stands where a secret was.
const Masked = "redacted"

var (
	schemeRE = regexp.MustCompile(`^[a-z][a-z0-9+.-]*$`)
	userRE   = regexp.MustCompile(`^(?:[\w.+-]|%[0-9A-Fa-f]{2})+$`)
	hostRE   = regexp.MustCompile(`^(?:\[[0-9A-Fa-f:.]+\]|(?:[\w.-]|%[0-9A-Fa-f]{2})*)(?::\d{1,5})?$`)
	pathRE   = regexp.MustCompile(`^(?:[\w./~+-]|%[0-9A-Fa-f]{2})*$`)
	nameRE   = regexp.MustCompile(`^[\w.-]+$`)
	plainRE  = regexp.MustCompile(`^[\w.-]*$`)
)

// plain are the parameters of a URL whose values say nothing secret.
var plain = []string{
	"sslmode", "schema", "pgbouncer", "connection_limit", "connect_timeout", "pool_timeout", "default_query_exec_mode", "channel_binding", "tls",
}

// parts are a URL as the clients of databases and brokers read it, nothing decoded.
type parts struct {
	scheme, userinfo, host, tail string // tail begins at the path; userinfo without its @
	hasScheme, hasUser           bool
}

func split(value string) parts {
	var p parts
	if p.scheme, value, p.hasScheme = strings.Cut(value, "://"); !p.hasScheme {
		p.scheme, value = "", p.scheme
	}
	if end := strings.IndexAny(value, "/?#"); end >= 0 {
		value, p.tail = value[:end], value[end:]
	}
	p.host = value
	if at := strings.LastIndexByte(value, '@'); at >= 0 {
		p.userinfo, p.host, p.hasUser = value[:at], value[at+1:], true
	}
	return p
}

// URL is a URL, or a list of them with commas between, without its secrets: passwords, tokens, the values of parameters that are not known
// to be harmless. A user with a password is shown. What is not fully understood is hidden whole.
func URL(value string) string {
	if value == "" {
		return ""
	}
	if path, ok := strings.CutPrefix(value, "sqlite:"); ok && !strings.ContainsAny(path, "@?") {
		return value
	}
	var shown, users []string
	entries := list(value)
	for _, entry := range entries {
		p := split(strings.TrimSpace(entry))
		text, ok := p.mask()
		// A comma behind a parameter may be part of its value.
		if !ok || len(entries) > 1 && strings.Contains(p.tail, "?") {
			return Masked
		}
		shown, users = append(shown, text), append(users, p.userinfo)
	}
	// Where not every entry has the same user and password, a comma may have been part of one.
	if len(slices.Compact(users)) > 1 {
		return Masked
	}
	return strings.Join(shown, ",")
}

// Hosts are the hosts of a URL, or of a list of them, and nothing else of it.
func Hosts(value string) string {
	masked := URL(value)
	if masked == Masked {
		return Masked
	}
	var hosts []string
	for _, entry := range list(masked) {
		hosts = append(hosts, split(entry).host)
	}
	return strings.Join(hosts, ",")
}

// list cuts at the commas before a scheme. All others belong to a list of hosts, or to a password.
func list(value string) []string {
	var entries []string
	for part := range strings.SplitSeq(value, ",") {
		if len(entries) > 0 && !strings.Contains(part, "://") {
			entries[len(entries)-1] += "," + part
			continue
		}
		entries = append(entries, part)
	}
	return entries
}

// mask returns the URL without secrets, false where it is not fully understood.
func (p parts) mask() (string, bool) {
	path, query, _ := strings.Cut(p.tail, "?")
	if p.hasScheme && !schemeRE.MatchString(p.scheme) || !pathRE.MatchString(path) || strings.ContainsAny(p.tail, "@#") {
		return "", false
	}
	for host := range strings.SplitSeq(p.host, ",") {
		if !hostRE.MatchString(strings.TrimSpace(host)) {
			return "", false
		}
	}
	text := p.host + path
	if p.hasUser {
		user, password, hasPassword := strings.Cut(p.userinfo, ":")
		switch {
		case !userRE.MatchString(user), hasPassword && password == "", !hasPassword && !strings.HasPrefix(p.scheme, "postgres"):
			user = Masked
		case hasPassword:
			user += ":" + Masked
		}
		text = user + "@" + text
	}
	if p.hasScheme {
		text = p.scheme + "://" + text
	}
	if query == "" {
		return text, true
	}
	var shown []string
	for pair := range strings.SplitSeq(query, "&") {
		name, value, given := strings.Cut(pair, "=")
		if !given || !nameRE.MatchString(name) {
			return "", false
		}
		if !slices.Contains(plain, name) || !plainRE.MatchString(value) {
			value = Masked
		}
		shown = append(shown, name+"="+value)
	}
	return text + "?" + strings.Join(shown, "&"), true
}

// ErrAmbiguous is why [CheckURL] refuses a URL. It repeats nothing of it.
var ErrAmbiguous = errors.New("an @, #, comma or slash stands where none belongs, so that a part of the password would be taken for a host or a name: " +
	"write special characters of a user or password as %XX (@ is %40, # is %23, / is %2F, ? is %3F, : is %3A, a comma is %2C, % is %25)")

// CheckURL refuses a URL, or a list of them with commas between, that clients read otherwise than who wrote it: they would take a part
// of a password for a host, a database or a parameter, and name that in errors.
func CheckURL(value string) error {
	if strings.HasPrefix(value, "sqlite:") {
		return nil
	}
	for _, entry := range list(value) {
		if p := split(entry); strings.ContainsAny(p.tail, "@#") || strings.Contains(p.userinfo, "@") {
			return ErrAmbiguous
		}
	}
	return nil
}

// CheckURLs is [CheckURL] for a list whose client cuts it at every comma, whatever is around it.
func CheckURLs(value string) error {
	with, without := 0, 0
	for entry := range strings.SplitSeq(value, ",") {
		if p := split(strings.TrimSpace(entry)); strings.ContainsAny(p.tail, "@#") || strings.Contains(p.userinfo, "@") {
			return ErrAmbiguous
		} else if p.hasUser {
			with++
		} else {
			without++
		}
	}
	if with > 0 && without > 0 {
		return ErrAmbiguous
	}
	return nil
}

// HasPassword reports whether a URL, or one of a list, holds a password or a token, as far as can be seen: rather once too often.
func HasPassword(value string) bool {
	masked := URL(value)
	return strings.Contains(masked, Masked) && masked != value
}

// Cause is the text of an error without the URL or path that it is about: that of the innermost cause where the error is one of the
// standard library's which repeats what it was given.
func Cause(err error) string {
	var file *fs.PathError
	if errors.As(err, &file) {
		return file.Err.Error()
	}
	var bad *url.Error
	if errors.As(err, &bad) {
		if bad.Op == "parse" { // its cause quotes a part of it
			return "not a valid URL"
		}
		return bad.Err.Error()
	}
	return err.Error()
}
