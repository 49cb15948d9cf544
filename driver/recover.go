package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/cgroup"
	"github.com/bivouac-run/bivouac/driver/internal/network"
	"github.com/bivouac-run/bivouac/driver/internal/runsc"
	"github.com/bivouac-run/bivouac/driver/internal/shim"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// track makes t known and follows it until it ends or the plugin does.
func (d *Driver) track(t *task) {
	d.mu.Lock()
	d.tasks[t.TaskID] = t
	d.mu.Unlock()
	d.spawn(func() { t.watch(d.ctx) })
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
	var state handleState
	if err := handle.GetDriverState(&state); err != nil {
		return fmt.Errorf("recover task %q: decode handle: %w", handle.Config.ID, err)
	}
	if !strings.HasPrefix(state.ContainerID, containerPrefix(handle.Config.AllocID, handle.Config.Name)) {
		return fmt.Errorf("recover task %q: the handle is of container %q", handle.Config.ID, state.ContainerID)
	}
	t, err := readTask(h.taskDir(filepath.Base(state.ContainerID)))
	if err == nil {
		err = t.load()
	}
	if err == nil {
		err = t.checkNetwork()
	}
	if err == nil {
		err = d.rename(t, handle.Config.ID)
	}
	if err != nil {
		return fmt.Errorf("recover task %q: %w", handle.Config.ID, err)
	}
	d.track(t)
	d.log.Info("task recovered", "task_id", t.TaskID, "container_id", t.ContainerID)
	return nil
}

// adopt takes over an invocation of the task that Nomad started and does not
// know of, because its agent or this plugin was killed before they could tell:
// one with the same ID, when Nomad repeats a start, or one with another ID and
// the same configuration, unless Nomad has asked for its end. Running the task
// again would run it twice. It returns nil if there is none; one that cannot be
// taken over is left for endInvocations.
func (d *Driver) adopt(h *host, cfg *drivers.TaskConfig, digest string) (*task, error) {
	dirs, err := h.invocations(cfg.AllocID, cfg.Name)
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		t, err := readTask(dir)
		if err != nil || t.AllocID != cfg.AllocID || t.TaskName != cfg.Name {
			continue
		}
		if t.TaskID != cfg.ID && (t.ConfigDigest != digest || t.released()) {
			continue
		}
		if err = d.awaitStart(h, t); d.ctx.Err() != nil {
			return nil, d.ctx.Err() // whoever comes next takes it over
		}
		if err == nil {
			err = t.checkNetwork()
		}
		if err == nil {
			err = d.rename(t, cfg.ID)
		}
		if err != nil {
			d.log.Warn("an earlier start cannot be taken over", "task_id", t.TaskID, "error", err)
			continue
		}
		d.log.Info("took over an invocation that Nomad did not know", "task_id", cfg.ID, "container_id", t.ContainerID)
		d.emit(cfg, "Took over the sandbox of an earlier start that Nomad had lost")
		return t, nil
	}
	return nil, nil
}

// rename gives a task the ID that Nomad knows it by now, and forgets what this
// process knew of its sandbox under another. On error nothing has changed.
func (d *Driver) rename(t *task, id string) error {
	if t.TaskID == id {
		return nil
	}
	former := t.TaskID
	t.TaskID = id
	if err := t.writeRecord(); err != nil {
		t.TaskID = former
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, known := range d.tasks {
		if known.ContainerID == t.ContainerID {
			delete(d.tasks, key) // its watch goes on, for those who wait for the old ID
		}
	}
	return nil
}

// invocations are the directories of all invocations of a task.
func (h *host) invocations(allocID, taskName string) ([]string, error) {
	dirs, err := filepath.Glob(filepath.Join(h.tasksDir(), containerPrefix(allocID, taskName)+"*"))
	if err != nil {
		return nil, fmt.Errorf("list tasks: %w", err)
	}
	return dirs, nil
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
	t.release()
	return h.remove(t)
}

// endInvocations ends every sandbox of a task, known to this process or not.
func (d *Driver) endInvocations(h *host, allocID, taskName string) error {
	mine := func(r *record) bool { return r.AllocID == allocID && r.TaskName == taskName }
	var errs []error
	for _, t := range d.known(mine) {
		d.log.Warn("ending an invocation that Nomad does not know", "task_id", t.TaskID, "container_id", t.ContainerID)
		errs = append(errs, d.destroy(h, t))
	}
	dirs, err := h.invocations(allocID, taskName)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		errs = append(errs, d.endUnknown(h, dir, mine))
	}
	return errors.Join(errs...)
}

