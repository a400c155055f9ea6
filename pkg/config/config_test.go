package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const secret = "whsec_MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0"

func TestDefaults(t *testing.T) {
	s, err := Load(nil, nil)
	require.NoError(t, err)
	assert.Equal(t, "sqlite:usher-data/usher.db", s.DatabaseURL)
	assert.Equal(t, ":8080", s.IngestAddr)
	assert.EqualValues(t, 10<<30, s.StreamMaxBytes)
	assert.Equal(t, "720h0m0s", s.Retention.String())
	assert.Equal(t, []Source{{Name: "clerk"}}, s.Sources)
}

func TestEveryProblemIsReported(t *testing.T) {
	_, err := Load(Environ{
		"USHER_RETENTION=soon", "USHER_STREAM_REPLICAS=2", "USHER_LOG_LEVEL=loud", "USHER_DATABASE_URL=mysql://x",
		"CLERK_WEBHOOK_SIGNING_SECRET=sk_test_abc", "USHER_CONSOLE_ADDR=0.0.0.0:1", "USHER_SOURCE_EU_SIGNING_SECRET=whsec_",
	}, nil)
	require.Error(t, err)
	for _, name := range []string{
		"USHER_RETENTION", "USHER_STREAM_REPLICAS", "USHER_LOG_LEVEL", "USHER_DATABASE_URL",
		"CLERK_WEBHOOK_SIGNING_SECRET", "USHER_CONSOLE_ADDR", "USHER_SOURCE_EU_SIGNING_SECRET",
	} {
		assert.Contains(t, err.Error(), name)
	}
	assert.NotContains(t, err.Error(), "sk_test_abc")
}

func TestASettingIsComplainedOfOnce(t *testing.T) {
	s, err := Load(Environ{"USHER_RETENTION=soon", "USHER_NATS_URL=nats://[hush", "USHER_INGEST_ADDR=:1"}, nil)
	var problems Problems
	require.ErrorAs(t, err, &problems)
	assert.Len(t, problems, 2)
	assert.NotContains(t, err.Error(), "hush")
	assert.Equal(t, "720h0m0s", s.Retention.String(), "as if it were not set")
	assert.Equal(t, ":1", s.IngestAddr)
}

func TestWhatIsNoAddressAndNoFileIsWrong(t *testing.T) {
	for setting, bad := range map[string][]string{
		"USHER_SMTP_URL": {"http://x", "garbage", "smtp://"}, "USHER_MAIL_FROM": {"not an address"}, "USHER_ALERT_EMAIL": {"zzz"},
		"USHER_NATS_CREDS": {"/nope", "/"}, "USHER_GEOIP_DB": {"/nope"}, "USHER_RETRY_ATTEMPTS": {"0", "many"}, "USHER_RETRY_INITIAL": {"0s"},
		"USHER_RETRY_MAX": {"10ms"}, "USHER_ALERT_MIN_EVENTS": {"0"}, "USHER_FRAUD_MAX_SESSIONS": {"-1"},
	} {
		for _, value := range bad {
			_, err := Load(Environ{setting + "=" + value}, nil)
			require.ErrorContains(t, err, setting, "%q", value)
		}
	}
	_, err := Load(Environ{
		"USHER_SMTP_URL=smtps://u:p@mail.example.com", "USHER_MAIL_FROM=Usher <usher@example.com>", "USHER_ALERT_EMAIL=ops@example.com",
		"USHER_RETRY_ATTEMPTS=3", "USHER_RETRY_INITIAL=10ms", "USHER_RETRY_MAX=10ms",
	}, nil)
	require.NoError(t, err)
}

func TestAddressesOfTheBroker(t *testing.T) {
	for _, good := range []string{"", "nats://h:4222", "h:4222", "nats://u:p@h", "tls://a:1, tls://b:2", "wss://h"} {
		_, err := Load(Environ{"USHER_NATS_URL=" + good}, nil)
		require.NoError(t, err, "%q", good)
	}
	for _, bad := range []string{"nats://", "nats://[x", "http://h", ",", "nats://a,,nats://b", "postgres://h"} {
		_, err := Load(Environ{"USHER_NATS_URL=" + bad}, nil)
		require.ErrorContains(t, err, "USHER_NATS_URL", "%q", bad)
	}
}

func TestSigningSecrets(t *testing.T) {
	for _, bad := range []string{"whsec_", "whsec_YWJj\n", "whsec_not base64", "sk_test_abc", secret + ",", ",", " "} {
		_, err := Load(Environ{"CLERK_WEBHOOK_SIGNING_SECRET=" + bad}, nil)
		require.Error(t, err, "%q", bad)
	}
	for _, good := range []string{secret, " " + secret + "\n", strings.TrimPrefix(secret, "whsec_"), secret + ", " + secret} {
		_, err := Load(Environ{"CLERK_WEBHOOK_SIGNING_SECRET=" + good}, nil)
		require.NoError(t, err, "%q", good)
	}
}

