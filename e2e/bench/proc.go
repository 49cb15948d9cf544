package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/hashicorp/nomad/client/lib/cgroupslib"
)

// allPIDs lists the processes of the machine.
func allPIDs() []int {
	entries, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well-formed
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(filepath.Base(e)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// scopeDir is a task cgroup's directory, under v1 for the controller.
func scopeDir(controller, allocID string) string {
	if cgroupslib.GetMode() == cgroupslib.CG2 {
		return cgroupslib.LinuxResourcesPath(allocID, taskName, false)
	}
	return filepath.Join("/sys/fs/cgroup", controller, cgroupslib.NomadCgroupParent, cgroupslib.ScopeCG1(allocID, taskName))
}

// scopePIDs lists every process of a task cgroup.
func scopePIDs(allocID string) ([]int, error) {
	raw, err := os.ReadFile(filepath.Join(scopeDir("freezer", allocID), "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for f := range strings.FieldsSeq(string(raw)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("list task processes: %w", err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// kernelKiB returns a field of a /proc file in KiB: "Pss:   123 kB".
func kernelKiB(path, field string) (int, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
		}
	}
	return 0, fmt.Errorf("read %q: no field %q", path, field)
}

// pssMiB sums the proportional set sizes of processes. One that has ended
// counts nothing.
func pssMiB(pids ...int) float64 {
	const kibPerMiB = 1024
	sum := 0
	for _, pid := range pids {
		if kib, err := kernelKiB(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss"); err == nil {
			sum += kib
		}
	}
	return float64(sum) / kibPerMiB
}

// loadAverage is the machine's load over the last minute, for the notes.
func loadAverage() string {
	raw, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	load, _, _ := strings.Cut(string(raw), " ")
	return load
}
