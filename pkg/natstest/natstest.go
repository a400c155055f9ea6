// Package natstest starts real NATS servers for tests. Only tests import it.
package natstest

import (
	"bytes"
	"context"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/stream"
)

// Server is an embedded nats-server with JetStream on a folder of its own. It listens on a random loopback
// port, which it keeps over Stop and Start.
type Server struct {
	t    testing.TB
	opts server.Options
	srv  *server.Server
}

// Option changes the server's options before it starts.
type Option func(*server.Options)

// WithSync makes every publish ack mean "on disk" (sync_interval: always), as in production.
func WithSync(o *server.Options) { o.SyncAlways = true }

// New starts a server that stops with the test.
func New(t testing.TB, options ...Option) *Server {
	t.Helper()
	s := &Server{t: t, opts: server.Options{
		ServerName: "natstest", Host: "127.0.0.1", Port: server.RANDOM_PORT,
		JetStream: true, StoreDir: storeDir(t), JetStreamMaxStore: 8 << 30, JetStreamMaxMemory: 64 << 20,
		MaxPayload: 2 << 20, NoSigs: true, NoLog: true,
	}}
	for _, o := range options {
		o(&s.opts)
	}
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// Cluster is several servers in one cluster.
type Cluster struct {
	Servers []*Server
}

// NewCluster starts n servers, named n1, n2, …, which stop with the test. It returns once they have a leader.
func NewCluster(t testing.TB, n int, options ...Option) *Cluster {
	t.Helper()
	c := &Cluster{}
	var routes []*url.URL
	ports := make([]int, n)
	for i := range n {
		ports[i] = freePort(t)
		routes = append(routes, &url.URL{Scheme: "nats", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(ports[i]))})
	}
	for i := range n {
		s := &Server{t: t, opts: server.Options{
			ServerName: "n" + strconv.Itoa(i+1), Host: "127.0.0.1", Port: server.RANDOM_PORT,
			JetStream: true, StoreDir: storeDir(t), JetStreamMaxStore: 8 << 30, JetStreamMaxMemory: 64 << 20,
			MaxPayload: 2 << 20, NoSigs: true, NoLog: true,
			Cluster: server.ClusterOpts{Name: "natstest", Host: "127.0.0.1", Port: ports[i]}, Routes: routes,
		}}
		for _, o := range options {
			o(&s.opts)
		}
		s.Start()
		t.Cleanup(s.Stop)
		c.Servers = append(c.Servers, s)
	}
	for deadline := time.Now().Add(time.Minute); !c.led(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the cluster has no leader after a minute")
		}
	}
	return c
}

// led reports whether the cluster has a leader that sees every server.
func (c *Cluster) led() bool {
	for _, s := range c.Servers {
		if s.srv.JetStreamIsLeader() && len(s.srv.JetStreamClusterPeers()) == len(c.Servers) {
			return true
		}
	}
	return false
}

// URL lists every server that runs.
func (c *Cluster) URL() string {
	var urls []string
	for _, s := range c.Servers {
		if s.srv != nil {
			urls = append(urls, s.URL())
		}
	}
	return strings.Join(urls, ",")
}

// Setup connects and creates the streams with as many replicas as there are servers, and consumers for the handlers.
func (c *Cluster) Setup(handlers ...stream.HandlerSpec) (*nats.Conn, jetstream.JetStream) {
	first := c.Servers[0]
	first.t.Helper()
	nc, js := connect(first.t, c.URL())
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		_, err := stream.Topology{Replicas: len(c.Servers), MaxBytes: 1 << 30, Handlers: handlers}.Ensure(ctx, js)
		if err == nil {
			return nc, js
		}
		if ctx.Err() != nil {
			first.t.Fatal(err)
		}
	}
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return portOf(l.Addr())
}

// storeDir is a folder that a server may still write to while it is removed.
func storeDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "natstest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// Start starts the server again on the same folder and port.
func (s *Server) Start() {
	s.t.Helper()
	opts := s.opts
	srv, err := server.NewServer(&opts)
	if err != nil {
		s.t.Fatalf("start nats-server: %v", err)
	}
	srv.Start()
	if !srv.ReadyForConnections(15 * time.Second) {
		s.t.Fatal("nats-server is not ready after 15 s")
	}
	s.srv = srv
	s.opts.Port = opts.Port
	if addr := srv.Addr(); addr != nil {
		s.opts.Port = portOf(addr)
	}
}

// Stop stops the server and keeps its folder. It may be called twice.
func (s *Server) Stop() {
	if s.srv != nil {
		s.srv.Shutdown()
		s.srv.WaitForShutdown()
		s.srv = nil
	}
}

// Damage flips a bit in the record of the stream's message that holds text, while the server is stopped.
func (s *Server) Damage(stream, text string) {
	s.t.Helper()
	if s.srv != nil {
		s.t.Fatal("the server runs")
	}
	files, err := filepath.Glob(filepath.Join(s.opts.StoreDir, "jetstream", "*", "streams", stream, "msgs", "*.blk"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			s.t.Fatal(err)
		}
		if at := bytes.Index(data, []byte(text)); at >= 0 {
			data[at] ^= 1
			if err := os.WriteFile(name, data, 0o600); err != nil {
				s.t.Fatal(err)
			}
			return
		}
	}
	s.t.Fatalf("no message of %s holds %s", stream, text)
}

// MaxPayload changes what the server takes from its next Start on.
func (s *Server) MaxPayload(bytes int32) { s.opts.MaxPayload = bytes }

// URL is where the server listens.
func (s *Server) URL() string { return s.srv.ClientURL() }

// Server is the running server itself, for its counters.
func (s *Server) Server() *server.Server { return s.srv }

// Connect opens a connection with the options of Usher's services. It closes with the test.
func (s *Server) Connect(opts ...nats.Option) (*nats.Conn, jetstream.JetStream) {
	s.t.Helper()
	return connect(s.t, s.URL(), opts...)
}

func connect(t testing.TB, url string, opts ...nats.Option) (*nats.Conn, jetstream.JetStream) {
	t.Helper()
	nc, err := stream.Connect(url, "", "test", zap.NewNop(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := stream.JetStream(nc)
	if err != nil {
		t.Fatal(err)
	}
	return nc, js
}

// Setup connects and creates the streams of a small topology with consumers for the handlers.
func (s *Server) Setup(handlers ...stream.HandlerSpec) (*nats.Conn, jetstream.JetStream) {
	s.t.Helper()
	nc, js := s.Connect()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	if _, err := (stream.Topology{Replicas: 1, MaxBytes: 1 << 30, Handlers: handlers}).Ensure(ctx, js); err != nil {
		s.t.Fatal(err)
	}
	return nc, js
}

func portOf(addr net.Addr) int {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return server.RANDOM_PORT
	}
	return tcp.Port
}
