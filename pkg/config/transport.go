package config

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/usherhq/usher/pkg/redact"
)

// checkTLS says what is wrong with the files of the broker's TLS: a connection that cannot be made for want of them would only be waited for.
func (s *Settings) checkTLS() Problems {
	var problems Problems
	bad := func(name, text string) { problems = append(problems, name+": "+text) }
	content := map[string][]byte{}
	for name, path := range map[string]string{"USHER_NATS_CA": s.NATSCA, "USHER_NATS_CERT": s.NATSCert, "USHER_NATS_KEY": s.NATSKey} {
		if path == "" {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			bad(name, noFile(path))
			continue
		}
		content[name] = text
	}
	if ca := content["USHER_NATS_CA"]; ca != nil && !x509.NewCertPool().AppendCertsFromPEM(ca) {
		bad("USHER_NATS_CA", "the file holds no certificate in PEM (-----BEGIN CERTIFICATE-----)")
	}
	cert, key := content["USHER_NATS_CERT"], content["USHER_NATS_KEY"]
	switch {
	case s.NATSCert != "" && s.NATSKey == "":
		bad("USHER_NATS_KEY", "not set: name the file of the private key of USHER_NATS_CERT")
	case s.NATSKey != "" && s.NATSCert == "":
		bad("USHER_NATS_CERT", "not set: name the file of the certificate of USHER_NATS_KEY")
	case cert != nil && key != nil:
		if _, err := tls.X509KeyPair(cert, key); err != nil {
			bad("USHER_NATS_CERT, USHER_NATS_KEY", "are no pair of certificate and private key in PEM: "+strings.TrimPrefix(err.Error(), "tls: "))
		}
	}
	return problems
}

// clearText names the connections to other machines that show a secret to whoever listens on the way.
func (s *Settings) clearText() []string {
	var warnings []string
	if hosts := exposedHosts(strings.Split(s.NATSURL, ","), "nats", "ws"); hosts != "" && s.NATSCA == "" && s.NATSCert == "" {
		what := "events"
		if s.NATSCreds != "" || redact.HasPassword(s.NATSURL) {
			what = "the login and events"
		}
		warnings = append(warnings, fmt.Sprintf("USHER_NATS_URL: %s reach %s in clear text unless the broker insists on TLS: "+
			"write tls:// (wss:// for ws://), and name the authority of its certificate in USHER_NATS_CA where it is your own", what, hosts))
	}
	for address := range strings.SplitSeq(s.NATSMonitorURL, ",") {
		if host := exposedHosts([]string{address}, "http"); host != "" && redact.HasPassword(address) {
			warnings = append(warnings, "USHER_NATS_MONITOR_URL: its password reaches "+host+" in clear text: write https://")
		}
	}
	hasKey := slices.ContainsFunc(s.Sources, func(src Source) bool { return src.SecretKey != "" })
	if host := exposedHosts([]string{s.ClerkAPIURL}, "http"); host != "" && hasKey {
		warnings = append(warnings, "CLERK_API_URL: the secret key reaches "+host+" in clear text: write https://")
	}
	if host := exposedHosts([]string{s.SlackWebhookURL}, "http"); host != "" {
		warnings = append(warnings, "USHER_SLACK_WEBHOOK_URL: the webhook, which is a secret, reaches "+host+" in clear text: write https://")
	}
	return warnings
}

// exposedHosts are the hosts of URLs, with commas between, that are other machines and are spoken to by one of the schemes, the first
// of which is that of an address without one.
func exposedHosts(addresses []string, schemes ...string) string {
	var hosts []string
	for _, address := range addresses {
		if address = strings.TrimSpace(address); address == "" {
			continue
		}
		if !strings.Contains(address, "://") {
			address = schemes[0] + "://" + address
		}
		u, err := url.Parse(address)
		if err == nil && slices.Contains(schemes, u.Scheme) && !isLoopbackHost(u.Hostname()) && !slices.Contains(hosts, u.Hostname()) {
			hosts = append(hosts, u.Hostname())
		}
	}
	return strings.Join(hosts, ", ")
}
