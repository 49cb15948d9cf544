package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/network"
	"github.com/bivouac-run/bivouac/driver/internal/proc"
	"github.com/bivouac-run/bivouac/driver/internal/runsc"
	"github.com/bivouac-run/bivouac/driver/internal/shim"
	"github.com/hashicorp/nomad/plugins/drivers"
	"golang.org/x/sys/unix"
)

const (
	killSignal = unix.SIGKILL
	// killTimeout bounds how long killed processes may take to disappear.
	killTimeout = 10 * time.Second
	// runscTimeout bounds one short runsc command.
	runscTimeout = 10 * time.Second
)

// WaitTask implements drivers.DriverPlugin. Any number of callers may wait,
// before the end and after it, until DestroyTask.
func (d *Driver) WaitTask(ctx context.Context, taskID string) (<-chan *drivers.ExitResult, error) {
	t, err := d.lookup(taskID)
	if err != nil {
		return nil, err
	}
	ch := make(chan *drivers.ExitResult, 1)
	d.spawn(func() {
		defer close(ch)
		select {
		case <-t.done:
			t.release() // whoever starts the task next means to run it
			ch <- t.exit.Copy()
		case <-ctx.Done():
		case <-d.ctx.Done():
		}
	})
	return ch, nil
}

// StopTask implements drivers.DriverPlugin: the signal, the wait, the kill. It
// returns once the task has ended.
func (d *Driver) StopTask(taskID string, timeout time.Duration, signal string) error {
	t, err := d.lookup(taskID)
	if err != nil {
		return err
	}
	t.release()
	if t.ended() {
		return nil
	}
	h, err := d.ready()
	if h == nil {
		return err
	}
	sig, err := stopSignal(signal, t.StopSignal)
	if err != nil {
		return fmt.Errorf("stop task %q: %w", taskID, err)
	}
	if sig != killSignal && timeout > 0 {
		ctx, cancel := context.WithTimeout(d.ctx, min(timeout, runscTimeout))
		err := h.runsc.Kill(ctx, t.ContainerID, sig)
		cancel()
		// A sandbox that does not take the signal is killed all the same.
		if err != nil && !errors.Is(err, runsc.ErrNotRunning) {
			d.log.Warn("stop signal was not delivered", "task_id", taskID, "error", err)
			timeout = 0
		}
		select {
		case <-t.done:
			return nil
		case <-time.After(timeout):
		case <-d.ctx.Done():
			return d.ctx.Err()
		}
	}
	return d.kill(t)
}

// kill ends the sandbox and waits for its record.
func (d *Driver) kill(t *task) error {
	if err := t.started.Sandbox.Signal(killSignal); err != nil && !errors.Is(err, proc.ErrGone) {
		return fmt.Errorf("kill task %q: %w", t.TaskID, err)
	}
	if t.scope != nil {
		if err := t.scope.Kill(killTimeout); err != nil {
			return fmt.Errorf("kill task %q: %w", t.TaskID, err)
		}
	}
	select {
	case <-t.done:
		return nil
	case <-time.After(killTimeout + shimGrace):
		return fmt.Errorf("kill task %q: its shim did not record the end", t.TaskID)
	case <-d.ctx.Done():
		return d.ctx.Err()
	}
}

// stopSignal is the job's kill_signal, else the image's, else SIGTERM.
func stopSignal(job, image string) (unix.Signal, error) {
	switch {
	case job != "":
		return parseSignal(job)
	case image != "":
		// An image's mistake must not make its task unstoppable.
		if sig, err := parseSignal(image); err == nil {
			return sig, nil
		}
	}
	return unix.SIGTERM, nil
}

