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

// mountPrivately gives the calling thread a mount namespace of its own and
// mounts there what the sandbox needs. The mounts end with the namespace.
func mountPrivately(cfg *Config) error {
	if len(cfg.Binds) == 0 && cfg.Overlay == nil {
		return nil
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	// Mounts that Nomad makes later, a secrets directory say, still arrive;
	// those made here do not leave.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// A directory can be bound only by a descriptor of this namespace.
	alloc, err := openAlloc(cfg.AllocDir)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(alloc) }()
	for _, b := range cfg.Binds {
		if err := bind(alloc, b); err != nil {
			return err
		}
	}
	return mountOverlay(cfg.Overlay)
}

// bind mounts the directory itself, by descriptor: its name may mean something
// else a moment later.
func bind(alloc int, b Bind) error {
	fd, err := openBeneath(alloc, b.Path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("open %q of the allocation: %w", b.Path, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", fd), b.Target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %q of the allocation: %w", b.Path, err)
	}
	return nil
}

// openBeneath opens path below the directory dir; no component may be a link
// (openat2(2), Linux 5.6).
func openBeneath(dir int, path string, flags uint64) (int, error) {
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ELOOP) {
		return -1, fmt.Errorf("a link was put in its place: %w", err)
	}
	return fd, err
}

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
