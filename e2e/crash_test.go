package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

// crash is what is killed in a round.
type crash string

const (
	crashDriver crash = "driver"
	crashAgent  crash = "agent"
	crashBoth   crash = "driver and agent"
)

const (
	// crashTasks start in each round and end while things are killed.
	crashTasks = 4
	// crashServices live through all rounds.
	crashServices = 2
)

// crashScript leaves a line at its start and one at its end, lives for 100 ms
// to 1 s and exits with a code that tells which task it was.
const crashScript = `echo "start" >> /alloc/data/trace
sleep 0.$((1 + 3 * NOMAD_ALLOC_INDEX))
echo "end" >> /alloc/data/trace
exit $((11 + NOMAD_ALLOC_INDEX))`

const tickScript = `trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo "tick $i"; sleep 0.2; done`

// The driver, the agent, or both are killed at any moment, again and again.
// No exit code is lost or wrong, no task that Nomad knew of runs twice, and
// what ran goes on running, its output complete.
func TestCrashes(t *testing.T) {
	rounds := 50
	if s := os.Getenv("BIVOUAC_CRASH_ROUNDS"); s != "" {
		var err error
		if rounds, err = strconv.Atoi(s); err != nil {
			t.Fatalf("BIVOUAC_CRASH_ROUNDS: %v", err)
		}
	}
	seed := rand.Uint64()
	c := &crasher{
		Agent: nomadtest.Start(t, nomadtest.Options{OwnServer: true}),
		rand:  rand.New(rand.NewPCG(seed, 0)),
		kills: map[crash]int{},
	}
	t.Logf("seed %d", seed)
	c.image = c.Image(t, "busybox", nil)
	c.startServices(t)
	kinds := []crash{crashDriver, crashAgent, crashBoth}
	for round := range rounds {
		c.round(t, kinds[round%len(kinds)])
		if t.Failed() {
			t.Fatalf("in round %d, after %v", round, kinds[round%len(kinds)])
		}
	}
	c.checkTicks(t)
	t.Logf("%d rounds, kills: %v; %d tasks ended; after the agent was killed Nomad started %d again and told of the end of %d again",
		rounds, c.kills, rounds*crashTasks, c.ranTwice, c.toldTwice)
}

// crasher is an agent that is killed, and the tasks that live through it.
type crasher struct {
	*nomadtest.Agent
	image    string
	rand     *rand.Rand
	services []*api.Allocation
	// sandboxes of the services, as they started.
	sandboxes []string
	kills     map[crash]int
	// ranTwice and toldTwice count what Nomad doubles, see checkEnd.
	ranTwice, toldTwice int
}

func (c *crasher) startServices(t *testing.T) {
	j := nomadtest.Service(t, c.image, tickScript)
	j.Group.Count = ptr(crashServices)
	c.services = c.Run(t, j.Job).RunningAll(t, crashServices)
	for _, alloc := range c.services {
		id, err := c.Sandbox(alloc)
		if err != nil {
			t.Fatal(err)
		}
		c.sandboxes = append(c.sandboxes, id)
	}
}

func (c *crasher) round(t *testing.T, what crash) {
	j := nomadtest.Batch(t, c.image, crashScript)
	j.Group.Count = ptr(crashTasks)
	r := c.Run(t, j.Job)
	// The tasks start about 0.5 s after this and end within 1 s of that.
	const window = 1800 * time.Millisecond
	<-time.After(time.Duration(c.rand.Int64N(int64(window))))
	known := c.known(r)
	began := time.Now()
	c.crash(t, what)
	healthy := time.Since(began)
	allocs := r.DoneAll(t, crashTasks)
	t.Logf("%s killed: healthy after %v, all ended after %v", what, healthy, time.Since(began))
	for _, alloc := range allocs {
		c.checkEnd(t, alloc, what, known[alloc.ID])
	}
	for i, alloc := range c.services {
		id, err := c.Sandbox(alloc)
		if err != nil || id != c.sandboxes[i] {
			t.Errorf("service runs in sandbox %s, was %s (error %v)", id, c.sandboxes[i], err)
		}
		nomadtest.Eventually(t, nomadtest.Moment, func() error {
			if code, _, _, err := c.Exec(t.Context(), alloc, nil, "true"); err != nil || code != 0 {
				return fmt.Errorf("exec in service: exit code %d, error %w", code, err)
			}
			return nil
		})
	}
	if err := r.Purge(); err != nil {
		t.Error(err)
	}
}

// known are the allocations whose task Nomad says has started.
func (c *crasher) known(r *nomadtest.Run) map[string]bool {
	known := map[string]bool{}
	allocs, _ := r.Allocs() // none yet is an answer, too
	for _, alloc := range allocs {
		known[alloc.ID] = len(nomadtest.EventsOf(alloc, api.TaskStarted)) > 0
	}
	return known
}

// crash kills, and waits until all is well again.
func (c *crasher) crash(t *testing.T, what crash) {
	t.Helper()
	if what == crashDriver || what == crashBoth {
		nomadtest.Eventually(t, nomadtest.Moment, func() error {
			if c.KillDriver() == 0 {
				return errors.New("no driver to kill")
			}
			return nil
		})
	}
	if what == crashAgent || what == crashBoth {
		c.KillAgent(t)
		c.Restart(t)
	}
	c.kills[what]++
	if err := c.AwaitHealthy(); err != nil {
		t.Fatal(err)
	}
}

// checkEnd demands that the task ran once and Nomad learned of its end once,
// with the right exit code.
//
// A crash of the agent may double either, whatever the driver does: the start,
// if Nomad had not noted it yet, and the event of the end, if Nomad had not
// noted yet that it was done with the task.
func (c *crasher) checkEnd(t *testing.T, alloc *api.Allocation, what crash, known bool) {
	t.Helper()
	var index int
	if _, err := fmt.Sscanf(alloc.Name[strings.LastIndexByte(alloc.Name, '['):], "[%d]", &index); err != nil {
		t.Fatalf("name %q: %v", alloc.Name, err)
	}
	ends := nomadtest.EventsOf(alloc, api.TaskTerminated)
	for _, e := range ends {
		if e.ExitCode != 11+index || e.Message != "" {
			t.Errorf("exit code %d, message %q, want %d: %s", e.ExitCode, e.Message, 11+index, nomadtest.Events(alloc, "main"))
		}
	}
	switch {
	case len(ends) == 1:
	case len(ends) == 2 && what != crashDriver:
		c.toldTwice++
	default:
		t.Errorf("%d ends: %s", len(ends), nomadtest.Events(alloc, "main"))
	}
	raw, err := os.ReadFile(filepath.Join(c.AllocDir(alloc.ID), "alloc", "data", "trace"))
	if err != nil {
		t.Error(err)
	}
	switch trace := string(raw); {
	case trace == "start\nend\n":
	case what != crashDriver && !known && (trace == "start\nstart\nend\n" || trace == "start\nend\nstart\nend\n"):
		c.ranTwice++
	default:
		t.Errorf("task %d left the trace %q: %s", index, trace, nomadtest.Events(alloc, "main"))
	}
}

// checkTicks demands that no line of the services' output is lost, doubled or
// out of order.
func (c *crasher) checkTicks(t *testing.T) {
	t.Helper()
	for _, alloc := range c.services {
		out := c.AwaitLog(t, alloc, "stdout", func(s string) bool { return strings.HasSuffix(s, "\n") })
		want := 1
		for line := range strings.Lines(out) {
			if line != fmt.Sprintf("tick %d\n", want) {
				t.Errorf("after tick %d comes %q", want-1, line)
				break
			}
			want++
		}
	}
}
