package natstest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// Certificates are files in PEM: an authority, and of it a server's certificate for 127.0.0.1 and a client's.
type Certificates struct {
	t testing.TB

	CA                    string
	ServerCert, ServerKey string
	ClientCert, ClientKey string
}

// NewCertificates makes new ones, which go with the test.
func NewCertificates(t testing.TB) Certificates {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: content}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	authorityKey := newKey()
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	issue := func(name string, template *x509.Certificate) (cert, key string) {
		own := newKey()
		if template == authority {
			own = authorityKey
		}
		der, err := x509.CreateCertificate(rand.Reader, template, authority, &own.PublicKey, authorityKey)
		if err != nil {
			t.Fatal(err)
		}
		private, err := x509.MarshalPKCS8PrivateKey(own)
		if err != nil {
			t.Fatal(err)
		}
		return write(name+".pem", "CERTIFICATE", der), write(name+".key", "PRIVATE KEY", private)
	}
	leaf := func(serial int64, name string, usage x509.ExtKeyUsage) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: authority.NotBefore, NotAfter: authority.NotAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
	}
	c := Certificates{t: t}
	c.CA, _ = issue("ca", authority)
	c.ServerCert, c.ServerKey = issue("server", leaf(2, "server", x509.ExtKeyUsageServerAuth))
	c.ClientCert, c.ClientKey = issue("client", leaf(3, "client", x509.ExtKeyUsageClientAuth))
	return c
}

// WithTLS makes a server speak TLS only, at its monitoring port too; verify: it wants to see a certificate of the clients.
func (c Certificates) WithTLS(verify bool) Option {
	return func(o *server.Options) {
		config, err := server.GenTLSConfig(&server.TLSConfigOpts{CertFile: c.ServerCert, KeyFile: c.ServerKey, CaFile: c.CA, Verify: verify, Timeout: 30})
		if err != nil {
			c.t.Fatal(err)
		}
		o.TLS, o.TLSConfig, o.TLSVerify, o.TLSTimeout = true, config, verify, 30
		o.HTTPHost, o.HTTPSPort = "127.0.0.1", server.RANDOM_PORT
	}
}
