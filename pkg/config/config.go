// Package config reads Usher's settings from the environment. Every process and every command uses
// it, so a setting has one name, one default and one rule everywhere. It reports every wrong
// setting at once, not just the first, and never prints a secret.
package config

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/mail"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/sethvargo/go-envconfig"

	"github.com/usherhq/usher/pkg/redact"
)

// Settings are all settings. A field's env tag is its name and default, doc its meaning, secret:"true" keeps
// it out of every output.
type Settings struct {
	WebhookSigningSecret Secrets `env:"CLERK_WEBHOOK_SIGNING_SECRET" secret:"true" doc:"signing secrets of the default source, comma-separated (rotation); ingest refuses to start without one"`
	ClerkSecretKey       string  `env:"CLERK_SECRET_KEY" secret:"true" doc:"Backend API key of the default source"`
	ClerkAPIURL          string  `env:"CLERK_API_URL, default=https://api.clerk.com/v1" secret:"url" doc:"base URL of Clerk's Backend API; without a path, /v1 is added"`
	ClerkInstanceID      string  `env:"CLERK_INSTANCE_ID" doc:"events of another Clerk instance are dead-lettered; unset: not checked"`
	Source               string  `env:"USHER_SOURCE, default=clerk" doc:"name of the default source"`

	DatabaseURL         string `env:"USHER_DATABASE_URL" secret:"url" doc:"postgres://… or sqlite:PATH (else DATABASE_URL, else sqlite:<data dir>/usher.db)"`
	FallbackDatabaseURL string `env:"DATABASE_URL" secret:"url" doc:"used where USHER_DATABASE_URL is not set"`
	DatabaseSchema      string `env:"USHER_DATABASE_SCHEMA, default=usher" doc:"PostgreSQL schema of all tables (search_path)"`

	NATSURL        string        `env:"USHER_NATS_URL" secret:"url" doc:"the broker; dev and serve start their own where it is not set"`
	NATSCreds      string        `env:"USHER_NATS_CREDS" doc:"credentials file for the broker"`
	NATSCA         string        `env:"USHER_NATS_CA" doc:"file of the authorities (PEM) that the broker's certificate must come from; the connection is then encrypted or not made; unset: the system's, where the broker asks for TLS or its URL begins with tls://"`
	NATSCert       string        `env:"USHER_NATS_CERT" doc:"file of the client certificate (PEM) that is shown to the broker; with USHER_NATS_KEY"`
	NATSKey        string        `env:"USHER_NATS_KEY" doc:"file of the client certificate's private key (PEM)"`
	NATSMonitorURL string        `env:"USHER_NATS_MONITOR_URL" secret:"url" doc:"monitoring port of every server of the broker, such as http://127.0.0.1:8222, with commas between; there is asked whether they sync to disk"`
	AllowUnsynced  bool          `env:"USHER_ALLOW_UNSYNCED_BROKER, default=false" doc:"take a broker that is known not to sync: a power cut then loses events that were answered 202"`
	StreamReplicas int           `env:"USHER_STREAM_REPLICAS, default=1" doc:"replicas of the streams: 1, 3 or 5"`
	StreamMaxBytes Bytes         `env:"USHER_STREAM_MAX_BYTES, default=10GiB" doc:"size at which the event stream is full and ingest answers 503"`
	Retention      time.Duration `env:"USHER_RETENTION, default=720h" doc:"how long a settled event stays in the stream"`

	RetryAttempts int           `env:"USHER_RETRY_ATTEMPTS, default=10" doc:"attempts of an event that fails by its own error before it is a dead letter"`
	RetryInitial  time.Duration `env:"USHER_RETRY_INITIAL, default=1s" doc:"wait before the second attempt; each following one waits four times as long, with jitter"`
	RetryMax      time.Duration `env:"USHER_RETRY_MAX, default=10m" doc:"longest wait between two attempts"`

	DataDir        string   `env:"USHER_DATA_DIR, default=./usher-data" doc:"state of dev and serve"`
	IngestAddr     string   `env:"USHER_INGEST_ADDR, default=:8080" doc:"listener for webhooks"`
	ConsoleAddr    string   `env:"USHER_CONSOLE_ADDR, default=127.0.0.1:8081" doc:"listener of the console and its API"`
	OpsAddr        string   `env:"USHER_OPS_ADDR, default=127.0.0.1:8082" doc:"listener for /healthz, /readyz and /metrics of the process; as processes of their own, ingest has this default, worker 127.0.0.1:8083, reconciler 127.0.0.1:8084 and console 127.0.0.1:8085"`
	TrustedProxies Networks `env:"USHER_TRUSTED_PROXIES" doc:"addresses or networks of reverse proxies, comma-separated: their X-Forwarded-For names the sender in the log, and the bound of connections per address does not hold for them"`
	AdminToken     string   `env:"USHER_ADMIN_TOKEN" secret:"true" doc:"token of the console and its API, at least 16 characters; where none is set one is made and kept in the data folder, and the console binds to loopback only"`
	AppToken       string   `env:"USHER_APP_TOKEN" secret:"true" doc:"token of applications, at least 16 characters: for GET /api/users/{id}/ensure, nothing else"`

	KeepMessageBodies bool `env:"USHER_KEEP_MESSAGE_BODIES, default=false" doc:"store email.* and sms.* events with their texts, codes and links"`

	SMTPURL         string `env:"USHER_SMTP_URL" secret:"url" doc:"mail server, smtp://user:password@host:port; unset: mail is kept as suppressed"`
	MailFrom        string `env:"USHER_MAIL_FROM" doc:"sender of mail"`
	SlackWebhookURL string `env:"USHER_SLACK_WEBHOOK_URL" secret:"true" doc:"Slack incoming webhook for alerts"`
	AlertEmail      string `env:"USHER_ALERT_EMAIL" doc:"receiver of alerts"`

	FraudMaxCountries       int           `env:"USHER_FRAUD_MAX_COUNTRIES, default=3" doc:"countries of one user's sessions within the window before an alert"`
	FraudCountryWindow      time.Duration `env:"USHER_FRAUD_COUNTRY_WINDOW, default=24h" doc:"window of the country rule"`
	FraudMaxSessions        int           `env:"USHER_FRAUD_MAX_SESSIONS, default=5" doc:"sessions of one user within the window before an alert"`
	FraudSessionWindow      time.Duration `env:"USHER_FRAUD_SESSION_WINDOW, default=10m" doc:"window of the session rule"`
	GeoIPDB                 string        `env:"USHER_GEOIP_DB" doc:"MaxMind country database; unset: the embedded table"`
	OnboardingReminderAfter time.Duration `env:"USHER_ONBOARDING_REMINDER_AFTER, default=48h" doc:"age of an unfinished onboarding at which a reminder is sent"`

	ReconcileInterval     time.Duration `env:"USHER_RECONCILE_INTERVAL, default=10m" doc:"time between incremental sweeps"`
	ReconcileFullInterval time.Duration `env:"USHER_RECONCILE_FULL_INTERVAL, default=24h" doc:"time between full sweeps"`
	SilenceAfter          time.Duration `env:"USHER_SILENCE_AFTER, default=15m" doc:"how long Clerk may move on without an event before an alert"`

	AlertFailureRate float64       `env:"USHER_ALERT_FAILURE_RATE, default=0.05" doc:"share of failed attempts that raises an alert"`
	AlertWindow      time.Duration `env:"USHER_ALERT_WINDOW, default=5m" doc:"window of the failure-rate alert"`
	AlertMinEvents   int           `env:"USHER_ALERT_MIN_EVENTS, default=20" doc:"fewest events in the window for the alert"`

	LogLevel  string `env:"USHER_LOG_LEVEL, default=info" doc:"debug, info, warn or error"`
	LogFormat string `env:"USHER_LOG_FORMAT" doc:"json or console; unset: console on a terminal, else json"`

	// Sources are the default source and those of USHER_SOURCE_<NAME>_…, by name.
	Sources []Source

	origins map[string]string
	files   map[string]string // of secrets, by setting, such as USHER_ADMIN_TOKEN_FILE
}

