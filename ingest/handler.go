package ingest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/listen"
	"github.com/usherhq/usher/pkg/redact"
	"github.com/usherhq/usher/pkg/stream"
)

// Path is where the default source delivers; a named one delivers below it.
const Path = "/webhooks/clerk"

// result is how a request ended: the label of the metric, the reason in the log and, where the request was
// refused, the code in the answer.
type result string

// Results of an accepted event.
const (
	accepted    result = "accepted"
	duplicate   result = "duplicate"   // it was stored before
	undecodable result = "undecodable" // stored, but no event that Usher can read
)

// Results of a refused request.
const (
	notFound          result = "not_found"
	methodNotAllowed  result = "method_not_allowed"
	unknownSource     result = "unknown_source"
	shuttingDown      result = "shutting_down"
	headerMissing     result = "header_missing"
	headerMalformed   result = "header_malformed"
	bodyTooLarge      result = "body_too_large"
	bodyTimeout       result = "body_timeout"
	badRequest        result = "bad_request"
	outOfTolerance    result = "timestamp_out_of_tolerance"
	signatureMismatch result = "signature_mismatch"
	overloaded        result = "overloaded"
	streamFull        result = "stream_full"
	brokerUnavailable result = "broker_unavailable"
)

// refusal is the answer to a refused request.
type refusal struct {
	status     int
	retryAfter int // seconds; every 503 has it
	hangUp     bool
	message    string
}

// refusals are all answers but 202. (What is not HTTP at all, or has more than 16 KiB of headers, is
// refused by net/http with a plain 400 or 431; slow headers by closing the connection.)
var refusals = map[result]refusal{
	notFound:          {status: http.StatusNotFound, message: "nothing here; webhooks go to " + Path + " or " + Path + "/{source}"},
	methodNotAllowed:  {status: http.StatusMethodNotAllowed, message: "only POST is allowed"},
	unknownSource:     {status: http.StatusNotFound, message: "no source of this name has a signing secret"},
	headerMissing:     {status: http.StatusBadRequest, message: "svix-id, svix-timestamp and svix-signature are required"},
	headerMalformed:   {status: http.StatusBadRequest, message: "svix-id or svix-timestamp is malformed"},
	badRequest:        {status: http.StatusBadRequest, hangUp: true, message: "the body ended before its announced length or is not encoded as announced"},
	outOfTolerance:    {status: http.StatusUnauthorized, message: "the timestamp is more than five minutes from this server's clock"},
	signatureMismatch: {status: http.StatusUnauthorized, message: "no signature matches a signing secret of this source"},
	bodyTimeout:       {status: http.StatusRequestTimeout, hangUp: true, message: "the body took too long"},
	bodyTooLarge:      {status: http.StatusRequestEntityTooLarge, hangUp: true, message: "the body is larger than this server takes"},
	overloaded:        {status: http.StatusServiceUnavailable, retryAfter: 5, message: "too many requests at once; try again"},
	streamFull:        {status: http.StatusServiceUnavailable, retryAfter: 60, message: "the event stream is full; try again later"},
	brokerUnavailable: {status: http.StatusServiceUnavailable, retryAfter: 5, message: "the event could not be stored; try again"},
	shuttingDown:      {status: http.StatusServiceUnavailable, retryAfter: 1, hangUp: true, message: "this server is stopping; try again"},
}

// ServeHTTP answers one delivery. A 202 means that the event is on disk.
func (s *Service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	e, res, read := s.receive(w, r)
	if refused, ok := refusals[res]; ok {
		if !read && r.ContentLength != 0 {
			refused.hangUp = true
			// Without a limit, net/http waits for the rest of the body before it closes the connection.
			limit := time.Now()
			if refused.status/100 == 4 && res != bodyTimeout {
				limit = limit.Add(afterRefusal)
			}
			_ = http.NewResponseController(w).SetReadDeadline(limit)
		}
		refuse(w, res, refused)
	} else {
		writeJSON(w, http.StatusAccepted, struct {
			ID        string `json:"id"`
			Duplicate bool   `json:"duplicate"`
		}{e.ID, res == duplicate})
	}
	s.metrics.requests[res].Inc()
	s.metrics.duration.Observe(time.Since(start).Seconds())
}

