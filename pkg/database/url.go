package database

import (
	"crypto/tls"
	"errors"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/usherhq/usher/pkg/redact"
)

// defaultSetting is what errors name where the caller does not say which setting a URL comes from.
const defaultSetting = "USHER_DATABASE_URL"

// postgresRE are the schemes of PostgreSQL, those of SQLAlchemy and JDBC, with a driver's name in them, and of Django and Rails included.
var postgresRE = regexp.MustCompile(`^(?:jdbc:)?(?:postgres(?:ql)?|postgis|psql|pgsql)(?:\+\w+)?://`)

// foreign are the parameters that other clients of PostgreSQL read from a URL, and that mean nothing to the server or to Usher. Those that
// are in neither list are the server's: it refuses what it does not know by its name.
var foreign = []string{
	"schema", "currentSchema", "schema_search_path", "search_path", // see ignoredNotice
	// Prisma
	"connection_limit", "pool_timeout", "socket_timeout", "max_connection_lifetime", "max_idle_connection_lifetime", "single_use_connections", "sslaccept",
	// node-postgres, postgres.js
	"uselibpqcompat", "max", "min", "idleTimeoutMillis", "connectionTimeoutMillis", "query_timeout", "keepAlive", "allowExitOnIdle",
	"idle_timeout", "max_lifetime", "fetch_types",
	// Supabase's and Vercel's integrations
	"supa", "workaround",
	// libpq: psycopg and all that are built on it
	"hostaddr", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout", "gssencmode", "gsslib", "gssdelegation",
	"sslcompression", "sslcrl", "sslcrldir", "requirepeer", "requiressl", "load_balance_hosts", "fallback_application_name",
	"ssl_min_protocol_version", "ssl_max_protocol_version",
	// SQLAlchemy, asyncpg
	"prepared_statement_name_func", "async_fallback", "command_timeout", "max_cached_statement_lifetime", "max_cacheable_statement_size",
	"executemany_mode", "max_overflow",
	// JDBC
	"ApplicationName", "loginTimeout", "socketTimeout", "connectTimeout", "tcpKeepAlive", "stringtype", "sslfactory", "autosave", "binaryTransfer",
	"reWriteBatchedInserts", "preparedStatementCacheQueries", "preparedStatementCacheSizeMiB", "defaultRowFetchSize", "targetServerType", "loadBalanceHosts",
	// Rails, Django, Ecto
	"pool", "encoding", "statement_limit", "advisory_locks", "checkout_timeout", "reaping_frequency", "timeout", "variables", "min_messages",
	"conn_max_age", "conn_health_checks",
	// sqlx, lib/pq
	"statement-cache-capacity", "disable_prepared_binary_result",
}

// foreignPrefixes are the same for families of names: pgxpool's and Ecto's pools, golang-migrate.
var foreignPrefixes = []string{"pool_", "x-"}

// unprepared are the ways in which clients are told that a pooler knows no prepared statements: Prisma, asyncpg, SQLAlchemy, postgres.js, Rails,
// JDBC, lib/pq. Any other value of these names asks for what Usher does anyway.
var unprepared = map[string][]string{
	"pgbouncer": {"true"}, "statement_cache_size": {"0"}, "prepared_statement_cache_size": {"0"}, "prepare": {"false"},
	"prepared_statements": {"false"}, "prepareThreshold": {"0"}, "binary_parameters": {"yes"},
}

// pgURL is a URL of PostgreSQL as people have it, understood.
type pgURL struct {
	setting string // that it comes from
	cfg     *pgx.ConnConfig
	ignored []string // names of parameters, in their order
	tls     string   // what it says of TLS, in its own words: "sslmode=no-verify"
}

// pair is a parameter as it is written, and its name and value decoded.
type pair struct{ raw, name, value string }

// parsePostgres reads a URL. Its errors hold nothing secret of it.
func parsePostgres(address, setting string) (*pgURL, error) {
	u := &pgURL{setting: setting}
	if err := redact.CheckURL(address); err != nil {
		return nil, unusable("%s: %v", setting, err)
	}
	if strings.Contains(address, "[YOUR-PASSWORD]") { // Supabase prints it
		return nil, unusable("%s still has [YOUR-PASSWORD] where the password belongs", setting)
	}
	base, query, _ := strings.Cut(postgresRE.ReplaceAllLiteralString(address, "postgres://"), "?")
	var pairs []pair
	for raw := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(raw, "=")
		p := pair{raw: raw, name: unescape(name), value: unescape(value)}
		if raw != "" {
			pairs = append(pairs, p)
		}
	}
	pairs, plain, err := u.translate(pairs)
	if err != nil {
		return nil, err
	}
	if u.cfg, err = pgx.ParseConfig(join(base, pairs)); err != nil { // its text may hold a password that it did not understand
		return nil, u.invalid(base, pairs, err)
	}
	if u.cfg.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement && (plain || u.cfg.StatementCacheCapacity == 0) {
		u.cfg.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	}
	if u.cfg.DefaultQueryExecMode == pgx.QueryExecModeCacheDescribe && u.cfg.DescriptionCacheCapacity == 0 {
		u.cfg.DefaultQueryExecMode = pgx.QueryExecModeDescribeExec
	}
	u.cfg.ConnectTimeout = connectTimeout
	return u, nil
}

