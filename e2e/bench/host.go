package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/bivouac-run/bivouac/internal/testimage"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/client/lib/cgroupslib"
	"golang.org/x/sys/unix"
)

// host is what a run makes on the machine: two directories, a cgroup parent
// and copies of the programs, which nobody replaces meanwhile and which tell
// our processes from others.
type host struct {
	// dir is on disk, as Nomad's data directory is; run is on a tmpfs, as
	// the driver's run_dir is.
	dir, run string
	// cgroup is the name of the parent of all task cgroups.
	cgroup                      string
	bivouac, shim, runsc, nomad string
}

// newHost prepares the machine. close undoes it, after an error too.
func newHost() (_ *host, err error) {
	h := &host{cgroup: fmt.Sprintf("bivouac-bench-%d", os.Getpid())}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.close())
		}
	}()
	// Sandboxes of runsc itself are ours to reap.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become subreaper: %w", err)
	}
	if h.dir, err = os.MkdirTemp("", "bivouac-bench-"); err != nil {
		return nil, err
	}
	if h.run, err = os.MkdirTemp("/run", "bvb-"); err != nil { // short: sockets live below it
		return nil, err
	}
	if err := h.copyPrograms(); err != nil {
		return nil, err
	}
	img, err := testimage.Busybox(nil)
	if err != nil {
		return nil, err
	}
	if err := testimage.Layout(h.imageDir(), img); err != nil {
		return nil, err
	}
	return h, h.initCgroups()
}

func (h *host) imageDir() string { return filepath.Join(h.dir, "image") }

// pluginConfig is the driver's configuration, with directories for a part of
// the benchmark of their own.
func (h *host) pluginConfig(part string) map[string]any {
	return map[string]any{
		"runsc_path": h.runsc, "shim_path": h.shim,
		"state_dir": filepath.Join(h.dir, part), "run_dir": filepath.Join(h.run, part),
		"platform": "systrap", "start_timeout": "60s",
		"image_dirs": []string{h.dir},
	}
}

func (h *host) copyPrograms() error {
	if err := os.Mkdir(filepath.Join(h.dir, "plugins"), 0o755); err != nil {
		return err
	}
	for _, p := range []struct {
		env, fallback, to string
		at                *string
	}{
		// Nomad names a plugin by its file.
		{"BIVOUAC_BIN", "build/bin/bivouac", "plugins/gvisor", &h.bivouac},
		{"BIVOUAC_SHIM", "build/bin/bivouac-shim", "bivouac-shim", &h.shim},
		{"BIVOUAC_RUNSC", "build/tools/runsc", "runsc", &h.runsc},
		{"BIVOUAC_NOMAD", "build/tools/nomad", "nomad", &h.nomad},
	} {
		from := os.Getenv(p.env)
		if from == "" {
			from = p.fallback
		}
		*p.at = filepath.Join(h.dir, p.to)
		if err := copyProgram(from, *p.at); err != nil {
			return fmt.Errorf("copy program: %w (make build tools, or set %s)", err, p.env)
		}
	}
	return nil
}

func copyProgram(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}

// initCgroups makes the tree that a Nomad client makes, by Nomad's own code,
// under a parent of our own.
func (h *host) initCgroups() error {
	if cgroupslib.GetMode() == cgroupslib.CG2 {
		h.cgroup += ".slice"
	}
	cgroupslib.NomadCgroupParent = h.cgroup
	cores, err := onlineCores()
	if err != nil {
		return err
	}
	if err := cgroupslib.Init(hclog.NewNullLogger(), cores); err != nil {
		return err
	}
	share := cgroupslib.LinuxResourcesPath("", "", false)
	if cgroupslib.GetMode() == cgroupslib.CG2 {
		share = filepath.Dir(share)
	}
	return os.WriteFile(filepath.Join(share, "cpuset.cpus"), []byte(cores), 0o644)
}

func onlineCores() (string, error) {
	raw, err := os.ReadFile("/sys/devices/system/cpu/online")
	return strings.TrimSpace(string(raw)), err
}

// close ends every process of the run and removes all that it made.
func (h *host) close() error {
	var errs []error
	errs = append(errs, h.killProcesses(), h.unmount())
	errs = append(errs, removeCgroups(h.cgroup))
	for _, dir := range []string{h.run, h.dir} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// killProcesses ends every process that runs one of our copies and waits for
// it to be gone.
func (h *host) killProcesses() error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		pids := h.processes()
		reapOrphans()
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v do not end", pids)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// processes lists those that run one of our copies, zombies aside.
func (h *host) processes() []int {
	var ours []os.FileInfo
	for _, path := range []string{h.bivouac, h.shim, h.runsc, h.nomad} {
		if info, err := os.Stat(path); err == nil {
			ours = append(ours, info)
		}
	}
	var pids []int
	for _, pid := range allPIDs() {
		exe, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			continue // gone, a zombie or a kernel thread
		}
		if slices.ContainsFunc(ours, func(info os.FileInfo) bool { return os.SameFile(info, exe) }) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// unmount undoes what an agent that was killed left mounted, and runsc's empty
// network namespace, which it keeps for the next sandbox.
func (h *host) unmount() error {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	for _, line := range slices.Backward(strings.Split(string(raw), "\n")) {
		f := strings.Fields(line)
		const at = 4 // the mount point, proc_pid_mountinfo(5)
		if len(f) <= at {
			continue
		}
		if below(h.dir, f[at]) || below(h.run, f[at]) {
			errs = append(errs, unix.Unmount(f[4], unix.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
}

func below(dir, path string) bool { return dir != "" && strings.HasPrefix(path, dir+"/") }

// removeCgroups removes the parent's tree under every controller.
func removeCgroups(parent string) error {
	roots, err := filepath.Glob("/sys/fs/cgroup/*/" + parent)
	if err != nil {
		return err
	}
	var errs []error
	for _, root := range append(roots, "/sys/fs/cgroup/"+parent) {
		var dirs []string
		_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // what is not there needs no removal
		})
		for _, dir := range slices.Backward(dirs) {
			errs = append(errs, removeCgroup(dir))
		}
	}
	return errors.Join(errs...)
}

// removeCgroup waits a little for processes that have ended to leave.
func removeCgroup(dir string) error {
	var err error
	for range 200 {
		if err = os.Remove(dir); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// reapOrphans reaps children that nobody waits for: the gofers and stubs of
// sandboxes whose runsc has ended. No os/exec command may be under way.
func reapOrphans() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
	}
}

// cleanup is a context for undoing things after the run was interrupted.
func cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	const limit = 30 * time.Second
	return context.WithTimeout(context.WithoutCancel(ctx), limit)
}