// afterRefusal is how long a body that is not wanted may still come: a sender that sends it without looking then gets its answer.
const afterRefusal = 500 * time.Millisecond

// receive does the work of one request, in the order of the contract: method, source, headers, announced size,
// timestamp, the signature's form, and only then the body, the signature and the broker. What costs most comes last, and
// nothing is stored before all of it. read reports whether the body was read to its end.
func (s *Service) receive(w http.ResponseWriter, r *http.Request) (_ event.Event, _ result, read bool) {
	source, name, headers, res := s.judge(r)
	if res != "" {
		return event.Event{}, s.refused(res, name, r), false
	}
	s.metrics.inFlight.Inc()
	defer s.metrics.inFlight.Dec()
	room, res := s.bodies.begin(http.NewResponseController(w), firstSize(r))
	defer s.bodies.done(room)
	var body []byte
	if res == "" {
		body, res = s.readBody(r, room)
	}
	if res != "" {
		return event.Event{}, s.refused(res, name, r), false
	}
	if !source.matches(headers, body) {
		return event.Event{}, s.refused(signatureMismatch, name, r), true
	}

	// From here on the request is known to be Clerk's: a stranger cannot take the places of its deliveries.
	listen.Known(r)
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		return event.Event{}, s.refused(overloaded, name, r), true
	}
	e := s.newEvent(headers, name, r.Header, body)
	return e, s.publish(r.Context(), &e), true
}

// judge looks at all that is known of a request before its body. name is the source's, as far as it is known.
func (s *Service) judge(r *http.Request) (source verifier, name string, headers signed, res result) {
	below, ok := strings.CutPrefix(r.URL.Path, Path)
	below = strings.TrimSuffix(below, "/") // which is easily typed into Clerk's dashboard
	name = strings.TrimPrefix(below, "/")
	switch {
	case !ok, below != "" && (name == "" || len(name) == len(below)), strings.Contains(name, "/"):
		return nil, "", headers, notFound
	case r.Method != http.MethodPost:
		return nil, "", headers, methodNotAllowed
	case name == "":
		name = s.cfg.Sources[0].Name
	}
	source, ok = s.sources[name]
	if !ok {
		return nil, "", headers, unknownSource
	}
	if s.stopping.Load() {
		return nil, name, headers, shuttingDown
	}
	if headers, res = readHeaders(r.Header); res != "" {
		return nil, name, headers, res
	}
	switch {
	case r.ContentLength > s.maxBody():
		res = bodyTooLarge
	case !inTime(headers.seconds, s.deps.Now()):
		res = outOfTolerance
	case !headers.wellFormed():
		res = signatureMismatch
	}
	return source, name, headers, res
}

// newEvent makes an event of a verified body. A body that cannot be decoded becomes one without a type:
// Svix would only repeat it for a day, while the worker keeps it as a dead letter.
func (s *Service) newEvent(h signed, source string, header http.Header, body []byte) event.Event {
	e, err := event.Decode(body)
	if !s.cfg.KeepMessages && (err != nil || redact.IsMessage(string(e.Type))) {
		if kept, message := redact.Message(string(e.Type), body); message {
			body = kept
			e, err = event.Decode(body)
		}
	}
	if err != nil || len(e.Type) > maxID || !printable(string(e.Type)) {
		e = event.Event{Raw: body}
	}
	e.ID, e.Source, e.Origin = h.id, source, event.OriginWebhook
	e.ReceivedAt, e.TraceParent = s.deps.Now(), traceParent(header)
	return e
}

// publish stores e and says how that ended. It goes on when the sender hangs up: stored is stored, and
// the retry then is a duplicate.
func (s *Service) publish(ctx context.Context, e *event.Event) result {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.PublishTimeout)
	defer cancel()
	var ack stream.Ack
	var err error
	if s.verified.Load() {
		ack, err = s.deps.Publisher.Publish(ctx, e)
		s.broker.published(err)
	} else {
		err = s.unverified()
	}
	log := s.log.With(zap.String("event_id", e.ID), zap.String("event_type", string(e.Type)), zap.String("source", e.Source))
	if err != nil {
		res := publishFailure(err)
		log.Warn("event not stored", zap.String("reason", string(res)), zap.Error(err))
		return res
	}
	switch {
	case ack.Duplicate:
		log.Debug("event was stored before")
		return duplicate
	case e.Type == "":
		log.Warn("event cannot be decoded, stored for the dead letters")
		return undecodable
	default:
		log.Debug("event stored")
		return accepted
	}
}

