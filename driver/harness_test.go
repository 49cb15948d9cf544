package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/internal/testimage"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/client/lib/cgroupslib"
	"github.com/hashicorp/nomad/helper/testlog"
	"github.com/hashicorp/nomad/helper/uuid"
	"github.com/hashicorp/nomad/nomad/structs"
	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/drivers"
	dtestutil "github.com/hashicorp/nomad/plugins/drivers/testutils"
	"github.com/shoenig/test/must"
)

// node is what the tests of this package share of the host: programs, and an
// image with a shell.
type node struct {
	runsc, shim string
	stateDir    string
	imageDir    string
}

// needNode returns the node, or skips; in CI a skip is a failure.
func needNode(t *testing.T) *node {
	t.Helper()
	n := &node{runsc: os.Getenv("BIVOUAC_RUNSC"), shim: os.Getenv("BIVOUAC_SHIM")}
	lack := ""
	switch {
	case os.Geteuid() != 0:
		lack = "root"
	case n.runsc == "":
		lack = "BIVOUAC_RUNSC"
	case n.shim == "":
		lack = "BIVOUAC_SHIM"
	}
	if lack != "" {
		if os.Getenv("BIVOUAC_CI") == "1" {
			t.Fatal("needs " + lack)
		}
		t.Skip("needs " + lack + " (make test sets it)")
	}
	n.stateDir = t.TempDir()
	n.imageDir = t.TempDir()
	return n
}

// image writes a busybox image and returns its reference.
func (n *node) image(t *testing.T, name string, change func(*v1.Config)) string {
	t.Helper()
	img, err := testimage.Busybox(change)
	must.NoError(t, err)
	dir := filepath.Join(n.imageDir, name)
	must.NoError(t, testimage.Layout(dir, img))
	return "oci:" + dir
}

// config is a plugin configuration with a run directory of its own.
func (n *node) config(t *testing.T) *PluginConfig {
	t.Helper()
	runDir, err := os.MkdirTemp("/run", "bvt-")
	must.NoError(t, err)
	t.Cleanup(func() {
		unmountNullNetNS(t, runDir)
		must.NoError(t, os.RemoveAll(runDir))
	})
	return &PluginConfig{
		RunscPath: n.runsc, ShimPath: n.shim, StateDir: n.stateDir, RunDir: runDir,
		Platform: defaultPlatform, ImageDirs: []string{n.imageDir}, StartTimeout: defaultStartTimeout,
	}
}

// newDriver returns a driver with cfg; the test's end closes it.
func newDriver(t *testing.T, cfg *PluginConfig) *Driver {
	t.Helper()
	d := New(testlog.HCLogger(t))
	var raw []byte
	must.NoError(t, base.MsgPackEncode(&raw, cfg))
	must.NoError(t, d.SetConfig(&base.Config{PluginConfig: raw}))
	t.Cleanup(func() { must.NoError(t, d.Close()) })
	return d
}

// harness wraps a new driver in Nomad's test kit, which talks to it over gRPC.
// It serves one task: the kit's MkAllocDir ends it with that. (The kit's Kill
// races with it inside go-plugin.)
func (n *node) harness(t *testing.T) *dtestutil.DriverHarness {
	t.Helper()
	return harnessOf(t, newDriver(t, n.config(t)))
}

func harnessOf(t *testing.T, d *Driver) *dtestutil.DriverHarness {
	t.Helper()
	return dtestutil.NewDriverHarness(t, d)
}

func testLogger(t *testing.T) hclog.Logger { return testlog.HCLogger(t) }

// regexpContainerID is what runsc accepts (runsc/container, idRegex).
var regexpContainerID = regexp.MustCompile(`^[\w+\-.]+$`)

// driverOf is the driver behind a harness.
func driverOf(h *dtestutil.DriverHarness) *Driver { return h.Impl().(*Driver) }

// notFound says whether err, which may have come over gRPC, is
// drivers.ErrTaskNotFound.
func notFound(err error) bool {
	return err != nil && strings.Contains(err.Error(), drivers.ErrTaskNotFound.Error())
}

