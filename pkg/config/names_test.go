package config

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestUnknownNamesAreWarnedAboutWithWhatWasMeant(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"USHER_DATABSE_URL":                    "USHER_DATABSE_URL: did you mean USHER_DATABASE_URL?",
		"USHER_DATABSE_URL_FILE":               "USHER_DATABSE_URL_FILE: did you mean USHER_DATABASE_URL_FILE?",
		"usher_database_url":                   "usher_database_url: did you mean USHER_DATABASE_URL?",
		"USHER_DATABASE":                       "USHER_DATABASE: did you mean USHER_DATABASE_URL?",
		"USHER_RETENTION_FILE":                 "USHER_RETENTION_FILE: only a secret can come from a file; set USHER_RETENTION",
		"USHER_SOURCE_STAGING_SIGNING_SERCET":  "USHER_SOURCE_STAGING_SIGNING_SERCET: did you mean USHER_SOURCE_STAGING_SIGNING_SECRET?",
		"USHER_SOURCE_EU_WEST_SECRT_KEY_FILE":  "USHER_SOURCE_EU_WEST_SECRT_KEY_FILE: did you mean USHER_SOURCE_EU_WEST_SECRET_KEY_FILE?",
		"USHER_COFFEE":                         "USHER_COFFEE: there is no such setting, so it changes nothing; `usher config` lists them",
		"USHER_PORT":                           "USHER_PORT: there is no such setting, so it changes nothing; `usher config` lists them",
		"CLERK_WEBHOOK_SECRET":                 "CLERK_WEBHOOK_SECRET: did you mean CLERK_WEBHOOK_SIGNING_SECRET?",
		"CLERK_WEBHOOK_SIGNING_SERCET":         "CLERK_WEBHOOK_SIGNING_SERCET: did you mean CLERK_WEBHOOK_SIGNING_SECRET?",
		"CLERK_WEBHOOK_SINGING_SECRET_FILE":    "CLERK_WEBHOOK_SINGING_SECRET_FILE: did you mean CLERK_WEBHOOK_SIGNING_SECRET_FILE?",
		"CLERK_SECRET_KYE":                     "CLERK_SECRET_KYE: did you mean CLERK_SECRET_KEY?",
		"USHER_SOURCE_STAGING_SIGNING_SECRET":  "",
		"USHER_SOURCE_STAGING_SECRET_KEY_FILE": "",
		"USHER_ADMIN_TOKEN_FILE":               "",
		"DATABASE_URL_FILE":                    "",
		"CLERK_PUBLISHABLE_KEY":                "",
		"CLERK_JWT_KEY":                        "",
		"CLERK_API_KEY":                        "",
		"CLERK_MACHINE_SECRET_KEY":             "",
		"CLERK_SIGN_IN_URL":                    "",
		"CLERK_TELEMETRY_DISABLED":             "",
		"NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY":    "",
		"USHER_INGEST_SERVICE_HOST":            "",
		"USHER_INGEST_SERVICE_PORT_HTTP":       "",
		"USHER_PORT_8080_TCP_ADDR":             "",
		"USHER_\x1b[31m":                       "",
	} {
		value := "hunter2"
		var want1 []string
		if want != "" {
			want1 = []string{want}
		}
		assert.Equal(t, want1, Environ{"PATH=/bin", name + "=" + value}.UnknownNames(), name)
	}
	assert.Empty(t, Environ{"USHER_DATABSE_URL="}.UnknownNames(), "an empty value counts as unset")
	assert.Empty(t, Environ{"USHER_PORT=tcp://10.0.0.1:8080", "USHER_CONSOLE_PORT=tcp://10.0.0.1:8081"}.UnknownNames(), "Kubernetes set it")
	assert.Empty(t, Environ{"CLERK_WEBHOOK_SECRET=x", "CLERK_WEBHOOK_SIGNING_SECRET=x"}.UnknownNames(), "another program reads it")
	for _, s := range Describe() {
		assert.Empty(t, Environ{s.Name + "=x"}.UnknownNames())
	}
}

func TestDurationsTakeDaysAndWeeks(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for text, want := range map[string]time.Duration{
		"7d": 7 * day, "2w": 14 * day, "1w2d": 9 * day, "1d12h": 36 * time.Hour, "1.5d": 36 * time.Hour, "-1d": -day, "90s": 90 * time.Second, "1h30m": 90 * time.Minute, "0": 0,
	} {
		have, err := ParseDuration(text)
		require.NoError(t, err, text)
		assert.Equal(t, want, have, text)
	}
	for _, text := range []string{"", "7", "d", "7 d", "7days", "1y", "99999999w"} {
		_, err := ParseDuration(text)
		require.ErrorContains(t, err, "is not a duration such as 90s, 12h, 7d or 2w", text)
	}
	s, err := Load(Environ{"USHER_RETENTION=4w", "USHER_ALERT_WINDOW=1d"}, map[string]string{"USHER_SILENCE_AFTER": "2d"})
	require.NoError(t, err)
	assert.Equal(t, 28*day, s.Retention)
	assert.Equal(t, day, s.AlertWindow)
	assert.Equal(t, 2*day, s.SilenceAfter)
	_, err = Load(Environ{"USHER_RETENTION=30 days"}, nil)
	require.ErrorContains(t, err, `USHER_RETENTION: "30 days" is not a duration such as 90s, 12h, 7d or 2w`)
}
