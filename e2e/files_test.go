package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
)

// readAllocFile reads a file of /alloc/data on the host.
func readAllocFile(t *testing.T, alloc *api.Allocation, name string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(agent(t).AllocDir(alloc.ID), "alloc", "data", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// cgroupDirs are where the kernel keeps the scope of a task: with cgroup v1
// below a controller, with v2 below one of Nomad's two slices.
func cgroupDirs(alloc *api.Allocation, controller string) []string {
	const root = "/sys/fs/cgroup/"
	scope := alloc.ID + ".main"
	return []string{
		root + controller + "/nomad/" + scope,
		root + "nomad.slice/share.slice/" + scope + ".scope",
		root + "nomad.slice/reserve.slice/" + scope + ".scope",
	}
}

// cgroupFile reads an interface file of a task's scope: v1's of a controller,
// or v2's.
func cgroupFile(t *testing.T, alloc *api.Allocation, controller, v1, v2 string) string {
	t.Helper()
	for i, dir := range cgroupDirs(alloc, controller) {
		name := v1
		if i > 0 {
			name = v2
		}
		if raw, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			return strings.TrimSpace(string(raw))
		}
	}
	t.Fatalf("no file %s or %s for allocation %s", v1, v2, alloc.ID)
	return ""
}

func isCgroupV2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// sandboxPIDs are the processes of a task on the host.
func sandboxPIDs(t *testing.T, alloc *api.Allocation) []string {
	t.Helper()
	pids := strings.Fields(cgroupFile(t, alloc, "freezer", "cgroup.procs", "cgroup.procs"))
	if len(pids) == 0 {
		t.Fatalf("no process in the cgroup of allocation %s", alloc.ID)
	}
	return pids
}

// statusField reads a line of /proc/PID/status.
func statusField(t *testing.T, pid, name string) string {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%s/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %s in the status of process %s", name, pid)
	return ""
}
