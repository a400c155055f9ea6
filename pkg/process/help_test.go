package process

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestArgumentsStartNothing(t *testing.T) {
	t.Parallel()
	program := Program{Name: "tester", Short: "tester tests.", OpsAddr: "127.0.0.1:8099"}
	for _, args := range [][]string{{"--help"}, {"-h"}, {"help"}} {
		var out, err bytes.Buffer
		assert.Equal(t, Stopped, help(args, &out, &err, program))
		assert.Contains(t, out.String(), "tester tests.")
		assert.Contains(t, out.String(), "USHER_NATS_URL")
		assert.Contains(t, out.String(), "(default 127.0.0.1:8099)")
		assert.Contains(t, out.String(), "Example:")
		assert.Empty(t, err.String())
	}
	for _, args := range [][]string{{"--nonsense"}, {"run"}, {"--help", "me"}} {
		var out, err bytes.Buffer
		assert.Equal(t, WrongSettings, help(args, &out, &err, program))
		assert.Contains(t, err.String(), "tester: unknown arguments")
		assert.Empty(t, out.String())
	}
}
