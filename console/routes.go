package console

import (
	"bytes"
	"embed"
	"encoding/json"
	"html/template"
	"net/http"

	"go.uber.org/zap"

	"github.com/usherhq/usher/pkg/stream"
)

//go:embed assets
var assets embed.FS

var adminPage = template.Must(template.ParseFS(assets, "assets/admin.html"))

// route is one pattern of the console and who may use it.
type route struct {
	pattern string
	need    role
	handler http.HandlerFunc
}

func (c *Console) routes() []route {
	return []route{
		{"GET /admin/login", anyone, c.login},
		{"POST /admin/login", anyone, c.login},
		{"POST /admin/logout", anyone, c.logout},
		{"GET /{$}", administrator, http.RedirectHandler("/admin", http.StatusFound).ServeHTTP},
		{"GET /admin", administrator, c.admin},
		{"GET /admin/admin.css", administrator, func(w http.ResponseWriter, r *http.Request) {
			http.ServeFileFS(w, r, assets, "assets/admin.css")
		}},
		{"GET /api/consumers", administrator, c.consumers},
		{"/api/consumers", administrator, notAllowed},
		{"GET /api/users/{id}/ensure", application, c.ensureUser},
		{"/api/users/{id}/ensure", application, notAllowed},
		{"/api/", administrator, func(w http.ResponseWriter, _ *http.Request) {
			writeError(w, http.StatusNotFound, "not_found", "there is no such resource")
		}},
	}
}

// Routes are the patterns that the console answers, as [http.ServeMux] has them.
func (c *Console) Routes() []string {
	var patterns []string
	for _, r := range c.routes() {
		patterns = append(patterns, r.pattern)
	}
	return patterns
}

// consumers answers GET /api/consumers.
func (c *Console) consumers(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := ask(r)
	defer cancel()
	items, err := stream.Consumers(ctx, c.js)
	if err != nil {
		c.log.Warn("consumers could not be read", zap.Error(err))
		code, message := unavailable(err)
		writeError(w, http.StatusServiceUnavailable, code, message)
		return
	}
	writeJSON(w, http.StatusOK, listing[stream.Consumer]{Items: items})
}

// admin answers GET /admin. What cannot be read is said on the page in its place, which stays up.
func (c *Console) admin(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := ask(r)
	defer cancel()
	var page struct {
		Consumers   []stream.Consumer
		NoConsumers string // why they are not known
		Open        []openDeliveries
		NoOpen      string
	}
	var err error
	if page.Consumers, err = stream.Consumers(ctx, c.js); err != nil {
		c.log.Warn("consumers could not be read", zap.Error(err))
		_, page.NoConsumers = unavailable(err)
	}
	ctx, cancel = ask(r) // time of its own: the broker may have used up its part
	defer cancel()
	if page.Open, err = c.openDeliveries(ctx); err != nil {
		c.log.Warn("deliveries could not be read", zap.Error(err))
		page.NoOpen = "the database does not answer, or `usher setup` was not run"
	}
	var body bytes.Buffer
	if err := adminPage.Execute(&body, page); err != nil {
		c.log.Error("page could not be made", zap.Error(err))
		writeError(w, http.StatusInternalServerError, "internal", "the page could not be made")
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(body.Bytes())
}

func notAllowed(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Allow", "GET, HEAD")
	writeError(w, http.StatusMethodNotAllowed, "method_not_allowed", "only GET is known here")
}

// listing is the shape of every list; next is the cursor of the next page, empty on the last.
type listing[T any] struct {
	Items []T    `json:"items"`
	Next  string `json:"next"`
}

func writeError(w http.ResponseWriter, status int, code, message string) {
	type body struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	writeJSON(w, status, map[string]body{"error": {Code: code, Message: message}})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the client is gone; the server closes the connection
}
