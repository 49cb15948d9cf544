package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/cgroup"
	"github.com/bivouac-run/bivouac/driver/internal/shim"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// track makes t known and follows it until it ends or the plugin does.
func (d *Driver) track(t *task) {
	d.mu.Lock()
	d.tasks[t.TaskID] = t
	d.mu.Unlock()
	d.wg.Go(func() { t.watch(d.ctx) })
}

// RecoverTask implements drivers.DriverPlugin. It may be called for a task
// that is known, that runs, or that ended while no driver watched: its exit is
// then kept for WaitTask. An error means that the task cannot be told about;
// Nomad destroys it and starts it anew.
func (d *Driver) RecoverTask(handle *drivers.TaskHandle) error {
	if handle == nil || handle.Config == nil {
		return errors.New("recover task: the handle is empty")
	}
	if handle.Version != recordVersion {
		return fmt.Errorf("recover task %q: handle version %d, known is %d", handle.Config.ID, handle.Version, recordVersion)
	}
	if _, err := d.lookup(handle.Config.ID); err == nil {
		return nil
	}
	h, err := d.ready()
	if h == nil {
		return fmt.Errorf("recover task %q: %w", handle.Config.ID, err)
	}
	t, err := readTask(h.taskDir(containerIDOf(handle.Config.ID, handle.Config.Name)))
	if err == nil {
		err = t.load()
	}
	if err != nil {
		return fmt.Errorf("recover task %q: %w", handle.Config.ID, err)
	}
	d.track(t)
	d.log.Info("task recovered", "task_id", t.TaskID, "container_id", t.ContainerID)
	return nil
}

// adopt takes over a start with the same task ID that an earlier driver
// process did not live to report. It returns nil if there was none, or it
// failed; what it left is then gone.
func (d *Driver) adopt(h *host, cfg *drivers.TaskConfig) (*task, error) {
	dir := h.taskDir(containerIDOf(cfg.ID, cfg.Name))
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	t, err := readTask(dir)
	if err == nil {
		err = d.awaitStart(h, t)
	}
	if err == nil {
		d.log.Info("took over a start that was cut short", "task_id", cfg.ID)
		return t, nil
	}
	d.log.Warn("clearing a start that was cut short", "task_id", cfg.ID, "error", err)
	if errors.Is(err, errRebooted) {
		return nil, errors.Join(h.runsc.Forget(filepath.Base(dir)), os.RemoveAll(dir))
	}
	return nil, h.clear(dir, t)
}

// awaitStart waits until the shim of a task says how its start went.
func (d *Driver) awaitStart(h *host, t *task) error {
	deadline := time.Now().Add(h.cfg.startTimeout + shimGrace)
	for {
		err := t.load()
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		// No word yet. Without a shim there will be none.
		if running, _ := shim.Running(t.dir); !running {
			if err := t.load(); !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return errors.New("its shim is gone")
		}
		if time.Now().After(deadline) {
			return errSlowStart
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-d.ctx.Done():
			return d.ctx.Err()
		}
	}
}

// clear ends and removes what a task directory of this boot stands for. t may
// be nil, if the directory could not be read.
func (h *host) clear(dir string, t *task) error {
	if t == nil {
		t = &task{dir: dir, record: record{ContainerID: filepath.Base(dir)}}
	}
	if t.scope == nil && t.TaskID != "" {
		// It is gone with its allocation, if not there.
		t.scope, _ = cgroup.Open(cgroup.DefaultRoot, t.CgroupPath, t.AllocID, t.TaskName)
	}
	return h.remove(t)
}

// endOrphans ends every task on disk that this process does not know and match
// picks. What an earlier boot left is removed on the way: nothing of it runs.
func (d *Driver) endOrphans(h *host, match func(*record) bool) error {
	entries, err := os.ReadDir(h.tasksDir())
	if err != nil {
		return fmt.Errorf("list tasks: %w", err)
	}
	known := d.knownContainers()
	var errs []error
	for _, e := range entries {
		if known[e.Name()] {
			continue
		}
		dir := filepath.Join(h.tasksDir(), e.Name())
		t, err := readTask(dir)
		switch {
		case errors.Is(err, os.ErrNotExist): // being made, or being removed
		case errors.Is(err, errRebooted):
			errs = append(errs, h.runsc.Forget(e.Name()), os.RemoveAll(dir))
		case err != nil:
			errs = append(errs, err)
		case match(&t.record):
			d.log.Warn("ending a sandbox that Nomad does not know", "task_id", t.TaskID, "container_id", t.ContainerID)
			errs = append(errs, h.clear(dir, t))
		}
	}
	return errors.Join(errs...)
}

// knownContainers are the IDs of the sandboxes that this process knows.
func (d *Driver) knownContainers() map[string]bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	known := make(map[string]bool, len(d.tasks))
	for _, t := range d.tasks {
		known[t.ContainerID] = true
	}
	return known
}

// sweep ends what is left of allocations whose directory Nomad has removed.
func (d *Driver) sweep() {
	h, _ := d.ready()
	if h == nil {
		return
	}
	err := d.endOrphans(h, func(r *record) bool {
		_, err := os.Stat(r.AllocDir)
		return errors.Is(err, os.ErrNotExist)
	})
	if err != nil {
		d.log.Error("clearing what earlier tasks left", "error", err)
	}
}
