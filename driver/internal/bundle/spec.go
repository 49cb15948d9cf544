package bundle

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// nofileLimit is the number of open files a process may have: fs.nr_open's
// default (linux/fs/file.c), which most Docker installations give a container.
const nofileLimit = 1048576

// reservedAnnotations are prefixes of annotations that runsc reads: flags and
// mounts (dev.gvisor.), and whether to join another sandbox (io.kubernetes.cri.
// and io.kubernetes.cri-o.); gVisor runsc/specutils, September 2026.
var reservedAnnotations = []string{"dev.gvisor.", "io.kubernetes.cri"}

// Spec returns the runtime spec of t. It checks all of t first and returns
// every problem in one joined error, each on a line of its own.
//
// The environment gains HOME, from the user, and HOSTNAME, from the hostname,
// unless they are set. Namespaces are all new, save the network's if t names
// one. The spec shares no memory with t, and the caller owns it.
func Spec(t Task) (*specs.Spec, error) {
	caps, errs := capabilities(t.Capabilities)
	binds, mountErrs := bindMounts(t.Mounts)
	resources, limitErrs := resources(t.Limits)
	env, envErrs := processEnv(t)
	errs = slices.Concat(checkTask(t), envErrs, errs, mountErrs, limitErrs, checkAnnotations(t.Annotations))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &specs.Spec{
		Version:  specs.Version,
		Hostname: t.Hostname,
		Root:     &specs.Root{Path: t.Root, Readonly: t.ReadOnlyRoot},
		Process: &specs.Process{
			User:            specUser(t.User),
			Args:            slices.Clone(t.Process.Args),
			Env:             env,
			Cwd:             t.Process.Cwd,
			Capabilities:    caps,
			Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: nofileLimit, Soft: nofileLimit}},
			NoNewPrivileges: true,
		},
		Mounts:      append(baseMounts(t.ShmBytes), binds...),
		Annotations: maps.Clone(t.Annotations),
		Linux: &specs.Linux{
			Namespaces:    namespaces(t.NetNS),
			CgroupsPath:   t.CgroupsPath,
			Resources:     resources,
			MaskedPaths:   maskedPaths(),
			ReadonlyPaths: readonlyPaths(),
			Seccomp:       mountLock(),
		},
	}, nil
}

// namespaces gives the sandbox a namespace of its own for everything. runsc
// runs the task in the sentry, so only the network's touches the node.
func namespaces(netNS string) []specs.LinuxNamespace {
	return []specs.LinuxNamespace{
		{Type: specs.PIDNamespace},
		{Type: specs.NetworkNamespace, Path: netNS},
		{Type: specs.IPCNamespace},
		{Type: specs.UTSNamespace},
		{Type: specs.MountNamespace},
		{Type: specs.CgroupNamespace},
	}
}

// maskedPaths are Docker's (moby v28.5.2, oci/defaults.go), without those for
// each of the node's CPUs. gVisor has few of them and masks none.
func maskedPaths() []string {
	return []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore",
		"/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
		"/sys/firmware", "/sys/devices/virtual/powercap",
	}
}

// readonlyPaths are Docker's (moby v28.5.2, oci/defaults.go).
func readonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}

// specUser writes the primary group into the supplementary ones too, as Docker
// does: without it a program that drops its primary group escapes a file
// mode meant for that group (CVE-2022-36109).
func specUser(u User) specs.User {
	gids := []uint32{u.GID}
	seen := map[uint32]bool{u.GID: true}
	for _, g := range u.Groups {
		if !seen[g] {
			gids = append(gids, g)
		}
		seen[g] = true
	}
	return specs.User{UID: u.UID, GID: u.GID, AdditionalGids: gids}
}

// processEnv completes and checks the process's environment.
func processEnv(t Task) ([]string, []error) {
	env := slices.Clone(t.Process.Env)
	home := t.User.Home
	if home == "" {
		home = "/"
	}
	env = withDefault(env, "HOME", home)
	if t.Hostname != "" {
		env = withDefault(env, "HOSTNAME", t.Hostname)
	}
	var errs []error
	seen := make(map[string]bool, len(env))
	for _, kv := range env {
		k, _, _ := strings.Cut(kv, "=")
		if err := checkEnv(kv); err != nil {
			errs = append(errs, err)
		} else if seen[k] {
			errs = append(errs, fmt.Errorf("environment variable %q: set twice", k))
		}
		seen[k] = true
	}
	sortEnv(env)
	return env, errs
}

// withDefault adds key to env unless env has it.
func withDefault(env []string, key, value string) []string {
	if slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, key+"=") }) {
		return env
	}
	return append(env, key+"="+value)
}

// sortEnv sorts by key, which is not the order of the whole strings: "=" sorts
// after digits.
func sortEnv(env []string) {
	slices.SortFunc(env, func(a, b string) int {
		ka, _, _ := strings.Cut(a, "=")
		kb, _, _ := strings.Cut(b, "=")
		return strings.Compare(ka, kb)
	})
}

