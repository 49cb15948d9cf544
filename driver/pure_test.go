package driver

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/bundle"
	"github.com/bivouac-run/bivouac/driver/internal/cgroup"
	"github.com/bivouac-run/bivouac/driver/internal/image"
	"github.com/hashicorp/nomad/nomad/structs"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"
)

func TestLimitsOf(t *testing.T) {
	const mib = 1 << 20
	h := &host{cfg: PluginConfig{PidsLimit: 100}, cores: 4}
	res := func(shares, memory, memoryMax int64, percent float64) *drivers.Resources {
		return &drivers.Resources{
			NomadResources: &structs.AllocatedTaskResources{Memory: structs.AllocatedMemoryResources{MemoryMB: memory, MemoryMaxMB: memoryMax}},
			LinuxResources: &drivers.LinuxResources{CPUShares: shares, MemoryLimitBytes: max(memory, memoryMax) * mib, PercentTicks: percent},
		}
	}
	for name, c := range map[string]struct {
		res  *drivers.Resources
		opts TaskConfig
		want bundle.Limits
	}{
		"none":       {nil, TaskConfig{}, bundle.Limits{PidsMax: 100}},
		"plain":      {res(500, 64, 0, 0.1), TaskConfig{}, bundle.Limits{CPUShares: 500, MemoryBytes: 64 * mib, PidsMax: 100}},
		"memory max": {res(500, 64, 128, 0.1), TaskConfig{}, bundle.Limits{CPUShares: 500, MemoryBytes: 128 * mib, MemoryReservationBytes: 64 * mib, PidsMax: 100}},
		"hard cpu":   {res(500, 64, 0, 0.125), TaskConfig{CPUHardLimit: true, CPUCFSPeriod: 100000}, bundle.Limits{CPUShares: 500, CPUQuota: 50000, CPUPeriod: 100000, MemoryBytes: 64 * mib, PidsMax: 100}},
		"tiny quota": {res(1, 64, 0, 0.000001), TaskConfig{CPUHardLimit: true, CPUCFSPeriod: 100000}, bundle.Limits{CPUShares: 2, CPUQuota: 1000, CPUPeriod: 100000, MemoryBytes: 64 * mib, PidsMax: 100}},
		"cores":      {cores("2-3"), TaskConfig{}, bundle.Limits{CPUs: "2-3", PidsMax: 100}},
		"huge":       {res(1<<30, 64, 0, 0), TaskConfig{PidsLimit: 7}, bundle.Limits{CPUShares: 262144, MemoryBytes: 64 * mib, PidsMax: 7}},
	} {
		t.Run(name, func(t *testing.T) {
			must.Eq(t, c.want, limitsOf(c.res, &c.opts, h))
		})
	}
}

func cores(set string) *drivers.Resources {
	return &drivers.Resources{LinuxResources: &drivers.LinuxResources{CpusetCpus: set}}
}

func TestParseSignal(t *testing.T) {
	for in, want := range map[string]unix.Signal{"SIGTERM": 15, "term": 15, "9": 9, "sigusr1": 10, "HUP": 1, "0": 0, "65": 0, "": 0, "SIGNOPE": 0, "-1": 0} {
		got, err := parseSignal(in)
		must.Eq(t, want, got)
		must.Eq(t, want == 0, err != nil)
	}
	sig, err := stopSignal("", "SIGQUIT")
	must.NoError(t, err)
	must.Eq(t, unix.SIGQUIT, sig)
	sig, err = stopSignal("", "nonsense")
	must.NoError(t, err)
	must.Eq(t, unix.SIGTERM, sig)
	_, err = stopSignal("nonsense", "")
	must.Error(t, err)
}

func TestContainerIDOf(t *testing.T) {
	a := containerIDOf("alloc", "web", "alloc/web/1")
	must.Eq(t, a, containerIDOf("alloc", "web", "alloc/web/1"))
	must.NotEq(t, a, containerIDOf("alloc", "web", "alloc/web/2"))
	must.StrHasPrefix(t, containerPrefix("alloc", "web"), a)
	must.StrHasPrefix(t, containerPrefix("alloc", "web"), containerIDOf("alloc", "web", "alloc/web/2"))
	must.NotEq(t, containerPrefix("alloc", "web"), containerPrefix("other", "web"))
	must.NotEq(t, containerPrefix("alloc", "we:b"), containerPrefix("alloc", "we,b"))
	weird := containerIDOf("x", "a/../b c\x00é"+strings.Repeat("y", 300), "x")
	must.RegexMatch(t, regexpContainerID, weird)
	must.Less(t, 48, len(weird))
}

