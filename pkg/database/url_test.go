package database_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// awaited opens a database as a service does, and returns what was logged.
func awaited(t *testing.T, address string) ([]string, error) {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	db, err := database.Await(t.Context(), address, dbtest.Schema, zap.New(core), nil, "DATABASE_URL")
	if err == nil {
		require.Equal(t, `"usher"`, show(t, db, "search_path"))
		require.NoError(t, database.Close(db))
	}
	var lines []string
	for _, entry := range logs.All() {
		if !strings.HasPrefix(entry.Message, "PostgreSQL runs with") { // the server of the tests
			lines = append(lines, entry.Message)
		}
	}
	return lines, err
}

// The URLs that vendors print and other clients read. What belongs to those is ignored, and told once.
func TestURLsOfOtherClientsOpenTheDatabase(t *testing.T) {
	t.Parallel()
	address := dbtest.EmptyPostgresURL(t)
	for query, ignored := range map[string]string{
		"schema=public":                                     "schema",
		"connection_limit=5&pool_timeout=10":                "connection_limit, pool_timeout",
		"pgbouncer=true":                                    "",
		"sslmode=disable&sslaccept=strict":                  "sslaccept",
		"statement_cache_size=0":                            "",
		"sslmode=disable&channel_binding=prefer":            "",
		"pgbouncer=true&connect_timeout=15":                 "",
		"pgbouncer=true&supa=base-pooler.x":                 "supa",
		"workaround=supabase-pooler.vercel":                 "workaround",
		"ssl=false&max=20&idleTimeoutMillis=30000":          "max, idleTimeoutMillis",
		"ssl=disable&prepare=false&idle_timeout=20":         "idle_timeout",
		"ssl=true&sslmode=disable":                          "ssl",
		"uselibpqcompat=true&sslmode=prefer":                "uselibpqcompat",
		"gssencmode=disable&keepalives=1":                   "gssencmode, keepalives",
		"pool=5&encoding=unicode&prepared_statements=false": "pool, encoding",
		"prepareThreshold=0&currentSchema=app":              "currentSchema",
		"pool_max_conns=10&pool_min_conns=2":                "pool_max_conns, pool_min_conns",
		"x-migrations-table=m":                              "x-migrations-table",
		"search_path=public":                                "search_path",
		"schema=a&schema=b":                                 "schema",
		"application_name=mine&statement_timeout=7000":      "",
	} {
		lines, err := awaited(t, address+"?"+query)
		require.NoError(t, err, query)
		if ignored == "" {
			assert.Empty(t, lines, query)
			continue
		}
		require.Len(t, lines, 1, "%s: %q", query, lines)
		assert.Contains(t, lines[0], "DATABASE_URL: ignored, since it belongs to other clients: "+ignored, query)
		namesSchema := strings.Contains(strings.ToLower(query), "schema") || strings.Contains(query, "search_path")
		assert.Equal(t, namesSchema, strings.Contains(lines[0], "USHER_DATABASE_SCHEMA names, now usher"), lines[0])
	}
	for _, scheme := range []string{"postgresql", "postgresql+psycopg2", "postgresql+asyncpg", "postgres+pg8000", "postgis", "psql", "pgsql"} {
		lines, err := awaited(t, scheme+strings.TrimPrefix(address, "postgres"))
		require.NoError(t, err, scheme)
		assert.Empty(t, lines, scheme)
	}
	u, err := url.Parse(address)
	require.NoError(t, err)
	password, _ := u.User.Password()
	_, err = awaited(t, "jdbc:postgresql://"+u.Host+u.Path+"?user="+u.User.Username()+"&password="+password)
	require.NoError(t, err)
}

