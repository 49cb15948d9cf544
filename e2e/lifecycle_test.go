package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

func TestLogsFollow(t *testing.T) {
	t.Parallel()
	a := agent(t)
	alloc := a.Run(t, nomadtest.Service(t, busybox(t), "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done").Job).Running(t)
	cancel := make(chan struct{})
	defer close(cancel)
	frames, errs := a.Client.AllocFS().Logs(alloc, true, "main", "stdout", "start", 0, cancel, nil)
	var got strings.Builder
	timeout := time.After(30 * time.Second)
	for !strings.Contains(got.String(), "line 10\n") {
		select {
		case f := <-frames:
			got.Write(f.Data)
		case err := <-errs:
			t.Fatal(err)
		case <-timeout:
			t.Fatalf("no tenth line; output is %q", got.String())
		}
	}
	for i := range 10 {
		if want := fmt.Sprintf("line %d\n", i+1); strings.Count(got.String(), want) != 1 {
			t.Errorf("%q is not there once: %q", want, got.String())
		}
	}
}

// All output of a task that ends at once after much of it is kept.
func TestLogsOfManyMegabytes(t *testing.T) {
	t.Parallel()
	a := agent(t)
	j := nomadtest.Batch(t, busybox(t), "seq 400000; echo the-end")
	alloc := a.Run(t, j.Job).Done(t)
	out := a.AwaitLog(t, alloc, "stdout", func(s string) bool { return strings.HasSuffix(s, "the-end\n") })
	if n := strings.Count(out, "\n"); n != 400001 {
		t.Errorf("%d lines, want 400001", n)
	}
}

func TestSignal(t *testing.T) {
	t.Parallel()
	a := agent(t)
	alloc := a.Run(t, nomadtest.Service(t, busybox(t), "trap 'echo got-usr1' USR1; echo ready; while :; do sleep 0.1; done").Job).Running(t)
	a.AwaitLog(t, alloc, "stdout", func(s string) bool { return s == "ready\n" })
	for _, name := range []string{"SIGUSR1", "USR1"} {
		if err := a.Client.Allocations().Signal(alloc, nil, "main", name); err != nil {
			t.Fatalf("signal %s: %v", name, err)
		}
	}
	a.AwaitLog(t, alloc, "stdout", func(s string) bool { return strings.Contains(s, "got-usr1") })
	if err := a.Client.Allocations().Signal(alloc, nil, "main", "SIGNONSENSE"); err == nil {
		t.Error("an unknown signal is accepted")
	}
}

// stop stops a job but keeps its allocation to be looked at.
func stop(t *testing.T, r *nomadtest.Run) *api.Allocation {
	t.Helper()
	if _, _, err := agent(t).Client.Jobs().Deregister(r.ID, false, nil); err != nil {
		t.Fatal(err)
	}
	return r.Done(t)
}

func TestStopRunsTheTrap(t *testing.T) {
	t.Parallel()
	a := agent(t)
	r := a.Run(t, nomadtest.Service(t, busybox(t), "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.1; done").Job)
	a.AwaitLog(t, r.Running(t), "stdout", func(s string) bool { return s == "ready\n" })
	alloc := stop(t, r)
	a.AwaitLog(t, alloc, "stdout", func(s string) bool { return s == "ready\nbye\n" })
	if ends := nomadtest.EventsOf(alloc, api.TaskTerminated); len(ends) != 1 || ends[0].ExitCode != 4 {
		t.Errorf("want one end with exit code 4: %s", nomadtest.Events(alloc, "main"))
	}
}

func TestStopSendsTheJobsSignal(t *testing.T) {
	t.Parallel()
	a := agent(t)
	j := nomadtest.Service(t, busybox(t), "trap 'echo int; exit 0' INT; trap '' TERM; echo ready; while :; do sleep 0.1; done")
	j.Task.KillSignal = "SIGINT"
	r := a.Run(t, j.Job)
	a.AwaitLog(t, r.Running(t), "stdout", func(s string) bool { return s == "ready\n" })
	a.AwaitLog(t, stop(t, r), "stdout", func(s string) bool { return s == "ready\nint\n" })
}

func TestStopKillsAfterTheTimeout(t *testing.T) {
	t.Parallel()
	a := agent(t)
	j := nomadtest.Service(t, busybox(t), "trap '' TERM; echo ready; while :; do sleep 0.1; done")
	const timeout = 2 * time.Second
	j.Task.KillTimeout = ptr(timeout)
	r := a.Run(t, j.Job)
	a.AwaitLog(t, r.Running(t), "stdout", func(s string) bool { return s == "ready\n" })
	alloc := stop(t, r)
	ends, kills := nomadtest.EventsOf(alloc, api.TaskTerminated), nomadtest.EventsOf(alloc, api.TaskKilling)
	if len(ends) != 1 || len(kills) != 1 || ends[0].ExitCode != 137 {
		t.Fatalf("want one end with exit code 137: %s", nomadtest.Events(alloc, "main"))
	}
	const slack = 5 * time.Second
	if took := time.Duration(ends[0].Time - kills[0].Time); took < timeout || took > timeout+slack {
		t.Errorf("killed after %v, want %v", took, timeout)
	}
}

func TestRestartInPlace(t *testing.T) {
	t.Parallel()
	a := agent(t)
	r := a.Run(t, nomadtest.Service(t, busybox(t), `trap 'exit 0' TERM
test -e /mark && echo stale
touch /mark
echo "start $NOMAD_ALLOC_ID"
while :; do sleep 0.1; done`).Job)
	alloc := r.Running(t)
	start := "start " + alloc.ID + "\n"
	a.AwaitLog(t, alloc, "stdout", func(s string) bool { return s == start })
	if err := a.Client.Allocations().Restart(alloc, "main", nil); err != nil {
		t.Fatal(err)
	}
	a.AwaitLog(t, alloc, "stdout", func(s string) bool { return s == start+start })
	again := r.Running(t)
	if again.ID != alloc.ID {
		t.Errorf("allocation is %s, was %s", again.ID, alloc.ID)
	}
	if got := a.Sh(t, again, "echo in"); got != "in" {
		t.Errorf("exec after the restart: %q", got)
	}
}

// Statistics arrive and mean something.
func TestStats(t *testing.T) {
	t.Parallel()
	a := agent(t)
	alloc := a.Run(t, nomadtest.Service(t, busybox(t), "while :; do :; done").Job).Running(t)
	nomadtest.Eventually(t, 30*time.Second, func() error {
		u, err := a.Client.Allocations().Stats(alloc, nil)
		if err != nil {
			return err
		}
		task := u.Tasks["main"]
		if task == nil || task.ResourceUsage == nil {
			return fmt.Errorf("no usage of task main: %+v", u)
		}
		const mib = 1 << 20
		usage := task.ResourceUsage
		if usage.CpuStats.TotalTicks < 50 || usage.MemoryStats.Usage < mib || usage.MemoryStats.Usage > 64*mib {
			return fmt.Errorf("CPU %v MHz, memory %d bytes", usage.CpuStats.TotalTicks, usage.MemoryStats.Usage)
		}
		return nil
	})
}