// taskConfig makes what Nomad's client would hand over for a task, and the
// directories and cgroups it would have made.
func taskConfig(t *testing.T, h *dtestutil.DriverHarness, opts *TaskConfig, change func(*drivers.TaskConfig)) *drivers.TaskConfig {
	t.Helper()
	return taskConfigWithLogs(t, h, opts, change, true)
}

// badTaskConfig is taskConfig for a task that will not start: the kit's log
// collector would wait for seconds for a writer.
func badTaskConfig(t *testing.T, h *dtestutil.DriverHarness, opts *TaskConfig, change func(*drivers.TaskConfig)) *drivers.TaskConfig {
	t.Helper()
	return taskConfigWithLogs(t, h, opts, change, false)
}

func taskConfigWithLogs(t *testing.T, h *dtestutil.DriverHarness, opts *TaskConfig, change func(*drivers.TaskConfig), logs bool) *drivers.TaskConfig {
	t.Helper()
	if opts.ImagePullTimeout == "" {
		opts.ImagePullTimeout = "1m"
	}
	allocID := uuid.Generate()
	cfg := &drivers.TaskConfig{
		ID:         allocID + "/task/" + uuid.Short(),
		AllocID:    allocID,
		Name:       "task",
		StdoutPath: os.DevNull,
		StderrPath: os.DevNull,
		Resources: &drivers.Resources{
			NomadResources: &structs.AllocatedTaskResources{
				Memory: structs.AllocatedMemoryResources{MemoryMB: 256},
				Cpu:    structs.AllocatedCpuResources{CpuShares: 250},
			},
			LinuxResources: &drivers.LinuxResources{
				CPUShares:        250,
				MemoryLimitBytes: 256 << 20,
				CpusetCgroupPath: cgroupslib.LinuxResourcesPath(allocID, "task", false),
			},
		},
	}
	if change != nil {
		change(cfg)
	}
	must.NoError(t, cfg.EncodeConcreteDriverConfig(opts))
	t.Cleanup(h.MkAllocDir(cfg, logs))
	must.NoError(t, cgroupslib.Init(testlog.HCLogger(t), allCPUs(t)))
	h.MakeTaskCgroup(cfg.AllocID, cfg.Name)
	return cfg
}

// allCPUs is what an agent without reservations gives to its tasks. Agents of
// other tests share Nomad's parent cgroup, so nothing less will do.
func allCPUs(t *testing.T) string {
	t.Helper()
	file := "/sys/fs/cgroup/cpuset.cpus.effective"
	if cgroupslib.GetMode() == cgroupslib.CG1 {
		file = "/sys/fs/cgroup/cpuset/cpuset.cpus"
	}
	raw, err := os.ReadFile(file)
	must.NoError(t, err)
	return strings.TrimSpace(string(raw))
}

// startTask starts a task and destroys it at the test's end.
func startTask(t *testing.T, h *dtestutil.DriverHarness, cfg *drivers.TaskConfig) *drivers.TaskHandle {
	t.Helper()
	handle, _, err := h.StartTask(cfg)
	must.NoError(t, err)
	t.Cleanup(func() {
		if err := h.DestroyTask(cfg.ID, true); err != nil && !notFound(err) {
			t.Error(err)
		}
	})
	return handle
}

// wait returns the task's exit.
func wait(t *testing.T, h drivers.DriverPlugin, id string) *drivers.ExitResult {
	t.Helper()
	ch, err := h.WaitTask(t.Context(), id)
	must.NoError(t, err)
	select {
	case r := <-ch:
		must.NotNil(t, r)
		return r
	case <-time.After(30 * time.Second):
		t.Fatal("task did not end")
		return nil
	}
}

// output waits until the task's stdout or stderr log has content that ok
// accepts.
func output(t *testing.T, cfg *drivers.TaskConfig, stream string, ok func(string) bool) string {
	t.Helper()
	path := filepath.Join(cfg.TaskDir().LogDir, fmt.Sprintf("%s.%s.0", cfg.Name, stream))
	deadline := time.Now().Add(10 * time.Second)
	for {
		raw, _ := os.ReadFile(path)
		if ok(string(raw)) {
			return string(raw)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s of the task is %q", stream, raw)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func sh(ref, script string) *TaskConfig {
	return &TaskConfig{Image: ref, Command: "sh", Args: []string{"-c", script}}
}