// No waiting cures these: the start ends at once, and names the setting that was set, and the parameter.
func TestWhatWaitingCannotCureEndsTheStart(t *testing.T) {
	t.Parallel()
	address := dbtest.EmptyPostgresURL(t)
	for query, says := range map[string]string{
		"ssl=true":                         "as ssl=true in DATABASE_URL wants it",
		"ssl=require":                      "as ssl=require in DATABASE_URL wants it",
		"sslmode=require":                  "as sslmode=require in DATABASE_URL wants it",
		"sslmode=no-verify":                "as sslmode=no-verify in DATABASE_URL wants it",
		"sslmode=sometimes":                "sslmode in DATABASE_URL is not valid",
		"sslmode=disable&sslmode=require":  "sslmode=require",
		"sslmode=require&sslaccept=strict": "sslmode=require&sslaccept=strict",
		"sslrootcert=/nowhere/ca.pem":      "sslrootcert in DATABASE_URL is not valid (no such file or directory)",
		"sslcert=/nowhere/ca.pem":          "sslcert in DATABASE_URL is not valid (no such file or directory)",
		"sslidentity=/nowhere/me.p12":      "sslidentity in DATABASE_URL",
		"connect_timeout=soon":             "connect_timeout in DATABASE_URL is not valid",
		"channel_binding=sometimes":        "channel_binding in DATABASE_URL is not valid",
		"target_session_attrs=nice":        "target_session_attrs in DATABASE_URL is not valid",
		"default_query_exec_mode=exec":     `default_query_exec_mode="exec" in DATABASE_URL`,
		"no_such_setting=5s":               "no_such_setting",
		"statement_timeout=soon":           "statement_timeout",
		"shared_buffers=1GB":               "shared_buffers",
		"channel_binding=require":          "channel binding",
	} {
		lines, err := awaited(t, address+"?"+query)
		require.ErrorIs(t, err, database.ErrUnusable, query)
		require.ErrorContains(t, err, says)
		require.ErrorContains(t, err, "DATABASE_URL")
		require.NotContains(t, err.Error(), "USHER_DATABASE_URL")
		assert.Empty(t, lines, "nothing is waited for: %s", query)
	}
	u, err := url.Parse(address)
	require.NoError(t, err)
	for _, edit := range []func(){
		func() { u.User = url.UserPassword("postgres", "wrong") }, func() { u.User = url.UserPassword("nobody_known", "x") }, func() { u.Path = "/not_there" },
	} {
		edit()
		lines, err := awaited(t, u.String())
		var wrong interface{ WrongSettings() bool }
		require.ErrorAs(t, err, &wrong)
		assert.True(t, wrong.WrongSettings(), "exit code 2: %v", err)
		require.ErrorContains(t, err, "DATABASE_URL")
		assert.Empty(t, lines)
	}
	_, err = awaited(t, strings.Replace(address, "127.0.0.1", "h@127.0.0.1", 1))
	require.ErrorIs(t, err, database.ErrUnusable)
	require.ErrorContains(t, err, "write special characters of a user or password as %XX")
	_, err = awaited(t, "postgresql://postgres.abc:[YOUR-PASSWORD]@db.example.com:6543/postgres")
	require.ErrorContains(t, err, "DATABASE_URL still has [YOUR-PASSWORD] where the password belongs")

	// Something that is not PostgreSQL.
	other, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := other.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"))
			_, _ = conn.Read(make([]byte, 100))
			_ = conn.Close()
		}
	}()
	_, err = database.Open(t.Context(), "postgres://me@"+other.Addr().String()+"/app?sslmode=disable", "usher", "DATABASE_URL")
	require.ErrorIs(t, err, database.ErrUnusable)
	require.NoError(t, other.Close())
	<-ended
}

// A name that stands for several addresses: that one of them is not listened on does not hide what the other says.
func TestARefusalIsNotHiddenByAnAddressThatNobodyListensOn(t *testing.T) {
	t.Parallel()
	u, err := url.Parse(dbtest.EmptyPostgresURL(t))
	require.NoError(t, err)
	for _, hosts := range []string{"127.0.0.1:1," + u.Host, u.Host + ",127.0.0.1:1"} {
		u.Host, u.RawQuery = hosts, "sslmode=require"
		_, err = database.Open(t.Context(), u.String(), "usher")
		require.ErrorIs(t, err, database.ErrUnusable, hosts)
	}
}

func TestTLSAsOtherClientsAskForIt(t *testing.T) {
	t.Parallel()
	server := dbtest.NewServer(t)
	address := server.Create(t, "usher")
	authority := serveTLS(t, server, address)
	for query, want := range map[string]error{
		"": nil, "ssl=true": nil, "ssl=require": nil, "sslmode=require": nil, "sslmode=no-verify": nil, "sslmode=prefer&sslaccept=strict": nil,
		"sslmode=require&sslaccept=accept_invalid_certs":        nil,
		"sslmode=no-verify&sslrootcert=/nowhere":                nil,
		"sslmode=verify-full":                                   database.ErrUnusable,
		"sslmode=require&sslaccept=strict":                      database.ErrUnusable,
		"sslmode=verify-full&sslrootcert=" + authority:          nil,
		"sslmode=require&sslaccept=strict&sslcert=" + authority: nil, // Prisma
		"sslmode=require&channel_binding=require":               nil, // Neon
	} {
		db, err := database.Open(t.Context(), address+"?"+query, "usher", "DATABASE_URL")
		if want != nil {
			require.ErrorIs(t, err, want, query)
			require.ErrorContains(t, err, strings.Split(query, "&")[0])
			require.ErrorContains(t, err, "certificate")
			continue
		}
		require.NoError(t, err, query)
		var encrypted bool
		require.NoError(t, db.Raw("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").Scan(&encrypted).Error)
		assert.True(t, encrypted, query)
		require.NoError(t, database.Close(db))
	}
}

