package console

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/singleflight"
	"gorm.io/gorm"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/config"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
	"github.com/usherhq/usher/pkg/stream"
)

// Limits of one `ensure`. With askTimeout they stay below writeTimeout.
const (
	defaultWait  = 500 * time.Millisecond
	maxWait      = 5 * time.Second
	fetchTimeout = 5 * time.Second // for Clerk, the turn within the share included
	applyTimeout = 4 * time.Second // for the worker
	pollEvery    = 20 * time.Millisecond

	// ensureShare is how much of an instance's quota is spent on users that are asked for before their webhook came.
	ensureShare = 0.1
	// maxGenerations bounds how often one version of a user is published again after its row was lost.
	maxGenerations = 16
	mirrorHandler  = "mirror"

	// privateMetadata is the column that is left out unless it is asked for: most who ask only want the user to be there.
	privateMetadata = "private_metadata"
)

// How an `ensure` ended: the label of its metric, and what the answer says of a row that was found.
const (
	ensurePresent     = "present"     // the row was there
	ensureArrived     = "arrived"     // its webhook came while we waited
	ensureFetched     = "fetched"     // Clerk was asked, and the worker has applied the answer
	ensureNotFound    = "not_found"   // Clerk says that there is no such user
	ensureNotApplied  = "not_applied" // the event is stored, the worker is behind
	ensureUnavailable = "unavailable" // Clerk, the broker or the database could not be asked
)

// ensurer answers "the user just signed up, and the row is not there yet".
type ensurer struct {
	db      *gorm.DB // may be nil
	js      jetstream.JetStream
	log     *zap.Logger
	sources map[string]*reader
	rows    *arrivals
	flights singleflight.Group // of calls to Clerk, by source and user
	base    context.Context    //nolint:containedctx // of calls that several requests wait for; Close ends it
	close   context.CancelFunc
	results *prometheus.CounterVec
}

type reader struct {
	clerk.Source
	client *clerk.Client
}

func newEnsurer(sources []clerk.Source, deps Deps, log *zap.Logger) (*ensurer, error) {
	e := &ensurer{
		db: deps.DB, js: deps.JetStream, log: log, sources: map[string]*reader{}, rows: newArrivals(deps.DB),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "usher_ensure_requests_total", Help: "Requests for users that must be there, by how they ended."}, []string{"result"}),
	}
	e.base, e.close = context.WithCancel(context.Background())
	for _, s := range sources {
		client, err := s.Client(clerk.Config{Share: ensureShare, Log: log, Registerer: deps.Registerer})
		if err != nil {
			return nil, err
		}
		e.sources[s.Name] = &reader{s, client}
	}
	if deps.Registerer != nil {
		deps.Registerer.MustRegister(e.results)
	}
	for _, result := range []string{ensurePresent, ensureArrived, ensureFetched, ensureNotFound, ensureNotApplied, ensureUnavailable} {
		e.results.WithLabelValues(result)
	}
	return e, nil
}

func (e *ensurer) Close() {
	e.close()
	for _, s := range e.sources {
		s.client.Close()
	}
}

// userID is the form of Clerk's ids: another path of the API must not be asked for in an id's place.
var userID = regexp.MustCompile(`^user_[A-Za-z0-9_-]{1,123}$`)

// ensureUser answers GET /api/users/{id}/ensure.
func (c *Console) ensureUser(w http.ResponseWriter, r *http.Request) {
	id, query := r.PathValue("id"), r.URL.Query()
	if !userID.MatchString(id) {
		writeError(w, http.StatusBadRequest, "invalid_id", "want the id of a user, such as user_2abc")
		return
	}
	wait := defaultWait
	if text := query.Get("wait"); text != "" {
		var err error
		if wait, err = config.ParseDuration(text); err != nil || wait < 0 || wait > maxWait {
			writeError(w, http.StatusBadRequest, "invalid_wait", "wait: want a duration from 0s to "+maxWait.String()+", such as 500ms")
			return
		}
	}
	source := c.cfg.Source
	if query.Has("source") {
		source = query.Get("source")
	}
	private := false
	for _, name := range query["include"] {
		if private = name == privateMetadata; !private {
			writeError(w, http.StatusBadRequest, "invalid_include", "include: want "+privateMetadata)
			return
		}
	}
	row, result, err := c.ensurer.ensure(r.Context(), source, id, wait)
	if r.Context().Err() != nil {
		return // nobody listens
	}
	c.ensurer.results.WithLabelValues(result).Inc()
	var no *refusal
	switch {
	case err == nil:
		if !private { // the row is shared by all who wait for it
			row = maps.Clone(row)
			delete(row, privateMetadata)
		}
		writeJSON(w, http.StatusOK, map[string]any{"user": row, "result": result})
	case errors.As(err, &no) && result == ensureNotFound:
		writeError(w, http.StatusNotFound, no.code, no.message)
	case errors.As(err, &no):
		c.log.Warn("user could not be ensured", zap.String("user_id", id), zap.String("source", source), zap.String("reason", no.code), zap.Error(no.cause))
		w.Header().Set("Retry-After", "1")
		writeError(w, http.StatusServiceUnavailable, no.code, no.message)
	}
}

