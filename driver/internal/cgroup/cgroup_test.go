package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// tree makes files below a directory that stands for /sys/fs/cgroup. It is not
// a cgroup2 mount, so Open takes it for v1; v2 scopes are made by hand.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func content(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func v1Tree(t *testing.T) string {
	return tree(t, map[string]string{
		"memory/nomad/a.t/cgroup.procs":                "",
		"memory/nomad/a.t/memory.limit_in_bytes":       "",
		"memory/nomad/a.t/memory.soft_limit_in_bytes":  "",
		"memory/nomad/a.t/memory.memsw.limit_in_bytes": "",
		"memory/nomad/a.t/memory.swappiness":           "",
		"memory/nomad/a.t/memory.usage_in_bytes":       "5000",
		"memory/nomad/a.t/memory.max_usage_in_bytes":   "6000",
		"memory/nomad/a.t/memory.stat":                 "cache 1\ntotal_cache 400\ntotal_rss 30\ntotal_shmem 300\ntotal_mapped_file 7\ntotal_swap 2\n",
		"cpu/nomad/a.t/cpu.shares":                     "",
		"cpu/nomad/a.t/cpu.cfs_quota_us":               "",
		"cpu/nomad/a.t/cpu.cfs_period_us":              "",
		"cpu/nomad/a.t/cpu.stat":                       "nr_periods 5\nnr_throttled 2\nthrottled_time 900\n",
		"cpuacct/nomad/a.t/cpuacct.usage":              "123456",
		"cpuacct/nomad/a.t/cpuacct.stat":               "user 3\nsystem 4\n",
		"freezer/nomad/a.t/cgroup.procs":               "11\n12\n",
		"cpuset/nomad/share/cgroup.procs":              "",
		"cpuset/nomad/reserve/a.t/cpuset.cpus":         "",
	})
}

