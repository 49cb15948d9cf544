package nomadtest

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
)

// startPatience and endPatience bound how long a task may take to come up or
// to end on a busy machine; both usually take under a second.
const (
	startPatience = 60 * time.Second
	endPatience   = 90 * time.Second
)

// Run is a job under way.
type Run struct {
	a  *Agent
	ID string
}

// Run registers a job. It is purged when the test ends.
func (a *Agent) Run(t testing.TB, j *api.Job) *Run {
	t.Helper()
	resp, _, err := a.Client.Jobs().Register(j, nil)
	if err != nil {
		t.Fatalf("register job: %v", err)
	}
	if resp.Warnings != "" {
		t.Logf("job %s: %s", *j.ID, resp.Warnings)
	}
	r := &Run{a: a, ID: *j.ID}
	t.Cleanup(func() {
		if t.Failed() {
			r.logState(t)
		}
		if err := r.Purge(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// RunHCL registers a job written in HCL, with values for its variables in the
// form of a variables file.
func (a *Agent) RunHCL(t testing.TB, hcl, variables string) *Run {
	t.Helper()
	j, err := a.Client.Jobs().ParseHCLOpts(&api.JobsParseRequest{JobHCL: hcl, Variables: variables, Canonicalize: true})
	if err != nil {
		t.Fatalf("parse job: %v", err)
	}
	return a.Run(t, j)
}

// Purge stops and forgets the job, and returns when its tasks have ended. A
// job that is gone already is no error.
func (r *Run) Purge() error {
	if _, err := r.Allocs(); err != nil { // to have seen them all
		return err
	}
	return poll(endPatience, func() error {
		if _, _, err := r.a.Client.Jobs().Deregister(r.ID, true, nil); err != nil && !strings.Contains(err.Error(), "not found") {
			return err
		}
		stubs, _, err := r.a.Client.Allocations().List(&api.QueryOptions{Filter: fmt.Sprintf("JobID == %q", r.ID)})
		if err != nil {
			return err
		}
		for _, s := range stubs {
			if !ended(s.ClientStatus) {
				return fmt.Errorf("allocation %s of job %q is %s", s.ID, r.ID, s.ClientStatus)
			}
		}
		return nil
	})
}

// Allocs returns the job's allocations, oldest first.
func (r *Run) Allocs() ([]*api.Allocation, error) {
	stubs, _, err := r.a.Client.Jobs().Allocations(r.ID, true, nil)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(stubs, func(a, b *api.AllocationListStub) int { return int(a.CreateIndex) - int(b.CreateIndex) })
	var allocs []*api.Allocation
	for _, s := range stubs {
		r.a.note(s.ID)
		alloc, _, err := r.a.Client.Allocations().Info(s.ID, nil)
		if err != nil {
			return nil, err
		}
		allocs = append(allocs, alloc)
	}
	return allocs, nil
}

// await waits until there are n allocations and every one passes.
func (r *Run) await(t testing.TB, n int, timeout time.Duration, pass func(*api.Allocation) error) []*api.Allocation {
	t.Helper()
	var allocs []*api.Allocation
	Eventually(t, timeout, func() error {
		var err error
		if allocs, err = r.Allocs(); err != nil {
			return err
		}
		if len(allocs) < n {
			return fmt.Errorf("job %q has %d allocations of %d%s", r.ID, len(allocs), n, r.blocked())
		}
		for _, alloc := range allocs {
			if err := pass(alloc); err != nil {
				return err
			}
		}
		return nil
	})
	return allocs
}

// blocked says why the scheduler places nothing, if that is so.
func (r *Run) blocked() string {
	evals, _, err := r.a.Client.Jobs().Evaluations(r.ID, nil)
	if err != nil {
		return ""
	}
	for _, e := range evals {
		for group, m := range e.FailedTGAllocs {
			return fmt.Sprintf(" (group %s: %v %v)", group, m.ConstraintFiltered, m.DimensionExhausted)
		}
	}
	return ""
}

// Running waits until the task of the job's one allocation runs.
func (r *Run) Running(t testing.TB) *api.Allocation {
	t.Helper()
	return r.RunningAll(t, 1)[0]
}

// RunningAll is Running for n allocations.
func (r *Run) RunningAll(t testing.TB, n int) []*api.Allocation {
	t.Helper()
	return r.await(t, n, startPatience, func(alloc *api.Allocation) error {
		for name, s := range alloc.TaskStates {
			if s.State == "running" {
				continue
			}
			err := fmt.Errorf("task %q is %s: %s", name, s.State, Events(alloc, name))
			if s.State == "dead" {
				return final{err}
			}
			return err
		}
		if alloc.ClientStatus != api.AllocClientStatusRunning {
			return fmt.Errorf("allocation is %s", alloc.ClientStatus)
		}
		return nil
	})
}

// Done waits until the job's one allocation has ended, well or not.
func (r *Run) Done(t testing.TB) *api.Allocation {
	t.Helper()
	return r.DoneAll(t, 1)[0]
}

// DoneAll is Done for n allocations.
func (r *Run) DoneAll(t testing.TB, n int) []*api.Allocation {
	t.Helper()
	return r.await(t, n, endPatience, func(alloc *api.Allocation) error {
		if !ended(alloc.ClientStatus) {
			return fmt.Errorf("allocation %s is %s: %s", alloc.ID, alloc.ClientStatus, Events(alloc, "main"))
		}
		return nil
	})
}

func ended(clientStatus string) bool {
	switch clientStatus {
	case api.AllocClientStatusComplete, api.AllocClientStatusFailed, api.AllocClientStatusLost:
		return true
	}
	return false
}

// Events is the history of a task in one line, for messages.
func Events(alloc *api.Allocation, task string) string {
	s := alloc.TaskStates[task]
	if s == nil {
		return "no events"
	}
	var lines []string
	for _, e := range s.Events {
		lines = append(lines, e.Type+": "+e.DisplayMessage)
	}
	return strings.Join(lines, " | ")
}

// EventsOf returns the events of task main that are of one type.
func EventsOf(alloc *api.Allocation, kind string) []*api.TaskEvent {
	var found []*api.TaskEvent
	if s := alloc.TaskStates["main"]; s != nil {
		for _, e := range s.Events {
			if e.Type == kind {
				found = append(found, e)
			}
		}
	}
	return found
}

func (r *Run) logState(t testing.TB) {
	allocs, err := r.Allocs()
	if err != nil {
		t.Logf("job %s: %v", r.ID, err)
		return
	}
	for _, alloc := range allocs {
		t.Logf("allocation %s is %s: %s", alloc.ID, alloc.ClientStatus, Events(alloc, "main"))
		for _, stream := range []string{"stdout", "stderr"} {
			if out, err := r.a.Logs(alloc, stream); err == nil && out != "" {
				t.Logf("its %s ends with:\n%s", stream, tail(out, 600))
			}
		}
	}
}

// Logs returns what task main has written so far.
func (a *Agent) Logs(alloc *api.Allocation, stream string) (string, error) {
	cancel := make(chan struct{})
	defer close(cancel)
	frames, errs := a.Client.AllocFS().Logs(alloc, false, "main", stream, "start", 0, cancel, nil)
	var b strings.Builder
	for {
		select {
		case f, ok := <-frames:
			if !ok {
				return b.String(), nil
			}
			b.Write(f.Data)
		case err := <-errs:
			if errors.Is(err, io.EOF) {
				return b.String(), nil
			}
			return b.String(), err
		}
	}
}

// AwaitLog waits until a stream of task main passes, and returns it. The log
// may be a moment behind the task's end.
func (a *Agent) AwaitLog(t testing.TB, alloc *api.Allocation, stream string, pass func(string) bool) string {
	t.Helper()
	const patience = 30 * time.Second
	var out string
	Eventually(t, patience, func() error {
		var err error
		if out, err = a.Logs(alloc, stream); err != nil {
			return err
		}
		if !pass(out) {
			return fmt.Errorf("%s is %q", stream, tail(out, 600))
		}
		return nil
	})
	return out
}

// Output runs a job to its end, demands exit code 0, and returns its stdout,
// which must end in a newline.
func (a *Agent) Output(t testing.TB, j *Job) string {
	t.Helper()
	alloc := a.Run(t, j.Job).Done(t)
	if alloc.ClientStatus != api.AllocClientStatusComplete {
		t.Fatalf("allocation is %s: %s", alloc.ClientStatus, Events(alloc, "main"))
	}
	return a.AwaitLog(t, alloc, "stdout", func(s string) bool { return strings.HasSuffix(s, "\n") })
}
