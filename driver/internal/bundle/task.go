package bundle

// Mount is one bind mount from the node into the sandbox.
type Mount struct {
	// Source is the path on the node, absolute and clean. Whether a job may
	// have it is the driver's decision.
	Source string
	// Destination is the path in the sandbox, absolute and clean. It may not
	// be "/", nor lie on or below /proc, /sys or /dev.
	Destination string
	// ReadOnly stops writes from inside.
	ReadOnly bool
	// Propagation says whether mounts made later on the node below Source
	// appear inside: "" or "private" = no, "rslave" or Nomad's "host-to-task"
	// = yes. "rshared" and Nomad's "bidirectional" are refused, since runsc
	// keeps the sandbox's mounts to the sandbox.
	Propagation string
}

// Limits are what the task may use. Zero means unlimited, or the kernel's
// default, for each field. Spec only records them: runsc applies none of them
// to a cgroup that exists already, as Nomad's does, so the driver writes them
// to the cgroup too.
type Limits struct {
	CPUShares              uint64 // relative weight, 2 to 262144
	CPUQuota               int64  // CPU time per period, microseconds, at least 1000
	CPUPeriod              uint64 // length of a period, microseconds, 1000 to 1000000
	MemoryBytes            int64  // hard limit
	MemoryReservationBytes int64  // soft limit, not above the hard one
	PidsMax                int64  // processes and threads, counted on the node: the sandbox's own are among them
	CPUs                   string // allowed CPUs as a list, "0-3,8"
}

// Task is all that Spec needs to know about a task.
type Task struct {
	// Root is the root filesystem's directory on the node, absolute and clean.
	Root string
	// ReadOnlyRoot stops writes to the root filesystem from inside.
	ReadOnlyRoot bool
	// Process is what to run, as Merge returns it. Its User is not read.
	Process Process
	// User runs it, as ResolveUser returns it. Zero = root in the sandbox.
	User User
	// Hostname is the sandbox's, by RFC 1123, at most 63 bytes; "" = none.
	Hostname string
	// Capabilities are the process's, with or without "CAP_", in any case; nil
	// = DefaultCapabilities, empty = none.
	Capabilities []string
	// Mounts are the task's bind mounts. Spec orders them by depth of
	// destination, keeping the given order within one depth, so that a parent
	// never hides a child. No destination may repeat.
	Mounts []Mount
	// NetNS is the path of the network namespace to join, absolute, clean and
	// not below /proc; "" = a new one with loopback only.
	NetNS string
	// CgroupsPath is the cgroup, absolute from the root of the hierarchy and
	// clean; "" = runsc makes none.
	CgroupsPath string
	// Limits are what the task may use; zero = unlimited.
	Limits Limits
	// ShmBytes is the size of /dev/shm; 0 = 64 MiB, Docker's default.
	ShmBytes int64
	// Annotations are the job's labels. Keys that runsc reads as configuration
	// (dev.gvisor.*, io.kubernetes.cri*) are refused.
	Annotations map[string]string
}
