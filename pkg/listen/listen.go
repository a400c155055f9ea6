// Package listen opens the listeners of every service so that strangers do no harm: connections are bounded well below the
// process's limit of descriptors, so that broker and database can always open their files, and per address.
//
// It guarantees that a new connection finds a place as long as one is held by a sender who has not shown that they may be
// here: first goes who only waits and had time to ask, then the longest request of a stranger, then an idle
// connection of a known sender. A known sender's request that is being answered is never interrupted. It does not judge requests:
// the services do, and call [Known] for those that they believe.
package listen

import (
	"cmp"
	"container/list"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Options say how many connections a listener takes, and whom it knows.
type Options struct {
	// Name is the listener's in the log and in metrics.
	Name string
	// Share is the part of the process's descriptors that its connections may hold: 3 for a third. Most bounds them where that is more.
	Share, Most int
	// Trusted are the reverse proxies: a connection of theirs carries many senders, so it does not count for its address.
	Trusted    []netip.Prefix
	Log        *zap.Logger           // nil: none
	Registerer prometheus.Registerer // nil: none

	descriptors int // for tests; 0: the process's limit
}

// Listener is a net.Listener of bounded size. It is safe for concurrent use.
type Listener struct {
	net.Listener
	options    Options
	most       int
	perAddress int
	log        *zap.Logger
	dropped    map[string]prometheus.Counter

	mu        sync.Mutex
	open      int
	addresses map[netip.Addr]int
	groups    [groups]list.List // of *conn, by when they came into the group
}

// What a connection does and whether its sender is known. The order is that in which they are dropped.
const (
	waitingStranger = iota
	activeStranger
	waitingKnown
	activeKnown // never dropped
	groups
)

// Reasons of usher_connections_dropped_total.
const (
	droppedIdle = "idle" // it waited without a request
	droppedSlow = "slow" // its request took the longest
	droppedFull = "full" // it was new, and nobody could go for it
)

// Open listens at once, so that a taken port is an error here. [Listener.Attach] must be called for the server that serves it.
func Open(addr string, o Options) (*Listener, error) {
	inner, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l := &Listener{Listener: inner, options: o, log: o.Log, addresses: map[netip.Addr]int{}, dropped: map[string]prometheus.Counter{}}
	if l.log == nil {
		l.log = zap.NewNop()
	}
	// Whoever floods the listener must not flood its log; the metrics count everything.
	l.log = l.log.With(zap.String("listener", o.Name)).WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Second, 5, 1000)
	}))
	if o.descriptors == 0 {
		o.descriptors = Descriptors()
	}
	l.most = max(min(o.descriptors/o.Share, o.Most), 1)
	l.perAddress = max(l.most/2, 1)
	if err := l.register(o.Registerer); err != nil {
		_ = inner.Close()
		return nil, err
	}
	return l, nil
}

func (l *Listener) register(reg prometheus.Registerer) error {
	labels := prometheus.Labels{"listener": l.options.Name}
	dropped := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "usher_connections_dropped_total", Help: "Connections that were closed to make room: idle without a request, slow with one, or new where none could go.",
		ConstLabels: labels,
	}, []string{"reason"})
	for _, reason := range []string{droppedIdle, droppedSlow, droppedFull} {
		l.dropped[reason] = dropped.WithLabelValues(reason)
	}
	if reg == nil {
		return nil
	}
	for _, c := range []prometheus.Collector{
		dropped,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "usher_connections", Help: "Open connections of a listener.", ConstLabels: labels}, func() float64 {
			return float64(l.Connections())
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "usher_connections_max", Help: "Connections that a listener takes.", ConstLabels: labels}, func() float64 {
			return float64(l.most)
		}),
	} {
		if err := reg.Register(c); err != nil {
			return fmt.Errorf("register metrics of listener %s: %w", l.options.Name, err)
		}
	}
	return nil
}

// Connections is how many are open.
func (l *Listener) Connections() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

// Most is the number of connections that the listener takes.
func (l *Listener) Most() int { return l.most }

type connKey struct{}

// Attach lets the listener see what the connections of its server do.
func (l *Listener) Attach(server *http.Server) {
	server.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) }
	server.ConnState = func(nc net.Conn, state http.ConnState) {
		if c, ok := nc.(*conn); ok && (state == http.StateActive || state == http.StateIdle) {
			l.move(c, state == http.StateActive)
		}
	}
}

// Known tells the listener that a request is of a sender who may be here: its connection is then the last to be dropped.
func Known(r *http.Request) {
	if c, ok := r.Context().Value(connKey{}).(*conn); ok {
		c.listener.known(c)
	}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			return nil, err //nolint:wrapcheck // net/http looks at it
		}
		c, hasty := l.admit(nc)
		if hasty > 0 {
			time.Sleep(hasty)
		}
		if c != nil {
			return c, nil
		}
	}
}

// least is what every connection gets before it is dropped: what has been sent with it is then read. A flood of new connections that leaves
// less waits in the system's queue.
const least = 20 * time.Millisecond