// checkTask checks the fields of t that no other function does.
func checkTask(t Task) []error {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if err := checkPath(t.Root); err != nil {
		refuse("root %q: %w", t.Root, err)
	}
	if err := checkArgs(t.Process.Args); err != nil {
		errs = append(errs, err)
	}
	if t.Process.Cwd != "/" {
		if err := checkPath(t.Process.Cwd); err != nil {
			refuse("working directory %q: %w", t.Process.Cwd, err)
		}
	}
	for _, id := range slices.Concat([]uint32{t.User.UID, t.User.GID}, t.User.Groups) {
		if id > maxID {
			refuse("user or group number %d: above %d", id, maxID)
		}
	}
	if t.Hostname != "" {
		if err := checkHostname(t.Hostname); err != nil {
			refuse("hostname %q: %w", t.Hostname, err)
		}
	}
	if t.NetNS != "" {
		if err := checkPath(t.NetNS); err != nil {
			refuse("network namespace %q: %w", t.NetNS, err)
		} else if within(t.NetNS, "/proc") {
			refuse("network namespace %q: below /proc, where it may be the node's own; name a bind-mounted one such as /var/run/netns/NAME", t.NetNS)
		}
	}
	if t.CgroupsPath != "" {
		if err := checkPath(t.CgroupsPath); err != nil {
			refuse("cgroup %q: %w", t.CgroupsPath, err)
		}
	}
	if t.ShmBytes < 0 {
		refuse("size of /dev/shm %d: negative", t.ShmBytes)
	}
	return errs
}

// checkAnnotations refuses annotations that would configure runsc.
func checkAnnotations(annotations map[string]string) []error {
	var errs []error
	for _, k := range slices.Sorted(maps.Keys(annotations)) {
		if err := errors.Join(checkText(k), checkText(annotations[k])); err != nil {
			errs = append(errs, fmt.Errorf("annotation %q: %w", k, err))
		}
		if k == "" {
			errs = append(errs, errors.New(`annotation "": empty key`))
		}
		for _, prefix := range reservedAnnotations {
			if strings.HasPrefix(strings.ToLower(k), prefix) {
				errs = append(errs, fmt.Errorf("annotation %q: keys that start with %q configure the sandbox and cannot be set by a job", k, prefix))
			}
		}
	}
	return errs
}

// resources checks l and writes down what is set; nil when nothing is.
func resources(l Limits) (*specs.LinuxResources, []error) {
	errs := checkLimits(l)
	cpu := specs.LinuxCPU{
		Shares: nonZero(l.CPUShares), Quota: nonZero(l.CPUQuota), Period: nonZero(l.CPUPeriod), Cpus: l.CPUs,
	}
	memory := specs.LinuxMemory{Limit: nonZero(l.MemoryBytes), Reservation: nonZero(l.MemoryReservationBytes)}
	var r specs.LinuxResources
	if cpu != (specs.LinuxCPU{}) {
		r.CPU = &cpu
	}
	if memory != (specs.LinuxMemory{}) {
		r.Memory = &memory
	}
	if l.PidsMax != 0 {
		r.Pids = &specs.LinuxPids{Limit: &l.PidsMax}
	}
	if r.CPU == nil && r.Memory == nil && r.Pids == nil {
		return nil, errs
	}
	return &r, errs
}

// nonZero returns nil for zero, the spec's "not set".
func nonZero[T int64 | uint64](n T) *T {
	if n == 0 {
		return nil
	}
	return &n
}

// checkLimits holds l to the kernel's bounds: kernel/sched/core.c in Linux 6.12
// for CPU time (quota at least 1 ms, period 1 ms to 1 s) and the v1 shares that
// runsc converts to a weight (2 to 262144).
func checkLimits(l Limits) []error {
	var errs []error
	check := func(name string, value, low, high int64) {
		if value != 0 && (value < low || value > high) {
			errs = append(errs, fmt.Errorf("%s %d: outside %d to %d", name, value, low, high))
		}
	}
	check("CPU shares", int64(min(l.CPUShares, math.MaxInt64)), 2, 262144)
	check("CPU quota in microseconds", l.CPUQuota, 1000, math.MaxInt64)
	check("CPU period in microseconds", int64(min(l.CPUPeriod, math.MaxInt64)), 1000, 1000000)
	check("memory limit in bytes", l.MemoryBytes, 1, math.MaxInt64)
	check("memory reservation in bytes", l.MemoryReservationBytes, 1, math.MaxInt64)
	check("limit of processes", l.PidsMax, 1, math.MaxInt64)
	if l.MemoryBytes > 0 && l.MemoryReservationBytes > l.MemoryBytes {
		errs = append(errs, fmt.Errorf("memory reservation %d: above the limit of %d bytes", l.MemoryReservationBytes, l.MemoryBytes))
	}
	if err := checkCPUList(l.CPUs); err != nil {
		errs = append(errs, fmt.Errorf("allowed CPUs %q: %w", l.CPUs, err))
	}
	return errs
}
