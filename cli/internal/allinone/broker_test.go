package allinone

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestABrokerThatCannotStartIsAnError(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "jetstream"), nil, 0o600))
	srv, err := startBroker(brokerConfig{dir: dir, password: "password"}, zap.NewNop())
	require.Nil(t, srv)
	require.ErrorContains(t, err, "start the embedded broker in "+dir)
	assert.ErrorContains(t, err, "belong to the user that Usher runs as")
}

func TestTheStateNamesTheDatabaseThatIsOpened(t *testing.T) {
	t.Parallel()
	here, err := os.Getwd()
	require.NoError(t, err)
	for url, want := range map[string]string{
		"sqlite:usher.db": "sqlite:" + filepath.Join(here, "usher.db"), "sqlite://usher.db": "sqlite:" + filepath.Join(here, "usher.db"),
		"sqlite:/var/usher.db": "sqlite:/var/usher.db", "sqlite:///var/usher.db": "sqlite:/var/usher.db", "postgres://h/db": "postgres://h/db",
	} {
		assert.Equal(t, want, absoluteDatabase(url), url)
	}
}
