package allinone

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/usherhq/usher/pkg/config"
)

// State is what a running dev or serve tells the commands of the same data folder, in
// <data dir>/usher.json (mode 0600: it holds credentials).
type State struct {
	PID            int       `json:"pid"`
	Mode           string    `json:"mode"` // dev or serve
	StartedAt      time.Time `json:"started_at"`
	NATSURL        string    `json:"nats_url"`             // with user and password
	NATSCreds      string    `json:"nats_creds,omitempty"` // files, as the settings name them: of a broker that is not embedded
	NATSCA         string    `json:"nats_ca,omitempty"`
	NATSCert       string    `json:"nats_cert,omitempty"`
	NATSKey        string    `json:"nats_key,omitempty"`
	EmbeddedBroker bool      `json:"embedded_broker,omitempty"`
	DatabaseURL    string    `json:"database_url"`
	DatabaseSchema string    `json:"database_schema"`
	IngestURL      string    `json:"ingest_url"` // where to POST webhooks of the default source
	ConsoleURL     string    `json:"console_url"`
	OpsURL         string    `json:"ops_url"`
	// AdminToken is the console's, where none is set and it made one.
	AdminToken string `json:"admin_token,omitempty"`
	// Instances are the Clerk instances that the worker holds events to, by source, so that a dry run judges as it does.
	Instances map[string]string `json:"instances,omitempty"`
	// Settings are those that it runs with, secrets masked, for `usher config`.
	Settings []config.Setting `json:"settings,omitempty"`
	// SigningSecret is the secret that dev made up; serve writes none.
	SigningSecret string `json:"signing_secret,omitempty"`
	// ClerkAPIURL and ClerkSecretKey are dev's emulated Clerk: verify and reconcile compare with that, and trigger lets events happen there.
	ClerkAPIURL    string `json:"clerk_api_url,omitempty"`
	ClerkSecretKey string `json:"clerk_secret_key,omitempty"`
}

// ErrNotRunning tells that no dev or serve runs on a data folder.
var ErrNotRunning = errors.New("no running `usher dev` or `usher serve` was found")

func statePath(dataDir string) string { return filepath.Join(dataDir, "usher.json") }

// ReadState finds the running instance of a data folder. The file of one that was killed is no instance.
func ReadState(dataDir string) (State, error) {
	var s State
	// Whoever wrote it says where the commands connect to, and which database they change.
	if info, err := os.Lstat(statePath(dataDir)); err == nil && os.Geteuid() != 0 && config.Foreign(info) {
		return s, fmt.Errorf("%w in %s: %s belongs to another user: set USHER_DATA_DIR, or USHER_NATS_URL and USHER_DATABASE_URL", ErrNotRunning, dataDir, statePath(dataDir))
	}
	body, err := os.ReadFile(statePath(dataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("%w in %s: start one, or set USHER_DATA_DIR, or USHER_NATS_URL and USHER_DATABASE_URL", ErrNotRunning, dataDir)
	}
	if err != nil {
		return s, fmt.Errorf("read state: %w", err)
	}
	if err := json.Unmarshal(body, &s); err != nil {
		return s, fmt.Errorf("read state %s: %w", statePath(dataDir), err)
	}
	if held, err := isLocked(dataDir); err == nil && !held {
		return s, fmt.Errorf("%w in %s: process %d has ended without cleaning up", ErrNotRunning, dataDir, s.PID)
	}
	return s, nil
}

// write replaces the file in one step, so that a reader never sees half of it.
func (s State) write(dataDir string) error {
	body, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	tmp, err := os.CreateTemp(dataDir, "usher.json.*") // created with mode 0600
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	_, err = tmp.Write(append(body, '\n'))
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), statePath(dataDir))
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}
