package cgroup

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Limits are a task's resources. The zero value of a field sets nothing.
type Limits struct {
	// CPUShares is the relative weight in the scale of cgroup v1, where 1024
	// is a process's default and Nomad's unit is one MHz: 2 to 262144.
	CPUShares uint64
	// CPUQuota is the time in microseconds that the task may run in each
	// CPUPeriod of microseconds.
	CPUQuota  int64
	CPUPeriod uint64
	// MemoryBytes is the hard limit. MemoryReservationBytes, if below it, is
	// what the kernel protects (v2) or shrinks to under pressure (v1).
	MemoryBytes            int64
	MemoryReservationBytes int64
	// PidsMax bounds the host processes and threads of the sandbox.
	PidsMax int64
	// CPUs are the cores that Nomad reserved for the task ("0-1,4"); "" means
	// that it shares those that are not reserved.
	CPUs string
}

// Bounds of the kernel (kernel/sched/core.c) for v1 shares.
const (
	minShares = 2
	maxShares = 262144
)

// Apply writes the limits. It stops at the first file that refuses its value:
// a task without its limits must not start.
func (s *Scope) Apply(l Limits) error {
	if s.mode == V2 {
		return s.applyV2(l)
	}
	return s.applyV1(l)
}

func (s *Scope) applyV1(l Limits) error {
	w := writer{s: s}
	if l.CPUShares > 0 {
		w.uint("cpu", "cpu.shares", clampShares(l.CPUShares))
	}
	if l.CPUQuota > 0 {
		w.uint("cpu", "cpu.cfs_period_us", l.CPUPeriod)
		w.int("cpu", "cpu.cfs_quota_us", l.CPUQuota)
	}
	if l.MemoryBytes > 0 {
		// A restarted task finds the limits of its former self: memory may
		// never exceed memsw, so take that away before and set it after.
		w.optional("memory", "memory.memsw.limit_in_bytes", "-1")
		w.int("memory", "memory.limit_in_bytes", l.MemoryBytes)
		w.optional("memory", "memory.memsw.limit_in_bytes", strconv.FormatInt(l.MemoryBytes, 10))
		w.optional("memory", "memory.swappiness", "0")
	}
	if l.MemoryReservationBytes > 0 && l.MemoryReservationBytes < l.MemoryBytes {
		w.int("memory", "memory.soft_limit_in_bytes", l.MemoryReservationBytes)
	}
	// Nomad makes the task's cpuset and leaves it to the driver to fill it.
	if l.CPUs != "" && w.err == nil {
		w.err = setFile(filepath.Join(s.cpuset, "cpuset.cpus"), l.CPUs)
	}
	return w.err
}

func (s *Scope) applyV2(l Limits) error {
	w := writer{s: s}
	if l.CPUShares > 0 {
		w.uint("", "cpu.weight", sharesToWeight(clampShares(l.CPUShares)))
	}
	if l.CPUQuota > 0 {
		w.text("", "cpu.max", fmt.Sprintf("%d %d", l.CPUQuota, l.CPUPeriod))
	}
	if l.MemoryBytes > 0 {
		w.int("", "memory.max", l.MemoryBytes)
		w.optional("", "memory.swap.max", "0")
	}
	if l.MemoryReservationBytes > 0 && l.MemoryReservationBytes < l.MemoryBytes {
		w.int("", "memory.low", l.MemoryReservationBytes)
	}
	if l.PidsMax > 0 {
		w.int("", "pids.max", l.PidsMax)
	}
	if l.CPUs != "" {
		w.text("", "cpuset.cpus", l.CPUs)
	}
	return w.err
}

func clampShares(shares uint64) uint64 {
	return min(max(shares, minShares), maxShares)
}

// sharesToWeight maps v1 shares to v2 weight as runc and crun do since 2025:
// a curve through (2, 1), (1024, 100) and (262144, 10000), so that a default
// stays a default (opencontainers/cgroups, ConvertCPUSharesToCgroupV2Value).
func sharesToWeight(shares uint64) uint64 {
	l := math.Log2(float64(shares))
	exponent := (l*l+125*l)/612.0 - 7.0/34.0
	return uint64(math.Ceil(math.Pow(10, exponent)))
}

// writer writes interface files until one fails.
type writer struct {
	s   *Scope
	err error
}

func (w *writer) int(controller, name string, v int64) {
	w.text(controller, name, strconv.FormatInt(v, 10))
}

func (w *writer) uint(controller, name string, v uint64) {
	w.text(controller, name, strconv.FormatUint(v, 10))
}

func (w *writer) text(controller, name, v string) {
	if w.err != nil {
		return
	}
	w.err = setFile(w.s.file(controller, name), v)
}

func setFile(path, v string) error {
	if err := os.WriteFile(path, []byte(v), 0); err != nil {
		return fmt.Errorf("set %s to %s: %w", filepath.Base(path), v, err)
	}
	return nil
}

// optional writes a file that a kernel may lack or have switched off: swap
// accounting is a boot option, and memsw.limit refuses -1 in a limited parent.
func (w *writer) optional(controller, name, v string) {
	if w.err != nil {
		return
	}
	err := os.WriteFile(w.s.file(controller, name), []byte(v), 0)
	missing := errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) ||
		errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EBUSY)
	if err != nil && !missing {
		w.err = fmt.Errorf("set %s to %s: %w", name, v, err)
	}
}