func publishFailure(err error) result {
	switch {
	case errors.Is(err, stream.ErrTooLarge):
		return bodyTooLarge
	case errors.Is(err, stream.ErrFull):
		return streamFull
	case errors.Is(err, stream.ErrClosed):
		return shuttingDown
	default:
		return brokerUnavailable
	}
}

// refused logs a refusal before the event's id is known to be true; so it is not logged.
func (s *Service) refused(res result, source string, r *http.Request) result {
	fields := []zap.Field{zap.String("reason", string(res)), zap.String("source", source), zap.String("remote_addr", listen.Remote(r, s.cfg.TrustedProxies))}
	if r.Method != http.MethodPost || res != notFound && res != unknownSource {
		s.log.Warn("request refused", fields...)
		return res
	}
	// A line of its own, so that it is not left out with those of a flood: perhaps the endpoint's URL in Clerk is wrong.
	s.log.Warn("webhook at a wrong path: the URL of the endpoint in Clerk's dashboard must end with one of the right paths",
		append(fields, zap.String("path", shownPath(r.URL.Path)), zap.Strings("right_paths", s.paths()))...)
	return res
}

// shownPath is the beginning of a path; a stranger may send any.
func shownPath(path string) string {
	const most = 100
	if path = strings.ToValidUTF8(path, "?"); len(path) > most {
		return strings.ToValidUTF8(path[:most], "") + "…"
	}
	return path
}

// paths are where webhooks are taken.
func (s *Service) paths() []string {
	var paths []string
	for i, src := range s.cfg.Sources {
		switch {
		case len(src.Secrets) == 0:
		case i == 0:
			paths = append(paths, Path)
		default:
			paths = append(paths, Path+"/"+src.Name)
		}
	}
	return paths
}

// firstSize is the size of the buffer with which a body begins.
func firstSize(r *http.Request) int64 {
	if r.ContentLength >= 0 {
		return min(r.ContentLength, firstRead)
	}
	return firstRead
}

// readBody reads the whole body, no more than the broker takes. The time limits are the server's ReadTimeout and those of [bodies]; while
// the service stops, they are cut short so that the sender still gets its answer.
func (s *Service) readBody(r *http.Request, room *body) ([]byte, result) {
	defer s.bodies.read(room)
	limit := s.maxBody()
	size, last := firstSize(r), limit+1
	if r.ContentLength >= 0 {
		last = r.ContentLength
	}
	buf := make([]byte, 0, size)
	var told int64 // of what has arrived
	for int64(len(buf)) < last {
		if len(buf) == cap(buf) {
			size = min(2*size, last)
			if res := s.bodies.grow(room, int64(len(buf))-told, size); res != "" {
				return nil, res
			}
			told = int64(len(buf))
			buf = append(make([]byte, 0, size), buf...)
		}
		n, err := r.Body.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		switch {
		case int64(len(buf)) > limit:
			return nil, bodyTooLarge
		case errors.Is(err, io.EOF) && (r.ContentLength < 0 || int64(len(buf)) == r.ContentLength):
			return buf, ""
		case err == nil:
			s.bodies.arrived(room, int64(len(buf))-told)
			told = int64(len(buf))
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, cmp.Or(s.bodies.why(room), bodyTimeout)
		default:
			return nil, badRequest
		}
	}
	return buf, ""
}

func refuse(w http.ResponseWriter, code result, r refusal) {
	h := w.Header()
	if r.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(r.retryAfter))
	}
	if r.hangUp {
		h.Set("Connection", "close")
	}
	if r.status == http.StatusMethodNotAllowed {
		h.Set("Allow", http.MethodPost)
	}
	type problem struct {
		Code    result `json:"code"`
		Message string `json:"message"`
	}
	writeJSON(w, r.status, struct {
		Error problem `json:"error"`
	}{problem{code, r.message}})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		panic(err) // strings and a bool
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
}
