package stream

import (
	"context"
	"errors"
	"fmt"
	neturl "net/url"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/event"
)

// PublishTimeout is how long a publish may wait for its ack: well below the 15 s after which Svix
// gives up on a delivery. A timeout means "unknown", never "not stored".
const PublishTimeout = 4 * time.Second

// Connect dials the broker and keeps the connection alive for ever: it returns at once, also while
// the broker is unavailable, and a publish fails at once instead of being buffered while it is. A refused login counts
// as unavailable: a password may be rotated back, a permission returned. Name is
// the service's, as operators see it in the broker's connection list. creds is a credentials file,
// empty for none. opts come last and may override. The error is about the URL or the credentials.
func Connect(url, creds, name string, log *zap.Logger, opts ...nats.Option) (*nats.Conn, error) {
	var failed atomic.Pointer[string] // why the last try failed: every try would say the same
	var denied atomic.Pointer[string] // what was denied last: ingest asks for the same once a minute
	options := []nats.Option{
		nats.Name("usher-" + name),
		nats.MaxReconnects(-1),
		nats.RetryOnFailedConnect(true),
		nats.IgnoreAuthErrorAbort(),
		nats.ReconnectWait(250 * time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 500*time.Millisecond),
		nats.ReconnectBufSize(-1),
		// A broker that hangs still takes bytes: only a ping that is not answered shows it. Other brokers of its cluster
		// work meanwhile, so it is given up after 15 s.
		nats.PingInterval(5 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.Timeout(3 * time.Second),
		// A write to a full socket holds the connection's lock, and with it whoever publishes, asks for the state or wants to
		// close. The broker hangs then: the connection is given up, and a publish in it fails as unknown.
		nats.FlusherTimeout(PublishTimeout),
		nats.ReconnectOnFlusherError(),
		nats.DrainTimeout(20 * time.Second),
		nats.CustomInboxPrefix("_INBOX_" + name),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("broker connection lost", zap.Error(Explain(err)))
			}
		}),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) {
			text := notConnected(err).Error()
			if last := failed.Swap(&text); last == nil || *last != text {
				log.Warn("cannot connect to the broker, trying again", zap.String("reason", text))
			}
		}),
		nats.ConnectHandler(func(*nats.Conn) { failed.Store(nil) }),
		nats.ReconnectHandler(func(*nats.Conn) {
			failed.Store(nil)
			denied.Store(nil)
			log.Info("broker connected again")
		}),
		nats.ErrorHandler(func(nc *nats.Conn, _ *nats.Subscription, err error) {
			if !nc.IsConnected() { // a refused login among others, each time
				text := notConnected(err).Error()
				if last := failed.Swap(&text); last != nil && *last == text {
					return
				}
			}
			if errors.Is(err, nats.ErrPermissionViolation) {
				text := err.Error()
				if last := denied.Swap(&text); last != nil && *last == text {
					return
				}
			}
			log.Warn("broker reported an error", zap.Error(Explain(err)))
		}),
	}
	if creds != "" {
		options = append(options, nats.UserCredentials(creds))
	}
	nc, err := nats.Connect(url, append(options, opts...)...)
	var bad *neturl.Error
	if errors.As(err, &bad) && bad.Op == "parse" { // it repeats the URL, with its password
		return nil, errors.New("connect to the broker: USHER_NATS_URL is not a valid URL; it looks like nats://user:password@host:4222 (special characters of the password as %XX)")
	}
	if err != nil {
		return nil, fmt.Errorf("connect to the broker: %w", err)
	}
	return nc, nil
}

// TLS is what [Connect] needs where the broker's certificate comes from an authority of one's own (ca), or where the broker wants to see one
// (cert and key); files in PEM, empty for none. With any of them the connection is encrypted or not made. They are read again at every
// connect, so that renewed ones need no restart. For all of them empty it is no change.
func TLS(ca, cert, key string) nats.Option {
	return func(o *nats.Options) error {
		if ca != "" {
			if err := nats.RootCAs(ca)(o); err != nil {
				return fmt.Errorf("read USHER_NATS_CA: %w", err)
			}
		}
		if cert != "" || key != "" {
			if err := nats.ClientCert(cert, key)(o); err != nil {
				return fmt.Errorf("read USHER_NATS_CERT and USHER_NATS_KEY: %w", err)
			}
		}
		return nil
	}
}

// JetStream opens the JetStream of a connection with the time limits that Usher's services use.
func JetStream(nc *nats.Conn) (jetstream.JetStream, error) {
	js, err := jetstream.New(nc,
		jetstream.WithDefaultTimeout(PublishTimeout),
		jetstream.WithPublishAsyncTimeout(PublishTimeout),
		jetstream.WithPublishAsyncMaxPending(4096))
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	return js, nil
}

// Guard is a service that fails once the connection is closed by anything but the process itself: nothing opens it again, and
// a supervisor's restart does. It implements lifecycle.Service.
type Guard struct{ Conn *nats.Conn }

// Name implements lifecycle.Service.
func (Guard) Name() string { return "broker connection" }

// Run returns nil when ctx is done, and an error when the connection was closed before.
func (g Guard) Run(ctx context.Context) error {
	closed := g.Conn.StatusChanged(nats.CLOSED)
	defer g.Conn.RemoveStatusListener(closed)
	if !g.Conn.IsClosed() {
		select {
		case <-closed:
		case <-ctx.Done():
			return nil
		}
	}
	if err := g.Conn.LastError(); err != nil {
		return fmt.Errorf("closed for good, a restart opens it again: %w", Explain(err))
	}
	return errors.New("closed for good, a restart opens it again")
}

// Lookup finds a stream. The error is in words, as of [Explain].
func Lookup(ctx context.Context, js jetstream.JetStream, name string) (jetstream.Stream, error) {
	s, err := js.Stream(ctx, name)
	if err == nil {
		err = leads(s.CachedInfo())
	}
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", name, Explain(err))
	}
	return s, nil
}

// codeOtherStream is the refusal of an event that expects another stream.
const codeOtherStream jetstream.ErrorCode = 10060

// Knock shows whether [Events] takes events, without storing one: it publishes where an event of the source that cannot be decoded would
// lie, and expects another stream, which the stream's leader refuses. It needs no permission but that to publish.
func Knock(ctx context.Context, js jetstream.JetStream, source string) error {
	msg := nats.NewMsg(Subject(&event.Event{Source: source}))
	msg.Header.Set(jetstream.ExpectedStreamHeader, "USHER_NO_STREAM")
	_, err := js.PublishMsg(ctx, msg)
	var api *jetstream.APIError
	if errors.As(err, &api) && api.ErrorCode == codeOtherStream {
		return nil
	}
	return Explain(err)
}

// leads reports whether a stream has a leader that a majority of its servers can follow. A leader that has lost them answers for some
// seconds as if nothing had happened.
func leads(info *jetstream.StreamInfo) error {
	cluster := info.Cluster
	if cluster == nil {
		return nil
	}
	running, all := 1, 1+len(cluster.Replicas)
	for _, replica := range cluster.Replicas {
		if !replica.Offline {
			running++
		}
	}
	if cluster.Leader == "" || 2*running <= all {
		return ErrNoLeader
	}
	return nil
}
