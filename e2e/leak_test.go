package e2e

import (
	"fmt"
	"os"
	"testing"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

// Two hundred tasks come and go: half of them end, half are stopped, and one
// job of each kind has a network. Afterwards the host is as it was.
func TestNothingLeaks(t *testing.T) {
	const jobs, count = 20, 10
	a := nomadtest.Start(t, nomadtest.Options{})
	image := a.Image(t, "busybox", nil)
	cycle := func(round int) {
		var j *nomadtest.Job
		stopped := round%2 == 1
		if stopped {
			j = nomadtest.Service(t, image, "trap 'exit 0' TERM; while :; do sleep 0.1; done")
		} else {
			j = nomadtest.Batch(t, image, "echo hello; exit 0")
		}
		if round >= jobs-2 {
			j.Bridge()
		}
		j.Group.Count = ptr(count)
		r := a.Run(t, j.Job)
		if stopped {
			r.RunningAll(t, count)
		} else {
			for _, alloc := range r.DoneAll(t, count) {
				if alloc.ClientStatus != api.AllocClientStatusComplete {
					t.Errorf("allocation is %s: %s", alloc.ClientStatus, nomadtest.Events(alloc, "main"))
				}
			}
		}
		if err := r.Purge(); err != nil {
			t.Fatal(err)
		}
	}

	cycle(0) // opens what is opened once
	a.Collect(t)
	before, err := a.DriverFDs()
	if err != nil {
		t.Fatal(err)
	}
	for round := range jobs {
		cycle(round)
	}
	a.Collect(t)

	// A moment's connection or timer may add one or two.
	const slack = 4
	nomadtest.Eventually(t, nomadtest.Moment, func() error {
		after, err := a.DriverFDs()
		if err == nil && after > before+slack {
			return fmt.Errorf("the plugin has %d open files, had %d before", after, before)
		}
		return err
	})
	if ports := a.BridgePorts(); len(ports) > 0 {
		t.Errorf("interfaces left on the bridge: %q", ports)
	}
	entries, err := os.ReadDir(a.StateDir())
	if err != nil || len(entries) != 1 || entries[0].Name() != "images" {
		t.Errorf("state_dir holds %v, want images only (error %v)", entries, err)
	}
}
