package database_test

import (
	"context"
	"database/sql"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/database"
	"github.com/usherhq/usher/pkg/dbtest"
)

// withParameter is address with a parameter more.
func withParameter(t *testing.T, address, name, value string) string {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	q := u.Query()
	q.Set(name, value)
	u.RawQuery = strings.ReplaceAll(q.Encode(), "+", "%20") // pgx reads a + as it is
	return u.String()
}

// hostileDefaults sets what an operator may have set for other programs.
func hostileDefaults(t *testing.T, address string) {
	t.Helper()
	admin := dbtest.Open(t, address)
	var name, user string
	require.NoError(t, admin.Raw("SELECT current_database(), current_user").Row().Scan(&name, &user))
	for _, set := range []string{
		"synchronous_commit = off", "default_transaction_isolation = serializable", "statement_timeout = '10s'",
		"idle_in_transaction_session_timeout = '10s'", "client_encoding = LATIN1", "timezone = 'Asia/Tokyo'", "search_path = public",
	} {
		require.NoError(t, admin.Exec(fmt.Sprintf("ALTER DATABASE %s SET %s", name, set)).Error)
		require.NoError(t, admin.Exec(fmt.Sprintf("ALTER ROLE %s IN DATABASE %s SET %s", user, name, set)).Error)
	}
}

func show(t *testing.T, db *gorm.DB, name string) string {
	t.Helper()
	var value string
	require.NoError(t, db.Raw("SELECT current_setting(?)", name).Scan(&value).Error)
	return value
}

func TestDefaultsOfDatabaseAndRoleChangeNothing(t *testing.T) {
	t.Parallel()
	address := dbtest.EmptyPostgresURL(t)
	hostileDefaults(t, address)
	want := map[string]string{
		"synchronous_commit": "on", "transaction_isolation": "read committed", "statement_timeout": "0", "idle_in_transaction_session_timeout": "0",
		"client_encoding": "UTF8", "timezone": "UTC", "search_path": `"usher"`,
	}
	for name, address := range map[string]string{
		"plain":          address,
		"client in URL":  withParameter(t, address, "client_encoding", "LATIN1"),
		"commits in URL": withParameter(t, address, "synchronous_commit", "off"),
		"options in URL": withParameter(t, address, "options", "-c synchronous_commit=off -c client_encoding=LATIN1 -c default_transaction_isolation=serializable"),
	} {
		db := dbtest.Open(t, address)
		for setting, value := range want {
			assert.Equal(t, value, show(t, db, setting), "%s: %s", name, setting)
			require.NoError(t, database.InTx(t.Context(), db, func(tx *gorm.DB) error {
				assert.Equal(t, value, show(t, tx, setting), "%s, in a transaction: %s", name, setting)
				return nil
			}))
		}
		require.NoError(t, database.InReadTx(t.Context(), db, func(tx *gorm.DB) error {
			assert.Equal(t, "repeatable read", show(t, tx, "transaction_isolation"))
			assert.Equal(t, "on", show(t, tx, "transaction_read_only"))
			return nil
		}))
		var text string
		require.NoError(t, db.Raw("SELECT ? || ''", "Łukasz 🦊").Scan(&text).Error)
		assert.Equal(t, "Łukasz 🦊", text)
	}
}

// Usher's own limits give way to what the URL says, since who wrote that meant Usher.
func TestTheURLMaySetLimits(t *testing.T) {
	t.Parallel()
	db := dbtest.Open(t, withParameter(t, dbtest.EmptyPostgresURL(t), "statement_timeout", "7s"))
	assert.Equal(t, "7s", show(t, db, "statement_timeout"))
}

// What a pooler in transaction mode does with ignore_startup_parameters: the connection begins without any.
func TestTransactionsAreDurableWhereAPoolerDropsTheParametersOfTheStart(t *testing.T) {
	t.Parallel()
	address := dbtest.EmptyPostgresURL(t)
	require.NoError(t, dbtest.Open(t, address).Exec("CREATE TABLE public.seen (setting text, how text)").Error)
	admin := dbtest.Open(t, address)
	var name string
	require.NoError(t, admin.Raw("SELECT current_database()").Scan(&name).Error)
	require.NoError(t, admin.Exec("ALTER DATABASE "+name+" SET synchronous_commit = off").Error)
	require.NoError(t, admin.Exec("ALTER DATABASE "+name+" SET default_transaction_isolation = serializable").Error)

	db := dbtest.Open(t, dropParameters(t, address))
	require.NoError(t, db.Exec("INSERT INTO public.seen SELECT current_setting('synchronous_commit'), 'alone'").Error)
	require.NoError(t, db.Exec("INSERT INTO public.seen SELECT current_setting('synchronous_commit'), ?", "alone with an argument").Error)
	require.Error(t, db.Exec("INSERT INTO public.seen SELECT 1/0, 'failed'").Error)
	require.NoError(t, database.InTx(t.Context(), db, func(tx *gorm.DB) error {
		assert.Equal(t, "read committed", show(t, tx, "transaction_isolation"))
		return tx.Exec("INSERT INTO public.seen SELECT current_setting('synchronous_commit'), 'in a transaction'").Error
	}))
	var seen []string
	require.NoError(t, admin.Raw("SELECT setting FROM public.seen").Scan(&seen).Error)
	assert.Equal(t, []string{"on", "on", "on"}, seen)
}