// admit finds a place for a connection; nil means that it found no place, and closed the connection. Before the next one is accepted, hasty
// must pass.
func (l *Listener) admit(nc net.Conn) (_ net.Conn, hasty time.Duration) {
	c := &conn{Conn: nc, listener: l}
	if at, err := netip.ParseAddrPort(nc.RemoteAddr().String()); err == nil {
		c.remote = at.Addr().Unmap()
		if !contains(l.options.Trusted, c.remote) {
			c.address = network(c.remote)
		}
	}
	l.mu.Lock()
	var victim *conn
	full := true
	switch {
	case c.address.IsValid() && l.addresses[c.address] >= l.perAddress:
		victim = l.victim(c.address)
	case l.open >= l.most:
		victim = l.victim(netip.Addr{})
	default:
		full = false
	}
	reason := droppedFull
	if victim != nil {
		reason = droppedIdle
		if victim.group == activeStranger {
			reason = droppedSlow
		}
		l.remove(victim)
		hasty = least - time.Since(victim.since)
	}
	admitted := !full || victim != nil
	if admitted {
		l.open++
		if c.address.IsValid() {
			l.addresses[c.address]++
		}
		c.since, c.place = time.Now(), l.groups[waitingStranger].PushBack(c)
	}
	l.mu.Unlock()
	if !full {
		return c, 0
	}
	l.dropped[reason].Inc()
	gone := cmp.Or(victim, c)
	_ = gone.Conn.Close()
	l.log.Warn("connection dropped to make room for others: many are open, see usher_connections",
		zap.String("reason", reason), zap.String("remote_addr", gone.remote.String()), zap.Int("max", l.most))
	if !admitted {
		return nil, least
	}
	return c, hasty
}

// young is the age under which a connection had no time to ask, or to ask for all. Without it, whoever comes in a flood of requests would be
// dropped before their own is read, since what waits goes first.
const young = time.Second

// victim is the connection that goes first, of one address or of all; nil where all are known and at work. The lock is held.
func (l *Listener) victim(address netip.Addr) *conn {
	waiting, active := l.oldest(waitingStranger, address), l.oldest(activeStranger, address)
	now := time.Now()
	switch {
	case waiting != nil && now.Sub(waiting.since) > young, active == nil && waiting != nil:
		return waiting
	case active != nil && (waiting == nil || now.Sub(active.since) > young || active.since.Before(waiting.since)):
		return active
	case waiting != nil:
		return waiting
	default:
		return l.oldest(waitingKnown, address)
	}
}

// oldest is the connection of an address, or of any, that is longest in a group; nil for an empty group. The lock is held.
func (l *Listener) oldest(group int, address netip.Addr) *conn {
	for e := l.groups[group].Front(); e != nil; e = e.Next() {
		if c := e.Value.(*conn); !address.IsValid() || c.address == address {
			return c
		}
	}
	return nil
}

// remove takes a connection out of the count, once. The lock is held.
func (l *Listener) remove(c *conn) {
	if c.place == nil {
		return
	}
	l.groups[c.group].Remove(c.place)
	c.place = nil
	l.open--
	if c.address.IsValid() {
		if l.addresses[c.address]--; l.addresses[c.address] == 0 {
			delete(l.addresses, c.address)
		}
	}
}

func (l *Listener) move(c *conn, active bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	group := waitingStranger
	if active {
		group = activeStranger
	}
	if c.known {
		group += waitingKnown
	}
	l.put(c, group)
}

func (l *Listener) known(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !c.known {
		c.known = true
		l.put(c, activeKnown)
	}
}

// put moves a connection to the end of a group. The lock is held.
func (l *Listener) put(c *conn, group int) {
	if c.place != nil {
		l.groups[c.group].Remove(c.place)
		c.group, c.since, c.place = group, time.Now(), l.groups[group].PushBack(c)
	}
}

// conn is a counted connection. What is below listener is guarded by its lock but remote and address, which do not change.
type conn struct {
	net.Conn
	listener *Listener
	remote   netip.Addr
	address  netip.Addr // that it counts for; the zero one: none
	group    int
	since    time.Time // when it came into its group
	known    bool
	place    *list.Element // in its group; nil once it is closed
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.listener.mu.Lock()
	c.listener.remove(c)
	c.listener.mu.Unlock()
	return c.Conn.Close() //nolint:wrapcheck // net/http looks at it
}

// CloseWrite lets net/http end an answer whose request it does not read to its end, as it does with a plain TCP connection.
func (c *conn) CloseWrite() error {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		return tcp.CloseWrite() //nolint:wrapcheck // net/http looks at it
	}
	return nil
}

// Remote is the address of a request's sender, without a port: the connection's, or where that is a trusted proxy's what the proxy says
// in X-Forwarded-For. What a sender writes there is not believed: the last entry counts that is not a trusted proxy's.
func Remote(r *http.Request, trusted []netip.Prefix) string {
	at, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return ""
	}
	remote := at.Addr().Unmap()
	entries := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(entries) - 1; i >= 0 && contains(trusted, remote); i-- {
		next, err := netip.ParseAddr(strings.TrimSpace(entries[i]))
		if err != nil { // some proxies name the port too
			at, err := netip.ParseAddrPort(strings.TrimSpace(entries[i]))
			if err != nil {
				break
			}
			next = at.Addr()
		}
		remote = next.Unmap().WithZone("")
	}
	return remote.String()
}

func contains(networks []netip.Prefix, a netip.Addr) bool {
	for _, n := range networks {
		if n.Contains(a) {
			return true
		}
	}
	return false
}

// network is what connections are counted for: one IPv4 address, or an IPv6 /64, which is what one host gets.
func network(a netip.Addr) netip.Addr {
	if a.Is4() {
		return a
	}
	p, err := a.WithZone("").Prefix(64)
	if err != nil {
		return a
	}
	return p.Addr()
}