// known are the tasks of this process that match picks.
func (d *Driver) known(match func(*record) bool) []*task {
	d.mu.Lock()
	defer d.mu.Unlock()
	var tasks []*task
	for _, t := range d.tasks {
		if match(&t.record) {
			tasks = append(tasks, t)
		}
	}
	return tasks
}

// endUnknown ends the task in dir if match picks it. What an earlier boot left
// is removed in any case: nothing of it runs.
func (d *Driver) endUnknown(h *host, dir string, match func(*record) bool) error {
	t, err := readTask(dir)
	switch {
	case errors.Is(err, os.ErrNotExist): // being made, or being removed
		return nil
	case errors.Is(err, errRebooted):
		return h.forget(t)
	case err != nil:
		return err
	case !match(&t.record):
		return nil
	}
	d.log.Warn("ending a sandbox that Nomad does not know", "task_id", t.TaskID, "container_id", t.ContainerID)
	return h.clear(dir, t)
}

// forget removes what a task of an earlier boot left in dir.
func (h *host) forget(t *task) error {
	var err error
	if t.Network != nil {
		err = network.Detach(t.Network)
	}
	if err = errors.Join(err, h.runsc.Forget(t.ContainerID)); err != nil {
		return err
	}
	return os.RemoveAll(t.dir)
}

// abandonedAfter is the age at which a file without owner counts as left by a
// crash: nothing takes that long to be made or removed.
const abandonedAfter = 10 * time.Minute

// sweepPeriod is how often the node is looked over for what nobody removed.
const sweepPeriod = time.Minute

// sweepAlways sweeps now and then until the plugin ends.
func (d *Driver) sweepAlways() {
	tick := time.NewTicker(sweepPeriod)
	defer tick.Stop()
	suspects := map[string]bool{}
	for {
		suspects = d.sweep(suspects)
		select {
		case <-tick.C:
		case <-d.ctx.Done():
			return
		}
	}
}

// sweep ends what is left of allocations whose directory Nomad has removed,
// and removes what a crash left half made or half removed. A task is ended only
// if the sweep before suspected it too: it returns those it suspects, by
// directory.
func (d *Driver) sweep(suspected map[string]bool) (suspects map[string]bool) {
	suspects = map[string]bool{}
	h, _ := d.ready()
	if h == nil {
		return suspects
	}
	entries, err := os.ReadDir(h.tasksDir())
	if err != nil {
		d.log.Error("listing what earlier tasks left", "error", err)
		return suspects
	}
	known := map[string]bool{}
	for _, t := range d.known(func(*record) bool { return true }) {
		known[t.ContainerID] = true
	}
	for _, e := range entries {
		dir := filepath.Join(h.tasksDir(), e.Name())
		if known[e.Name()] {
			continue
		}
		err := d.endUnknown(h, dir, func(r *record) bool {
			suspects[dir] = allocationRemoved(r)
			return suspects[dir] && suspected[dir]
		})
		if _, rerr := os.Stat(filepath.Join(dir, recordFile)); errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, removeAbandoned(dir))
		}
		if err != nil {
			d.log.Error("clearing what an earlier task left", "directory", dir, "error", err)
		}
	}
	probes, _ := filepath.Glob(filepath.Join(h.cfg.RunDir, runsc.ProbeDirs)) // fails only for a bad pattern
	for _, dir := range probes {
		if err := removeAbandoned(dir); err != nil {
			d.log.Error("clearing an earlier boot check", "directory", dir, "error", err)
		}
	}
	return suspects
}

// allocationRemoved says whether Nomad has removed a task's allocation. If the
// directory of all allocations is missing too, a disk is not mounted.
func allocationRemoved(r *record) bool {
	_, err := os.Stat(r.AllocDir)
	_, parentErr := os.Stat(filepath.Dir(r.AllocDir))
	return errors.Is(err, os.ErrNotExist) && parentErr == nil
}

func removeAbandoned(dir string) error {
	info, err := os.Stat(dir)
	if err != nil || time.Since(info.ModTime()) < abandonedAfter {
		return nil //nolint:nilerr // gone meanwhile
	}
	return os.RemoveAll(dir)
}