func TestSources(t *testing.T) {
	s, err := Load(Environ{"USHER_SOURCE_EU_PROD_SIGNING_SECRET=" + secret, "USHER_SOURCE_EU_PROD_INSTANCE_ID=ins_1", "USHER_SOURCE=main"}, nil)
	require.NoError(t, err)
	require.Len(t, s.Sources, 2)
	assert.Equal(t, "main", s.Sources[0].Name)
	assert.Equal(t, Source{Name: "eu_prod", SigningSecrets: Secrets{secret}, InstanceID: "ins_1"}, s.Sources[1])
}

func TestNamesOfSourcesThatCollideAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		environ Environ
		want    []string
	}{
		"the default, named again":      {Environ{"USHER_SOURCE_CLERK_SECRET_KEY=x"}, []string{"USHER_SOURCE_CLERK_…"}},
		"the default, with a dash":      {Environ{"USHER_SOURCE=eu-prod", "USHER_SOURCE_EU_PROD_SECRET_KEY=x"}, []string{"USHER_SOURCE_EU_PROD_…"}},
		"the default, in capitals":      {Environ{"USHER_SOURCE=EU", "USHER_SOURCE_EU_SECRET_KEY=x"}, []string{"USHER_SOURCE_EU_…", "USHER_SOURCE"}},
		"small letters":                 {Environ{"USHER_SOURCE_EU_SECRET_KEY=x", "USHER_SOURCE_eu_SECRET_KEY=y"}, []string{"USHER_SOURCE_eu_SECRET_KEY"}},
		"small letters in the setting":  {Environ{"USHER_SOURCE_EU_secret_key=x"}, []string{"USHER_SOURCE_EU_secret_key"}},
		"a dash":                        {Environ{"USHER_SOURCE_EU_PROD_SECRET_KEY=x", "USHER_SOURCE_EU-PROD_SECRET_KEY=y"}, []string{"USHER_SOURCE_EU-PROD_SECRET_KEY"}},
		"a name that no event may have": {Environ{"USHER_SOURCE__EU_SECRET_KEY=x", "USHER_SOURCE_A.B_INSTANCE_ID=x"}, []string{"USHER_SOURCE__EU_SECRET_KEY", "USHER_SOURCE_A.B_INSTANCE_ID"}},
		"a long name":                   {Environ{"USHER_SOURCE_" + strings.Repeat("X", 65) + "_SECRET_KEY=x"}, []string{"USHER_SOURCE_" + strings.Repeat("X", 65) + "_SECRET_KEY"}},
		"not set":                       {Environ{"USHER_SOURCE_eu_SECRET_KEY=", "USHER_SOURCE_EU_SECRET_KEY=x"}, nil},
	} {
		_, err := Load(c.environ, nil)
		var problems Problems
		errors.As(err, &problems)
		var named []string
		for _, problem := range problems {
			setting, _, _ := strings.Cut(problem, ":")
			named = append(named, setting)
		}
		assert.ElementsMatch(t, c.want, named, name)
	}
}

func TestSourcesThatAreNotApartAreWarnedAbout(t *testing.T) {
	const other = "whsec_YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4"
	s, err := Load(Environ{
		"CLERK_WEBHOOK_SIGNING_SECRET=" + other + "," + secret, "USHER_SOURCE_A_SIGNING_SECRET=" + strings.TrimPrefix(secret, "whsec_"),
		"CLERK_SECRET_KEY=sk_live_hush", "USHER_SOURCE_B_SECRET_KEY=sk_live_hush", "USHER_SOURCE_A_INSTANCE_ID=ins_1", "USHER_SOURCE_B_INSTANCE_ID=ins_1",
	}, nil)
	require.NoError(t, err)
	warnings := s.SourceWarnings()
	require.Len(t, warnings, 3)
	assert.Contains(t, warnings[0], `"clerk" and "a" have the same signing secret`)
	assert.Contains(t, warnings[1], `"clerk" and "b" have the same secret key`)
	assert.Contains(t, warnings[2], `"a" and "b" have the same instance id`)
	assert.NotContains(t, strings.Join(warnings, " "), "hush")
	assert.NotContains(t, strings.Join(warnings, " "), "MTIz")

	s, err = Load(Environ{"CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_SOURCE_A_SIGNING_SECRET=" + other, "USHER_SOURCE_B_SECRET_KEY=x"}, nil)
	require.NoError(t, err)
	assert.Empty(t, s.SourceWarnings())
}

