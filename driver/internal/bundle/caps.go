package bundle

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const capPrefix = "CAP_"

// knownCapabilities are those of linux/capability.h in Linux 6.12, all of which
// runsc knows by name.
var knownCapabilities = []string{
	"AUDIT_CONTROL", "AUDIT_READ", "AUDIT_WRITE", "BLOCK_SUSPEND", "BPF",
	"CHECKPOINT_RESTORE", "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER",
	"FSETID", "IPC_LOCK", "IPC_OWNER", "KILL", "LEASE", "LINUX_IMMUTABLE",
	"MAC_ADMIN", "MAC_OVERRIDE", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE",
	"NET_BROADCAST", "NET_RAW", "PERFMON", "SETFCAP", "SETGID", "SETPCAP",
	"SETUID", "SYSLOG", "SYS_ADMIN", "SYS_BOOT", "SYS_CHROOT", "SYS_MODULE",
	"SYS_NICE", "SYS_PACCT", "SYS_PTRACE", "SYS_RAWIO", "SYS_RESOURCE",
	"SYS_TIME", "SYS_TTY_CONFIG", "WAKE_ALARM",
}

// DefaultCapabilities returns the capabilities of a task that asks for none in
// particular, sorted and without "CAP_": Docker's (moby v28.5.2,
// oci/caps/defaults.go) less NET_RAW, as Nomad has it. The slice is the
// caller's.
func DefaultCapabilities() []string {
	return []string{
		"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL",
		"MKNOD", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID",
		"SYS_CHROOT",
	}
}

// capabilities writes names into the three sets Docker writes them to
// (moby v28.5.2, oci.SetCapabilities): bounding, effective and permitted, for
// root and other users alike. It never fills ambient or inheritable, so a user
// other than root loses effective and permitted at the first execve, in runsc
// as in runc.
func capabilities(names []string) (*specs.LinuxCapabilities, []error) {
	if names == nil {
		names = DefaultCapabilities()
	}
	var set []string
	var errs []error
	for _, n := range names {
		bare := strings.TrimPrefix(strings.ToUpper(n), capPrefix)
		if !slices.Contains(knownCapabilities, bare) {
			errs = append(errs, fmt.Errorf("capability %q: unknown", n))
			continue
		}
		set = append(set, capPrefix+bare)
	}
	slices.Sort(set)
	set = slices.Compact(set)
	return &specs.LinuxCapabilities{
		Bounding:  set,
		Effective: slices.Clone(set),
		Permitted: slices.Clone(set),
	}, errs
}
