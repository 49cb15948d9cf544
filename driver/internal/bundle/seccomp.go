package bundle

import "github.com/opencontainers/runtime-spec/specs-go"

// msMove is MS_MOVE of mount(2), include/uapi/linux/mount.h.
const msMove = 0x2000

// mountLock is a filter, applied by the sentry, that keeps the sandbox's mounts
// where they are. gVisor lets every task have a user namespace, and in it the
// right to mount; Linux would still hold on to a mount point that another mount
// namespace uses, gVisor looks only at the task's own. So a task that takes a
// mount away in a namespace of its own could rename what lies below it on the
// node: first of all alloc/logs, into which Nomad writes as root
// (CVE-2026-6959). Docker's default profile refuses these calls, and more.
//
// The filter allows by default and its decisions do not depend on arguments,
// except for mount: the sentry caches them by system call.
func mountLock() *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Syscalls: []specs.LinuxSyscall{
			{
				Names: []string{
					"umount2", "pivot_root", "move_mount", "open_tree", "mount_setattr",
					"fsopen", "fsconfig", "fsmount", "fspick", "setns",
				},
				Action: specs.ActErrno,
			},
			{
				Names:  []string{"mount"},
				Action: specs.ActErrno,
				Args:   []specs.LinuxSeccompArg{{Index: 3, Value: msMove, ValueTwo: msMove, Op: specs.OpMaskedEqual}},
			},
		},
	}
}
