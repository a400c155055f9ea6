package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/natstest"
)

func TestFilesOfTLSThatCannotWorkAreWrong(t *testing.T) {
	own, other := natstest.NewCertificates(t), natstest.NewCertificates(t)
	_, err := Load(Environ{"USHER_NATS_CA=" + own.CA, "USHER_NATS_CERT=" + own.ClientCert, "USHER_NATS_KEY=" + own.ClientKey}, nil)
	require.NoError(t, err)
	_, err = Load(Environ{"USHER_NATS_CA=" + own.CA}, nil)
	require.NoError(t, err)
	text, err := os.ReadFile(own.ClientKey)
	require.NoError(t, err)
	pasted := strings.TrimSpace(string(text))
	for name, c := range map[string]struct {
		environ Environ
		want    []string
	}{
		"missing": {
			Environ{"USHER_NATS_CA=/nope/ca", "USHER_NATS_CERT=/nope/cert", "USHER_NATS_KEY=/nope/key"},
			[]string{`USHER_NATS_CA: there is no file "/nope/ca"`, `USHER_NATS_CERT: there is no file "/nope/cert"`, `USHER_NATS_KEY: there is no file "/nope/key"`},
		},
		"a folder":                {Environ{"USHER_NATS_CA=/"}, []string{`USHER_NATS_CA: there is no file "/"`}},
		"no certificate":          {Environ{"USHER_NATS_CA=" + own.ClientKey}, []string{"USHER_NATS_CA: the file holds no certificate in PEM"}},
		"a certificate alone":     {Environ{"USHER_NATS_CERT=" + own.ClientCert}, []string{"USHER_NATS_KEY: not set"}},
		"a key alone":             {Environ{"USHER_NATS_KEY=" + own.ClientKey}, []string{"USHER_NATS_CERT: not set"}},
		"of different pairs":      {Environ{"USHER_NATS_CERT=" + own.ClientCert, "USHER_NATS_KEY=" + other.ClientKey}, []string{"USHER_NATS_CERT, USHER_NATS_KEY: are no pair"}},
		"exchanged":               {Environ{"USHER_NATS_CERT=" + own.ClientKey, "USHER_NATS_KEY=" + own.ClientCert}, []string{"USHER_NATS_CERT, USHER_NATS_KEY: are no pair"}},
		"the key itself":          {Environ{"USHER_NATS_CERT=" + own.ClientCert, "USHER_NATS_KEY=" + pasted}, []string{`USHER_NATS_KEY: there is no file "redacted"`}},
		"with other wrong things": {Environ{"USHER_NATS_CA=/nope", "USHER_LOG_LEVEL=loud"}, []string{"USHER_LOG_LEVEL: ", `USHER_NATS_CA: there is no file "/nope"`}},
	} {
		_, err := Load(c.environ, nil)
		var problems Problems
		require.ErrorAs(t, err, &problems, name)
		require.Len(t, problems, len(c.want), "%s: %s", name, problems)
		for i, want := range c.want {
			assert.True(t, strings.HasPrefix(problems[i], want), "%s: %s", name, problems[i])
		}
		assert.NotContains(t, err.Error(), "PRIVATE KEY", name)
		assert.NotContains(t, err.Error(), strings.Split(pasted, "\n")[1], name)
	}
}