func TestOriginsAndMasks(t *testing.T) {
	s, err := Load(Environ{
		"DATABASE_URL=postgres://u:hush@h/db", "CLERK_WEBHOOK_SIGNING_SECRET=" + secret, "USHER_ADMIN_TOKEN=hush-hush-hush-hush",
		"USHER_SOURCE_EU_SIGNING_SECRET=" + secret, "USHER_LOG_LEVEL=debug",
	}, map[string]string{"USHER_LOG_LEVEL": "warn"})
	require.NoError(t, err)
	byName := map[string]Setting{}
	for _, setting := range s.List() {
		byName[setting.Name] = setting
		assert.NotContains(t, setting.Value, "hush")
		assert.NotContains(t, setting.Value, "MTIz")
		assert.NotEmpty(t, setting.Doc, setting.Name)
	}
	assert.Equal(t, "DATABASE_URL", byName["USHER_DATABASE_URL"].Origin)
	assert.Equal(t, "warn", byName["USHER_LOG_LEVEL"].Value)
	assert.Equal(t, "flag", byName["USHER_LOG_LEVEL"].Origin)
	assert.Equal(t, "default", byName["USHER_RETENTION"].Origin)
}

// TestTokensThatCanBeGuessedOrSentByNobodyAreRefused: also from a file; the problem does not hold the token.
func TestTokensThatCanBeGuessedOrSentByNobodyAreRefused(t *testing.T) {
	const enough = "hush-hush-hush-!"
	require.Len(t, enough, MinTokenLength)
	for _, name := range []string{"USHER_ADMIN_TOKEN", "USHER_APP_TOKEN"} {
		_, err := Load(Environ{name + "=" + enough}, nil)
		require.NoError(t, err)
		for _, token := range []string{"hush", enough[1:], "hush hush hush hush", enough + "\u00a0", " " + enough, "hush\t" + enough, "hüsh-hüsh-hüsh-hüsh"} {
			_, err := Load(Environ{name + "=" + token}, nil)
			require.ErrorContains(t, err, name+": has ", token)
			assert.NotContains(t, err.Error(), token)
		}
		path := filepath.Join(t.TempDir(), "token")
		require.NoError(t, os.WriteFile(path, []byte("hush\n"), 0o600))
		_, err = Load(Environ{name + "_FILE=" + path}, nil)
		require.ErrorContains(t, err, name+": has 4 characters, at least 16 are needed")
	}
	_, err := Load(Environ{"USHER_ADMIN_TOKEN=" + enough, "USHER_APP_TOKEN=" + enough}, nil)
	require.ErrorContains(t, err, "USHER_APP_TOKEN: the same as USHER_ADMIN_TOKEN")
}

func TestBytes(t *testing.T) {
	for in, want := range map[string]string{"10GiB": "10GiB", "1024": "1KiB", "1MB": "1000000B", "1.5GiB": "1536MiB", "512 MiB": "512MiB", "7B": "7B"} {
		var b Bytes
		require.NoError(t, b.EnvDecode(t.Context(), in))
		assert.Equal(t, want, b.String(), in)
	}
	var b Bytes
	require.Error(t, b.EnvDecode(t.Context(), "ten"))
}

func TestSecretsFromFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	s, err := Load(Environ{
		"CLERK_WEBHOOK_SIGNING_SECRET_FILE=" + file("a", secret+"\n"), "USHER_DATABASE_URL_FILE=" + file("b", "postgres://u:p@h/db\r\n"),
		"USHER_SOURCE_EU_SECRET_KEY_FILE=" + file("c", "sk_live_x"), "USHER_LOG_LEVEL_FILE=/nowhere", "USHER_ADMIN_TOKEN_FILE=",
	}, nil)
	require.NoError(t, err, "what is no secret has no file, and an empty one is none")
	assert.Equal(t, Secrets{secret}, s.WebhookSigningSecret)
	assert.Equal(t, "postgres://u:p@h/db", s.DatabaseURL)
	require.Len(t, s.Sources, 2)
	assert.Equal(t, "sk_live_x", s.Sources[1].SecretKey)

	for name, environ := range map[string]Environ{
		"both":        {"USHER_ADMIN_TOKEN_FILE=" + file("d", "x"), "USHER_ADMIN_TOKEN=hush"},
		"missing":     {"USHER_ADMIN_TOKEN_FILE=" + filepath.Join(dir, "hush")},
		"the content": {"USHER_ADMIN_TOKEN_FILE=hush"},
		"empty":       {"USHER_ADMIN_TOKEN_FILE=" + file("e", "\n")},
	} {
		_, err := Load(environ, nil)
		require.ErrorContains(t, err, "USHER_ADMIN_TOKEN_FILE", name)
		assert.NotContains(t, err.Error(), "hush", name)
	}
}