func TestKeyedMutexSerialisesOneKey(t *testing.T) {
	var k keyedMutex
	var wg sync.WaitGroup
	counts := map[string]*int{"a": new(int), "b": new(int)}
	for range 200 {
		for key, n := range counts {
			wg.Go(func() {
				defer k.lock(key)()
				*n++ // a race without the lock
			})
		}
	}
	wg.Wait()
	must.Eq(t, 200, *counts["a"])
	must.Eq(t, 200, *counts["b"])
	must.MapEmpty(t, k.keys)
}

func TestHostResolvConf(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		must.NoError(t, os.WriteFile(path, []byte(content), 0o644))
		return path
	}
	real := write("real", "nameserver 10.0.0.2\n")
	stub := write("stub", "nameserver 127.0.0.53\noptions edns0\n")
	mixed := write("mixed", "nameserver 127.0.0.53\nnameserver 10.0.0.3\n")
	for name, c := range map[string]struct{ path, behind, want string }{
		"plain":        {real, "/none", "10.0.0.2"},
		"behind stub":  {stub, real, "10.0.0.2"},
		"only a stub":  {stub, "/none", "127.0.0.53"},
		"stub and one": {mixed, real, "10.0.0.3"},
		"none at all":  {"/none", "/none", ""},
	} {
		t.Run(name, func(t *testing.T) {
			raw, err := hostResolvConf(c.path, c.behind)
			must.NoError(t, err)
			must.StrContains(t, string(raw), c.want)
		})
	}
}

func TestMeterRates(t *testing.T) {
	m := meter{mhzPerCore: 2000}
	at := time.Unix(100, 0)
	first := m.read(&cgroup.Usage{CPUNanos: 1e9}, at)
	must.Zero(t, first.ResourceUsage.CpuStats.Percent)
	second := m.read(&cgroup.Usage{CPUNanos: 1e9 + 5e8, UserNanos: 25e7, ShmemBytes: 7, AnonBytes: 3, CacheBytes: 9}, at.Add(time.Second))
	must.Eq(t, 50, second.ResourceUsage.CpuStats.Percent)
	must.Eq(t, 25, second.ResourceUsage.CpuStats.UserMode)
	must.Eq(t, 1000, second.ResourceUsage.CpuStats.TotalTicks)
	must.Eq(t, 10, second.ResourceUsage.MemoryStats.RSS)
	must.Eq(t, 2, second.ResourceUsage.MemoryStats.Cache)
	third := m.read(&cgroup.Usage{}, at.Add(2*time.Second)) // a counter that restarted
	must.Zero(t, third.ResourceUsage.CpuStats.Percent)
}

func TestPullProgressIsSparing(t *testing.T) {
	var events []string
	p := newPullProgress("x", func(s string) { events = append(events, s) })
	p.report(image.Progress{Phase: image.PhaseResolving})
	for i := range int64(50) {
		p.report(image.Progress{Phase: image.PhasePulling, Layer: 1, Layers: 2, Bytes: i, TotalBytes: 100})
	}
	must.SliceLen(t, 1, events)
	p.last = p.last.Add(-time.Hour)
	p.report(image.Progress{Phase: image.PhasePulling, Layer: 2, Layers: 2, Bytes: 90, TotalBytes: 100})
	must.SliceLen(t, 2, events)
	must.StrContains(t, events[1], "layer 2 of 2, 90 %")
}

func TestSandboxErrorNamesTheMistake(t *testing.T) {
	for msg, want := range map[string]string{
		`x: error finding executable "y" in PATH [/bin]: no such file or directory`: "not in the image",
		`x: failed to load /etc/passwd: permission denied`:                          "not executable",
		`x: failed to load /no: no such file or directory`:                          "not in the image",
		`something else`: "start sandbox: something else",
	} {
		must.ErrorContains(t, sandboxError(msg), want)
		must.False(t, recoverable(sandboxError(msg)))
	}
}
