package driver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/shim"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/helper/uuid"
	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/shoenig/test/must"
)

// again returns a new driver process's driver on the same node. The former is
// closed, which leaves its sandboxes running, as a kill of the plugin does.
func again(t *testing.T, former *Driver) *Driver {
	t.Helper()
	cfg := former.host.cfg
	must.NoError(t, former.Close())
	d := New(hclog.NewNullLogger())
	var raw []byte
	must.NoError(t, base.MsgPackEncode(&raw, &cfg))
	must.NoError(t, d.SetConfig(&base.Config{PluginConfig: raw}))
	t.Cleanup(func() { must.NoError(t, d.Close()) })
	return d
}

// started starts a task on a driver without gRPC between, so that the driver
// can be replaced.
func started(t *testing.T, n *node, script string) (*Driver, *drivers.TaskConfig, *drivers.TaskHandle) {
	t.Helper()
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), script), nil)
	handle, _, err := driverOf(h).StartTask(cfg)
	must.NoError(t, err)
	return driverOf(h), cfg, handle
}

func destroy(t *testing.T, d *Driver, id string) {
	t.Helper()
	if err := d.DestroyTask(id, true); err != nil && !notFound(err) {
		t.Error(err)
	}
}

func TestRecoverRunningTask(t *testing.T) {
	d, cfg, handle := started(t, needNode(t), "echo up; while [ ! -e /local/go ]; do sleep 0.05; done; exit 9")
	d = again(t, d)
	must.NoError(t, d.RecoverTask(handle))
	must.NoError(t, d.RecoverTask(handle)) // again
	defer destroy(t, d, cfg.ID)
	status, err := d.InspectTask(cfg.ID)
	must.NoError(t, err)
	must.Eq(t, drivers.TaskStateRunning, status.State)
	result, err := d.ExecTask(cfg.ID, []string{"touch", "/local/go"}, 10*time.Second)
	must.NoError(t, err)
	must.Zero(t, result.ExitResult.ExitCode)
	must.Eq(t, 9, wait(t, d, cfg.ID).ExitCode)
}

func TestRecoverTaskThatEndedMeanwhile(t *testing.T) {
	d, cfg, handle := started(t, needNode(t), "sleep 0.2; exit 17")
	shimID := d.tasks[cfg.ID].started.Shim
	d = again(t, d)
	must.NoError(t, shimID.Wait(t.Context()))
	must.NoError(t, d.RecoverTask(handle))
	defer destroy(t, d, cfg.ID)
	must.Eq(t, 17, wait(t, d, cfg.ID).ExitCode)
	must.NoError(t, d.DestroyTask(cfg.ID, false))
	must.Error(t, d.RecoverTask(handle)) // nothing left to recover
}

func TestStartCutShortIsTakenOver(t *testing.T) {
	d, cfg, _ := started(t, needNode(t), "echo start >> /alloc/data/starts; echo up; sleep 600")
	output(t, cfg, "stdout", func(s string) bool { return s == "up\n" })
	before := d.tasks[cfg.ID].started
	d = again(t, d)
	defer destroy(t, d, cfg.ID)
	handle, _, err := d.StartTask(cfg) // Nomad repeats it with the same ID
	must.NoError(t, err)
	must.Eq(t, drivers.TaskStateRunning, handle.State)
	must.Eq(t, before.Sandbox, d.tasks[cfg.ID].started.Sandbox)
	raw, err := os.ReadFile(filepath.Join(cfg.TaskDir().SharedAllocDir, "data", "starts"))
	must.NoError(t, err)
	must.Eq(t, "start\n", string(raw))
}

// Nomad's agent was killed before it had stored the handle: it starts the task
// under another ID. Running it twice would be wrong if it is the same task, and
// keeping it if the job has changed, or if Nomad has asked for its end.
func TestInvocationThatNomadDoesNotKnow(t *testing.T) {
	n := needNode(t)
	for name, c := range map[string]struct {
		script string
		change func(*drivers.TaskConfig)
		before func(*testing.T, *Driver, *drivers.TaskConfig)
		kept   bool
	}{
		"runs on":        {script: "sleep 600", kept: true},
		"has ended":      {script: "exit 23", before: awaitEnd, kept: true},
		"was told of":    {script: "exit 23", before: tellEnd},
		"has changed":    {script: "sleep 600", change: func(c *drivers.TaskConfig) { c.Env["X"] = "new" }},
		"was stopped":    {script: "exit 23", before: stopTask},
		"was not ours":   {script: "sleep 600", change: func(c *drivers.TaskConfig) { c.User = "user" }},
		"known, runs on": {script: "sleep 600", kept: true},
	} {
		t.Run(name, func(t *testing.T) {
			d, cfg, _ := started(t, n, "echo start >> /alloc/data/starts; echo up; "+c.script)
			output(t, cfg, "stdout", func(s string) bool { return s == "up\n" })
			if c.before != nil {
				c.before(t, d, cfg)
			}
			before := d.tasks[cfg.ID]
			if name != "known, runs on" {
				d = again(t, d)
			}
			next := cfg.Copy()
			next.ID = cfg.AllocID + "/task/" + uuid.Short()
			if c.change != nil {
				c.change(next)
			}
			handle, _, err := d.StartTask(next)
			must.NoError(t, err)
			defer func() { destroy(t, d, next.ID) }() // of whatever driver is the last
			must.Eq(t, c.kept, before.started.Sandbox == d.tasks[next.ID].started.Sandbox)
			_, err = d.InspectTask(cfg.ID)
			must.ErrorIs(t, err, drivers.ErrTaskNotFound)
			if !c.kept {
				must.False(t, before.started.Sandbox.Alive())
				must.DirNotExists(t, before.dir)
				return
			}
			// It is known under its new ID from now on, after a crash too.
			d = again(t, d)
			must.NoError(t, d.RecoverTask(handle))
			if c.script == "exit 23" {
				must.Eq(t, 23, wait(t, d, next.ID).ExitCode)
			}
			raw, err := os.ReadFile(filepath.Join(cfg.TaskDir().SharedAllocDir, "data", "starts"))
			must.NoError(t, err)
			must.Eq(t, "start\n", string(raw))
			must.NoError(t, d.DestroyTask(next.ID, true))
			nothingLeft(t, d)
		})
	}
}