// refusal is an error as the caller reads it.
type refusal struct {
	code, message string
	cause         error
}

func (r *refusal) Error() string { return r.message }

// ensure returns the user's row: the one that is there or comes within wait, else the one that the worker makes of Clerk's
// own answer. The error is a *refusal.
func (e *ensurer) ensure(ctx context.Context, source, id string, wait time.Duration) (row mirror.Row, result string, err error) {
	if e.db == nil {
		return nil, ensureUnavailable, &refusal{code: "no_database", message: "this console has no database"}
	}
	if row, err = e.rows.look(ctx, source, id); err == nil && row == nil && wait > 0 {
		result = ensureArrived
		row, err = e.rows.wait(ctx, source, id, wait)
	} else {
		result = ensurePresent
	}
	if err != nil {
		return nil, ensureUnavailable, &refusal{"database_unavailable", "the database does not answer, or `usher setup` was not run", err}
	}
	if row != nil {
		return row, result, nil
	}
	if row, err = e.fetch(ctx, source, id); errors.Is(err, clerk.ErrNotFound) {
		return nil, ensureNotFound, &refusal{code: "user_not_found", message: "Clerk says that there is no such user"}
	}
	if err != nil {
		return nil, ensureUnavailable, err
	}
	if row == nil {
		return nil, ensureNotApplied, &refusal{code: "not_applied", message: "Clerk has the user and its event is stored, but the worker has not applied it within " + applyTimeout.String() + ": see GET /api/consumers"}
	}
	return row, ensureFetched, nil
}

// fetch asks Clerk for a user, publishes the event and waits for the row; nil where that has not come. Calls for one user share all
// of it, so that none begins while another's event is on its way; it goes on when a caller goes.
func (e *ensurer) fetch(ctx context.Context, source, id string) (mirror.Row, error) {
	s := e.sources[source]
	if s == nil {
		return nil, &refusal{code: "no_secret_key", message: "the row is not there, and Clerk cannot be asked: the settings have no secret key for this source (CLERK_SECRET_KEY)"}
	}
	flight := e.flights.DoChan(source+"\x00"+id, func() (any, error) {
		row, err := e.rows.look(e.base, source, id) // another flight may just have ended
		if err != nil {
			return row, &refusal{"database_unavailable", "the database does not answer", err}
		}
		if row != nil {
			return row, nil
		}
		if err := e.ask(s, id); err != nil {
			return mirror.Row(nil), err
		}
		row, err = e.rows.wait(e.base, source, id, applyTimeout)
		if err != nil {
			return row, &refusal{"database_unavailable", "the database does not answer", err}
		}
		return row, nil
	})
	select {
	case result := <-flight:
		row, _ := result.Val.(mirror.Row)
		return row, result.Err
	case <-ctx.Done():
		return nil, ctx.Err() //nolint:wrapcheck // nobody reads it
	}
}

// ask reads the user and publishes the event.
func (e *ensurer) ask(s *reader, id string) error {
	ctx, cancel := context.WithTimeout(e.base, fetchTimeout)
	defer cancel()
	read := time.Now() // or later: what came meanwhile is newer
	user, err := s.client.Get(ctx, "users", id)
	switch {
	case errors.Is(err, clerk.ErrNotFound):
		return err
	case errors.Is(err, clerk.ErrUnauthorized):
		return &refusal{"clerk_unauthorized", "Clerk does not accept the secret key of this source", err}
	case errors.Is(err, context.DeadlineExceeded):
		return &refusal{"clerk_timeout", "Clerk did not answer within " + fetchTimeout.String() + ", or the share of its quota for this is spent", err}
	case err != nil:
		return &refusal{"clerk_unavailable", "Clerk could not be asked", err}
	}
	return e.publish(ctx, s, user, read)
}

