package nomadtest

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hashicorp/nomad/api"

	"github.com/bivouac-run/bivouac/internal/testimage"
)

// Agent is a running Nomad agent, server and client in one.
type Agent struct {
	// Client speaks to the agent; it stays valid across Restart.
	Client *api.Client
	// NodeID is the client node's, once the agent is healthy.
	NodeID string

	programs Programs
	l        layout
	ports    ports
	env      []string

	// server is set with Options.OwnServer.
	server *daemon
	// local speaks to the client agent where that is not the server.
	local *api.Client

	// crashed is set by KillAgent.
	crashed atomic.Bool

	mu     sync.Mutex
	agent  *daemon
	allocs map[string]bool // every allocation seen, by ID
	images map[string]string
}

// Start launches an agent for one test, waits until it is healthy, and stops
// it when the test ends, which fails if anything is left on the host.
func Start(t testing.TB, o Options) *Agent {
	t.Helper()
	a, err := Launch(Need(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.LogOnFailure(t, 0)
		if err := a.Stop(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// Launch starts an agent and returns once its driver is healthy. The caller
// must Stop it. Tests that have an agent to themselves use Start.
func Launch(p Programs, o Options) (*Agent, error) {
	wipeAbandoned()
	l, err := newLayout()
	if err != nil {
		return nil, fmt.Errorf("make agent directory: %w", err)
	}
	a := &Agent{programs: p, l: l, allocs: map[string]bool{}, images: map[string]string{}}
	if err := a.launch(o); err != nil {
		log := a.logTail(0)
		return nil, errors.Join(fmt.Errorf("start Nomad agent: %w\n%s", err, log), a.process().kill(), a.server.kill(), l.wipe(nil))
	}
	return a, nil
}

func (a *Agent) launch(o Options) error {
	if err := writeOwner(a.l); err != nil {
		return err
	}
	if err := a.l.make(a.programs); err != nil {
		return err
	}
	var err error
	if a.ports, err = freePorts(); err != nil {
		return err
	}
	// The token in the environment marks the log monitors, whose command
	// line says nothing.
	a.env = cleanEnv(append([]string{"BVT_TOKEN=" + a.l.token, "TMPDIR=" + a.l.tmp()}, o.Env...)...)
	if a.local, err = client(a.ports.http); err != nil {
		return err
	}
	a.Client = a.local
	server := ""
	if o.OwnServer {
		if server, err = a.launchServer(); err != nil {
			return err
		}
	}
	// A subnet that Nomad's default and other agents hardly have.
	subnet := fmt.Sprintf("172.27.%d.0/24", 1+rand.IntN(250))
	if err := a.l.write(a.programs, a.ports, server, subnet, o); err != nil {
		return err
	}
	if err := a.exec(); err != nil {
		return err
	}
	return a.AwaitHealthy()
}

// launchServer starts a server and returns its RPC address.
func (a *Agent) launchServer() (string, error) {
	at, err := freePorts()
	if err != nil {
		return "", err
	}
	if err := a.l.writeServer(at); err != nil {
		return "", err
	}
	if a.Client, err = client(at.http); err != nil {
		return "", err
	}
	if a.server, err = startDaemon(a.programs.Nomad, a.l.server(), a.l, a.env); err != nil {
		return "", err
	}
	return fmt.Sprintf("127.0.0.1:%d", at.rpc), nil
}

// client returns an API client that takes nothing from the environment.
func client(port int) (*api.Client, error) {
	return api.NewClient(&api.Config{Address: fmt.Sprintf("http://127.0.0.1:%d", port), TLSConfig: &api.TLSConfig{}})
}

// exec starts the agent process.
func (a *Agent) exec() error {
	d, err := startDaemon(a.programs.Nomad, a.l.config(), a.l, a.env)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.agent = d
	return nil
}

func (a *Agent) process() *daemon {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.agent
}

// AwaitHealthy waits until the agent answers and runs the driver, and the
// server says that the node is ready and the driver healthy.
func (a *Agent) AwaitHealthy() error {
	return poll(60*time.Second, func() error {
		if err := a.process().gone(); err != nil {
			return final{err}
		}
		if _, err := a.local.Agent().Self(); err != nil {
			return err
		}
		if pids := a.DriverPIDs(); len(pids) != 1 {
			return fmt.Errorf("%d plugin processes", len(pids))
		}
		nodes, _, err := a.Client.Nodes().List(nil)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(nodes, func(n *api.NodeListStub) bool { return n.Name == a.l.token })
		if i < 0 {
			return errors.New("no node yet")
		}
		n := nodes[i]
		d := n.Drivers["gvisor"]
		if n.Status != "ready" || d == nil || !d.Healthy {
			return fmt.Errorf("node is %s, driver %+v", n.Status, d)
		}
		a.NodeID = n.ID
		return nil
	})
}

// KillAgent kills the agent process, and nothing else, with SIGKILL.
func (a *Agent) KillAgent(t testing.TB) {
	t.Helper()
	a.crashed.Store(true)
	if err := a.process().kill(); err != nil {
		t.Fatal(err)
	}
}

// InterruptAgent stops the agent as an operator does for an upgrade: jobs stay,
// and Nomad ends the plugin.
func (a *Agent) InterruptAgent(t testing.TB) {
	t.Helper()
	a.crashed.Store(true)
	if err := a.process().interrupt(); err != nil {
		t.Fatal(err)
	}
}

// DriverPIDs are the plugin processes that the agent runs. It is one, but for
// the moments in which Nomad starts it anew.
func (a *Agent) DriverPIDs() []int {
	var pids []int
	for _, p := range processes(a.l.token) {
		if len(p.args) == 2 && p.args[0] == a.l.pluginPath() && p.args[1] == "driver" {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// KillDriver kills every plugin process there is with SIGKILL and returns how
// many that were.
func (a *Agent) KillDriver() int {
	n := 0
	for _, pid := range a.DriverPIDs() {
		if syscall.Kill(pid, syscall.SIGKILL) == nil {
			n++
		}
	}
	return n
}

// Restart starts an agent that was killed or interrupted again, with the same state and ports, without
// waiting for it.
func (a *Agent) Restart(t testing.TB) {
	t.Helper()
	if err := a.exec(); err != nil {
		t.Fatal(err)
	}
}

// Image returns a reference to a busybox image, with its configuration
// changed, in a directory from which the driver loads images. The same name
// gives the same image.
func (a *Agent) Image(t testing.TB, name string, change func(*v1.Config)) string {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if ref := a.images[name]; ref != "" {
		return ref
	}
	img, err := testimage.Busybox(change)
	if err != nil {
		t.Fatal(err)
	}
	dir := a.l.images() + "/" + name
	if err := testimage.Layout(dir, img); err != nil {
		t.Fatal(err)
	}
	a.images[name] = "oci:" + dir
	return a.images[name]
}

// RunDir is the driver's run_dir.
func (a *Agent) RunDir() string { return a.l.run }

// StateDir is the driver's state_dir.
func (a *Agent) StateDir() string { return a.l.state() }

// ImageDir is a directory from which the driver loads images.
func (a *Agent) ImageDir() string { return a.l.images() }

// AllocDir is the directory of an allocation on the host.
func (a *Agent) AllocDir(allocID string) string { return a.l.data() + "/alloc/" + allocID }

// Stop ends all jobs and the agent and removes everything. The error says
// what the jobs left on the host, and what could not be ended.
func (a *Agent) Stop() error {
	var errs []error
	if err := a.process().gone(); err != nil {
		errs = append(errs, fmt.Errorf("stop agent: %w; its log ends:\n%s", err, a.logTail(0)))
	} else {
		errs = append(errs, a.endJobs(), a.process().interrupt())
	}
	errs = append(errs, a.process().kill(), a.server.kill())
	if left := a.Leftovers(); len(left) > 0 {
		errs = append(errs, fmt.Errorf("left on the host:\n  %s", strings.Join(left, "\n  ")))
	}
	errs = append(errs, a.l.wipe(a.seen()))
	return errors.Join(errs...)
}

// Collect waits until every allocation has ended and Nomad has removed it, and
// fails the test if anything of one is then left on the host. All jobs must
// have been purged.
func (a *Agent) Collect(t testing.TB) {
	t.Helper()
	if err := a.collect(endPatience); err != nil {
		t.Fatal(err)
	}
	Eventually(t, 10*time.Second, func() error {
		if left := a.Leftovers(); len(left) > 0 {
			return fmt.Errorf("left on the host:\n  %s", strings.Join(left, "\n  "))
		}
		return nil
	})
}

// endJobs purges every job and waits until no allocation is left.
func (a *Agent) endJobs() error {
	jobs, _, err := a.Client.Jobs().List(nil)
	if err != nil {
		return fmt.Errorf("list jobs: %w", err)
	}
	for _, j := range jobs {
		if _, _, err := a.Client.Jobs().Deregister(j.ID, true, nil); err != nil {
			return fmt.Errorf("stop job %q: %w", j.ID, err)
		}
	}
	return a.collect(60 * time.Second)
}

// collect waits until all allocations have ended and Nomad has removed them,
// here and on disk.
func (a *Agent) collect(timeout time.Duration) error {
	return poll(timeout, func() error {
		if err := a.Client.System().GarbageCollect(); err != nil {
			return err
		}
		allocs, _, err := a.Client.Allocations().List(nil)
		if err != nil {
			return err
		}
		for _, s := range allocs {
			a.note(s.ID)
		}
		if len(allocs) > 0 {
			return fmt.Errorf("%d allocations left, such as %s (%s)", len(allocs), allocs[0].ID, allocs[0].ClientStatus)
		}
		dirs, err := os.ReadDir(a.l.data() + "/alloc")
		if err != nil || len(dirs) == 0 {
			return err
		}
		return fmt.Errorf("%d allocation directories left", len(dirs))
	})
}

// note remembers an allocation, for the search for leftovers.
func (a *Agent) note(allocID string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.allocs[allocID] = true
}

func (a *Agent) seen() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Keys(a.allocs))
}
