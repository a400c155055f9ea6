package config

import (
	"regexp"
	"slices"
	"strings"
)

// variableRE is what a shell can set. linkRE are the variables that Kubernetes and Docker set in every container for a service of the name
// usher or usher-…, which nobody has typed.
var (
	variableRE = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	linkRE     = regexp.MustCompile(`_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)
)

// clerks are variables of Clerk's own SDKs, which look like settings of Usher and are read by others.
var clerks = []string{
	"CLERK_API_KEY", "CLERK_API_VERSION", "CLERK_DOMAIN", "CLERK_ENCRYPTION_KEY", "CLERK_FAPI", "CLERK_FRONTEND_API", "CLERK_IS_SATELLITE", "CLERK_JS_URL",
	"CLERK_JWT_KEY", "CLERK_MACHINE_SECRET_KEY", "CLERK_PROXY_URL", "CLERK_PUBLISHABLE_KEY", "CLERK_SIGN_IN_URL", "CLERK_SIGN_UP_URL", "CLERK_TELEMETRY_DISABLED",
}

// UnknownNames returns a warning for each variable that is set and looks like a setting of Usher without being one: every other USHER_…, and of
// CLERK_…, which belongs to Clerk, what is nearly the name of a setting that is not set. The texts hold no value.
func (e Environ) UnknownNames() []string {
	known := settingNames()
	var warnings []string
	for _, entry := range e {
		key, value, _ := strings.Cut(entry, "=")
		if value == "" || !variableRE.MatchString(key) || isName(key, known) {
			continue
		}
		upper := strings.ToUpper(key)
		switch {
		case strings.HasPrefix(upper, "USHER_"):
			if linkRE.MatchString(key) || strings.HasSuffix(key, "_PORT") && strings.Contains(value, "://") {
				continue
			}
			warnings = append(warnings, key+": "+unknownUsher(upper, known))
		case strings.HasPrefix(upper, "CLERK_") && !slices.Contains(clerks, upper):
			near := nearest(upper, known)
			_, set := e.Lookup(near)
			_, file := e.Lookup(near + "_FILE")
			if strings.HasPrefix(near, "CLERK_") && !set && !file {
				warnings = append(warnings, key+": did you mean "+near+"?")
			}
		}
	}
	slices.Sort(warnings)
	return slices.Compact(warnings)
}

func unknownUsher(name string, known []string) string {
	if secret, ok := strings.CutSuffix(name, "_FILE"); ok && slices.Contains(known, secret) {
		return "only a secret can come from a file; set " + secret
	}
	if near := nearest(name, known); near != "" {
		return "did you mean " + near + "?"
	}
	return "there is no such setting, so it changes nothing; `usher config` lists them"
}

func settingNames() []string {
	var names []string
	for _, s := range Describe() {
		names = append(names, s.Name)
	}
	return names
}

// isName reports whether a variable is read: a setting, one of a further source (or one that loadSources speaks of), or the file of a secret.
func isName(key string, known []string) bool {
	name, isFile := strings.CutSuffix(key, "_FILE")
	if isFile && isSecret(name) {
		return true
	}
	return slices.Contains(known, key) || sourceRE.MatchString(key+"=x")
}

// sourceTails are how the names of settings of a further source end.
var sourceTails = []string{"SIGNING_SECRET", "SECRET_KEY", "INSTANCE_ID"}

// nearest is the setting that is meant by a name with a slip or two in it, or with a word left out; empty where none is near.
func nearest(name string, known []string) string {
	stem, isFile := strings.CutSuffix(name, "_FILE")
	end := ""
	if isFile {
		end = "_FILE"
	}
	best, least := "", 3
	if len(stem) < len("CLERK_API_URL")+2 { // a short one is soon like another
		least = 2
	}
	try := func(candidate string, d int) {
		if d < least {
			best, least = candidate, d
		}
	}
	for _, candidate := range known {
		try(candidate, slips(stem, candidate))
		if lacksWord(stem, candidate) {
			try(candidate, 1)
		}
	}
	if parts := strings.Split(stem, "_"); len(parts) > 4 && slips(parts[0]+"_"+parts[1], "USHER_SOURCE") < 3 {
		begin, tail := strings.Join(parts[2:len(parts)-2], "_"), strings.Join(parts[len(parts)-2:], "_")
		for _, candidate := range sourceTails {
			try("USHER_SOURCE_"+begin+"_"+candidate, slips(tail, candidate)+slips(parts[0]+"_"+parts[1], "USHER_SOURCE"))
		}
	}
	if best == "" || isFile && !isSecret(best) {
		return best
	}
	return best + end
}

// lacksWord reports whether name is a setting's name without one of its words.
func lacksWord(name, setting string) bool {
	words := strings.Split(setting, "_")
	for i := 1; i < len(words); i++ {
		if name == strings.Join(slices.Delete(slices.Clone(words), i, i+1), "_") {
			return true
		}
	}
	return false
}

// slips is how many characters are wrong, missing, too many or swapped with their neighbour between two texts.
func slips(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
