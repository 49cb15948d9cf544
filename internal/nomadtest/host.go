package nomadtest

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// process is one of the host's.
type process struct {
	pid  int
	args []string
}

func (p process) String() string { return fmt.Sprintf("process %d: %.200q", p.pid, p.args) }

// processes lists those that have the token in their command line or their
// environment.
func processes(token string) []process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if len(cmdline) == 0 {
			continue // a kernel thread or a zombie
		}
		environ, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if strings.Contains(string(cmdline), token) || strings.Contains(string(environ), "BVT_TOKEN="+token) {
			args := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
			found = append(found, process{pid: pid, args: args})
		}
	}
	return found
}

// Leftovers lists what allocations have left on the host: meant for a moment
// in which none exists. The agent and its driver, if they run, do not count,
// nor does runsc's one mount, an empty network namespace that all sandboxes
// without a network share. After KillAgent, Nomad's log monitors do not either:
// it loses those that it had started and not yet noted (v1.11.3).
func (a *Agent) Leftovers() []string {
	var left []string
	drivers := a.DriverPIDs()
	for _, p := range processes(a.l.token) {
		switch {
		case p.pid == a.process().pid(), p.pid == a.server.pid(), slices.Contains(drivers, p.pid):
		case a.crashed.Load() && len(p.args) == 2 && p.args[1] == "logmon":
		default:
			left = append(left, p.String())
		}
	}
	for _, m := range a.l.mounts() {
		if m != a.l.nullNetNS() {
			left = append(left, "mount "+m)
		}
	}
	left = append(left, a.cgroupsLeft()...)
	for _, id := range a.seen() {
		if _, err := os.Lstat("/var/run/netns/" + id); err == nil {
			left = append(left, "network namespace "+id)
		}
	}
	for _, dir := range []string{a.l.run + "/tasks", a.l.state() + "/images/v1/tmp", a.l.data() + "/alloc"} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			left = append(left, filepath.Join(dir, e.Name()))
		}
	}
	for _, dir := range []string{a.l.data(), a.l.run, a.l.state() + "/images/v1/refs"} {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && (d.Type()&fs.ModeNamedPipe != 0 || strings.HasSuffix(path, ".tmp")) {
				left = append(left, path)
			}
			return nil
		})
	}
	return append(left, a.runscLeft()...)
}

// Sandbox names the sandbox process of a task for good: its pid and when it
// started.
func (a *Agent) Sandbox(alloc *api.Allocation) (string, error) {
	for _, p := range processes(a.l.token) {
		if p.args[0] != "runsc-sandbox" {
			continue
		}
		cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.pid))
		if err != nil || !strings.Contains(string(cgroups), alloc.ID) {
			continue
		}
		started, err := startTime(p.pid)
		return fmt.Sprintf("pid %d, started at %s", p.pid, started), err
	}
	return "", fmt.Errorf("allocation %s has no sandbox", alloc.ID)
}

// DriverFDs is how many files the plugin process has open.
func (a *Agent) DriverFDs() (int, error) {
	pids := a.DriverPIDs()
	if len(pids) != 1 {
		return 0, fmt.Errorf("%d plugin processes: %v", len(pids), pids)
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pids[0]))
	return len(entries), err
}