func TestOpenFollowsNomadsPaths(t *testing.T) {
	root := v1Tree(t)
	for name, c := range map[string]struct{ path, cpuset, err string }{
		"share":         {root + "/cpuset/nomad/share", root + "/cpuset/nomad/share/cgroup.procs", ""},
		"reserve":       {root + "/cpuset/nomad/reserve/a.t", root + "/cpuset/nomad/reserve/a.t/cgroup.procs", ""},
		"default":       {"", root + "/cpuset/nomad/share/cgroup.procs", ""},
		"other task's":  {root + "/cpuset/nomad/reserve/b.t", "", "neither"},
		"elsewhere":     {"/etc", "", "not below"},
		"above":         {root + "/cpuset/../../etc", "", "not below"},
		"other parent":  {root + "/cpuset/other/share", "", "no such file"},
		"not partition": {root + "/cpuset/nomad/a.t", "", "neither"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(root, c.path, "a", "t")
			if c.err != "" {
				if err == nil || !contains(err.Error(), c.err) {
					t.Fatalf("error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if s.RuntimePath() != "/nomad/a.t" || s.CPUSetProcsFile() != c.cpuset || s.Mode() != V1 {
				t.Fatalf("scope is %+v", s)
			}
			if s.OOMFile() != root+"/memory/nomad/a.t/memory.oom_control" {
				t.Fatalf("OOM file is %q", s.OOMFile())
			}
		})
	}
}

func contains(s, part string) bool {
	for i := range len(s) - len(part) + 1 {
		if s[i:i+len(part)] == part {
			return true
		}
	}
	return false
}

func TestApplyV1(t *testing.T) {
	root := v1Tree(t)
	s, err := Open(root, root+"/cpuset/nomad/reserve/a.t", "a", "t")
	if err != nil {
		t.Fatal(err)
	}
	err = s.Apply(Limits{CPUShares: 1 << 40, CPUQuota: 5000, CPUPeriod: 10000, MemoryBytes: 1 << 20, MemoryReservationBytes: 1 << 19, PidsMax: 9, CPUs: "0-1"})
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"cpu/nomad/a.t/cpu.shares":                     "262144",
		"cpuset/nomad/reserve/a.t/cpuset.cpus":         "0-1",
		"cpu/nomad/a.t/cpu.cfs_quota_us":               "5000",
		"cpu/nomad/a.t/cpu.cfs_period_us":              "10000",
		"memory/nomad/a.t/memory.limit_in_bytes":       "1048576",
		"memory/nomad/a.t/memory.memsw.limit_in_bytes": "1048576",
		"memory/nomad/a.t/memory.soft_limit_in_bytes":  "524288",
	} {
		if got := content(t, filepath.Join(root, file)); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
}

func TestApplyStopsAtARefusedLimit(t *testing.T) {
	root := v1Tree(t)
	s, err := Open(root, "", "a", "t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(root, "cpu")); err != nil {
		t.Fatal(err)
	}
	if err := s.Apply(Limits{CPUShares: 10}); err == nil {
		t.Fatal("a task would start without its limits")
	}
}

func TestApplyV2(t *testing.T) {
	root := tree(t, map[string]string{"s/cpu.weight": "", "s/cpu.max": "", "s/memory.max": "", "s/memory.low": "", "s/pids.max": "", "s/memory.swap.max": "", "s/cpuset.cpus": ""})
	s := &Scope{mode: V2, root: root, path: "/s"}
	err := s.Apply(Limits{CPUShares: 1024, CPUQuota: 5000, CPUPeriod: 10000, MemoryBytes: 1 << 20, MemoryReservationBytes: 1 << 19, PidsMax: 9, CPUs: "3"})
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"cpuset.cpus": "3", "cpu.weight": "100", "cpu.max": "5000 10000", "memory.max": "1048576", "memory.low": "524288",
		"memory.swap.max": "0", "pids.max": "9",
	} {
		if got := content(t, filepath.Join(root, "s", file)); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
}

func TestSharesToWeight(t *testing.T) {
	// The three points that define the curve, and what lies between.
	for shares, want := range map[uint64]uint64{2: 1, 1024: 100, 262144: 10000} {
		if got := sharesToWeight(shares); got != want {
			t.Errorf("%d: %d, want %d", shares, got, want)
		}
	}
	last := uint64(0)
	for shares := uint64(2); shares <= 262144; shares *= 2 {
		w := sharesToWeight(shares)
		if w < last || w < 1 || w > 10000 {
			t.Errorf("%d: %d after %d", shares, w, last)
		}
		last = w
	}
}

func TestUsageV1(t *testing.T) {
	s, err := Open(v1Tree(t), "", "a", "t")
	if err != nil {
		t.Fatal(err)
	}
	u, err := s.Usage()
	if err != nil {
		t.Fatal(err)
	}
	want := Usage{
		CPUNanos: 123456, UserNanos: 3e7, SystemNanos: 4e7, ThrottledPeriods: 2, ThrottledNanos: 900,
		MemoryBytes: 5000, MemoryPeakBytes: 6000, CacheBytes: 400, MappedFileBytes: 7, ShmemBytes: 300, AnonBytes: 30, SwapBytes: 2,
		Processes: 2,
	}
	if *u != want {
		t.Fatalf("usage is %+v, want %+v", *u, want)
	}
}

func TestUsageV2(t *testing.T) {
	root := tree(t, map[string]string{
		"s/cpu.stat":       "usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_throttled 1\nthrottled_usec 2\n",
		"s/memory.current": "5000\n", "s/memory.peak": "6000\n",
		"s/memory.stat":  "anon 30\nfile 400\nshmem 300\nfile_mapped 7\n",
		"s/cgroup.procs": "1\n",
	})
	u, err := (&Scope{mode: V2, root: root, path: "/s"}).Usage()
	if err != nil {
		t.Fatal(err)
	}
	want := Usage{
		CPUNanos: 10000, UserNanos: 6000, SystemNanos: 4000, ThrottledPeriods: 1, ThrottledNanos: 2000,
		MemoryBytes: 5000, MemoryPeakBytes: 6000, CacheBytes: 400, MappedFileBytes: 7, ShmemBytes: 300, AnonBytes: 30, Processes: 1,
	}
	if *u != want {
		t.Fatalf("usage is %+v, want %+v", *u, want)
	}
}

func TestScopeThatIsGone(t *testing.T) {
	s := &Scope{mode: V2, root: t.TempDir(), path: "/s"}
	if _, err := s.Usage(); !errors.Is(err, ErrGone) {
		t.Errorf("usage: %v", err)
	}
	if pids, err := s.PIDs(); err != nil || len(pids) > 0 {
		t.Errorf("pids: %v, %v", pids, err)
	}
	if err := s.Kill(time.Second); err != nil {
		t.Errorf("kill: %v", err)
	}
	if err := s.RemoveLeftovers(); err != nil {
		t.Errorf("leftovers: %v", err)
	}
}

func TestRemoveLeftoversKeepsNomadsOwn(t *testing.T) {
	root := v1Tree(t)
	for _, c := range []string{"pids", "blkio"} {
		if err := os.MkdirAll(filepath.Join(root, c, "nomad/a.t"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(root, "cpuacct")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("cpu", filepath.Join(root, "cpuacct")); err != nil { // mounted together
		t.Fatal(err)
	}
	s, err := Open(root, "", "a", "t")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveLeftovers(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"pids": false, "blkio": false, "cpu": true, "memory": true, "freezer": true} {
		_, err := os.Stat(filepath.Join(root, name, "nomad/a.t"))
		if (err == nil) != want {
			t.Errorf("%s: there is %v, want %v", name, err == nil, want)
		}
	}
}
