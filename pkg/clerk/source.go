package clerk

import "github.com/usherhq/usher/pkg/config"

// Source is one Clerk instance that Usher may read.
type Source struct {
	Name       string
	APIURL     string // empty for Clerk's
	SecretKey  string
	InstanceID string // may be empty
	Quota      int    // as in Config
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