// BridgePorts lists the interfaces on the agent's bridge.
func (a *Agent) BridgePorts() []string {
	entries, _ := os.ReadDir("/sys/class/net/" + a.l.bridge() + "/brif")
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// runscLeft lists runsc's records of sandboxes.
func (a *Agent) runscLeft() []string {
	entries, _ := os.ReadDir(a.l.run + "/runsc")
	var left []string
	for _, e := range entries {
		if path := filepath.Join(a.l.run, "runsc", e.Name()); path != a.l.nullNetNS() {
			left = append(left, path)
		}
	}
	return left
}

// cgroupsLeft lists the cgroups of the allocations seen.
func (a *Agent) cgroupsLeft() []string {
	var left []string
	for _, dir := range cgroupsOf(a.seen()) {
		procs, _ := os.ReadFile(dir + "/cgroup.procs")
		left = append(left, fmt.Sprintf("cgroup %s with processes %v", dir, strings.Fields(string(procs))))
	}
	return left
}

// cgroupsOf finds the cgroups named after allocations, children first.
func cgroupsOf(allocs []string) []string {
	var found []string
	_ = filepath.WalkDir(cgroupRoot, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && len(d.Name()) > 36 && slices.Contains(allocs, d.Name()[:36]) {
			found = append(found, path)
		}
		return nil
	})
	slices.Reverse(found)
	return found
}

func (l layout) nullNetNS() string { return filepath.Join(l.run, "runsc", "null-netns") }

// mounts lists the mount points below the agent's directories, innermost
// first.
func (l layout) mounts() []string {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil
	}
	defer f.Close()
	var found []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) > 1 && strings.Contains(fields[1], "/"+l.token) {
			found = append(found, fields[1])
		}
	}
	slices.Reverse(found)
	return found
}

// wipe ends and removes all that carries the token, and what is known of the
// allocations. It is the end of every agent, however its test went.
func (l layout) wipe(allocs []string) error {
	err := poll(10*time.Second, func() error {
		left := processes(l.token)
		for _, p := range left {
			_ = syscall.Kill(p.pid, syscall.SIGKILL)
		}
		if len(left) > 0 {
			return fmt.Errorf("still there: %v", left)
		}
		return nil
	})
	errs := []error{err}
	for _, m := range l.mounts() {
		errs = append(errs, unix.Unmount(m, unix.MNT_DETACH))
	}
	for _, dir := range cgroupsOf(allocs) {
		errs = append(errs, os.Remove(dir))
	}
	for _, id := range allocs {
		path := "/var/run/netns/" + id
		if _, err := os.Lstat(path); err == nil {
			_ = unix.Unmount(path, unix.MNT_DETACH)
			errs = append(errs, os.Remove(path))
		}
	}
	if _, err := os.Stat("/sys/class/net/" + l.bridge()); err == nil {
		if out, err := exec.Command("ip", "link", "delete", l.bridge()).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("delete bridge %q: %w: %s", l.bridge(), err, out))
		}
	}
	errs = append(errs, os.RemoveAll(l.run), os.RemoveAll(l.dir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up after agent: %w", err)
	}
	return nil
}

// writeOwner notes whose agent this is.
func writeOwner(l layout) error {
	id, err := startTime(os.Getpid())
	if err != nil {
		return err
	}
	return os.WriteFile(l.owner(), fmt.Appendf(nil, "%d %s", os.Getpid(), id), 0o600)
}

// wipeAbandoned removes agents whose test process is gone: killed, or ended by
// go test's time limit.
func wipeAbandoned() {
	dirs, _ := filepath.Glob("/tmp/bvt-*")
	for _, dir := range dirs {
		l := layoutOf(dir)
		raw, err := os.ReadFile(l.owner())
		if err != nil {
			continue // being made, or being removed
		}
		pid, started, _ := strings.Cut(string(raw), " ")
		n, _ := strconv.Atoi(pid)
		if now, err := startTime(n); err == nil && now == started {
			continue
		}
		allocs, _ := os.ReadDir(l.data() + "/alloc")
		var ids []string
		for _, e := range allocs {
			ids = append(ids, e.Name())
		}
		if err := l.wipe(ids); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
}

// startTime is when a process started, in ticks since boot: with its pid it
// names the process (proc(5), /proc/pid/stat, field 22).
func startTime(pid int) (string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	const field, afterName = 22, 3
	if len(fields) <= field-afterName {
		return "", fmt.Errorf("read start time of %d: %q", pid, raw)
	}
	return fields[field-afterName], nil
}
