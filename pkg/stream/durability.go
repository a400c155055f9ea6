package stream

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// States of a [Durability], as labels of a metric and in reports.
const (
	Synced   = "synced"   // every server that keeps the events writes them to disk before it confirms one
	Unsynced = "unsynced" // at least one does not: a power cut loses confirmed events, and maybe the stream
	Unknown  = "unknown"  // the servers could not be asked, or not all of them
)

// DurabilityStates are all states.
var DurabilityStates = []string{Synced, Unsynced, Unknown}

// Durability is what is known about whether the broker's confirmation means "on disk".
type Durability struct {
	State  string `json:"state"`
	Detail string `json:"detail"` // which server, or why it is unknown
}

// SyncAdvice says what makes a broker durable, SyncVerify what lets Usher verify that.
const (
	SyncAdvice = "give every nats-server these lines and restart it (deploy/nats/nats.conf):\n" +
		"  jetstream {\n" +
		"    store_dir: /var/lib/nats\n" +
		"    sync_interval: always\n" +
		"  }"
	SyncVerify = "to have it verified, set USHER_NATS_MONITOR_URL to the monitoring port (http_port) of every nats-server"
)

// ErrUnsynced is the refusal of a broker that is known not to sync.
var ErrUnsynced = errors.New("the broker does not sync to disk before it confirms an event, so a power cut loses events that Clerk was told are safe: " +
	"set sync_interval: always in the jetstream block of every nats-server and restart it (deploy/nats/nats.conf), " +
	"or take the risk with USHER_ALLOW_UNSYNCED_BROKER=true")

// Refuse returns [ErrUnsynced] with the server's name where the broker is known not to sync.
func (d Durability) Refuse() error {
	if d.State != Unsynced {
		return nil
	}
	return fmt.Errorf("%s: %w", d.Detail, ErrUnsynced)
}

// serverSync is what one server says of itself.
type serverSync struct {
	name      string
	jetstream bool
	state     string
	interval  time.Duration
}

// varz is the part of a server's /varz and of its answer to $SYS.REQ.SERVER.PING.VARZ that counts here. Servers before 2.10 say
// neither how often nor whether they sync.
type varz struct {
	Name      string `json:"server_name"`
	JetStream struct {
		Config *struct {
			SyncInterval time.Duration `json:"sync_interval"`
			SyncAlways   bool          `json:"sync_always"`
		} `json:"config"`
	} `json:"jetstream"`
}

func (v varz) sync() serverSync {
	s := serverSync{name: v.Name, state: Unknown}
	if c := v.JetStream.Config; c != nil {
		s.jetstream, s.interval = true, c.SyncInterval
		switch {
		case c.SyncAlways:
			s.state = Synced
		case c.SyncInterval > 0:
			s.state = Unsynced
		}
	}
	return s
}

const (
	askServers = 2 * time.Second        // for all answers
	lastServer = 500 * time.Millisecond // after the last one
)

// AskDurability asks the servers that keep [Events] whether they sync: at their monitoring ports (monitor: URLs with commas between,
// empty for none) and over the connection, where the user may ask $SYS. What a replicated stream promises is no different: servers in one
// rack, or one after another, lose their power too. It takes a few seconds at most, and no failure to ask is an error: the state then is
// [Unknown]. Replicas is how many servers the stream is to have where it does not exist yet.
func AskDurability(ctx context.Context, js jetstream.JetStream, monitor string, replicas int) Durability {
	ctx, cancel := context.WithTimeout(ctx, 3*askServers)
	defer cancel()
	if err := Connected(js.Conn()); err != nil {
		return Durability{Unknown, err.Error()}
	}
	keepers, unfit := keepersOf(ctx, js)
	if unfit != "" {
		return Durability{Unsynced, unfit}
	}
	servers := map[string]serverSync{}
	var trouble []string
	for base := range strings.SplitSeq(monitor, ",") {
		if base = strings.TrimSpace(base); base == "" {
			continue
		}
		s, err := askMonitor(ctx, js.Conn(), base)
		if err != nil {
			trouble = append(trouble, err.Error())
			continue
		}
		servers[s.name] = s
	}
	complete := false // every server of the cluster was asked, as far as that can be known
	if len(servers) == 0 || len(keepers) > 0 && !all(keepers, servers) {
		for _, s := range askSystem(ctx, js.Conn()) {
			servers[s.name], complete = s, true
		}
	}
	return judge(servers, keepers, trouble, monitor != "", complete || len(servers) >= max(replicas, 1))
}

func all(keepers []string, servers map[string]serverSync) bool {
	return !slices.ContainsFunc(keepers, func(name string) bool { _, known := servers[name]; return !known })
}

