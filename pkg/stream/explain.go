package stream

import (
	"context"
	"errors"
	"strings"
	"syscall"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Kinds of trouble with the broker, in words for whoever has to act. [Explain] finds the kind of an error. All but ErrSetup, ErrFull,
// ErrTooLarge and ErrClosed are also ErrUnavailable: waiting may cure them, and what was published may or may not be stored.
var (
	ErrUnavailable = errors.New("the broker does not answer: check that it runs and can be reached")
	ErrRefused     = errors.New("the broker refuses the login: check the user and password in USHER_NATS_URL, or the file in USHER_NATS_CREDS")
	ErrForbidden   = errors.New("the broker does not permit this to its user: extend the user's permissions")
	ErrNoJetStream = errors.New("JetStream does not answer at the broker: enable it there (a jetstream block, see deploy/nats/nats.conf); " +
		"right after the broker's start it only needs a moment")
	ErrNoLeader = errors.New("the broker's cluster has no leader for this: an election passes by itself, a lost majority returns with its servers")
	ErrStorage  = errors.New("the broker's storage (max_file_store, or the account's limit) is used up: give it more room")
	ErrSetup    = errors.New("streams or consumers are missing: run `usher setup`")
	ErrFull     = errors.New("the stream is full: see what is not settled, shorten USHER_RETENTION, or raise USHER_STREAM_MAX_BYTES")
	ErrTooLarge = errors.New("the event is larger than the broker takes (max_payload)")
	ErrClosed   = errors.New("publisher is closed")
)

// explained is an error of the broker's in words that say what to do. Its cause stays in the chain and out of the text.
type explained struct {
	words string
	chain []error
}

func (e *explained) Error() string   { return e.words }
func (e *explained) Unwrap() []error { return e.chain }

// Codes of the broker's errors that the client library has no names for (nats-server server/errors.json).
const (
	codeAccountLimit     jetstream.ErrorCode = 10002
	codeNoPeers          jetstream.ErrorCode = 10005
	codeClusterNotAvail  jetstream.ErrorCode = 10008
	codeClusterNotLeader jetstream.ErrorCode = 10009
	codeNoResources      jetstream.ErrorCode = 10023 // the server's storage is used up
	codeNoStorage        jetstream.ErrorCode = 10047 // a stream's limit is above what the server has left
	codeMessageTooLarge  jetstream.ErrorCode = 10054
	codeStoreFailed      jetstream.ErrorCode = 10077 // stream limit reached: "maximum bytes exceeded"
	codeStreamOffline    jetstream.ErrorCode = 10118
	codeConsumerOffline  jetstream.ErrorCode = 10119
	codeDuplicate        jetstream.ErrorCode = 10158 // it is in flight
	codeStreamOfflineFor jetstream.ErrorCode = 10194
)

// Explain says in words what an error of a call to the broker means and what to do about it; what it does not know stays as it is.
// The cause stays in the chain. Only for errors of the broker's: a time-out of anything else would be taken for one of its.
func Explain(err error) error {
	var done *explained
	if err == nil || errors.As(err, &done) {
		return err
	}
	if kind := kindOf(err); kind != nil {
		words := kind.Error()
		if _, what, found := strings.Cut(err.Error(), nats.ErrPermissionViolation.Error()+": "); found {
			words += " (" + what + ")"
		}
		return explain(kind, words, err)
	}
	return err
}

// Words is the part of an error that says what is the matter, without what was being done: the kind itself where the words are its own.
// What is not of [Explain] stays as it is.
func Words(err error) error {
	var e *explained
	if !errors.As(err, &e) {
		return err
	}
	if kind := e.chain[0]; kind.Error() == e.words {
		return kind
	}
	return e
}

// StorageTrouble says in words what a broker's report of its own health (/healthz) means where it cannot write to dir.
func StorageTrouble(report, dir string) string {
	const restart = ", then restart the broker"
	switch text := strings.ToLower(report); {
	case strings.Contains(text, "no space left"), strings.Contains(text, "disk quota"):
		return report + ": free space in " + dir + restart
	case strings.Contains(text, "too many open files"):
		return report + ": raise the limit of open files (ulimit -n, LimitNOFILE)" + restart
	case strings.Contains(text, "read-only"), strings.Contains(text, "permission denied"), strings.Contains(text, "input/output error"):
		return report + ": make " + dir + " writable again" + restart
	default:
		return report
	}
}

func explain(kind error, words string, cause error) error {
	chain := []error{kind, cause}
	switch {
	case errors.Is(kind, ErrStorage):
		chain = append(chain, ErrFull)
	case errors.Is(kind, ErrSetup), errors.Is(kind, ErrFull), errors.Is(kind, ErrTooLarge), errors.Is(kind, ErrUnavailable):
	default:
		chain = append(chain, ErrUnavailable)
	}
	return &explained{words: words, chain: chain}
}

func kindOf(err error) error {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return kindOfAPI(api)
	}
	is := func(targets ...error) bool {
		for _, target := range targets {
			if errors.Is(err, target) {
				return true
			}
		}
		return false
	}
	text := strings.ToLower(err.Error())
	switch {
	case is(ErrUnavailable, ErrSetup, ErrFull, ErrTooLarge, ErrClosed): // said already
		return nil
	// While it dials the library keeps the broker's own words, of which these are a part.
	case strings.Contains(text, "authorization violation"), strings.Contains(text, "authentication expired"), strings.Contains(text, "authentication revoked"):
		return ErrRefused
	case is(nats.ErrSecureConnWanted):
		return errNoTLS
	case is(nats.ErrTLS), strings.Contains(text, "tls:"), strings.Contains(text, "x509:"):
		return errTLS(text)
	case is(nats.ErrPermissionViolation):
		return ErrForbidden
	case is(jetstream.ErrStreamNotFound, jetstream.ErrConsumerNotFound, jetstream.ErrConsumerDeleted, jetstream.ErrBucketNotFound):
		return ErrSetup
	case is(jetstream.ErrJetStreamNotEnabled, jetstream.ErrJetStreamNotEnabledForAccount):
		return ErrNoJetStream
	case is(nats.ErrMaxPayload):
		return ErrTooLarge
	case is(syscall.EMFILE, syscall.ENFILE), strings.Contains(text, "too many open files"):
		return errFiles
	case is(jetstream.ErrConsumerLeadershipChanged):
		return ErrNoLeader
	case is(jetstream.ErrNoStreamResponse):
		return errNoStream
	case is(nats.ErrNoResponders):
		return ErrNoJetStream
	case is(nats.ErrMaxConnectionsExceeded, nats.ErrMaxAccountConnectionsExceeded), strings.Contains(text, "connections exceeded"):
		return errConnections
	// The library answers with the first two while it has no connection.
	case is(nats.ErrReconnectBufExceeded, nats.ErrHeadersNotSupported, nats.ErrDisconnected, nats.ErrConnectionReconnecting,
		nats.ErrConnectionClosed, nats.ErrConnectionDraining, nats.ErrStaleConnection, nats.ErrTimeout, nats.ErrNoServers,
		jetstream.ErrAsyncPublishTimeout, jetstream.ErrNoHeartbeat, jetstream.ErrServerShutdown, jetstream.ErrConnectionClosed, context.DeadlineExceeded, syscall.ECONNREFUSED, syscall.ECONNRESET):
		return ErrUnavailable
	}
	return nil
}