// parseSignal reads "SIGTERM", "term" or "15".
func parseSignal(s string) (unix.Signal, error) {
	const highest = 64 // SIGRTMAX
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n <= highest {
		return unix.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	return 0, fmt.Errorf("unknown signal %q", s)
}

// SignalTask implements drivers.DriverPlugin.
func (d *Driver) SignalTask(taskID string, signal string) error {
	t, err := d.lookup(taskID)
	if err != nil {
		return err
	}
	sig, err := parseSignal(signal)
	if err != nil {
		return fmt.Errorf("signal task %q: %w", taskID, err)
	}
	h, err := d.ready()
	if h == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(d.ctx, runscTimeout)
	defer cancel()
	if err := h.runsc.Kill(ctx, t.ContainerID, sig); err != nil {
		return fmt.Errorf("signal task %q: %w", taskID, err)
	}
	return nil
}

// InspectTask implements drivers.DriverPlugin.
func (d *Driver) InspectTask(taskID string) (*drivers.TaskStatus, error) {
	t, err := d.lookup(taskID)
	if err != nil {
		return nil, err
	}
	return t.status(), nil
}

// DestroyTask implements drivers.DriverPlugin: it removes all that is left of
// a task. A running one is refused, or killed with force.
func (d *Driver) DestroyTask(taskID string, force bool) error {
	t, err := d.lookup(taskID)
	if errors.Is(err, drivers.ErrTaskNotFound) {
		return d.destroyUnknown(taskID, force)
	}
	if err != nil {
		return err
	}
	h, err := d.ready()
	if h == nil {
		return err
	}
	if !t.ended() && !force {
		return fmt.Errorf("destroy task %q: it is running", taskID)
	}
	return d.destroy(h, t)
}

// destroy ends a task if it runs, removes what it left and forgets it. What
// cannot be removed is found by the next start of the task, or the sweep.
func (d *Driver) destroy(h *host, t *task) error {
	t.release()
	if !t.ended() {
		if err := d.kill(t); err != nil {
			return err
		}
	}
	d.mu.Lock()
	delete(d.tasks, t.TaskID)
	d.mu.Unlock()
	return h.remove(t)
}

// destroyUnknown serves Nomad's clean-up after a RecoverTask that failed: the
// task is not known to this process, but may have left something.
func (d *Driver) destroyUnknown(taskID string, force bool) error {
	h, _ := d.ready()
	if h == nil || !force {
		return drivers.ErrTaskNotFound
	}
	entries, err := os.ReadDir(h.tasksDir())
	if err != nil {
		return fmt.Errorf("destroy task %q: %w", taskID, err)
	}
	found := false
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(h.tasksDir(), e.Name())
		t, err := readTask(dir)
		if t == nil || t.TaskID != taskID {
			continue // another's, whatever is wrong with it
		}
		found = true
		if errors.Is(err, errRebooted) {
			errs = append(errs, h.forget(t))
		} else {
			errs = append(errs, err, h.clear(dir, t))
		}
	}
	if !found {
		return drivers.ErrTaskNotFound
	}
	return errors.Join(errs...)
}

// remove deletes what a task left on the node. Its processes are gone or are
// ended here; repeating it is harmless.
func (h *host) remove(t *task) error {
	if err := shim.Kill(t.dir); err != nil {
		return fmt.Errorf("remove task %q: %w", t.TaskID, err)
	}
	var errs []error
	if t.scope != nil {
		errs = append(errs, t.scope.Kill(killTimeout))
	}
	// The shim has done this, unless it was killed.
	if h.runsc.Exists(t.ContainerID) {
		ctx, cancel := context.WithTimeout(context.Background(), runscTimeout)
		defer cancel()
		errs = append(errs, h.runsc.Delete(ctx, t.ContainerID))
	}
	if t.scope != nil {
		errs = append(errs, t.scope.RemoveLeftovers())
	}
	if t.Network != nil {
		errs = append(errs, network.Detach(t.Network))
	}
	if t.AllocDir != "" {
		errs = append(errs, os.RemoveAll(t.nameFiles()))
	}
	err := errors.Join(errs...)
	if err == nil { // the record stays with what could not be removed
		err = os.RemoveAll(t.dir)
	}
	if err != nil {
		return fmt.Errorf("remove task %q: %w", t.TaskID, err)
	}
	return nil
}
