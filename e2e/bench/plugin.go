package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/nomad/client/lib/cgroupslib"
	"github.com/hashicorp/nomad/nomad/structs"
	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/drivers"
	"golang.org/x/sys/unix"
)

// taskName is the name of every task.
const taskName = "main"

// plugin is the driver in a process of its own, as a Nomad client has it.
type plugin struct {
	client *goplugin.Client
	driver drivers.DriverPlugin
	// runDir is the driver's run_dir.
	runDir string
}

// startPlugin launches and configures the driver as a Nomad client does.
func startPlugin(ctx context.Context, h *host) (*plugin, error) {
	// The plugin outlives an interrupt: cleaning up goes through it.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), h.bivouac, "driver")
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	log := hclog.NewNullLogger()
	p := &plugin{client: goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: base.Handshake,
		Plugins: goplugin.PluginSet{
			base.PluginTypeBase:   &base.PluginBase{},
			base.PluginTypeDriver: drivers.NewDriverPlugin(nil, log),
		},
		Cmd:              cmd,
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		Logger:           log,
	})}
	if err := p.configure(h.pluginConfig("driver")); err != nil {
		p.client.Kill()
		return nil, fmt.Errorf("start the driver plugin: %w", err)
	}
	return p, nil
}

func (p *plugin) configure(config map[string]any) error {
	rpc, err := p.client.Client()
	if err != nil {
		return err
	}
	raw, err := rpc.Dispense(base.PluginTypeDriver)
	if err != nil {
		return err
	}
	var ok bool
	if p.driver, ok = raw.(drivers.DriverPlugin); !ok {
		return fmt.Errorf("a %T is not a driver", raw)
	}
	p.runDir = fmt.Sprint(config["run_dir"])
	c := &base.Config{ApiVersion: drivers.ApiVersion010}
	if err := base.MsgPackEncode(&c.PluginConfig, config); err != nil {
		return err
	}
	return p.driver.SetConfig(c)
}

// rssMiB is the plugin process's resident memory.
func (p *plugin) rssMiB() (float64, error) {
	kib, err := kernelKiB(fmt.Sprintf("/proc/%s/status", p.client.ID()), "VmRSS")
	return float64(kib) / 1024, err
}

// task is one task of our driver.
type task struct {
	p      *plugin
	cfg    *drivers.TaskConfig
	scope  cgroupslib.Lifecycle
	config struct{ ContainerID string } // the driver's own state in the handle
}

// newTask makes what Nomad has made by the time it calls StartTask.
func (p *plugin) newTask(h *host) (*task, error) {
	allocID, err := newAllocID()
	if err != nil {
		return nil, err
	}
	allocDir, err := makeAllocDir(h, allocID)
	if err != nil {
		return nil, err
	}
	t := &task{p: p, scope: cgroupslib.Factory(allocID, taskName, false)}
	if err := t.scope.Setup(); err != nil {
		return nil, err
	}
	t.cfg = &drivers.TaskConfig{
		ID: allocID + "/" + taskName + "/" + allocID[:8], Name: taskName, AllocID: allocID, AllocDir: allocDir,
		JobName: "bench", JobID: "bench", TaskGroupName: "bench", Namespace: "default",
		Env:        map[string]string{"NOMAD_ALLOC_ID": allocID, "NOMAD_TASK_NAME": taskName},
		StdoutPath: os.DevNull, StderrPath: os.DevNull,
		Resources: &drivers.Resources{
			NomadResources: &structs.AllocatedTaskResources{
				Cpu:    structs.AllocatedCpuResources{CpuShares: taskMHz},
				Memory: structs.AllocatedMemoryResources{MemoryMB: taskMemoryMB},
			},
			LinuxResources: &drivers.LinuxResources{
				CPUShares: taskMHz, MemoryLimitBytes: taskMemoryMB << 20,
				CpusetCgroupPath: cgroupslib.LinuxResourcesPath(allocID, taskName, false),
			},
		},
	}
	return t, t.cfg.EncodeConcreteDriverConfig(map[string]any{
		"image": "oci:" + h.imageDir(), "command": "sleep", "args": []string{"3600"}, "image_pull_timeout": "5m",
	})
}

// What every task asks for.
const (
	taskMHz      = 500
	taskMemoryMB = 256
)

func newAllocID() (string, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	x := hex.EncodeToString(b)
	return x[:8] + "-" + x[8:12] + "-" + x[12:16] + "-" + x[16:20] + "-" + x[20:], nil
}

// makeAllocDir makes the directories that Nomad makes for an allocation.
func makeAllocDir(h *host, allocID string) (string, error) {
	dir := filepath.Join(h.dir, "alloc", allocID)
	for _, sub := range []string{
		"alloc/logs", "alloc/data", "alloc/tmp",
		taskName + "/local", taskName + "/secrets", taskName + "/private", taskName + "/tmp",
	} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o777); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// start is StartTask alone; what it needs was made before.
func (t *task) start(context.Context) (time.Duration, error) {
	began := time.Now()
	handle, _, err := t.p.driver.StartTask(t.cfg)
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("StartTask: %w", err)
	}
	return took, handle.GetDriverState(&t.config)
}

// exec is ExecTask /bin/true.
func (t *task) exec(context.Context) (time.Duration, error) {
	began := time.Now()
	res, err := t.p.driver.ExecTask(t.cfg.ID, []string{"/bin/true"}, 30*time.Second)
	took := time.Since(began)
	if err == nil && !res.ExitResult.Successful() {
		err = fmt.Errorf("exit code %d: %s", res.ExitResult.ExitCode, res.Stderr)
	}
	if err != nil {
		return 0, fmt.Errorf("ExecTask: %w", err)
	}
	return took, nil
}

// stop is StopTask with SIGKILL, then DestroyTask.
func (t *task) stop(context.Context) (time.Duration, error) {
	began := time.Now()
	err := t.p.driver.StopTask(t.cfg.ID, 0, "SIGKILL")
	if err == nil {
		err = t.p.driver.DestroyTask(t.cfg.ID, false)
	}
	return time.Since(began), err
}

// remove takes everything back, whatever state the task is in.
func (t *task) remove(context.Context) error {
	err := t.p.driver.DestroyTask(t.cfg.ID, true)
	if err != nil && strings.Contains(err.Error(), drivers.ErrTaskNotFound.Error()) { // its type is lost in gRPC
		err = nil
	}
	return errors.Join(err, t.scope.Teardown(), os.RemoveAll(t.cfg.AllocDir))
}

// pids lists the task's processes: the shim, and the sandbox's.
func (t *task) pids() (shim int, sandbox []int, err error) {
	started, err := t.started()
	if err != nil {
		return 0, nil, err
	}
	sandbox, err = scopePIDs(t.cfg.AllocID)
	return started.Shim.PID, sandbox, err
}

// stateDir is where the driver keeps the started task.
func (t *task) stateDir() string { return filepath.Join(t.p.runDir, "tasks", t.config.ContainerID) }

// startedRecord is what the shim wrote about the start.
type startedRecord struct {
	Shim struct {
		PID int `json:"pid"`
	} `json:"shim"`
	// At is when the sandbox ran and was in its cpuset.
	At time.Time `json:"at"`
}

func (t *task) started() (startedRecord, error) {
	var s startedRecord
	err := readState(filepath.Join(t.stateDir(), "started.json"), &s)
	return s, err
}
