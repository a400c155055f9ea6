package allinone

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.uber.org/zap"
	"golang.org/x/crypto/bcrypt"

	"github.com/usherhq/usher/pkg/listen"
	"github.com/usherhq/usher/pkg/observe"
	"github.com/usherhq/usher/pkg/stream"
)

// brokerConfig is what the embedded broker needs.
type brokerConfig struct {
	dir      string
	password string // of the user "usher"
}

const brokerUser = "usher"

// EmbeddedDurability is what is known about the embedded broker.
var EmbeddedDurability = stream.Durability{State: stream.Synced, Detail: "the embedded broker syncs before it confirms"}

// maxStore is no limit of the embedded broker's: each of its streams has one of its own, which follows USHER_STREAM_MAX_BYTES up and
// down. One for all would have to be changed in step with them, and a lower one than what is stored would refuse everything.
const maxStore = 1 << 60

// startBroker starts a nats-server in this process. It syncs every commit to disk before it acks, and
// listens on a random loopback port, with a password, for the commands of the same machine.
func startBroker(cfg brokerConfig, log *zap.Logger) (*server.Server, error) {
	// The password is random and 26 characters long, so the cheapest hash is good enough.
	hash, err := bcrypt.GenerateFromPassword([]byte(cfg.password), bcrypt.MinCost)
	if err != nil {
		return nil, fmt.Errorf("start the embedded broker: %w", err)
	}
	opts := &server.Options{
		ServerName: "usher-embedded", Host: "127.0.0.1", Port: server.RANDOM_PORT,
		JetStream: true, StoreDir: cfg.dir, SyncAlways: true,
		JetStreamMaxStore: maxStore, JetStreamMaxMemory: 64 << 20,
		// The largest body that ingest takes must fit with its headers.
		MaxPayload: 1<<20 + stream.HeaderRoom,
		// Of this machine, and those of the process itself: they leave descriptors to its files too.
		MaxConn:  min(max(listen.Descriptors()/8, 64), 1024),
		Username: brokerUser, Password: string(hash),
		NoSigs: true,
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("start the embedded broker: %w", err)
	}
	failed := make(chan string, 1)
	srv.SetLoggerV2(brokerLog{log.Named("nats").Sugar(), failed}, false, false, false)
	srv.Start()
	select {
	case why := <-failed:
		srv.Shutdown()
		return nil, fmt.Errorf("start the embedded broker in %s: %s: check that the folder and all in it belong to the user that Usher runs as", cfg.dir, why)
	case failed <- "": // what follows is no failure of the start
	}
	if !srv.ReadyForConnections(20 * time.Second) {
		srv.Shutdown()
		return nil, fmt.Errorf("the embedded broker is not ready after 20 s (folder %s)", cfg.dir)
	}
	return srv, nil
}

// storageCheck is the readiness of the embedded broker's storage. A stream whose write failed, above all for want of room, takes no
// write any more until the broker starts anew, and tells a publisher nothing.
func storageCheck(srv *server.Server, dir string) observe.Check {
	const keep = 2 * time.Second // an orchestrator may ask often
	var mu sync.Mutex
	var asked time.Time
	var last error
	return func() error {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(asked) < keep {
			return last
		}
		asked, last = time.Now(), nil
		if health := srv.Healthz(nil); health.Status != "ok" {
			last = errors.New("the embedded broker cannot work: " + stream.StorageTrouble(health.Error, dir))
		}
		return last
	}
}

// brokerURL is how a command on this machine reaches the embedded broker.
func brokerURL(srv *server.Server, password string) (string, error) {
	u, err := url.Parse(srv.ClientURL())
	if err != nil {
		return "", fmt.Errorf("address of the embedded broker: %w", err)
	}
	u.User = url.UserPassword(brokerUser, password)
	return u.String(), nil
}

// inProcess connects without the network.
func inProcess(srv *server.Server, password string) []nats.Option {
	return []nats.Option{nats.InProcessServer(srv), nats.UserInfo(brokerUser, password)}
}

// brokerLog hands the broker's warnings and errors to our log. Its notices are about its own start and stop.
type brokerLog struct {
	*zap.SugaredLogger
	failed chan string // takes why the start failed, and nothing once it has ended
}

// Fatalf is what the broker does not work on after. In its start, which then returns, it is an error of the start; later it ends the process.
func (l brokerLog) Fatalf(format string, v ...any) {
	select {
	case l.failed <- fmt.Sprintf(format, v...):
	default:
		l.SugaredLogger.Fatalf(format, v...)
	}
}

func (l brokerLog) Noticef(format string, v ...any) { l.Debugf(format, v...) }
func (l brokerLog) Tracef(format string, v ...any)  { l.Debugf(format, v...) }

// ErrLocked tells that another process uses the data folder.
var ErrLocked = errors.New("data folder is in use")

// lock takes the data folder for this process. The broker has no lock of its own: two on one folder would
// destroy it.
func lock(dataDir string) (*flock.Flock, error) {
	l := flock.New(filepath.Join(dataDir, "usher.lock"), flock.SetPermissions(0o600))
	held, err := l.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock data folder: %w", err)
	}
	if !held {
		by := ""
		if s, err := ReadState(dataDir); err == nil {
			by = " by process " + strconv.Itoa(s.PID) + " (usher " + s.Mode + ")"
		}
		return nil, fmt.Errorf("%w%s: %s: stop it, or choose another with --data-dir", ErrLocked, by, dataDir)
	}
	return l, nil
}

// isLocked tells whether a process holds the data folder.
func isLocked(dataDir string) (bool, error) {
	path := filepath.Join(dataDir, "usher.lock")
	if _, err := os.Stat(path); err != nil {
		return false, nil //nolint:nilerr // no lock file, no holder
	}
	l := flock.New(path, flock.SetFlag(os.O_RDWR))
	free, err := l.TryRLock()
	if err != nil {
		return false, fmt.Errorf("look at the lock: %w", err)
	}
	if free {
		_ = l.Unlock()
	}
	return !free, nil
}
