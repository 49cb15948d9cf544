package shim

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountOverlay gives the calling thread a mount namespace of its own and
// mounts o there. A nil o does nothing.
func mountOverlay(o *Overlay) error {
	if o == nil {
		return nil
	}
	for _, p := range []string{o.Lower, o.Upper, o.Work} {
		// overlayfs separates options and layers with these.
		if strings.ContainsAny(p, ",:\\") {
			return fmt.Errorf("mount overlay: path %q contains a comma, colon or backslash", p)
		}
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	opts := "lowerdir=" + o.Lower + ",upperdir=" + o.Upper + ",workdir=" + o.Work
	if err := unix.Mount("overlay", o.Target, "overlay", 0, opts); err != nil {
		return fmt.Errorf("mount overlay on %q: %w", o.Target, err)
	}
	return nil
}

// joinCPUSet moves every process of the sandbox to the cpuset that Nomad
// manages. It repeats until a pass finds nobody new: children made meanwhile
// inherit the cpuset of a parent that has been moved.
func joinCPUSet(scopeProcs, cpusetProcs string) error {
	if scopeProcs == "" || cpusetProcs == "" {
		return nil
	}
	moved := map[string]bool{}
	for {
		raw, err := os.ReadFile(scopeProcs)
		if err != nil {
			return fmt.Errorf("list sandbox processes: %w", err)
		}
		more := false
		for pid := range strings.FieldsSeq(string(raw)) {
			if moved[pid] {
				continue
			}
			more = true
			moved[pid] = true
			// A process that has exited meanwhile needs no cpuset.
			err := os.WriteFile(cpusetProcs, []byte(pid), 0)
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("move sandbox to its cpuset: %w", err)
			}
		}
		if !more {
			return nil
		}
	}
}

// killScope kills every process listed in the cgroup.procs file.
func killScope(procsFile string) {
	if procsFile == "" {
		return
	}
	raw, err := os.ReadFile(procsFile)
	if err != nil {
		return
	}
	for field := range bytes.FieldsSeq(raw) {
		if pid, err := strconv.Atoi(string(field)); err == nil && pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// readOOMKills returns the oom_kill counter of memory.events or
// memory.oom_control; both have the line "oom_kill N". A missing file counts
// as 0.
func readOOMKills(path string) uint64 {
	if path == "" {
		return 0
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			n, _ := strconv.ParseUint(v, 10, 64)
			return n
		}
	}
	return 0
}
