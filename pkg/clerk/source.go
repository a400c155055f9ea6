package clerk

import (
	"fmt"

	"github.com/usherhq/usher/pkg/config"
)

// Source is one Clerk instance that Usher may read.
type Source struct {
	Name       string
	APIURL     string // empty for Clerk's
	SecretKey  string
	InstanceID string // may be empty
	Quota      int    // as in Config
	PageSize   int    // as in Config
}

// SourcesFrom takes those sources of the settings that have a key.
func SourcesFrom(s *config.Settings) []Source {
	var sources []Source
	for _, source := range s.Sources {
		if source.SecretKey != "" {
			sources = append(sources, Source{Name: source.Name, APIURL: s.ClerkAPIURL, SecretKey: source.SecretKey, InstanceID: source.InstanceID})
		}
	}
	return sources
}

// Client opens the API of the source; of cfg, what the source says is replaced. The error names the source.
func (s Source) Client(cfg Config) (*Client, error) {
	cfg.BaseURL, cfg.SecretKey, cfg.Quota, cfg.PageSize = s.APIURL, s.SecretKey, s.Quota, s.PageSize
	c, err := New(cfg)
	if err != nil {
		return nil, fmt.Errorf("source %s: %w", s.Name, err)
	}
	return c, nil
}
