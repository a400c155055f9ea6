package config

import (
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
)

// mounted are the folders into which containers get their secrets, readable for everyone in a container that has one user.
var mounted = []string{"/run/secrets/", "/var/run/secrets/"}

// exposedFiles names the files of secrets that others on this machine can read or change. They are the user's, so they are left as they are.
func (s *Settings) exposedFiles() []string {
	files := maps.Clone(s.files)
	if files == nil {
		files = map[string]string{}
	}
	files["USHER_NATS_CREDS"], files["USHER_NATS_KEY"] = s.NATSCreds, s.NATSKey
	var warnings []string
	for _, name := range slices.Sorted(maps.Keys(files)) {
		path := files[name]
		if path == "" || slices.ContainsFunc(mounted, func(dir string) bool { return strings.HasPrefix(path, dir) }) {
			continue
		}
		info, err := os.Stat(path)
		if err != nil { // said elsewhere
			continue
		}
		if why := Exposed(info); why != "" {
			warnings = append(warnings, name+": "+why+": chmod 600 "+path+", owned by the user that Usher runs as")
		}
	}
	return warnings
}

// Exposed says in words that others on this machine can read or change a file which may be shared with a group: all users can read it, more
// than its owner can write to it, or it belongs to neither this process's user nor root. It is empty where that is not so, and
// where the system has no such modes.
func Exposed(info fs.FileInfo) string {
	if !HasModes {
		return ""
	}
	mode := "(mode " + info.Mode().Perm().String() + ")"
	switch {
	case Foreign(info):
		return "the file belongs to another user, who can read and change it"
	case info.Mode().Perm()&0o022 != 0:
		return "others on this machine can change the file " + mode
	case info.Mode().Perm()&0o004 != 0:
		return "everyone on this machine can read the file " + mode
	}
	return ""
}

// Foreign reports whether a file belongs to a user who is neither that of this process nor root.
func Foreign(info fs.FileInfo) bool {
	owner, known := ownerOf(info)
	return known && owner != os.Geteuid() && owner != 0
}
