// Package version holds the one version of Bivouac, stamped at link time.
//
// Plugins report it to Nomad, `bivouac version` prints it, and state files do
// not use it: they carry their own format version.
package version

import "runtime/debug"

var (
	// Version is the release, without a leading v. The linker sets it
	// (-X github.com/bivouac-run/bivouac/internal/version.Version=1.2.3).
	Version = "0.1.0-dev"
	// Commit is the source revision. The linker sets it; empty means Go's
	// own build information is asked.
	Commit = ""
)

// Revision returns the source revision the binary was built from, or
// "unknown".
func Revision() string {
	if Commit != "" {
		return Commit
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return "unknown"
}