// publish stores the event of a user whose row is not there.
func (e *ensurer) publish(ctx context.Context, s *reader, user clerk.Object, read time.Time) error {
	var rows []struct{ Source string }
	err := e.db.WithContext(ctx).Table("users").Where("id = ? AND (source <> ? OR deleted_at IS NOT NULL AND version > ?)", user.ID, s.Name, event.Millis(user.UpdatedAt)).
		Select("source").Find(&rows).Error
	if err != nil {
		return &refusal{"database_unavailable", "the database does not answer", err}
	}
	if len(rows) > 0 && rows[0].Source != s.Name {
		return &refusal{code: "wrong_source", message: "the row of this user belongs to another source"}
	}
	if len(rows) > 0 {
		return &refusal{code: "deleted_later", message: "Clerk has the user, but a delete came that is newer than its last change there: the row comes back with the next one"}
	}
	ev := event.Compose("user.created", user.Raw, s.InstanceID, read)
	ev.Source, ev.Origin, ev.ReceivedAt = s.Name, event.OriginReconcile, time.Now().UTC()
	identity := fmt.Appendf(nil, "ensure\x00%s\x00%s\x00%d", s.Name, user.ID, user.UpdatedAt)
	for generation := range maxGenerations {
		ev.ID = event.ReconciledID(identity, generation)
		var status []string
		err := e.db.WithContext(ctx).Table("deliveries").Where("handler = ? AND source = ? AND event_id = ?", mirrorHandler, s.Name, ev.ID).Pluck("status", &status).Error
		switch {
		case err != nil:
			return &refusal{"database_unavailable", "the database does not answer", err}
		case slices.Contains(status, "processed"): // and the row is gone again: another event must bring it back
			continue
		case slices.Contains(status, "retrying"):
			return nil
		case len(status) > 0:
			return &refusal{code: "dead_lettered", message: "the event of this user could not be applied: see `usher dlq list`, event " + ev.ID}
		}
		ack, err := e.js.PublishMsg(ctx, stream.Message(&ev))
		if err != nil {
			return &refusal{"broker_unavailable", stream.Words(stream.Explain(err)).Error(), stream.Explain(err)}
		}
		if ack.Duplicate {
			if waits, err := e.waits(ctx); err != nil || waits {
				return err // it was published before, and is on its way
			}
			continue // the database has forgotten what the broker has not
		}
		e.log.Info("user fetched from Clerk", zap.String("user_id", user.ID), zap.String("source", s.Name), zap.String("event_id", ev.ID))
		return nil
	}
	return &refusal{code: "not_applied", message: "the event of this user was settled and its row is not there: see its deliveries"}
}

// waits tells whether the mirror has events before it.
func (e *ensurer) waits(ctx context.Context) (bool, error) {
	consumer, err := e.js.Consumer(ctx, stream.Events, mirrorHandler)
	if err != nil {
		return false, &refusal{"broker_unavailable", stream.Words(stream.Explain(err)).Error(), stream.Explain(err)}
	}
	info := consumer.CachedInfo()
	return info.NumPending+uint64(max(info.NumAckPending, 0)) > 0, nil
}

// arrivals waits for rows: one query at a time for all that are waited for, however many wait.
type arrivals struct {
	db *gorm.DB

	mu      sync.Mutex
	waiting map[arrival]map[chan mirror.Row]struct{}
	polling bool
	err     error // of the last query
}

type arrival struct{ source, id string }

func newArrivals(db *gorm.DB) *arrivals {
	return &arrivals{db: db, waiting: map[arrival]map[chan mirror.Row]struct{}{}}
}

// look reads one row, nil where it is not there.
func (a *arrivals) look(ctx context.Context, source, id string) (mirror.Row, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	rows, err := mirror.Living(ctx, a.db, "users", source, []string{id})
	if err != nil {
		return nil, err
	}
	return rows[id], nil
}

// wait returns the row once it is there, nil where that is not within limit. The error is the database's.
func (a *arrivals) wait(ctx context.Context, source, id string, limit time.Duration) (mirror.Row, error) {
	key, came := arrival{source, id}, make(chan mirror.Row, 1)
	a.mu.Lock()
	if a.waiting[key] == nil {
		a.waiting[key] = map[chan mirror.Row]struct{}{}
	}
	a.waiting[key][came] = struct{}{}
	if !a.polling {
		a.polling, a.err = true, nil
		go a.poll()
	}
	a.mu.Unlock()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case row := <-came:
		return row, nil
	case <-timer.C:
	case <-ctx.Done():
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.waiting[key], came)
	if len(a.waiting[key]) == 0 {
		delete(a.waiting, key)
	}
	select {
	case row := <-came: // in the last moment
		return row, nil
	default:
		return nil, a.err
	}
}

// poll looks for all rows that are waited for, until nobody waits.
func (a *arrivals) poll() {
	for {
		time.Sleep(pollEvery)
		a.mu.Lock()
		bySource := map[string][]string{}
		for key := range a.waiting {
			bySource[key.source] = append(bySource[key.source], key.id)
		}
		if a.polling = len(bySource) > 0; !a.polling {
			a.mu.Unlock()
			return
		}
		a.mu.Unlock()
		for source, ids := range bySource {
			a.ask(source, ids)
		}
	}
}

func (a *arrivals) ask(source string, ids []string) {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	const most = 500 // of a statement's parameters
	for len(ids) > 0 {
		n := min(len(ids), most)
		rows, err := mirror.Living(ctx, a.db, "users", source, ids[:n])
		a.mu.Lock()
		a.err = err
		for id, row := range rows {
			for came := range a.waiting[arrival{source, id}] {
				came <- row
			}
			delete(a.waiting, arrival{source, id})
		}
		a.mu.Unlock()
		ids = ids[n:]
	}
}