// Source is one Clerk instance that delivers to this Usher.
type Source struct {
	Name           string
	SigningSecrets Secrets
	SecretKey      string
	InstanceID     string
}

// Secrets are signing secrets: "whsec_…", comma-separated. They print as "redacted".
type Secrets []string

// MinSecretBytes is the shortest signing key that is accepted. Svix makes 24 bytes; an empty key
// would let anyone forge a valid signature.
const MinSecretBytes = 16

// EnvDecode implements envconfig.DecoderCtx's older form: it refuses every secret that is not safe.
func (s *Secrets) EnvDecode(_ context.Context, value string) error {
	*s = nil
	for part := range strings.SplitSeq(value, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			return errors.New("a signing secret is empty")
		}
		if strings.HasPrefix(part, "sk_") || strings.HasPrefix(part, "pk_") {
			return errors.New("this is an API key, not a signing secret (whsec_…)")
		}
		key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(part, "whsec_"))
		if err != nil {
			return errors.New("a signing secret is not base64 after whsec_")
		}
		if len(key) < MinSecretBytes {
			return fmt.Errorf("a signing secret has %d bytes, at least %d are needed", len(key), MinSecretBytes)
		}
		*s = append(*s, part)
	}
	return nil
}

// String hides the secrets.
func (s Secrets) String() string {
	if len(s) == 0 {
		return ""
	}
	return redact.Masked
}