func TestURLsThatWouldBeReadOtherwiseAreRefused(t *testing.T) {
	for setting, value := range map[string]string{
		"USHER_DATABASE_URL": "postgres://joe:12/hush@h/db", "DATABASE_URL": "postgres://joe:12#hush@h/db", "USHER_NATS_URL": "nats://joe:12,hush@h",
		"USHER_NATS_MONITOR_URL": "http://joe:12?hush@h:8222", "USHER_SMTP_URL": "smtp://joe:12/hush@h", "CLERK_API_URL": "https://joe:12/hush@h/v1",
	} {
		_, err := Load(Environ{setting + "=" + value}, nil)
		require.ErrorContains(t, err, setting+": ")
		assert.ErrorContains(t, err, "%XX")
		assert.NotContains(t, err.Error(), "hush")
	}
}

func TestACredentialInPlaceOfItsFileIsNotRepeated(t *testing.T) {
	_, err := Load(Environ{"USHER_NATS_CREDS=-----BEGIN NATS USER JWT-----\nhush"}, nil)
	require.ErrorContains(t, err, "USHER_NATS_CREDS")
	assert.NotContains(t, err.Error(), "hush")
}

func TestWhatNamesNoDatabaseIsRefusedByTheNameThatWasSet(t *testing.T) {
	for _, name := range []string{"DATABASE_URL", "USHER_DATABASE_URL"} {
		for address, says := range map[string]string{
			"mysql://ann:hush@h/app":                    "where this is another program's, set USHER_DATABASE_URL",
			"file:./dev.db":                             "where this is another program's, set USHER_DATABASE_URL",
			"sqlite:":                                   "want postgres://… or sqlite:PATH",
			`"postgres://ann:hush@h/app"`:               "begins with a quote",
			"prisma://accelerate.example.com/?k=hush":   "Prisma's proxy is no PostgreSQL",
			"prisma+postgres://localhost:51213/?k=hush": "Prisma's proxy is no PostgreSQL",
		} {
			_, err := Load(Environ{name + "=" + address}, nil)
			var problems Problems
			require.ErrorAs(t, err, &problems, address)
			require.Len(t, problems, 1, problems)
			assert.True(t, strings.HasPrefix(problems[0], name+": "), problems[0])
			assert.Contains(t, problems[0], says)
			assert.NotContains(t, problems[0], "hush")
		}
		for _, address := range []string{"postgresql://h/app?schema=public", "postgresql+asyncpg://ann:hush@h/app?ssl=require", "jdbc:postgresql://h/app?user=ann", "sqlite:a"} {
			s, err := Load(Environ{name + "=" + address}, nil)
			require.NoError(t, err, address)
			assert.Equal(t, name, s.DatabaseSetting())
		}
	}
}

func TestAnEmptyFlagIsNotGiven(t *testing.T) {
	s, err := Load(Environ{"USHER_DATABASE_SCHEMA=mine"}, map[string]string{"USHER_DATABASE_URL": "", "USHER_DATABASE_SCHEMA": ""})
	require.NoError(t, err)
	assert.Equal(t, "default", s.Origin("USHER_DATABASE_URL"))
	assert.Equal(t, "mine", s.DatabaseSchema)
}

func TestWhiteSpaceAroundAURLDoesNotCount(t *testing.T) {
	s, err := Load(Environ{"DATABASE_URL= postgres://u:p@h/app?sslmode=disable\r\n", "USHER_NATS_URL=nats://h:4222\n"}, nil)
	require.NoError(t, err)
	assert.Equal(t, "postgres://u:p@h/app?sslmode=disable", s.DatabaseURL)
	assert.Equal(t, "nats://h:4222", s.NATSURL)
}

func TestWrongValuesAreNamedInWords(t *testing.T) {
	for entry, says := range map[string]string{
		"USHER_STREAM_REPLICAS=one": `USHER_STREAM_REPLICAS: "one" is not a whole number`, "USHER_ALLOW_UNSYNCED_BROKER=yes": `USHER_ALLOW_UNSYNCED_BROKER: "yes" is not true or false`,
		"USHER_ALERT_FAILURE_RATE=5%": `USHER_ALERT_FAILURE_RATE: "5%" is not a number`, "USHER_STREAM_MAX_BYTES=999999999TiB": "too large",
		"CLERK_SECRET_KEY=pk_test_hush": "CLERK_SECRET_KEY: this is the publishable key", "CLERK_SECRET_KEY=whsec_hush": "CLERK_SECRET_KEY: this is a signing secret",
		"USHER_SOURCE_EU_SECRET_KEY=pk_live_hush": "USHER_SOURCE_EU_SECRET_KEY: this is the publishable key",
	} {
		_, err := Load(Environ{entry}, nil)
		require.ErrorContains(t, err, says, entry)
		assert.NotContains(t, err.Error(), "strconv")
		assert.NotContains(t, err.Error(), "hush")
	}
}