// serveTLS gives a server a certificate of its own for 127.0.0.1, and returns the file of what signed it.
func serveTLS(t *testing.T, server *dbtest.Server, address string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	db := dbtest.Open(t, address)
	folder := show(t, db, "data_directory")
	info, err := os.Stat(folder)
	require.NoError(t, err)
	owner, ok := info.Sys().(*syscall.Stat_t)
	require.True(t, ok)
	authority := filepath.Join(t.TempDir(), "ca.pem")
	for file, block := range map[string]*pem.Block{
		filepath.Join(folder, "server.crt"): {Type: "CERTIFICATE", Bytes: cert}, authority: {Type: "CERTIFICATE", Bytes: cert},
		filepath.Join(folder, "server.key"): {Type: "PRIVATE KEY", Bytes: der},
	} {
		require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(block), 0o600))
		if file != authority {
			require.NoError(t, os.Chown(file, int(owner.Uid), int(owner.Gid)))
		}
	}
	require.NoError(t, db.Exec("ALTER SYSTEM SET ssl = on").Error)
	server.Stop()
	server.Start(t)
	return authority
}

// Only who does not answer, and "not now", is waited for. Poolers have one code for everything, so their words decide.
func TestOnlyNotNowIsWaitedFor(t *testing.T) {
	t.Parallel()
	const address = "postgres://me@db.example.com/app"
	refusal := func(code, message string) error {
		return &pgconn.PgError{Severity: "FATAL", Code: code, Message: message}
	}
	for _, err := range []error{
		syscall.ECONNREFUSED, io.EOF, io.ErrUnexpectedEOF, context.DeadlineExceeded, &net.DNSError{Err: "no such host", Name: "db.example.com", IsNotFound: true},
		refusal("57P03", "the database system is starting up"),
		refusal("57P01", "terminating connection due to administrator command"),
		refusal("53300", "sorry, too many clients already"),
		refusal("55006", `source database "x" is being accessed by other users`),
		refusal("08P01", "query_wait_timeout"),
		refusal("08P01", "no more connections allowed (max_client_conn)"),
		refusal("08P01", "server login has been failing, try again later (server_login_retry)"),
		refusal("XX000", "Max client connections reached"),
		errors.Join(refusal("28000", "no pg_hba.conf entry for host, SSL encryption"), refusal("53300", "sorry, too many clients already")), // the second without TLS
	} {
		require.ErrorIs(t, database.OpenErrorOf(address, err), database.ErrUnreachable, "%v", err)
	}
	for err, want := range map[error]error{
		refusal("28P01", `password authentication failed for user "me"`):                        database.ErrAuth,
		refusal("28000", "no pg_hba.conf entry for host"):                                       database.ErrAuth,
		refusal("08P01", "no such user: me"):                                                    database.ErrAuth,
		refusal("08P01", "auth failed"):                                                         database.ErrAuth,
		refusal("42501", `permission denied for database "app"`):                                database.ErrAuth,
		refusal("3D000", `database "app" does not exist`):                                       database.ErrNoDatabase,
		refusal("08P01", "no such database: app"):                                               database.ErrNoDatabase,
		refusal("42501", `permission denied to set parameter "session_replication_role"`):       database.ErrUnusable,
		refusal("55P02", `parameter "ssl" cannot be changed now`):                               database.ErrUnusable,
		refusal("08P01", "unsupported startup parameter: options"):                              database.ErrUnusable,
		refusal("0A000", "RDS Proxy currently doesn't support command-line options"):            database.ErrUnusable,
		refusal("XX000", "Tenant or user not found"):                                            database.ErrUnusable,
		refusal("XX000", "The endpoint has been disabled. Enable it using Neon API and retry."): database.ErrUnusable,
		errors.New("server refused TLS connection"):                                             database.ErrUnusable,
	} {
		told := database.OpenErrorOf(address, err)
		require.ErrorIs(t, told, want, "%v", err)
		require.ErrorContains(t, told, "DATABASE_URL")
	}
}

func TestTheEnvironmentOfLibpqIsNamedWhereItIsWrong(t *testing.T) {
	t.Setenv("PGSSLMODE", "sometimes")
	_, err := database.Open(t.Context(), "postgres://me@127.0.0.1:1/app", "usher", "DATABASE_URL")
	require.ErrorIs(t, err, database.ErrUnusable)
	require.ErrorContains(t, err, "PGSSLMODE")
	_, err = database.Open(t.Context(), "postgres://me@127.0.0.1:1/app?sslmode=disable", "usher", "DATABASE_URL")
	require.ErrorIs(t, err, database.ErrUnreachable, "the URL comes first")
}
