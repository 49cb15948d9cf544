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
	// crashTasks start before each series of kills and end during it.
	crashTasks = 4
	// crashServices live through all series.
	crashServices = 2
)

// series are the kills of one set of tasks, a random moment apart. The agent
// is killed whatever it does, often while it recovers from the kill before.
// The driver is killed again only once it works and no task is on its second
// start: a driver that dies while Nomad recovers a task, or repeats a start,
// makes Nomad itself give the task up ("failed to initialize driver after it
// exited unexpectedly", "failed to start task after driver exited
// unexpectedly").
var series = [][]crash{
	{crashDriver, crashDriver, crashDriver},
	{crashAgent, crashBoth},
	{crashBoth, crashAgent, crashDriver},
}

// crashScript leaves a line at its start and one at its end, lives for 100 ms
// to 2.2 s and exits with a code that tells which task it was.
const crashScript = `echo "start" >> /alloc/data/trace
sleep $((7 * NOMAD_ALLOC_INDEX / 10)).$(((1 + 7 * NOMAD_ALLOC_INDEX) % 10))
echo "end" >> /alloc/data/trace
exit $((11 + NOMAD_ALLOC_INDEX))`

const tickScript = `trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo "tick $i"; sleep 0.2; done`

// The driver, the agent, or both are killed at any moment, again and again.
// No exit code is lost or wrong, no task runs twice, and what ran goes on
// running, its output complete.
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
	done, sets := 0, 0
	for ; done < rounds && !t.Failed(); sets++ {
		kills := series[sets%len(series)]
		c.run(t, kills)
		done += len(kills)
	}
	c.checkTicks(t)
	t.Logf("%d kills: %v; %d tasks ended; after kills of the agent Nomad told of the end of %d again",
		done, c.kills, sets*crashTasks, c.toldTwice)
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
	// toldTwice counts what Nomad doubles, see checkEnd.
	toldTwice int
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

// run starts a set of tasks, kills, and looks at what became of the tasks and
// the services.
func (c *crasher) run(t *testing.T, kills []crash) {
	j := nomadtest.Batch(t, c.image, crashScript)
	j.Group.Count = ptr(crashTasks)
	r := c.Run(t, j.Job)
	agentKills := 0
	for i, what := range kills {
		window := time.Second
		if i == 0 {
			window = 2 * time.Second // a start takes about half a second
		}
		if i > 0 && what != crashAgent {
			c.awaitDriver(t)
			c.awaitStarts(t, r)
		}
		<-time.After(time.Duration(c.rand.Int64N(int64(window))))
		if what != crashDriver {
			agentKills++
		}
		c.crash(t, what)
	}
	began := time.Now()
	if err := c.AwaitHealthy(); err != nil {
		t.Fatal(err)
	}
	healthy := time.Since(began)
	for _, alloc := range r.DoneAll(t, crashTasks) {
		c.checkEnd(t, alloc, 1+agentKills)
	}
	t.Logf("killed %q: healthy after %v, all ended after %v", kills, healthy, time.Since(began))
	for i, alloc := range c.services {
		id, err := c.Sandbox(alloc)
		if err != nil || id != c.sandboxes[i] {
			t.Errorf("service runs in sandbox %s, was %s (error %v)", id, c.sandboxes[i], err)
		}
	}
	c.awaitDriver(t)
	if err := r.Purge(); err != nil {
		t.Error(err)
	}
}

// awaitDriver waits until Nomad can use the driver for the services.
func (c *crasher) awaitDriver(t *testing.T) {
	t.Helper()
	for _, alloc := range c.services {
		nomadtest.Eventually(t, 2*nomadtest.Moment, func() error {
			if code, _, _, err := c.Exec(t.Context(), alloc, nil, "true"); err != nil || code != 0 {
				return errors.Join(fmt.Errorf("exec in service: exit code %d", code), err)
			}
			return nil
		})
	}
}

// awaitStarts waits until Nomad says of every task that it has started.
func (c *crasher) awaitStarts(t *testing.T, r *nomadtest.Run) {
	t.Helper()
	nomadtest.Eventually(t, 2*nomadtest.Moment, func() error {
		allocs, err := r.Allocs()
		if err != nil {
			return err
		}
		for _, alloc := range allocs {
			if state := alloc.TaskStates["main"]; state == nil || state.StartedAt.IsZero() {
				return fmt.Errorf("%s has not started: %s", alloc.Name, nomadtest.Events(alloc, "main"))
			}
		}
		return nil
	})
}

// crash kills, and starts the agent again.
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
}

// checkEnd demands that the task ran once and Nomad learned of its end once,
// with the right exit code.
//
// A crash of the agent may double the event of the end, whatever the driver
// does: if Nomad had not noted yet that it was done with the task. So at most
// maxEnds are allowed, which is 1 if only the driver was killed.
func (c *crasher) checkEnd(t *testing.T, alloc *api.Allocation, maxEnds int) {
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
	if len(ends) < 1 || len(ends) > maxEnds {
		t.Errorf("%d ends, want 1 to %d: %s", len(ends), maxEnds, nomadtest.Events(alloc, "main"))
	} else if len(ends) > 1 {
		c.toldTwice++
	}
	raw, err := os.ReadFile(filepath.Join(c.AllocDir(alloc.ID), "alloc", "data", "trace"))
	if err != nil {
		t.Error(err)
	}
	if trace := string(raw); trace != "start\nend\n" {
		t.Errorf("task %d left the trace %q, want one run: %s", index, trace, nomadtest.Events(alloc, "main"))
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