// dropParameters starts a proxy that hands on nothing of a connection's start but user and database, and returns its address.
func dropParameters(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	server := u.Host
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { pass(ctx, client, server) })
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = listener.Close()
		running.Wait()
	})
	u.Host = listener.Addr().String()
	return withParameter(t, u.String(), "sslmode", "disable")
}

func pass(ctx context.Context, client net.Conn, server string) {
	defer func() { _ = client.Close() }()
	defer context.AfterFunc(ctx, func() { _ = client.Close() })()
	var size [4]byte
	if _, err := io.ReadFull(client, size[:]); err != nil {
		return
	}
	body := make([]byte, binary.BigEndian.Uint32(size[:])-4)
	if _, err := io.ReadFull(client, body); err != nil {
		return
	}
	var start pgproto3.StartupMessage
	if start.Decode(body) != nil {
		return // a request to cancel: nothing of the tests needs it
	}
	start.Parameters = map[string]string{"user": start.Parameters["user"], "database": start.Parameters["database"]}
	out, err := start.Encode(nil)
	if err != nil {
		return
	}
	upstream, err := (&net.Dialer{}).DialContext(ctx, "tcp", server)
	if err != nil {
		return
	}
	defer func() { _ = upstream.Close() }()
	if _, err := upstream.Write(out); err != nil {
		return
	}
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(client, upstream)
		_ = client.Close()
	})
	_, _ = io.Copy(upstream, client)
	_ = upstream.Close()
	back.Wait()
}

func TestExecModes(t *testing.T) {
	t.Parallel()
	address := dbtest.PostgresURL(t)
	upsert := &database.Upsert{Table: "public.modes", Conflict: []string{"id"}, Columns: []database.Column{
		{Name: "id", Type: "text"}, {Name: "n", Type: "bigint"}, {Name: "b", Type: "boolean"}, {Name: "f", Type: "float8"}, {Name: "at", Type: "timestamptz"}, {Name: "doc", Type: "jsonb"},
	}}
	require.NoError(t, dbtest.Open(t, address).Exec("CREATE TABLE public.modes (id text PRIMARY KEY, n bigint, b boolean, f float8, at timestamptz, doc jsonb)").Error)
	for i, parameters := range []string{
		"", "default_query_exec_mode=cache_statement", "default_query_exec_mode=cache_describe", "default_query_exec_mode=describe_exec",
		"statement_cache_capacity=0", "description_cache_capacity=0", "default_query_exec_mode=cache_describe&description_cache_capacity=0", "default_query_exec_mode=cache_describe&statement_cache_capacity=0",
	} {
		t.Run(parameters, func(t *testing.T) {
			name, value, _ := strings.Cut(parameters, "=")
			u := address
			if name != "" {
				value, more, _ := strings.Cut(value, "&")
				if u = withParameter(t, address, name, value); more != "" {
					name, value, _ := strings.Cut(more, "=")
					u = withParameter(t, u, name, value)
				}
			}
			db := dbtest.Open(t, u)
			_, err := upsert.Exec(t.Context(), db, [][]any{{fmt.Sprint("a", i), int64(1), true, 1.5, nil, `{"a":1}`}, {fmt.Sprint("b", i), nil, nil, nil, nil, nil}})
			require.NoError(t, err)
			var ids []string
			require.NoError(t, db.Raw("SELECT id FROM public.modes WHERE id = ANY(ARRAY[?]::text[]) AND n IN ?", []string{fmt.Sprint("a", i)}, []int64{1, 2}).Scan(&ids).Error)
			assert.Equal(t, []string{fmt.Sprint("a", i)}, ids)
		})
	}
	for _, mode := range []string{"exec", "simple_protocol", "", "nonsense"} {
		_, err := database.Open(t.Context(), withParameter(t, address, "default_query_exec_mode", mode), dbtest.Schema)
		require.ErrorIs(t, err, database.ErrUnusable, mode)
		require.ErrorContains(t, err, fmt.Sprintf("default_query_exec_mode=%q in USHER_DATABASE_URL cannot work", mode))
	}
}

