package stream_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/usherhq/usher/pkg/natstest"
	"github.com/usherhq/usher/pkg/stream"
)

// TestTLSToTheBroker: a broker that speaks TLS only and wants to see a certificate, at its monitoring port too.
func TestTLSToTheBroker(t *testing.T) {
	t.Parallel()
	own, other := natstest.NewCertificates(t), natstest.NewCertificates(t)
	s := natstest.New(t, natstest.WithSync, own.WithTLS(true))
	url := "tls://" + s.Server().Addr().String()
	connect := func(t *testing.T, url string, option nats.Option) *nats.Conn {
		t.Helper()
		nc, err := stream.Connect(url, "", "test", nop(), option)
		require.NoError(t, err)
		t.Cleanup(nc.Close)
		return nc
	}
	t.Run("with its authority and a certificate of it", func(t *testing.T) {
		t.Parallel()
		for _, url := range []string{url, strings.Replace(url, "tls://", "nats://", 1)} {
			nc := connect(t, url, stream.TLS(own.CA, own.ClientCert, own.ClientKey))
			require.Eventually(t, nc.IsConnected, time.Minute, time.Millisecond)
			_, err := nc.TLSConnectionState()
			require.NoError(t, err, url)
			js, err := stream.JetStream(nc)
			require.NoError(t, err)
			_, err = stream.Topology{Replicas: 1, MaxBytes: 1 << 20}.Ensure(t.Context(), js)
			require.NoError(t, err)
			monitor := "https://" + s.Server().MonitorAddr().String()
			assert.Equal(t, stream.Durability{State: stream.Synced, Detail: "sync_interval is always at natstest"}, stream.AskDurability(t.Context(), js, monitor, 1))
		}
	})
	for name, c := range map[string]struct {
		option nats.Option
		says   string
	}{
		"without anything":                 {stream.TLS("", "", ""), "name the authority's file in USHER_NATS_CA"},
		"with another authority":           {stream.TLS(other.CA, own.ClientCert, own.ClientKey), "name the authority's file in USHER_NATS_CA"},
		"without a certificate":            {stream.TLS(own.CA, "", ""), "set USHER_NATS_CERT and USHER_NATS_KEY"},
		"with a certificate of a stranger": {stream.TLS(own.CA, other.ClientCert, other.ClientKey), "set USHER_NATS_CERT and USHER_NATS_KEY"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, url, c.option)
			require.Eventually(t, func() bool { return strings.Contains(stream.Connected(nc).Error(), c.says) }, time.Minute, 10*time.Millisecond,
				"%s: %v", name, nc.LastError())
			require.ErrorIs(t, stream.Connected(nc), stream.ErrUnavailable)
		})
	}
	t.Run("a broker without TLS is not spoken to in clear text", func(t *testing.T) {
		t.Parallel()
		plain := natstest.New(t)
		for _, url := range []string{plain.URL(), strings.Replace(plain.URL(), "nats://", "tls://", 1)} {
			nc := connect(t, url, stream.TLS(own.CA, "", ""))
			require.Eventually(t, func() bool { return strings.Contains(stream.Connected(nc).Error(), "offers no TLS") }, time.Minute, 10*time.Millisecond)
		}
	})
	t.Run("renewed files need no restart", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		install := func(from natstest.Certificates) {
			for name, path := range map[string]string{"cert": from.ClientCert, "key": from.ClientKey} {
				content, err := os.ReadFile(path)
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(filepath.Join(dir, name), content, 0o600))
			}
		}
		install(other)
		nc := connect(t, url, stream.TLS(own.CA, filepath.Join(dir, "cert"), filepath.Join(dir, "key")))
		require.Eventually(t, func() bool {
			return strings.Contains(stream.Connected(nc).Error(), "set USHER_NATS_CERT and USHER_NATS_KEY")
		}, time.Minute, 10*time.Millisecond)
		install(own)
		require.Eventually(t, nc.IsConnected, time.Minute, 10*time.Millisecond)
	})
}

// TestARefusedCertificateIsNamedWhateverIsReadOfIt: the refusal may be read, or only that the connection is gone.
func TestARefusedCertificateIsNamedWhateverIsReadOfIt(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"connection closed by remote after TLS handshake: EOF", "remote error: tls: certificate required", "remote error: tls: bad certificate",
		"remote error: tls: unknown certificate authority", "remote error: tls: expired certificate",
	} {
		assert.ErrorContains(t, stream.Explain(fmt.Errorf("%w: %s", nats.ErrTLS, text)), "set USHER_NATS_CERT and USHER_NATS_KEY", text)
	}
}