func TestClearTextToAnotherMachineIsWarnedAbout(t *testing.T) {
	files := natstest.NewCertificates(t)
	for name, c := range map[string]struct {
		environ Environ
		want    []string
	}{
		"on this machine": {Environ{
			"USHER_NATS_URL=nats://u:hush@127.0.0.1:4222,nats://u:hush@[::1],nats://u:hush@localhost", "CLERK_API_URL=http://127.0.0.1:1", "CLERK_SECRET_KEY=hush",
			"USHER_NATS_MONITOR_URL=http://u:hush@127.0.0.1:8222",
		}, nil},
		"nothing set":         {nil, nil},
		"encrypted":           {Environ{"USHER_NATS_URL=tls://u:hush@n.example,wss://u:hush@m.example", "USHER_NATS_MONITOR_URL=https://u:hush@n.example", "CLERK_SECRET_KEY=hush"}, nil},
		"with a file":         {Environ{"USHER_NATS_URL=nats://u:hush@n.example", "USHER_NATS_CA=" + files.CA}, nil},
		"the broker":          {Environ{"USHER_NATS_URL=nats://n.example,nats://m.example:4222,nats://127.0.0.1"}, []string{"USHER_NATS_URL: events reach n.example, m.example in clear text"}},
		"no scheme":           {Environ{"USHER_NATS_URL=n.example:4222"}, []string{"USHER_NATS_URL: events reach n.example in clear text"}},
		"a web socket":        {Environ{"USHER_NATS_URL=ws://u:hush@n.example"}, []string{"USHER_NATS_URL: the login and events reach n.example"}},
		"with a password":     {Environ{"USHER_NATS_URL=nats://u:hush@10.0.0.7:4222"}, []string{"USHER_NATS_URL: the login and events reach 10.0.0.7"}},
		"with credentials":    {Environ{"USHER_NATS_URL=nats://n.example", "USHER_NATS_CREDS=" + files.CA}, []string{"USHER_NATS_URL: the login and events reach n.example"}},
		"the monitor":         {Environ{"USHER_NATS_MONITOR_URL=http://u:hush@m.example,https://u:hush@n.example"}, []string{"USHER_NATS_MONITOR_URL: its password reaches m.example"}},
		"a comma in a secret": {Environ{"USHER_SLACK_WEBHOOK_URL=https://slack.example/x,hush"}, nil},
		"Clerk, and Slack": {
			Environ{"CLERK_API_URL=http://api.example", "USHER_SOURCE_EU_SECRET_KEY=hush", "USHER_SLACK_WEBHOOK_URL=http://slack.example/x,hush"},
			[]string{"CLERK_API_URL: the secret key reaches api.example", "USHER_SLACK_WEBHOOK_URL: "},
		},
	} {
		s, err := Load(c.environ, nil)
		require.NoError(t, err, name)
		warnings := s.Warnings()
		require.Len(t, warnings, len(c.want), "%s: %s", name, warnings)
		for i, want := range c.want {
			assert.True(t, strings.HasPrefix(warnings[i], want), "%s: %s", name, warnings[i])
			assert.NotContains(t, warnings[i], "hush", name)
		}
	}
}

func TestFilesOfSecretsThatOthersCanReadAreWarnedAbout(t *testing.T) {
	if !HasModes {
		t.Skip("this system's files do not say who may read them")
	}
	dir := t.TempDir()
	file := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte("0123456789abcdef0123456789"), 0o600))
		require.NoError(t, os.Chmod(path, mode))
		return path
	}
	link := filepath.Join(dir, "link")
	require.NoError(t, os.Symlink(file("world", 0o644), link))
	s, err := Load(Environ{
		"USHER_APP_TOKEN_FILE=" + file("private", 0o600), "USHER_ADMIN_TOKEN_FILE=" + link, "CLERK_SECRET_KEY_FILE=" + file("group", 0o640),
		"USHER_SOURCE_EU_SECRET_KEY_FILE=" + file("open", 0o660), "USHER_NATS_CREDS=" + file("creds", 0o604), "USHER_LOG_LEVEL_FILE=" + file("none", 0o666),
	}, nil)
	require.ErrorContains(t, err, "USHER_APP_TOKEN: the same as USHER_ADMIN_TOKEN")
	warnings := s.exposedFiles()
	require.Len(t, warnings, 3, warnings)
	assert.Subset(t, s.Warnings(), warnings)
	assert.Contains(t, warnings[0], "USHER_ADMIN_TOKEN_FILE: everyone on this machine can read the file (mode -rw-r--r--): chmod 600 "+link)
	assert.Contains(t, warnings[1], "USHER_NATS_CREDS: everyone on this machine can read the file")
	assert.Contains(t, warnings[2], "USHER_SOURCE_EU_SECRET_KEY_FILE: others on this machine can change the file (mode -rw-rw----)")
	for _, path := range []string{"world", "open", "creds"} {
		info, err := os.Stat(filepath.Join(dir, path))
		require.NoError(t, err)
		assert.NotEqual(t, os.FileMode(0o600), info.Mode().Perm(), "%s is the user's, and left as it is", path)
	}
}