// Networks are addresses and networks (CIDR), comma-separated.
type Networks []netip.Prefix

// EnvDecode implements envconfig.Decoder.
func (n *Networks) EnvDecode(_ context.Context, value string) error {
	*n = nil
	for part := range strings.SplitSeq(value, ",") {
		part = strings.TrimSpace(part)
		prefix, err := netip.ParsePrefix(part)
		if err != nil {
			var addr netip.Addr
			if addr, err = netip.ParseAddr(part); err != nil {
				return fmt.Errorf("%q is neither an address nor a network such as 10.0.0.0/8", part)
			}
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
		*n = append(*n, prefix.Masked())
	}
	return nil
}

// String prints them as they are set.
func (n Networks) String() string {
	parts := make([]string, len(n))
	for i, prefix := range n {
		parts[i] = prefix.String()
	}
	return strings.Join(parts, ",")
}

// Bytes is a size: a number with an optional unit B, KB, MB, GB, TB, KiB, MiB, GiB or TiB.
type Bytes int64

var bytesRE = regexp.MustCompile(`^(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?$`)

// EnvDecode implements envconfig.Decoder.
func (b *Bytes) EnvDecode(_ context.Context, value string) error {
	m := bytesRE.FindStringSubmatch(strings.TrimSpace(value))
	if m == nil {
		return fmt.Errorf("%q is not a size such as 512MiB or 10GiB", value)
	}
	f, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return fmt.Errorf("%q is not a size: %w", value, err)
	}
	base := 1000.0
	if strings.HasSuffix(m[2], "i") {
		base = 1024
	}
	for range strings.Index(" KMGT", cmp.Or(strings.TrimSuffix(m[2], "i"), " ")) {
		f *= base
	}
	if f >= 1<<62 {
		return fmt.Errorf("%q is too large a size", value)
	}
	*b = Bytes(f)
	return nil
}

// String prints the size in the largest unit that divides it.
func (b Bytes) String() string {
	for i, unit := range []string{"TiB", "GiB", "MiB", "KiB"} {
		if size := Bytes(1) << (40 - 10*i); b >= size && b%size == 0 {
			return fmt.Sprintf("%d%s", b/size, unit)
		}
	}
	return fmt.Sprintf("%dB", int64(b))
}

// Lookup is os.LookupEnv or a map for tests. An empty value counts as unset.
type Lookup func(key string) (string, bool)

// Problems are everything that is wrong with the settings.
type Problems []string

func (p Problems) Error() string { return "wrong settings:\n  " + strings.Join(p, "\n  ") }

// Environ is what Load reads: a lookup, and the list of "KEY=value" to find further sources in.
type Environ []string

// Lookup finds a variable; the last one of a name counts.
func (e Environ) Lookup(key string) (string, bool) {
	for i := len(e) - 1; i >= 0; i-- {
		if k, v, ok := strings.Cut(e[i], "="); ok && k == key {
			return v, v != ""
		}
	}
	return "", false
}