func judge(servers map[string]serverSync, keepers []string, trouble []string, monitored, complete bool) Durability {
	if len(servers) == 0 {
		why := "the broker's servers could not be asked"
		if len(trouble) > 0 {
			why = strings.Join(trouble, "; ")
		} else if !monitored {
			why = "USHER_NATS_MONITOR_URL is not set, and the broker does not let its user ask $SYS"
		}
		return Durability{Unknown, why}
	}
	if len(keepers) == 0 { // no stream yet, or nobody may look at it: any server may keep it
		for name, s := range servers {
			if s.jetstream {
				keepers = append(keepers, name)
			}
		}
		slices.Sort(keepers)
	} else {
		complete = true
	}
	var unknown []string
	for _, name := range keepers {
		s, asked := servers[name]
		switch {
		case s.state == Unsynced:
			return Durability{Unsynced, fmt.Sprintf("server %s syncs every %s only", name, s.interval)}
		case !asked:
			unknown = append(unknown, "server "+name+", which keeps the stream, was not asked")
		case s.state != Synced:
			unknown = append(unknown, "server "+name+" does not say how it syncs")
		}
	}
	switch {
	case len(keepers) == 0:
		return Durability{Unknown, "no server that answered has JetStream"}
	case len(unknown) > 0:
		return Durability{Unknown, strings.Join(append(unknown, trouble...), "; ")}
	case !complete:
		return Durability{Unknown, fmt.Sprintf("only %s said that it syncs, and the stream is to have more replicas", strings.Join(keepers, ", "))}
	}
	return Durability{Synced, "sync_interval is always at " + strings.Join(keepers, ", ")}
}

// keepersOf names the servers that keep the stream, empty where that cannot be known. unfit says what of the stream itself
// keeps its events from being on disk.
func keepersOf(ctx context.Context, js jetstream.JetStream) (names []string, unfit string) {
	ctx, cancel := context.WithTimeout(ctx, askServers)
	defer cancel()
	s, err := js.Stream(ctx, Events)
	if err != nil {
		return nil, ""
	}
	info := s.CachedInfo()
	switch {
	case info.Config.Storage == jetstream.MemoryStorage:
		return nil, "stream " + Events + " is kept in memory"
	case info.Config.PersistMode == jetstream.AsyncPersistMode:
		return nil, "stream " + Events + " has persist_mode async"
	}
	if info.Cluster != nil {
		for _, peer := range info.Cluster.Replicas {
			names = append(names, peer.Name)
		}
		if info.Cluster.Leader != "" {
			names = append(names, info.Cluster.Leader)
		}
	}
	slices.Sort(names)
	return names, ""
}

// askMonitor asks one monitoring port; one that speaks https with the certificates of the connection.
func askMonitor(ctx context.Context, nc *nats.Conn, base string) (serverSync, error) {
	ctx, cancel := context.WithTimeout(ctx, askServers)
	defer cancel()
	where := base
	if u, err := url.Parse(base); err == nil {
		where = u.Host // without a password
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(base, "/")+"/varz", nil)
	if err != nil {
		return serverSync{}, fmt.Errorf("the monitoring port %s cannot be asked: not a URL", where)
	}
	config, err := tlsOf(nc)
	if err != nil {
		return serverSync{}, fmt.Errorf("the monitoring port %s cannot be asked: %w", where, err)
	}
	client := http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: config, DisableKeepAlives: true}}
	resp, err := client.Do(r)
	if err != nil {
		var in *url.Error
		if errors.As(err, &in) {
			err = in.Err
		}
		return serverSync{}, fmt.Errorf("the monitoring port %s does not answer: %w", where, err)
	}
	defer resp.Body.Close()
	var v varz
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&v); err != nil || resp.StatusCode != http.StatusOK || v.Name == "" {
		return serverSync{}, fmt.Errorf("what answers at %s is no nats-server's monitoring port (status %d)", where, resp.StatusCode)
	}
	return v.sync(), nil
}

// tlsOf is what [TLS] has given to a connection.
func tlsOf(nc *nats.Conn) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if read := nc.Opts.RootCAsCB; read != nil {
		pool, err := read()
		if err != nil {
			return nil, err
		}
		config.RootCAs = pool
	}
	if read := nc.Opts.TLSCertCB; read != nil {
		cert, err := read()
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{cert}
	}
	return config, nil
}

// askSystem asks all servers over the connection. Only a user of the system account is answered, or one whose account imports the
// service; nobody else learns more than that nobody answers.
func askSystem(ctx context.Context, nc *nats.Conn) []serverSync {
	inbox, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		return nil
	}
	defer func() { _ = inbox.Unsubscribe() }()
	if err := nc.PublishRequest("$SYS.REQ.SERVER.PING.VARZ", inbox.Subject, nil); err != nil {
		return nil
	}
	var servers []serverSync
	wait := askServers
	for {
		next, cancel := context.WithTimeout(ctx, wait)
		msg, err := inbox.NextMsgWithContext(next)
		cancel()
		if err != nil {
			return servers
		}
		var answer struct {
			Server struct {
				Name string `json:"name"`
			} `json:"server"`
			Data *varz `json:"data"`
		}
		if json.Unmarshal(msg.Data, &answer) == nil && answer.Data != nil {
			if answer.Data.Name == "" {
				answer.Data.Name = answer.Server.Name
			}
			servers = append(servers, answer.Data.sync())
			wait = lastServer
		}
	}
}
