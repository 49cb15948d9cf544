package cgroup

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrGone is returned for a scope that no longer exists.
var ErrGone = errors.New("task cgroup is gone")

// Usage is what a task has used so far, the sandbox's own kernel included.
type Usage struct {
	// CPUNanos, UserNanos and SystemNanos are CPU time in nanoseconds.
	CPUNanos, UserNanos, SystemNanos uint64
	// ThrottledPeriods and ThrottledNanos are the quota's doing.
	ThrottledPeriods, ThrottledNanos uint64
	// MemoryBytes is the current charge, MemoryPeakBytes its highest value
	// (0 if the kernel does not tell), CacheBytes the part that is page
	// cache, MappedFileBytes the part that is mapped, ShmemBytes the part
	// that is shared memory: the application's own memory under gVisor.
	MemoryBytes, MemoryPeakBytes, CacheBytes, MappedFileBytes, ShmemBytes, AnonBytes uint64
	SwapBytes                                                                        uint64
	// Processes is the number of host processes.
	Processes int
}

// Usage reads the scope's figures. It returns ErrGone once Nomad has removed
// the scope.
func (s *Scope) Usage() (*Usage, error) {
	u := &Usage{}
	var err error
	if s.mode == V2 {
		err = s.usageV2(u)
	} else {
		err = s.usageV1(u)
	}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("read task usage: %w", ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("read task usage: %w", err)
	}
	pids, err := s.PIDs()
	u.Processes = len(pids)
	return u, err
}

func (s *Scope) usageV2(u *Usage) error {
	cpu, err := readKeyed(s.file("", "cpu.stat"))
	if err != nil {
		return err
	}
	u.CPUNanos = cpu["usage_usec"] * 1000
	u.UserNanos = cpu["user_usec"] * 1000
	u.SystemNanos = cpu["system_usec"] * 1000
	u.ThrottledPeriods = cpu["nr_throttled"]
	u.ThrottledNanos = cpu["throttled_usec"] * 1000
	if u.MemoryBytes, err = readUint(s.file("", "memory.current")); err != nil {
		return err
	}
	u.MemoryPeakBytes, _ = readUint(s.file("", "memory.peak"))   // Linux 5.19 and later
	u.SwapBytes, _ = readUint(s.file("", "memory.swap.current")) // swap accounting may be off
	mem, err := readKeyed(s.file("", "memory.stat"))
	u.CacheBytes, u.MappedFileBytes = mem["file"], mem["file_mapped"]
	u.ShmemBytes, u.AnonBytes = mem["shmem"], mem["anon"]
	return err
}

// tick is the unit of cpuacct.stat, USER_HZ, 100 on every Linux architecture.
const tickNanos = 1e9 / 100

func (s *Scope) usageV1(u *Usage) error {
	var err error
	if u.MemoryBytes, err = readUint(s.file("memory", "memory.usage_in_bytes")); err != nil {
		return err
	}
	u.MemoryPeakBytes, _ = readUint(s.file("memory", "memory.max_usage_in_bytes"))
	mem, err := readKeyed(s.file("memory", "memory.stat"))
	if err != nil {
		return err
	}
	u.CacheBytes, u.MappedFileBytes = mem["total_cache"], mem["total_mapped_file"]
	u.ShmemBytes, u.AnonBytes, u.SwapBytes = mem["total_shmem"], mem["total_rss"], mem["total_swap"]
	throttle, err := readKeyed(s.file("cpu", "cpu.stat"))
	if err != nil {
		return err
	}
	u.ThrottledPeriods, u.ThrottledNanos = throttle["nr_throttled"], throttle["throttled_time"]
	// runsc removes its own directories a moment before Nomad removes the
	// rest: no figures then, but no error either.
	u.CPUNanos, _ = readUint(s.file("cpuacct", "cpuacct.usage"))
	acct, _ := readKeyed(s.file("cpuacct", "cpuacct.stat"))
	u.UserNanos, u.SystemNanos = acct["user"]*tickNanos, acct["system"]*tickNanos
	return nil
}

func readUint(path string) (uint64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
}

// readKeyed reads lines of "key value".
func readKeyed(path string) (map[string]uint64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m := map[string]uint64{}
	for line := range strings.Lines(string(raw)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); ok && err == nil {
			m[key] = n
		}
	}
	return m, nil
}
