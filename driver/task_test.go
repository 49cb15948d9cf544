package driver

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/cgroup"
	"github.com/bivouac-run/bivouac/driver/internal/shim"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"
)

func TestExitCodes(t *testing.T) {
	n := needNode(t)
	ref := n.image(t, "busybox", nil)
	for name, c := range map[string]struct {
		script string
		code   int
	}{
		"zero":    {"exit 0", 0},
		"seven":   {"exit 7", 7},
		"killed":  {"kill -KILL $$", 137},
		"segv":    {"kill -SEGV $$", 139},
		"at once": {":", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := n.harness(t)
			cfg := taskConfig(t, h, sh(ref, c.script), nil)
			startTask(t, h, cfg)
			r := wait(t, h, cfg.ID)
			must.Eq(t, c.code, r.ExitCode)
			must.False(t, r.OOMKilled)
			must.NoError(t, r.Err)
			// After the end as before it.
			must.Eq(t, c.code, wait(t, h, cfg.ID).ExitCode)
			status, err := h.InspectTask(cfg.ID)
			must.NoError(t, err)
			must.Eq(t, drivers.TaskStateExited, status.State)
			must.False(t, status.CompletedAt.Before(status.StartedAt))
		})
	}
}

func TestOutputGoesToItsStream(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "echo out; echo err >&2; seq 1 200000 | md5sum; exit 3"), nil)
	startTask(t, h, cfg)
	must.Eq(t, 3, wait(t, h, cfg.ID).ExitCode)
	output(t, cfg, "stderr", func(s string) bool { return s == "err\n" })
	out := output(t, cfg, "stdout", func(s string) bool { return strings.Contains(s, "  -") })
	must.StrHasPrefix(t, "out\n", out)
}

func TestStopSignalsThenKills(t *testing.T) {
	n := needNode(t)
	ref := n.image(t, "busybox", nil)
	for name, c := range map[string]struct {
		script string
		signal string
		grace  time.Duration
		code   int
	}{
		"takes TERM":    {"trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done", "SIGTERM", 20 * time.Second, 5},
		"takes INT":     {"trap 'exit 6' INT; echo up; while :; do sleep 0.05; done", "int", 20 * time.Second, 6},
		"ignores TERM":  {"trap '' TERM; echo up; while :; do sleep 0.05; done", "", 100 * time.Millisecond, 137},
		"kill at once":  {"echo up; sleep 600", "SIGKILL", 20 * time.Second, 137},
		"without grace": {"trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done", "", 0, 137},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := n.harness(t)
			cfg := taskConfig(t, h, sh(ref, c.script), nil)
			startTask(t, h, cfg)
			output(t, cfg, "stdout", func(s string) bool { return s == "up\n" })
			must.ErrorContains(t, h.DestroyTask(cfg.ID, false), "running")
			must.NoError(t, h.StopTask(cfg.ID, c.grace, c.signal))
			must.Eq(t, c.code, wait(t, h, cfg.ID).ExitCode)
			must.NoError(t, h.StopTask(cfg.ID, c.grace, c.signal)) // again
			must.NoError(t, h.DestroyTask(cfg.ID, false))
			must.True(t, notFound(h.DestroyTask(cfg.ID, false)))
			_, err := h.InspectTask(cfg.ID)
			must.True(t, notFound(err))
		})
	}
}

func TestSignalReachesTheTask(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "trap 'echo got' USR1; echo up; while :; do sleep 0.05; done"), nil)
	startTask(t, h, cfg)
	output(t, cfg, "stdout", func(s string) bool { return s == "up\n" })
	must.NoError(t, h.SignalTask(cfg.ID, "SIGUSR1"))
	output(t, cfg, "stdout", func(s string) bool { return s == "up\ngot\n" })
	must.ErrorContains(t, h.SignalTask(cfg.ID, "SIGNONE"), "unknown signal")
}

func TestDestroyLeavesNothing(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	d := driverOf(h)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "echo change > /bin/change; sleep 600"), nil)
	startTask(t, h, cfg)
	task, err := d.lookup(cfg.ID)
	must.NoError(t, err)
	must.NoError(t, h.DestroyTask(cfg.ID, true))
	pids, err := task.scope.PIDs()
	must.NoError(t, err)
	must.SliceEmpty(t, pids)
	must.False(t, task.started.Shim.Alive())
	must.False(t, task.started.Sandbox.Alive())
	for _, dir := range []string{d.host.tasksDir(), d.host.runscRoot()} {
		entries, err := os.ReadDir(dir)
		must.NoError(t, err)
		for _, e := range entries {
			must.Eq(t, "null-netns", e.Name()) // one per node, see runsc
		}
	}
	if task.scope.Mode() == cgroup.V1 {
		for _, c := range []string{"pids", "cpuacct", "blkio", "devices", "cpuset"} {
			must.DirNotExists(t, task.scope.Dir(c))
		}
	}
	found, err := filepath.Glob(filepath.Join(n.stateDir, "images/v1/rootfs/*/root/bin/change"))
	must.NoError(t, err)
	must.SliceEmpty(t, found)
}

func TestStatsShowUse(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "while :; do :; done"), nil)
	startTask(t, h, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ch, err := h.TaskStats(ctx, cfg.ID, 200*time.Millisecond)
	must.NoError(t, err)
	for s := range ch {
		if s.ResourceUsage.CpuStats.Percent > 5 && s.ResourceUsage.MemoryStats.Usage > 1<<20 {
			cancel()
			for range ch { // closes
			}
			return
		}
	}
	t.Fatal("no use was reported")
}

func TestSandboxKilledFromOutside(t *testing.T) {
	n := needNode(t)
	ref := n.image(t, "busybox", nil)
	t.Run("sandbox", func(t *testing.T) {
		h := n.harness(t)
		d := driverOf(h)
		cfg := taskConfig(t, h, sh(ref, "sleep 600"), nil)
		startTask(t, h, cfg)
		task, err := d.lookup(cfg.ID)
		must.NoError(t, err)
		must.NoError(t, task.started.Sandbox.Signal(unix.SIGKILL))
		r := wait(t, h, cfg.ID)
		must.Eq(t, 137, r.ExitCode)
		must.Eq(t, int(unix.SIGKILL), r.Signal)
		must.False(t, r.OOMKilled)
	})
	t.Run("shim", func(t *testing.T) {
		h := n.harness(t)
		d := driverOf(h)
		cfg := taskConfig(t, h, sh(ref, "sleep 600"), nil)
		startTask(t, h, cfg)
		task, err := d.lookup(cfg.ID)
		must.NoError(t, err)
		must.NoError(t, task.started.Shim.Signal(unix.SIGKILL))
		r := wait(t, h, cfg.ID)
		must.ErrorContains(t, r.Err, "without a record")
		must.NoError(t, h.DestroyTask(cfg.ID, false))
		must.False(t, task.started.Sandbox.Alive())
		must.False(t, d.host.runsc.Exists(task.ContainerID))
		running, err := shim.Running(task.dir)
		must.NoError(t, err)
		must.False(t, running)
	})
}

func TestOOMIsToldTruthfully(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "exec tail /dev/zero"), func(c *drivers.TaskConfig) {
		c.Resources.NomadResources.Memory.MemoryMB = 64
		c.Resources.LinuxResources.MemoryLimitBytes = 64 << 20
	})
	startTask(t, h, cfg)
	r := wait(t, h, cfg.ID)
	must.Eq(t, 137, r.ExitCode)
	must.True(t, r.OOMKilled)
}
