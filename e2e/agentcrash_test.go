package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
)

// The agent dies while a sandbox starts. The driver outlives it, although
// nobody reads its log any more, and the agent, which has no note of the
// start, starts the task again: then only the second sandbox runs.
func TestAgentDiesDuringStart(t *testing.T) {
	a := nomadtest.Start(t, nomadtest.Options{OwnServer: true})
	r := a.Run(t, nomadtest.Service(t, a.Image(t, "busybox", nil), tickScript).Job)
	tasks := filepath.Join(a.RunDir(), "tasks")
	nomadtest.Eventually(t, nomadtest.Moment, func() error {
		if entries, err := os.ReadDir(tasks); err != nil || len(entries) == 0 {
			return errors.New("no start yet")
		}
		return nil
	})
	before := a.DriverPIDs()
	a.KillAgent(t)
	// The start goes on: its end is what the driver logs.
	nomadtest.Eventually(t, nomadtest.Moment, func() error {
		started, err := filepath.Glob(filepath.Join(tasks, "*", "started.json"))
		if err != nil || len(started) == 0 {
			return errors.New("the start has not ended")
		}
		return nil
	})
	a.Restart(t)
	if err := a.AwaitHealthy(); err != nil {
		t.Fatal(err)
	}
	r.Running(t)
	if after := a.DriverPIDs(); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("the driver was process %v, is %v: it died with the agent", before, after)
	}
	nomadtest.Eventually(t, nomadtest.Moment, func() error {
		entries, err := os.ReadDir(tasks)
		if err != nil || len(entries) != 1 {
			return errors.Join(fmt.Errorf("%d sandboxes, want 1: %v", len(entries), entries), err)
		}
		return nil
	})
}
