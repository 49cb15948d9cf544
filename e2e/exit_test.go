package e2e

import (
	"strings"
	"testing"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

func TestExitCodes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, script string
		want         int
		status       string
	}{
		{"zero", "exit 0", 0, api.AllocClientStatusComplete},
		{"seven", "exit 7", 7, api.AllocClientStatusFailed},
		{"killed", "kill -9 $$", 137, api.AllocClientStatusFailed},
		{"segmentation fault", "kill -SEGV $$", 139, api.AllocClientStatusFailed},
		{"child killed", "sh -c 'kill -9 $$'; exit $?", 137, api.AllocClientStatusFailed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			alloc := agent(t).Run(t, nomadtest.Batch(t, busybox(t), tc.script).Job).Done(t)
			if alloc.ClientStatus != tc.status {
				t.Errorf("allocation is %s, want %s", alloc.ClientStatus, tc.status)
			}
			ends := nomadtest.EventsOf(alloc, api.TaskTerminated)
			if len(ends) != 1 || ends[0].ExitCode != tc.want {
				t.Errorf("want one Terminated event with exit code %d: %s", tc.want, nomadtest.Events(alloc, "main"))
			}
			for _, e := range ends {
				if e.Message != "" || e.Details["oom_killed"] == "true" {
					t.Errorf("an end of its own doing is explained by %q, oom_killed %q", e.Message, e.Details["oom_killed"])
				}
			}
		})
	}
}

// A failed task is started again as often as the job says, in a fresh root.
func TestRestartPolicy(t *testing.T) {
	t.Parallel()
	a := agent(t)
	j := nomadtest.Batch(t, busybox(t), `echo start >> /alloc/data/starts
test -e /mark && echo stale >> /alloc/data/starts
touch /mark
exit 3`)
	j.Group.RestartPolicy = nomadtest.Restarts(2)
	alloc := a.Run(t, j.Job).Done(t)
	if alloc.ClientStatus != api.AllocClientStatusFailed || alloc.TaskStates["main"].Restarts != 2 {
		t.Errorf("allocation is %s after %d restarts, want failed after 2", alloc.ClientStatus, alloc.TaskStates["main"].Restarts)
	}
	for _, e := range nomadtest.EventsOf(alloc, api.TaskTerminated) {
		if e.ExitCode != 3 {
			t.Errorf("exit code %d, want 3", e.ExitCode)
		}
	}
	if got := readAllocFile(t, alloc, "starts"); got != strings.Repeat("start\n", 3) {
		t.Errorf("starts: %q", got)
	}
}