func awaitEnd(_ *testing.T, d *Driver, cfg *drivers.TaskConfig) { <-d.tasks[cfg.ID].done }

func tellEnd(t *testing.T, d *Driver, cfg *drivers.TaskConfig) { wait(t, d, cfg.ID) }

func stopTask(t *testing.T, d *Driver, cfg *drivers.TaskConfig) {
	must.NoError(t, d.StopTask(cfg.ID, 0, ""))
}

func TestSweepEndsTasksWithoutAllocation(t *testing.T) {
	d, cfg, _ := started(t, needNode(t), "sleep 600")
	before := d.tasks[cfg.ID]
	must.NoError(t, os.Rename(cfg.AllocDir, cfg.AllocDir+".gone"))
	t.Cleanup(func() { _ = os.RemoveAll(cfg.AllocDir + ".gone") })
	d = again(t, d)
	suspects := d.sweep(nil)
	must.True(t, before.started.Sandbox.Alive()) // once is not enough
	d.sweep(suspects)
	deadline := time.Now().Add(20 * time.Second)
	for before.started.Sandbox.Alive() || exists(before.dir) {
		if time.Now().After(deadline) {
			t.Fatal("the sandbox is still there")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// A handle from before the task was taken over under another ID.
func TestRecoverByAFormerHandle(t *testing.T) {
	d, cfg, former := started(t, needNode(t), "sleep 600")
	d = again(t, d)
	next := cfg.Copy()
	next.ID = cfg.AllocID + "/task/" + uuid.Short()
	_, _, err := d.StartTask(next)
	must.NoError(t, err)
	must.NoError(t, d.RecoverTask(former))
	defer destroy(t, d, cfg.ID)
	status, err := d.InspectTask(cfg.ID)
	must.NoError(t, err)
	must.Eq(t, drivers.TaskStateRunning, status.State)
	_, err = d.InspectTask(next.ID)
	must.ErrorIs(t, err, drivers.ErrTaskNotFound)
	must.NoError(t, d.DestroyTask(cfg.ID, true))
	nothingLeft(t, d)
}

func TestTaskOfAnotherBootIsNotRecovered(t *testing.T) {
	d, cfg, handle := started(t, needNode(t), "exit 0")
	wait(t, d, cfg.ID)
	path := filepath.Join(d.tasks[cfg.ID].dir, recordFile)
	raw, err := os.ReadFile(path)
	must.NoError(t, err)
	const marker = `"boot_id":"`
	i := strings.Index(string(raw), marker) + len(marker)
	raw[i] ^= 1
	must.NoError(t, os.WriteFile(path, raw, 0o600))
	d = again(t, d)
	// It is refused, or the new driver has cleared it away already.
	err = d.RecoverTask(handle)
	must.True(t, errors.Is(err, errRebooted) || errors.Is(err, os.ErrNotExist), must.Sprint(err))
	// Nomad then destroys it.
	must.NoError(t, ignoreNotFound(d.DestroyTask(cfg.ID, true)))
	deadline := time.Now().Add(10 * time.Second)
	for exists(filepath.Dir(path)) { // the new driver's sweep may be at it
		must.True(t, time.Now().Before(deadline), must.Sprint("it is still there"))
		time.Sleep(time.Millisecond)
	}
}

func ignoreNotFound(err error) error {
	if notFound(err) {
		return nil
	}
	return err
}

func TestRecoverRefusesHandles(t *testing.T) {
	d := newDriver(t, needNode(t).config(t))
	must.ErrorContains(t, d.RecoverTask(nil), "empty")
	must.ErrorContains(t, d.RecoverTask(&drivers.TaskHandle{Version: 9, Config: &drivers.TaskConfig{ID: "x"}}), "version 9")
	handle := drivers.NewTaskHandle(recordVersion)
	handle.Config = &drivers.TaskConfig{ID: "x", AllocID: "a", Name: "n"}
	must.ErrorContains(t, d.RecoverTask(handle), "decode handle")
	must.NoError(t, handle.SetDriverState(&handleState{ContainerID: "../../etc"}))
	must.ErrorContains(t, d.RecoverTask(handle), "is of container")
	must.NoError(t, handle.SetDriverState(&handleState{ContainerID: containerIDOf("a", "n", "x")}))
	must.ErrorIs(t, d.RecoverTask(handle), os.ErrNotExist)
	_, err := shim.ReadExit(t.TempDir())
	must.ErrorIs(t, err, os.ErrNotExist)
}
