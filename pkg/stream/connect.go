package stream

import (
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
)

// PublishTimeout is how long a publish may wait for its ack: well below the 15 s after which Svix
// gives up on a delivery. A timeout means "unknown", never "not stored".
const PublishTimeout = 4 * time.Second

// Connect dials the broker and keeps the connection alive for ever: it returns at once, also while
// the broker is away, and a publish fails at once instead of being buffered while it is. Name is
// the service's, as operators see it in the broker's connection list. creds is a credentials file,
// empty for none. opts come last and may override. The error is about the URL or the credentials.
func Connect(url, creds, name string, log *zap.Logger, opts ...nats.Option) (*nats.Conn, error) {
	options := []nats.Option{
		nats.Name("usher-" + name),
		nats.MaxReconnects(-1),
		nats.RetryOnFailedConnect(true),
		nats.ReconnectWait(250 * time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 500*time.Millisecond),
		nats.ReconnectBufSize(-1),
		nats.PingInterval(20 * time.Second),
		nats.MaxPingsOutstanding(3),
		nats.Timeout(3 * time.Second),
		// A write to a full socket holds the connection's lock, and with it whoever publishes, asks for the state or wants to
		// close. The broker hangs then: the connection is given up, and a publish in it fails as unknown.
		nats.FlusherTimeout(PublishTimeout),
		nats.ReconnectOnFlusherError(),
		nats.DrainTimeout(20 * time.Second),
		nats.CustomInboxPrefix("_INBOX_" + name),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("broker connection lost", zap.Error(err))
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) { log.Info("broker connected again") }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			log.Warn("broker reported an error", zap.Error(err))
		}),
	}
	if creds != "" {
		options = append(options, nats.UserCredentials(creds))
	}
	nc, err := nats.Connect(url, append(options, opts...)...)
	if err != nil {
		return nil, fmt.Errorf("connect to the broker: %w", err)
	}
	return nc, nil
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

// ErrSetup tells that a stream or a consumer is missing.
var ErrSetup = errors.New("streams or consumers are missing: run `usher setup`")