// errTLS is what to do about an encrypted connection that was not made, nil where the text says it.
func errTLS(text string) error {
	switch {
	case strings.Contains(text, "remote error: tls:") && strings.Contains(text, "certificate"): // required, bad, unknown authority of it, expired
		return errClientCert
	case strings.Contains(text, "after tls handshake"): // how a refusal looks where the answer to it comes too late
		return errClosedByTLS
	case strings.Contains(text, "unknown authority"):
		return errAuthority
	}
	return nil
}

// Kinds that nobody asks for by name.
var (
	errNoTLS = errors.New("the broker offers no TLS, and is asked for it by tls:// in USHER_NATS_URL, USHER_NATS_CA or USHER_NATS_CERT: give it a tls block, " +
		"or leave them out")
	errAuthority   = errors.New("the broker's certificate comes from an authority that is not known here: name the authority's file in USHER_NATS_CA")
	errClientCert  = errors.New("the broker wants a client certificate that is valid and comes from an authority that it knows: set USHER_NATS_CERT and USHER_NATS_KEY")
	errClosedByTLS = errors.New("the broker closed the connection right after the TLS handshake: where that stays so, it wants a client certificate that is valid and comes " +
		"from an authority that it knows: set USHER_NATS_CERT and USHER_NATS_KEY")
	errFiles       = errors.New("too many open files: raise the limit of the process that says so (ulimit -n, LimitNOFILE)")
	errConnections = errors.New("the broker takes no more connections: raise its max_connections, or the account's")
	errNoStream    = errors.New("no stream took the event: it has no leader for the moment, or is missing (`usher setup` creates it)")
)

func kindOfAPI(api *jetstream.APIError) error {
	switch api.ErrorCode { //nolint:exhaustive // the others have no words of ours
	case jetstream.JSErrCodeStreamNotFound, jetstream.JSErrCodeConsumerNotFound:
		return ErrSetup
	case jetstream.JSErrCodeJetStreamNotEnabled, jetstream.JSErrCodeJetStreamNotEnabledForAccount:
		return ErrNoJetStream
	case codeClusterNotAvail, codeClusterNotLeader, codeNoPeers, codeStreamOffline, codeStreamOfflineFor, codeConsumerOffline:
		return ErrNoLeader
	case codeStoreFailed:
		return ErrFull
	case codeNoResources, codeNoStorage, codeAccountLimit:
		return ErrStorage
	case codeMessageTooLarge:
		return ErrTooLarge
	}
	if api.Code == 503 {
		return ErrUnavailable
	}
	return nil
}

// Connected returns nil while nc has a connection, else in words why it has none.
func Connected(nc *nats.Conn) error {
	if nc.IsConnected() {
		return nil
	}
	cause := nc.LastError()
	if cause == nil {
		cause = nats.ErrDisconnected
	}
	return notConnected(cause)
}

func notConnected(cause error) error {
	kind := kindOf(cause)
	if kind == nil {
		return explain(ErrUnavailable, "not connected to the broker: "+strings.TrimPrefix(cause.Error(), "nats: "), cause)
	}
	return explain(kind, "not connected to the broker: "+kind.Error(), cause)
}