var (
	sourceRE = regexp.MustCompile(`^(?i:USHER_SOURCE)_([^=]+)_(?i:(SIGNING_SECRET|SECRET_KEY|INSTANCE_ID))=.`)
	nameRE   = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,63}$`)
	schemaRE = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)
)

// withFiles adds, for every NAME_FILE of a secret, NAME with what the file holds, without the line's end. files are those that were read,
// by their settings' names.
func (e Environ) withFiles() (all Environ, files map[string]string, problems Problems) {
	all, files = slices.Clone(e), map[string]string{}
	for _, entry := range e {
		key, path, _ := strings.Cut(entry, "=")
		name, isFile := strings.CutSuffix(key, "_FILE")
		if !isFile || path == "" || !isSecret(name) {
			continue
		}
		if _, set := e.Lookup(name); set {
			problems = append(problems, fmt.Sprintf("%s: %s is set too: set one of them", key, name))
			continue
		}
		content, err := os.ReadFile(path)
		text := strings.TrimRight(string(content), "\r\n")
		switch {
		case err != nil: // its text holds the path, which is the secret itself where someone mistook the one for the other
			problems = append(problems, key+": the file that it names cannot be read: "+redact.Cause(err))
		case text == "":
			problems = append(problems, key+": the file that it names is empty")
		default:
			all = append(all, name+"="+text)
			files[key] = path
		}
	}
	return all, files, problems
}

// isSecret reports whether a setting of this name is a secret, those of further sources included.
func isSecret(name string) bool {
	if m := sourceRE.FindStringSubmatch(name + "=x"); m != nil {
		return strings.ToUpper(m[2]) != "INSTANCE_ID"
	}
	return slices.ContainsFunc(Describe(), func(s Setting) bool { return s.Secret && s.Name == name })
}

// Load reads the settings from environ; flags, by setting name, override it. An empty value counts as not given, in both. The error is
// Problems; the settings are then those that could be read, the others as if they were not set, so that a caller can look for what is
// wrong by rules of its own.
func Load(environ Environ, flags map[string]string) (*Settings, error) {
	s := &Settings{origins: map[string]string{}}
	environ, files, problems := environ.withFiles()
	s.files = files
	// The library stops at its first error, so each setting is decoded by itself.
	v := reflect.ValueOf(s).Elem()
	for i := range v.NumField() {
		field := v.Type().Field(i)
		name, ok := settingName(field)
		if !ok {
			continue
		}
		lookup := func(key string) (string, bool) {
			if value := flags[key]; value != "" {
				s.origins[key] = "flag"
				return value, true
			}
			if value, ok := environ.Lookup(key); ok {
				s.origins[key] = "environment"
				return value, true
			}
			s.origins[key] = "default"
			return "", false
		}
		value, err := decode(field, lookup)
		if err != nil {
			problems = append(problems, fmt.Sprintf("%s: %s", name, plain(field, err)))
			value, _ = decode(field, func(string) (string, bool) { return "", false }) // and no rule finds it wrong again
		}
		v.Field(i).Set(value)
		if field.Tag.Get("secret") == "url" { // what is kept in a file or a cluster's secret often ends with a newline
			v.Field(i).SetString(strings.TrimSpace(value.String()))
		}
	}
	if s.DatabaseURL == "" {
		switch {
		case s.FallbackDatabaseURL != "":
			s.DatabaseURL, s.origins["USHER_DATABASE_URL"] = s.FallbackDatabaseURL, "DATABASE_URL"
		default:
			s.DatabaseURL = "sqlite:" + filepath.Join(s.DataDir, "usher.db")
		}
	}
	problems = append(problems, s.loadSources(environ)...)
	problems = append(problems, s.validate()...)
	if len(problems) > 0 {
		return s, problems
	}
	return s, nil
}

// decode reads one field, its default where lookup has nothing.
func decode(field reflect.StructField, lookup Lookup) (reflect.Value, error) {
	var wrong error
	if field.Type == reflect.TypeFor[time.Duration]() { // of which the library knows no days
		set := lookup
		lookup = func(key string) (string, bool) {
			text, ok := set(key)
			if !ok {
				return "", false
			}
			d, err := ParseDuration(text)
			wrong = err
			return d.String(), true
		}
	}
	one := reflect.New(reflect.StructOf([]reflect.StructField{{Name: field.Name, Type: field.Type, Tag: field.Tag}}))
	err := envconfig.ProcessWith(context.Background(), &envconfig.Config{
		Target: one.Interface(), Lookuper: lookuper(lookup), DefaultNoInit: true,
	})
	return one.Elem().Field(0), cmp.Or(wrong, err)
}

// plain is the text of an error of decode.
func plain(field reflect.StructField, err error) string {
	var number *strconv.NumError
	switch {
	case !errors.As(err, &number):
		return strings.TrimPrefix(err.Error(), field.Name+": ")
	case field.Type.Kind() == reflect.Bool:
		return fmt.Sprintf("%q is not true or false", number.Num)
	case field.Type.Kind() == reflect.Float64:
		return fmt.Sprintf("%q is not a number", number.Num)
	default:
		return fmt.Sprintf("%q is not a whole number", number.Num)
	}
}

type lookuper Lookup

func (l lookuper) Lookup(key string) (string, bool) { return l(key) }

func settingName(field reflect.StructField) (string, bool) {
	tag, ok := field.Tag.Lookup("env")
	name, _, _ := strings.Cut(tag, ",")
	return strings.TrimSpace(name), ok
}

func (s *Settings) loadSources(environ Environ) Problems {
	var problems Problems
	byName := map[string]*Source{}
	for _, entry := range environ {
		m := sourceRE.FindStringSubmatch(entry)
		if m == nil {
			continue
		}
		key, value, _ := strings.Cut(entry, "=")
		name := strings.ToLower(m[1])
		if key != strings.ToUpper(key) || !nameRE.MatchString(name) || strings.Contains(name, "-") {
			// Not taken as another spelling of a source that has this name already, nor ignored: its events would be refused without a word.
			problems = append(problems, key+": want USHER_SOURCE_<NAME>_"+strings.ToUpper(m[2])+", all in capital letters, the name of letters, digits and _, at most 64")
			continue
		}
		src := byName[name]
		if src == nil {
			src = &Source{Name: name}
			byName[name] = src
		}
		switch m[2] {
		case "SIGNING_SECRET":
			if err := src.SigningSecrets.EnvDecode(context.Background(), value); err != nil {
				problems = append(problems, fmt.Sprintf("%s: %v", key, err))
			}
		case "SECRET_KEY":
			src.SecretKey = value
		case "INSTANCE_ID":
			src.InstanceID = value
		}
	}
	def := Source{Name: s.Source, SigningSecrets: s.WebhookSigningSecret, SecretKey: s.ClerkSecretKey, InstanceID: s.ClerkInstanceID}
	s.Sources = []Source{def}
	for _, src := range byName {
		s.Sources = append(s.Sources, *src)
	}
	slices.SortFunc(s.Sources[1:], func(a, b Source) int { return strings.Compare(a.Name, b.Name) })
	// The names of two sources differ by more than what a variable cannot say.
	for _, src := range s.Sources[1:] {
		switch variable := "USHER_SOURCE_" + strings.ToUpper(src.Name) + "_…"; {
		case src.Name == s.Source:
			problems = append(problems, fmt.Sprintf("%s: %q is the default source: set CLERK_WEBHOOK_SIGNING_SECRET instead", variable, s.Source))
		case src.Name == strings.ReplaceAll(strings.ToLower(s.Source), "-", "_"):
			problems = append(problems, fmt.Sprintf("%s: %q and the default source %q (USHER_SOURCE) are too alike: name one otherwise", variable, src.Name, s.Source))
		}
	}
	return problems
}

// SourceNames are the names of all sources, the default one first.
func (s *Settings) SourceNames() []string {
	names := make([]string, len(s.Sources))
	for i := range s.Sources {
		names[i] = s.Sources[i].Name
	}
	return names
}

// Warnings says what works and should not stay so: sources that are not apart, secrets that cross a network in clear text, files of secrets that
// others can read. The texts hold no secret. What the database's URL asks for is pkg/database's to judge.
func (s *Settings) Warnings() []string {
	return slices.Concat(s.SourceWarnings(), s.clearText(), s.exposedFiles())
}

// SourceWarnings says which sources are not apart as they are set: those that share a secret, a key or an instance. The texts hold no secret.
func (s *Settings) SourceWarnings() []string {
	var warnings []string
	for i := range s.Sources {
		for j := range i {
			a, b := &s.Sources[j], &s.Sources[i]
			both := fmt.Sprintf("sources %q and %q have the same ", a.Name, b.Name)
			if slices.ContainsFunc(a.SigningSecrets, func(secret string) bool {
				return slices.ContainsFunc(b.SigningSecrets, func(other string) bool {
					return strings.TrimPrefix(secret, "whsec_") == strings.TrimPrefix(other, "whsec_")
				})
			}) {
				warnings = append(warnings, both+"signing secret: who can send for one can send for the other; give each the secret of its own endpoint in Clerk")
			}
			if a.SecretKey != "" && a.SecretKey == b.SecretKey {
				warnings = append(warnings, both+"secret key: both would be compared with one Clerk instance, whose objects belong to one source only; a source is one instance")
			}
			if a.InstanceID != "" && a.InstanceID == b.InstanceID {
				warnings = append(warnings, both+"instance id: an object belongs to one source only, and the other's events about it are dead-lettered; a source is one instance")
			}
		}
	}
	return warnings
}

// isFile reports whether there is a file that can be read.
func isFile(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	return err == nil && !info.IsDir()
}

// noFile is the error text for a path at which no file can be read; it hides what does not look like a path.
func noFile(path string) string {
	if len(path) > 1024 || strings.ContainsAny(path, "\r\n") { // what the file should hold, perhaps
		path = redact.Masked
	}
	return fmt.Sprintf("there is no file %q that can be read", path)
}

func (s *Settings) validate() Problems {
	var problems Problems
	bad := func(name, format string, args ...any) {
		problems = append(problems, name+": "+fmt.Sprintf(format, args...))
	}
	if !nameRE.MatchString(s.Source) {
		bad("USHER_SOURCE", "%q is not a name of small letters, digits, - and _", s.Source)
	}
	if !schemaRE.MatchString(s.DatabaseSchema) {
		bad("USHER_DATABASE_SCHEMA", "%q is not a name of small letters, digits and _", s.DatabaseSchema)
	}
	for name, value := range map[string]string{"CLERK_API_URL": s.ClerkAPIURL, "USHER_SLACK_WEBHOOK_URL": s.SlackWebhookURL} {
		if u, err := url.Parse(value); value != "" && (err != nil || u.Host == "" || !strings.HasPrefix(u.Scheme, "http")) {
			bad(name, "not an http(s) URL")
		}
	}
	for name, value := range map[string]string{
		"CLERK_API_URL": s.ClerkAPIURL, "USHER_DATABASE_URL": s.DatabaseURL, "USHER_SMTP_URL": s.SMTPURL, "USHER_SLACK_WEBHOOK_URL": s.SlackWebhookURL,
	} {
		if err := redact.CheckURL(value); err != nil {
			if name == "USHER_DATABASE_URL" {
				name = s.DatabaseSetting()
			}
			bad(name, "%v", err)
		}
	}
	for name, value := range map[string]string{"USHER_NATS_URL": s.NATSURL, "USHER_NATS_MONITOR_URL": s.NATSMonitorURL} {
		if err := redact.CheckURLs(value); err != nil {
			bad(name, "%v", err)
		}
	}
	for address := range strings.SplitSeq(s.NATSURL, ",") { // what the client takes: several, with or without a scheme
		if !strings.Contains(address, "://") {
			address = "nats://" + address
		}
		u, err := url.Parse(strings.TrimSpace(address))
		if s.NATSURL != "" && (err != nil || u.Hostname() == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme)) {
			bad("USHER_NATS_URL", "not nats://host:port, nor several of them with commas between")
			break
		}
	}
	for address := range strings.SplitSeq(s.NATSMonitorURL, ",") {
		u, err := url.Parse(strings.TrimSpace(address))
		if s.NATSMonitorURL != "" && (err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https") {
			bad("USHER_NATS_MONITOR_URL", "not http://host:port, nor several of them with commas between")
			break
		}
	}
	if why := wrongDatabase(s.DatabaseURL); why != "" {
		bad(s.DatabaseSetting(), "%s", why)
	}
	if !slices.Contains([]int{1, 3, 5}, s.StreamReplicas) {
		bad("USHER_STREAM_REPLICAS", "%d is not 1, 3 or 5", s.StreamReplicas)
	}
	if s.StreamMaxBytes < 1<<20 {
		bad("USHER_STREAM_MAX_BYTES", "%s is below 1MiB", s.StreamMaxBytes)
	}
	for name, d := range map[string]time.Duration{
		"USHER_RETENTION": s.Retention, "USHER_FRAUD_COUNTRY_WINDOW": s.FraudCountryWindow,
		"USHER_FRAUD_SESSION_WINDOW": s.FraudSessionWindow, "USHER_ONBOARDING_REMINDER_AFTER": s.OnboardingReminderAfter,
		"USHER_RECONCILE_INTERVAL": s.ReconcileInterval, "USHER_RECONCILE_FULL_INTERVAL": s.ReconcileFullInterval,
		"USHER_SILENCE_AFTER": s.SilenceAfter, "USHER_ALERT_WINDOW": s.AlertWindow,
	} {
		if d <= 0 {
			bad(name, "%s is not above zero", d)
		}
	}
	if s.RetryAttempts < 1 {
		bad("USHER_RETRY_ATTEMPTS", "%d is below 1", s.RetryAttempts)
	}
	if s.RetryInitial <= 0 {
		bad("USHER_RETRY_INITIAL", "%s is not above zero", s.RetryInitial)
	}
	if s.RetryMax < s.RetryInitial {
		bad("USHER_RETRY_MAX", "%s is below USHER_RETRY_INITIAL", s.RetryMax)
	}
	if s.SMTPURL != "" {
		u, err := url.Parse(s.SMTPURL)
		if err != nil || u.Hostname() == "" || u.Scheme != "smtp" && u.Scheme != "smtps" {
			bad("USHER_SMTP_URL", "not smtp://host:port or smtps://host:port, with user:password@ before the host where it wants them")
		}
	}
	for name, address := range map[string]string{"USHER_MAIL_FROM": s.MailFrom, "USHER_ALERT_EMAIL": s.AlertEmail} {
		if _, err := mail.ParseAddress(address); address != "" && err != nil {
			bad(name, "not a mail address such as ops@example.com")
		}
	}
	for name, path := range map[string]string{"USHER_NATS_CREDS": s.NATSCreds, "USHER_GEOIP_DB": s.GeoIPDB} {
		if path != "" && !isFile(path) {
			bad(name, "%s", noFile(path))
		}
	}
	problems = append(problems, s.checkTLS()...)
	if s.FraudMaxCountries < 1 || s.FraudMaxSessions < 1 {
		bad("USHER_FRAUD_MAX_COUNTRIES, USHER_FRAUD_MAX_SESSIONS", "want 1 or more")
	}
	if s.AlertMinEvents < 1 {
		bad("USHER_ALERT_MIN_EVENTS", "%d is below 1", s.AlertMinEvents)
	}
	if s.AlertFailureRate <= 0 || s.AlertFailureRate > 1 {
		bad("USHER_ALERT_FAILURE_RATE", "%v is not between 0 and 1", s.AlertFailureRate)
	}
	for name, addr := range map[string]string{"USHER_INGEST_ADDR": s.IngestAddr, "USHER_CONSOLE_ADDR": s.ConsoleAddr, "USHER_OPS_ADDR": s.OpsAddr} {
		if _, port, err := net.SplitHostPort(addr); err != nil {
			bad(name, "%q is not host:port", addr)
		} else if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
			bad(name, "%q has no port between 0 and 65535", addr)
		}
	}
	for name, token := range map[string]string{"USHER_ADMIN_TOKEN": s.AdminToken, "USHER_APP_TOKEN": s.AppToken} {
		if err := CheckToken(token); token != "" && err != nil {
			bad(name, "%v", err)
		}
	}
	for _, src := range s.Sources {
		name := "CLERK_SECRET_KEY"
		if src.Name != s.Source {
			name = "USHER_SOURCE_" + strings.ToUpper(src.Name) + "_SECRET_KEY"
		}
		switch {
		case strings.HasPrefix(src.SecretKey, "pk_"):
			bad(name, "this is the publishable key, not the secret key (sk_…)")
		case strings.HasPrefix(src.SecretKey, "whsec_"):
			bad(name, "this is a signing secret, not the secret key (sk_…)")
		}
	}
	if s.AppToken != "" && s.AppToken == s.AdminToken {
		bad("USHER_APP_TOKEN", "the same as USHER_ADMIN_TOKEN: an application would be an administrator; make one of its own")
	}
	if s.AdminToken == "" && !IsLoopback(s.ConsoleAddr) {
		bad("USHER_CONSOLE_ADDR", "%q is not a loopback address and USHER_ADMIN_TOKEN is not set: set the token, or bind to 127.0.0.1", s.ConsoleAddr)
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, s.LogLevel) {
		bad("USHER_LOG_LEVEL", "%q is not debug, info, warn or error", s.LogLevel)
	}
	if !slices.Contains([]string{"", "json", "console"}, s.LogFormat) {
		bad("USHER_LOG_FORMAT", "%q is not json or console", s.LogFormat)
	}
	slices.Sort(problems)
	return problems
}

// MinTokenLength is the shortest token that is accepted, in characters.
const MinTokenLength = 16

// CheckToken returns what is wrong with a token: that it can be guessed, or that no header can carry it. The error does not hold it.
func CheckToken(token string) error {
	if n := utf8.RuneCountInString(token); n < MinTokenLength {
		return fmt.Errorf("has %d characters, at least %d are needed: make one with `openssl rand -hex 20`", n, MinTokenLength)
	}
	if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return errors.New("has characters that a header does not carry: want letters, digits and signs of ASCII, without spaces")
	}
	return nil
}

// IsLoopback tells whether a listener address is reachable from this machine only.
func IsLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	return err == nil && isLoopbackHost(host)
}

func isLoopbackHost(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Setting is one effective setting, as `usher config` prints it.
type Setting struct {
	Name    string `json:"name"`
	Value   string `json:"value"`  // masked where it is secret
	Origin  string `json:"origin"` // default, environment, flag, DATABASE_URL
	Default string `json:"default"`
	Doc     string `json:"doc"`
	Secret  bool   `json:"secret,omitempty"`
	URL     bool   `json:"-"` // secret in parts only
}

// List returns every setting in the order of Settings, then the further sources.
func (s *Settings) List() []Setting {
	var list []Setting
	v := reflect.ValueOf(*s)
	for i := range v.NumField() {
		field := v.Type().Field(i)
		name, ok := settingName(field)
		if !ok {
			continue
		}
		_, def, _ := strings.Cut(field.Tag.Get("env"), "default=")
		list = append(list, Setting{
			Name: name, Value: mask(fmt.Sprint(v.Field(i).Interface()), field.Tag.Get("secret")),
			Origin: s.origins[name], Default: def, Doc: field.Tag.Get("doc"), Secret: field.Tag.Get("secret") != "",
		})
	}
	for _, src := range s.Sources[1:] {
		prefix := "USHER_SOURCE_" + strings.ToUpper(src.Name) + "_"
		list = append(list,
			Setting{Name: prefix + "SIGNING_SECRET", Value: src.SigningSecrets.String(), Origin: "environment", Doc: "signing secrets of source " + src.Name},
			Setting{Name: prefix + "SECRET_KEY", Value: mask(src.SecretKey, "true"), Origin: "environment", Doc: "Backend API key of source " + src.Name},
			Setting{Name: prefix + "INSTANCE_ID", Value: src.InstanceID, Origin: "environment", Doc: "Clerk instance of source " + src.Name})
	}
	return list
}

// Origin says where the value of a setting comes from: default, environment, flag, or DATABASE_URL.
func (s *Settings) Origin(name string) string { return s.origins[name] }

// DatabaseSetting is the setting that DatabaseURL comes from: what errors of the database name.
func (s *Settings) DatabaseSetting() string {
	if s.origins["USHER_DATABASE_URL"] == "DATABASE_URL" {
		return "DATABASE_URL"
	}
	return "USHER_DATABASE_URL"
}

// databaseRE are the schemes that pkg/database opens, those of SQLAlchemy and JDBC, with a driver's name in them, and of Django and
// Rails included.
var databaseRE = regexp.MustCompile(`^(?:(?:jdbc:)?(?:postgres(?:ql)?|postgis|psql|pgsql)(?:\+\w+)?://|sqlite:.)`)

// wrongDatabase says why a URL names no database that Usher can use, as far as its scheme tells. It repeats nothing of it.
func wrongDatabase(address string) string {
	switch {
	case databaseRE.MatchString(address):
		return ""
	case strings.HasPrefix(address, `"`), strings.HasPrefix(address, "'"):
		return "begins with a quote: docker --env-file and the like keep quotes, so leave them out"
	case strings.HasPrefix(address, "prisma://"), strings.HasPrefix(address, "prisma+postgres://"):
		return "Prisma's proxy is no PostgreSQL: name the database itself, postgres://… (often in DIRECT_URL), in USHER_DATABASE_URL"
	default:
		return "want postgres://… or sqlite:PATH; where this is another program's, set USHER_DATABASE_URL"
	}
}

// mask hides a secret, and of a URL what may be one.
func mask(value, secret string) string {
	switch {
	case value == "" || secret == "":
		return value
	case secret == "url":
		return redact.URL(value)
	default:
		return redact.Masked
	}
}

// Describe lists every setting with its default and meaning, as documentation and flags need it. Value and
// Origin are empty.
func Describe() []Setting {
	var list []Setting
	t := reflect.TypeFor[Settings]()
	for i := range t.NumField() {
		field := t.Field(i)
		name, ok := settingName(field)
		if !ok {
			continue
		}
		_, def, _ := strings.Cut(field.Tag.Get("env"), "default=")
		list = append(list, Setting{Name: name, Default: def, Doc: field.Tag.Get("doc"), Secret: field.Tag.Get("secret") != "", URL: field.Tag.Get("secret") == "url"})
	}
	return list
}