// translate leaves the parameters that pgx and the server know, with what others call otherwise in their words. plain: no prepared
// statements are wanted.
func (u *pgURL) translate(pairs []pair) (kept []pair, plain bool, err error) {
	given := map[string]string{}
	for _, p := range pairs {
		given[p.name] = p.value
	}
	_, hasKey := given["sslkey"]
	_, hasMode := given["sslmode"]
	strict := given["sslaccept"] == "strict" && given["sslmode"] == "require"
	for _, p := range pairs {
		switch {
		case p.name == "sslmode" || p.name == "ssl" && !hasMode:
			u.tls = p.name + "=" + p.value
			mode := p.value
			switch mode {
			case "no-verify", "true", "1", "on": // as libpq reads ssl=true
				mode = "require"
			case "false", "0", "off":
				mode = "disable"
			}
			if strict {
				mode, u.tls = "verify-full", u.tls+"&sslaccept=strict"
			}
			kept = append(kept, pair{"sslmode=" + url.QueryEscape(mode), p.name, p.value})
		case p.name == "ssl":
			u.ignore(p.name)
		case p.name == "sslrootcert" && given["sslmode"] == "no-verify": // with it pgx would verify
			u.ignore(p.name)
		case p.name == "sslcert" && !hasKey: // Prisma's word for the certificate of the authority
			kept = append(kept, pair{"sslrootcert=" + url.PathEscape(p.value), p.name, p.value})
		case p.name == "sslidentity":
			return nil, false, unusable("sslidentity in %s names a PKCS #12 file, which Usher does not read: write it as PEM, and name it by sslcert and sslkey", u.setting)
		case p.name == "default_query_exec_mode" && !slices.Contains(execModes, p.value):
			return nil, false, unusable("default_query_exec_mode=%.40q in %s cannot work: rows are written with arrays, which pgx cannot encode in that mode; "+
				"remove the parameter: a pooler is recognized without it", p.value, u.setting)
		case unprepared[p.name] != nil:
			plain = plain || slices.Contains(unprepared[p.name], p.value)
		case p.name == "sslaccept" && strict:
		case slices.Contains(foreign, p.name), slices.ContainsFunc(foreignPrefixes, func(prefix string) bool { return strings.HasPrefix(p.name, prefix) }):
			u.ignore(p.name)
		default:
			kept = append(kept, p)
		}
	}
	return kept, plain, nil
}

func (u *pgURL) ignore(name string) {
	if !slices.Contains(u.ignored, name) {
		u.ignored = append(u.ignored, name)
	}
}

// invalid says which parameter keeps a URL from being read: the one without which it can be.
func (u *pgURL) invalid(base string, pairs []pair, err error) error {
	for i, p := range pairs {
		if _, without := pgx.ParseConfig(join(base, slices.Delete(slices.Clone(pairs), i, i+1))); without == nil {
			why := "" // of the innermost: the outer ones repeat the URL
			if cause := errors.Unwrap(err); cause != nil && p.name != "password" && p.name != "sslpassword" {
				why = " (" + redact.Cause(cause) + ")"
			}
			return unusable("%s in %s is not valid%s: correct or remove it", p.name, u.setting, why)
		}
	}
	beside := ""
	if set := environment(); set != "" {
		beside = "; or what of the environment is read with it is not valid: " + set
	}
	return unusable("%s is not valid; it looks like postgres://user:password@host:5432/name (special characters of the password as %%XX)%s", u.setting, beside)
}

// environment names the variables of libpq that are set and can keep a URL from being understood.
func environment() string {
	return strings.Join(slices.DeleteFunc([]string{
		"PGSERVICE", "PGSERVICEFILE", "PGPORT", "PGSSLMODE", "PGSSLNEGOTIATION", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGCHANNELBINDING", "PGREQUIREAUTH",
		"PGCONNECT_TIMEOUT", "PGTARGETSESSIONATTRS", "PGMINPROTOCOLVERSION", "PGMAXPROTOCOLVERSION",
	}, func(name string) bool { return os.Getenv(name) == "" }), ", ")
}

// ignoredNotice is what to tell of the parameters that were left out, "" where there were none.
func (u *pgURL) ignoredNotice(schema string) string {
	if len(u.ignored) == 0 {
		return ""
	}
	notice := u.setting + ": ignored, since it belongs to other clients: " + strings.Join(u.ignored, ", ")
	if slices.ContainsFunc(u.ignored, func(name string) bool { return slices.Index(foreign, name) >= 0 && slices.Index(foreign, name) < 4 }) {
		notice += "; Usher's tables are in the schema that USHER_DATABASE_SCHEMA names, now " + schema
	}
	return notice
}

// clearText is what to tell where rows and perhaps the password cross a network unencrypted, or would where an attacker on the way says that
// the server has no TLS; "" where they do not.
func (u *pgURL) clearText() string {
	var hosts []string
	note := func(host string, config *tls.Config) {
		ip := net.ParseIP(host)
		local := host == "localhost" || strings.HasPrefix(host, "/") || strings.HasPrefix(host, "@") || ip != nil && ip.IsLoopback() // a socket's folder
		if config == nil && !local && !slices.Contains(hosts, host) {
			hosts = append(hosts, host)
		}
	}
	note(u.cfg.Host, u.cfg.TLSConfig)
	for _, f := range u.cfg.Fallbacks {
		note(f.Host, f.TLSConfig)
	}
	if len(hosts) == 0 {
		return ""
	}
	what := "rows"
	if u.cfg.Password != "" {
		what = "the login and rows"
	}
	return u.setting + ": " + what + " may reach " + strings.Join(hosts, ", ") + " in clear text: add sslmode=require to the URL, or better sslmode=verify-full with sslrootcert"
}

func join(base string, pairs []pair) string {
	if len(pairs) == 0 {
		return base
	}
	raw := make([]string, len(pairs))
	for i, p := range pairs {
		raw[i] = p.raw
	}
	return base + "?" + strings.Join(raw, "&")
}

// unescape decodes as libpq and pgx do: a + stays one. What is not valid stays as it is, and pgx says so.
func unescape(s string) string {
	if decoded, err := url.PathUnescape(s); err == nil {
		return decoded
	}
	return s
}
