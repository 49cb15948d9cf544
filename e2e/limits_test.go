package e2e

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

const mib = 1 << 20

func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	a := agent(t)
	alloc := a.Run(t, nomadtest.Batch(t, busybox(t), "echo start; exec tail /dev/zero").Job).Done(t)
	ends := nomadtest.EventsOf(alloc, api.TaskTerminated)
	if len(ends) != 1 || ends[0].ExitCode != 137 || ends[0].Details["oom_killed"] != "true" {
		t.Fatalf("want one end with exit code 137 by the OOM killer: %s", nomadtest.Events(alloc, "main"))
	}
	if !strings.Contains(ends[0].DisplayMessage, "OOM Killed") {
		t.Errorf("event says %q", ends[0].DisplayMessage)
	}
}

// memoryLimits are the hard and the soft limit of a task's scope in MiB.
func memoryLimits(t *testing.T, alloc *api.Allocation) [2]string {
	t.Helper()
	var limits [2]string
	for i, raw := range []string{
		cgroupFile(t, alloc, "memory", "memory.limit_in_bytes", "memory.max"),
		cgroupFile(t, alloc, "memory", "memory.soft_limit_in_bytes", "memory.low"),
	} {
		limits[i] = raw
		if n, err := strconv.ParseInt(raw, 10, 64); err == nil {
			limits[i] = fmt.Sprint(n / mib)
		}
	}
	return limits
}

func TestMemoryMax(t *testing.T) {
	t.Parallel()
	a := agent(t)
	scheduler, _, err := a.Client.Operator().SchedulerGetConfiguration(nil)
	if err != nil {
		t.Fatal(err)
	}
	scheduler.SchedulerConfig.MemoryOversubscriptionEnabled = true
	if _, _, err := a.Client.Operator().SchedulerSetConfiguration(scheduler.SchedulerConfig, nil); err != nil {
		t.Fatal(err)
	}
	// More than the reservation, less than the maximum.
	j := nomadtest.Service(t, busybox(t), "dd if=/dev/zero of=/dev/null bs=150M count=1 2>/dev/null && echo fits; trap 'exit 0' TERM; while :; do sleep 0.2; done")
	j.Task.Resources.MemoryMaxMB = ptr(300)
	alloc := a.Run(t, j.Job).Running(t)
	if got, want := memoryLimits(t, alloc), [2]string{"300", "64"}; got != want {
		t.Errorf("hard and soft limit in MiB: %v, want %v", got, want)
	}
	a.AwaitLog(t, alloc, "stdout", func(s string) bool { return s == "fits\n" })
}

func TestReservedCores(t *testing.T) {
	t.Parallel()
	a := agent(t)
	j := nomadtest.Service(t, busybox(t), "trap 'exit 0' TERM; while :; do sleep 0.2; done")
	j.Task.Resources.CPU, j.Task.Resources.Cores = nil, ptr(1)
	alloc := a.Run(t, j.Job).Running(t)
	reserved := a.Sh(t, alloc, "echo $NOMAD_CPU_CORES")
	if reserved == "" {
		t.Fatal("NOMAD_CPU_CORES is not set")
	}
	for _, pid := range sandboxPIDs(t, alloc) {
		if got := statusField(t, pid, "Cpus_allowed_list"); got != reserved {
			t.Errorf("process %s may run on cores %s, reserved are %s", pid, got, reserved)
		}
		raw, err := os.ReadFile("/proc/" + pid + "/cpuset")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(raw), "/reserve") || !strings.Contains(string(raw), alloc.ID) {
			t.Errorf("process %s is in cpuset %s", pid, raw)
		}
	}
}

func TestCPULimits(t *testing.T) {
	t.Parallel()
	a := agent(t)
	node, _, err := a.Client.Nodes().Info(a.NodeID, nil)
	if err != nil {
		t.Fatal(err)
	}
	total, _ := strconv.ParseFloat(node.Attributes["cpu.totalcompute"], 64)
	cores, _ := strconv.ParseFloat(node.Attributes["cpu.numcores"], 64)
	if total == 0 || cores == 0 {
		t.Fatalf("node attributes: %v", node.Attributes)
	}
	const mhz, period = 300, 50000
	j := nomadtest.Service(t, busybox(t), "trap 'exit 0' TERM; while :; do sleep 0.2; done")
	j.Task.Resources.CPU = ptr(mhz)
	j.Set("cpu_hard_limit", true).Set("cpu_cfs_period", period)
	alloc := a.Run(t, j.Job).Running(t)
	got := cgroupFile(t, alloc, "cpu", "cpu.cfs_quota_us", "cpu.max")
	quota, err := strconv.ParseFloat(strings.Fields(got)[0], 64)
	if want := mhz / total * cores * period; err != nil || math.Abs(quota-want) > 0.01*want {
		t.Errorf("quota is %q, want %.0f of %d microseconds", got, want, period)
	}
	if !isCgroupV2() {
		if got := cgroupFile(t, alloc, "cpu", "cpu.cfs_period_us", ""); got != strconv.Itoa(period) {
			t.Errorf("period is %s, want %d", got, period)
		}
		if got := cgroupFile(t, alloc, "cpu", "cpu.shares", ""); got != strconv.Itoa(mhz) {
			t.Errorf("shares are %s, want %d", got, mhz)
		}
	}
}

// Without a hard limit CPU is a weight only.
func TestCPUIsNoLimitByDefault(t *testing.T) {
	t.Parallel()
	alloc := idle(t)
	if got := cgroupFile(t, alloc, "cpu", "cpu.cfs_quota_us", "cpu.max"); got != "-1" && !strings.HasPrefix(got, "max") {
		t.Errorf("quota is %s", got)
	}
}

// A fork bomb meets the limit, and the node goes on.
func TestPIDsLimit(t *testing.T) {
	t.Parallel()
	a := agent(t)
	const limit = 100
	j := nomadtest.Batch(t, busybox(t), "for i in $(seq 200); do sleep 30 & done; wait; echo all-200-ran")
	j.Task.Resources.MemoryMB = ptr(512)
	j.Set("pids_limit", limit)
	r := a.Run(t, j.Job)
	deadline := time.Now().Add(20 * time.Second)
	highest := 0
	nomadtest.Eventually(t, 60*time.Second, func() error {
		allocs, err := r.Allocs()
		if err != nil || len(allocs) == 0 {
			return errors.Join(fmt.Errorf("%d allocations", len(allocs)), err)
		}
		for _, dir := range cgroupDirs(allocs[0], "pids") {
			if raw, err := os.ReadFile(dir + "/pids.current"); err == nil {
				n, _ := strconv.Atoi(strings.TrimSpace(string(raw)))
				highest = max(highest, n)
			}
		}
		if s := allocs[0].TaskStates["main"]; s != nil && s.State == "dead" {
			if !s.Failed {
				t.Errorf("the bomb ended well: %s", nomadtest.Events(allocs[0], "main"))
			}
			return nil
		}
		if time.Now().After(deadline) {
			return nil // it lives within its limit
		}
		return fmt.Errorf("task still runs, %d processes at most", highest)
	})
	if highest > limit {
		t.Errorf("%d host processes and threads, limit %d", highest, limit)
	}
	if highest < limit/2 {
		t.Errorf("only %d host processes and threads seen: the limit was not reached", highest)
	}
	if out := a.Output(t, nomadtest.Batch(t, busybox(t), "echo fine")); out != "fine\n" {
		t.Errorf("a task after the bomb says %q", out)
	}
}
