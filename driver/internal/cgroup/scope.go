package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultRoot is where every Linux distribution mounts cgroups.
const DefaultRoot = "/sys/fs/cgroup"

// Mode is the host's cgroup layout.
type Mode string

// The layouts. Hybrid hosts, with controllers in v1 and a unified tree beside
// them, are V1.
const (
	V1 Mode = "v1"
	V2 Mode = "v2"
)

// DetectMode tells the layout mounted at root: v2 if the file system there is
// cgroup2, v1 otherwise (the rule that Nomad and runsc follow).
func DetectMode(root string) (Mode, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return "", fmt.Errorf("detect cgroup mode of %q: %w", root, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return V2, nil
	}
	return V1, nil
}

// Scope is the cgroup of one task.
type Scope struct {
	mode Mode
	root string
	// path is the cgroup below the root (v2) or below every controller (v1).
	path string
	// cpuset is Nomad's cpuset directory for the task (v1 only).
	cpuset string
}

// Open returns the scope that Nomad's path stands for. nomadPath is
// LinuxResources.CpusetCgroupPath: with v2 the scope itself, with v1 the
// task's cpuset, from which the other controllers' paths follow. If it is
// empty, Nomad's default parent is assumed, as Nomad's own driver test kit
// expects. The scope must exist.
func Open(root, nomadPath, allocID, task string) (*Scope, error) {
	mode, err := DetectMode(root)
	if err != nil {
		return nil, err
	}
	s := &Scope{mode: mode, root: root}
	if mode == V2 {
		err = s.resolveV2(nomadPath, allocID, task)
	} else {
		err = s.resolveV1(nomadPath, allocID, task)
	}
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(s.file("memory", "cgroup.procs")); err != nil {
		return nil, fmt.Errorf("open task cgroup: %w", err)
	}
	return s, nil
}

func (s *Scope) resolveV2(nomadPath, allocID, task string) error {
	if nomadPath == "" {
		nomadPath = filepath.Join(s.root, "nomad.slice/share.slice", allocID+"."+task+".scope")
	}
	rel, err := below(s.root, nomadPath)
	s.path = rel
	return err
}

// resolveV1 takes …/cpuset/PARENT/share or …/cpuset/PARENT/reserve/SCOPE apart.
func (s *Scope) resolveV1(nomadPath, allocID, task string) error {
	scope := allocID + "." + task
	base := filepath.Join(s.root, "cpuset")
	if nomadPath == "" {
		nomadPath = filepath.Join(base, "nomad/share")
	}
	rel, err := below(base, nomadPath)
	if err != nil {
		return err
	}
	parent, ok := strings.CutSuffix(rel, "/share")
	if !ok {
		parent, ok = strings.CutSuffix(rel, "/reserve/"+scope)
	}
	if !ok {
		return fmt.Errorf("open task cgroup: %q is neither a share nor a reserve cpuset of %q", nomadPath, scope)
	}
	s.path = filepath.Join(parent, scope)
	s.cpuset = nomadPath
	return nil
}

func below(base, path string) (string, error) {
	rel, ok := strings.CutPrefix(filepath.Clean(path), base+"/")
	if !ok {
		return "", fmt.Errorf("open task cgroup: %q is not below %q", path, base)
	}
	return "/" + rel, nil
}

// file returns the path of an interface file; with v2 the controller does not
// matter.
func (s *Scope) file(controller, name string) string {
	return filepath.Join(s.Dir(controller), name)
}

// Mode returns the layout of the scope.
func (s *Scope) Mode() Mode { return s.mode }

// Dir returns the scope's directory for a controller; with v2 it is the same
// for all.
func (s *Scope) Dir(controller string) string {
	if s.mode == V2 {
		return s.root + s.path
	}
	return filepath.Join(s.root, controller) + s.path
}

// RuntimePath is the value of linux.cgroupsPath in the runtime spec.
func (s *Scope) RuntimePath() string { return s.path }

// OOMFile is the file that has the scope's oom_kill counter.
func (s *Scope) OOMFile() string {
	if s.mode == V2 {
		return s.file("memory", "memory.events")
	}
	return s.file("memory", "memory.oom_control")
}

// ProcsFile is the file that lists every process of the scope.
func (s *Scope) ProcsFile() string {
	return s.file("freezer", "cgroup.procs")
}

// CPUSetProcsFile is the file that moves a process to the task's cpuset, or ""
// where the scope itself does that (v2).
func (s *Scope) CPUSetProcsFile() string {
	if s.cpuset == "" {
		return ""
	}
	return filepath.Join(s.cpuset, "cgroup.procs")
}

// PIDs lists the processes of the scope. A scope that is gone has none.
func (s *Scope) PIDs() ([]int, error) {
	raw, err := os.ReadFile(s.ProcsFile())
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list task processes: %w", err)
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

// Kill ends every process of the scope and returns when there is none left, or
// with an error after the timeout.
func (s *Scope) Kill(timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		pids, err := s.PIDs()
		if err != nil || len(pids) == 0 {
			return err
		}
		if s.mode == V2 {
			_ = os.WriteFile(s.file("", "cgroup.kill"), []byte("1"), 0) // Linux 5.14 and later
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("kill task cgroup %q: %d processes left after %v", s.path, len(pids), timeout)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// ownV1 are the controllers for which neither Nomad makes nor removes the
// task's directory: runsc does, unless it was killed.
var ownV1 = []string{"cpuacct", "cpuset", "pids", "blkio", "devices", "hugetlb", "net_cls", "net_prio", "perf_event", "rdma", "systemd"}

// RemoveLeftovers removes the directories that runsc made for the scope beside
// Nomad's, if they still exist. Processes in them must be gone.
func (s *Scope) RemoveLeftovers() error {
	if s.mode == V2 {
		return nil
	}
	var errs []error
	for _, controller := range ownV1 {
		dir := s.Dir(controller)
		if controller != "cpuset" && sameDir(dir, s.Dir("cpu")) {
			continue // a controller mounted together with one of Nomad's
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove task cgroup: %w", err))
		}
	}
	return errors.Join(errs...)
}

func sameDir(a, b string) bool {
	ia, errA := os.Stat(a)
	ib, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(ia, ib)
}