func TestAParameterThatTheServerRefusesEndsTheStart(t *testing.T) {
	t.Parallel()
	for name, value := range map[string]string{"no_such_setting": "5s", "statement_timeout": "soon", "shared_buffers": "1GB"} {
		_, err := database.Open(t.Context(), withParameter(t, dbtest.EmptyPostgresURL(t), name, value), dbtest.Schema)
		require.ErrorIs(t, err, database.ErrUnusable)
		require.ErrorContains(t, err, name)
	}
}

func TestADatabaseThatIsNotUTF8IsRefused(t *testing.T) {
	t.Parallel()
	address := dbtest.EmptyPostgresURL(t)
	admin := dbtest.Open(t, address)
	for _, encoding := range []string{"LATIN1", "SQL_ASCII", "EUC_JP"} {
		name := strings.ToLower("usher_" + encoding)
		require.NoError(t, admin.Exec(fmt.Sprintf("CREATE DATABASE %s ENCODING '%s' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'", name, encoding)).Error)
		t.Cleanup(func() { _ = dbtest.Open(t, address).Exec("DROP DATABASE " + name + " WITH (FORCE)") })
		u, err := url.Parse(address)
		require.NoError(t, err)
		u.Path = "/" + name
		_, err = database.Open(t.Context(), u.String(), dbtest.Schema)
		require.ErrorIs(t, err, database.ErrUnusable)
		require.ErrorContains(t, err, fmt.Sprintf(`the encoding of database %q is %s`, name, encoding))
		require.ErrorContains(t, err, "ENCODING 'UTF8' TEMPLATE template0")
	}
}

// In a file of UTF-16 texts sort by the bytes of UTF-16 (in UTF-16le 'z' after 'Ā'), and so would the ids of events.
func TestASQLiteFileThatIsNotUTF8IsRefused(t *testing.T) {
	t.Parallel()
	for _, encoding := range []string{"UTF-16le", "UTF-16be"} {
		file := sqliteFile(t, "PRAGMA encoding = '"+encoding+"'", "CREATE TABLE t (a text)")
		_, err := database.Open(t.Context(), "sqlite:"+file, "")
		require.ErrorIs(t, err, database.ErrUnusable)
		require.ErrorContains(t, err, encoding)
	}
}

// sqliteFile makes a file with SQLite alone.
func sqliteFile(t *testing.T, statements ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "other.db")
	pool, err := sql.Open("sqlite", "file:"+file)
	require.NoError(t, err)
	defer func() { require.NoError(t, pool.Close()) }()
	pool.SetMaxOpenConns(1)
	for _, statement := range statements {
		_, err := pool.ExecContext(t.Context(), statement)
		require.NoError(t, err)
	}
	return file
}

func TestSettingsOfTheServerThatEndangerRowsAreNamed(t *testing.T) {
	t.Parallel()
	warnings, err := database.Warnings(t.Context(), dbtest.SQLite(t))
	require.NoError(t, err)
	assert.Empty(t, warnings)
	address := dbtest.EmptyPostgresURL(t)
	admin := dbtest.Open(t, address)
	want := []string{}
	for _, name := range []string{"fsync", "full_page_writes"} { // as the server of the tests has them
		if show(t, admin, name) == "off" {
			want = append(want, name+" = off")
		}
	}
	named := func(address string, want ...string) {
		warnings, err := database.Warnings(t.Context(), dbtest.Open(t, address))
		require.NoError(t, err)
		require.Len(t, warnings, len(want), warnings)
		for i := range want {
			assert.Contains(t, warnings[i], want[i])
		}
	}
	named(address, want...)
	var name string
	require.NoError(t, admin.Raw("SELECT current_database()").Scan(&name).Error)
	require.NoError(t, admin.Exec("ALTER DATABASE "+name+" SET session_replication_role = replica").Error)
	require.NoError(t, admin.Exec("ALTER DATABASE "+name+" SET synchronous_commit = off").Error)
	named(address, append(want, "session_replication_role = replica")...)
	named(dropParameters(t, address), append(want, "session_replication_role = replica", "a pooler")...)
}
