// Package client is for applications that read Usher's tables: it makes sure that a row is there before they look.
//
// Somebody who has just signed up comes back to the application before Clerk's webhook has come to Usher. [Client.EnsureUser] waits for the
// row, and has Clerk asked where it does not come. It guarantees that "not found" is Clerk's word and never a guess, and that after a
// nil error the row is in the database. It depends on the standard library only.
package client

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Errors of a [Client]. What is neither means that the console could not be asked, or that the context ended first.
var (
	// ErrNotFound is Clerk's word that there is no such user.
	ErrNotFound = errors.New("user not found")
	// ErrUnauthorized is a wrong or missing token.
	ErrUnauthorized = errors.New("unauthorized: the token is neither the console's USHER_APP_TOKEN nor its USHER_ADMIN_TOKEN")
)

// Client calls a console. It is safe for concurrent use. Calls for one user at a time share one request to Clerk, at the console.
type Client struct {
	base  *url.URL
	token string
	// HTTP makes the requests; it may be replaced before the first one. It must allow a request some 20 s.
	HTTP *http.Client
}

// New makes a client of the console at an address such as "http://127.0.0.1:8081". token is the console's USHER_APP_TOKEN, which opens
// nothing else, or its admin token.
func New(address, token string) (*Client, error) {
	u, err := url.Parse(strings.TrimRight(address, "/"))
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("console address %q: want http://host:port or https://host", address)
	}
	return &Client{base: u, token: token, HTTP: &http.Client{Timeout: 25 * time.Second}}, nil
}

// Local makes a client of the `usher dev` or `usher serve` that runs on a data folder of this machine, such as "./usher-data", with the admin
// token that it made. Where USHER_ADMIN_TOKEN is set no token was made: use [New].
func Local(dataDir string) (*Client, error) {
	body, err := os.ReadFile(filepath.Join(dataDir, "usher.json"))
	if err != nil {
		return nil, fmt.Errorf("find a running `usher dev` or `usher serve`: %w", err)
	}
	var running struct {
		Address string `json:"console_url"`
		Token   string `json:"admin_token"`
	}
	if err := json.Unmarshal(body, &running); err != nil {
		return nil, fmt.Errorf("find a running `usher dev` or `usher serve`: read %s: %w", filepath.Join(dataDir, "usher.json"), err)
	}
	if running.Token == "" {
		return nil, fmt.Errorf("find the console's token: %s has none, since USHER_ADMIN_TOKEN is set: use client.New with that", filepath.Join(dataDir, "usher.json"))
	}
	return New(running.Address, running.Token)
}

// PrivateMetadata is what [Client.EnsureUser] leaves out unless it is named.
const PrivateMetadata = "private_metadata"

// User is the user's row in the table users.
type User struct {
	ID              string          `json:"id"`
	Source          string          `json:"source"`
	Email           string          `json:"email"`
	EmailVerified   bool            `json:"email_verified"`
	Phone           string          `json:"phone"`
	Username        string          `json:"username"`
	FirstName       string          `json:"first_name"`
	LastName        string          `json:"last_name"`
	ImageURL        string          `json:"image_url"`
	ExternalID      string          `json:"external_id"`
	Banned          bool            `json:"banned"`
	Locked          bool            `json:"locked"`
	PublicMetadata  json.RawMessage `json:"public_metadata"`
	PrivateMetadata json.RawMessage `json:"private_metadata"` // nil unless it was asked for
	UnsafeMetadata  json.RawMessage `json:"unsafe_metadata"`
	ClerkCreatedAt  time.Time       `json:"clerk_created_at"`
	ClerkUpdatedAt  time.Time       `json:"clerk_updated_at"`
	SyncedAt        time.Time       `json:"synced_at"`
}

// EnsureUser returns the row of a user once it is there. wait (at most 5 s, 0 for not at all) is how long the webhook may take before Clerk
// is asked. What may pass (a console, a worker or Clerk that is away or busy) is tried again until ctx is done, so ctx should have a deadline.
// include names what else to return: [PrivateMetadata].
func (c *Client) EnsureUser(ctx context.Context, id string, wait time.Duration, include ...string) (*User, error) {
	address := c.base.JoinPath("api/users", url.PathEscape(id), "ensure")
	query := url.Values{"wait": {wait.String()}}
	if len(include) > 0 {
		query["include"] = include
	}
	address.RawQuery = query.Encode()
	for {
		user, again, err := c.ensure(ctx, address.String())
		if again <= 0 {
			return user, err
		}
		timer := time.NewTimer(again)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, fmt.Errorf("ensure %s: %w; last: %w", id, ctx.Err(), err)
		}
	}
}

// ensure makes one request. again says when another may succeed, 0 for never.
func (c *Client) ensure(ctx context.Context, address string) (user *User, again time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, 0, fmt.Errorf("ensure user: %w", err)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	res, err := c.HTTP.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, 0, fmt.Errorf("ensure user: %w", ctx.Err())
		}
		return nil, retryAfter, fmt.Errorf("ensure user: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, 4<<20))
	if err != nil {
		return nil, retryAfter, fmt.Errorf("ensure user: %w", err)
	}
	var answer struct {
		User  *User
		Error struct{ Code, Message string }
	}
	_ = json.Unmarshal(body, &answer) // what lacks is empty
	said := errors.New(cmp.Or(answer.Error.Message, res.Status))
	switch {
	case res.StatusCode == http.StatusOK && answer.User != nil && answer.User.ID != "":
		return answer.User, 0, nil
	case res.StatusCode == http.StatusNotFound && answer.Error.Code == "user_not_found":
		return nil, 0, ErrNotFound
	case res.StatusCode == http.StatusUnauthorized:
		return nil, 0, ErrUnauthorized
	case res.StatusCode == http.StatusServiceUnavailable, res.StatusCode == http.StatusBadGateway, res.StatusCode == http.StatusGatewayTimeout: // or of a proxy before the console
		seconds, _ := strconv.Atoi(res.Header.Get("Retry-After"))
		return nil, max(time.Duration(seconds)*time.Second, retryAfter), fmt.Errorf("ensure user: %w", said)
	default:
		return nil, 0, fmt.Errorf("ensure user: %w (status %d)", said, res.StatusCode)
	}
}

// retryAfter is how long to wait where nobody says.
const retryAfter = 250 * time.Millisecond
