package nomadtest

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
)

// Job is a job of one group with one task, main, to be changed at will before
// it runs.
type Job struct {
	*api.Job
	Group *api.TaskGroup
	Task  *api.Task
}

// Batch returns a job whose task runs script with sh in image. It is started
// once: no restarts, no rescheduling.
func Batch(t testing.TB, image, script string) *Job { return newJob(t, "batch", image, script) }

// Service is Batch for a task that does not end by itself.
func Service(t testing.TB, image, script string) *Job {
	j := newJob(t, "service", image, script)
	// Nomad would otherwise stop a job whose deployment it thinks stuck.
	j.Job.Update = &api.UpdateStrategy{MaxParallel: new(int)}
	return j
}

func newJob(t testing.TB, kind, image, script string) *Job {
	id := fmt.Sprintf("%s-%06x", strings.ToLower(notName.ReplaceAllString(t.Name(), "-")), rand.IntN(1<<24))
	task := &api.Task{
		Name:   "main",
		Driver: "gvisor",
		Config: map[string]any{"image": image, "command": "sh", "args": []string{"-c", script}},
		// CPU is a weight: a small one lets many tasks fit on a small node.
		Resources:   &api.Resources{CPU: ptr(20), MemoryMB: ptr(64)},
		LogConfig:   &api.LogConfig{MaxFiles: ptr(2), MaxFileSizeMB: ptr(20)},
		KillTimeout: ptr(5 * time.Second),
	}
	group := &api.TaskGroup{
		Name:             ptr("sandbox"),
		Count:            ptr(1),
		Tasks:            []*api.Task{task},
		RestartPolicy:    Restarts(0),
		ReschedulePolicy: &api.ReschedulePolicy{Attempts: ptr(0), Unlimited: ptr(false)},
		EphemeralDisk:    &api.EphemeralDisk{SizeMB: ptr(50)},
	}
	job := &api.Job{
		ID: &id, Name: &id, Type: &kind, Datacenters: []string{"dc1"}, TaskGroups: []*api.TaskGroup{group},
	}
	return &Job{Job: job, Group: group, Task: task}
}

// Restarts is the policy to start a failed task n times again, at once.
func Restarts(n int) *api.RestartPolicy {
	return &api.RestartPolicy{
		Attempts: &n, Delay: ptr(100 * time.Millisecond), Interval: ptr(10 * time.Minute), Mode: ptr(api.RestartPolicyModeFail),
	}
}

// Bridge gives the group a network of its own on the agent's bridge.
func (j *Job) Bridge() *Job {
	j.Group.Networks = []*api.NetworkResource{{Mode: "bridge"}}
	return j
}

// Set changes one key of the task's config.
func (j *Job) Set(key string, value any) *Job {
	j.Task.Config[key] = value
	return j
}

var notName = regexp.MustCompile(`[^A-Za-z0-9-]+`)

func ptr[T any](v T) *T { return &v }
