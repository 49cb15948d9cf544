package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/nomad/api"
)

// benchRegister measures, with a real agent, from the moment before a job is
// registered to the Started event of its task. Both times are of this machine's
// clock; the event's is the one the client wrote.
func benchRegister(ctx context.Context, h *host, count int, r *report) error {
	r.sayf("starting a Nomad agent")
	a, err := startAgent(ctx, h)
	if err != nil {
		return err
	}
	defer a.stop()
	const warmUp = 2
	var ours, theirs, oursDriver, theirsDriver samples
	for i := range warmUp + count {
		o, err := a.timeJob(ctx, "gvisor", map[string]any{
			"image": "oci:" + h.imageDir(), "command": "sleep", "args": []string{"3600"},
		})
		if err != nil {
			return err
		}
		t, err := a.timeJob(ctx, "raw_exec", map[string]any{"command": "sleep", "args": []string{"3600"}})
		if err != nil {
			return err
		}
		if i < warmUp {
			continue
		}
		ours.addTime(o.whole)
		oursDriver.addTime(o.afterSetup)
		theirs.addTime(t.whole)
		theirsDriver.addTime(t.afterSetup)
		if n := i + 1 - warmUp; n%5 == 0 {
			r.sayf("jobs: %d of %d", n, count)
		}
	}
	r.add(rowRegister, "ms", ours, peerRawExec, theirs)
	r.note("%s: N = %d each; fastest %.2f ms against %.2f ms; from the event before (Task Setup) %.2f ms against %.2f ms (p50)",
		rowRegister, len(ours), ours.least(), theirs.least(), oursDriver.percentile(50), theirsDriver.percentile(50))
	return nil
}

// jobTimes are one task's start as its events tell it.
type jobTimes struct {
	// whole is from registration to Started; afterSetup is from Task Setup,
	// the event before: directories, logmon and StartTask.
	whole, afterSetup time.Duration
}

// timeJob runs one job with one task until the task has started, and removes it.
func (a *agent) timeJob(ctx context.Context, driver string, config map[string]any) (t jobTimes, err error) {
	suffix, err := newAllocID()
	if err != nil {
		return t, err
	}
	id := "bench-" + driver + "-" + suffix[:8]
	job := api.NewBatchJob(id, id, "global", 50)
	task := api.NewTask(taskName, driver)
	task.Config = config
	mhz, mb, attempts, mode := taskMHz, taskMemoryMB, 0, "fail"
	task.Resources = &api.Resources{CPU: &mhz, MemoryMB: &mb}
	group := api.NewTaskGroup("bench", 1).AddTask(task)
	group.RestartPolicy = &api.RestartPolicy{Attempts: &attempts, Mode: &mode}
	group.ReschedulePolicy = &api.ReschedulePolicy{Attempts: &attempts}
	job.AddTaskGroup(group)

	registered := time.Now()
	if _, _, err := a.api.Jobs().Register(job, (&api.WriteOptions{}).WithContext(ctx)); err != nil {
		return t, fmt.Errorf("register job %q: %w", id, err)
	}
	defer func() { err = errors.Join(err, a.removeJob(ctx, id)) }()
	state, err := a.taskState(ctx, id, func(s *api.TaskState) bool { return !s.StartedAt.IsZero() || s.Failed })
	if err != nil {
		return t, err
	}
	var before, started time.Time
	for _, e := range state.Events {
		switch e.Type {
		case api.TaskSetup:
			before = time.Unix(0, e.Time)
		case api.TaskStarted:
			started = time.Unix(0, e.Time)
		}
	}
	if started.IsZero() {
		last := state.Events[len(state.Events)-1]
		return t, fmt.Errorf("job %q: the task did not start: %s", id, last.DisplayMessage)
	}
	return jobTimes{started.Sub(registered.Round(0)), started.Sub(before)}, nil
}

// taskState polls the job's task until done says so. The events have their
// own times, so a slow poll costs no accuracy and disturbs little.
func (a *agent) taskState(ctx context.Context, job string, done func(*api.TaskState) bool) (*api.TaskState, error) {
	var found *api.TaskState
	err := poll(ctx, 60*time.Second, func(ctx context.Context) error {
		allocs, _, err := a.api.Jobs().Allocations(job, true, (&api.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return err
		}
		for _, alloc := range allocs {
			if s := alloc.TaskStates[taskName]; s != nil && done(s) {
				found = s
				return nil
			}
		}
		return errors.New("not there yet")
	})
	if err != nil {
		return nil, fmt.Errorf("wait for the task of job %q: %w", job, err)
	}
	return found, nil
}

// removeJob stops the job and waits for its task to be dead.
func (a *agent) removeJob(ctx context.Context, id string) error {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	if _, _, err := a.api.Jobs().Deregister(id, false, (&api.WriteOptions{}).WithContext(ctx)); err != nil {
		return fmt.Errorf("stop job %q: %w", id, err)
	}
	_, err := a.taskState(ctx, id, func(s *api.TaskState) bool { return s.State == "dead" })
	return err
}

// poll calls f until it returns nil, the limit has passed or ctx ends; then it
// returns f's last error.
func poll(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}
