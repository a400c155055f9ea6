package emulator

import (
	"net/http"
	"slices"
	"strings"
)

// Feature is a part of Clerk that an instance may do without.
type Feature string

// The features. Without organizations there are no domains, roles and permissions either.
const (
	Organizations       Feature = "organizations"
	OrganizationDomains Feature = "organization_domains"
	Waitlist            Feature = "waitlist"
)

// SwitchOff takes features away, in place of those that were away before; none switches all on. The objects stay, as they do at Clerk,
// but cannot be read.
func (a *API) SwitchOff(features ...Feature) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.without = features
}

// absent answers a request for what belongs to a feature that is off, and tells whether it did.
func (a *API) absent(c *call) bool {
	a.mu.Lock()
	without := slices.Clone(a.without)
	a.mu.Unlock()
	path := strings.TrimPrefix(c.r.URL.Path, "/v1")
	organizations := strings.HasPrefix(path, "/organization") || strings.HasSuffix(path, "/organization_memberships")
	var code, message, long string
	switch {
	case organizations && slices.Contains(without, Organizations):
		code, message = "organization_not_enabled_in_instance", "access denied"
		long = "The organizations feature is not enabled for this instance. You can enable it at https://dashboard.clerk.com."
	case organizations && strings.Contains(path, "domains") && slices.Contains(without, OrganizationDomains):
		code, message, long = "organization_domains_not_enabled", "organization domains not enabled", "This instance does not have domains enabled for organizations."
	case path == "/waitlist_entries" && slices.Contains(without, Waitlist):
		code, message, long = "feature_not_enabled", "not enabled", "This feature is not enabled on this instance"
	default:
		return false
	}
	if a.cfg.AbsentIsNotFound {
		c.fail(http.StatusNotFound, "resource_not_found", "not found", "Resource not found", "")
		return true
	}
	c.fail(http.StatusForbidden, code, message, long, "")
	return true
}
