package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

// serve answers with its task's name on a port of the allocation's address.
const serve = `mkdir /tmp/www && echo $NOMAD_TASK_NAME > /tmp/www/index.html
exec httpd -f -p $NOMAD_ALLOC_IP_%[1]s:$NOMAD_ALLOC_PORT_%[1]s -h /tmp/www`

// networkJob has two tasks that share one network, each with a port.
func networkJob(t *testing.T, image string) *nomadtest.Job {
	t.Helper()
	j := nomadtest.Service(t, image, fmt.Sprintf(serve, "one")).Bridge()
	j.Set("ports", []string{"one"})
	j.Group.Networks[0].DynamicPorts = []api.Port{{Label: "one", To: 8001}, {Label: "two", To: 8002}}
	second := *j.Task
	second.Name = "second"
	second.Config = map[string]any{
		"image": image, "command": "sh", "args": []string{"-c", fmt.Sprintf(serve, "two")}, "ports": []string{"two"},
	}
	j.Group.Tasks = append(j.Group.Tasks, &second)
	j.Group.RestartPolicy = nomadtest.Restarts(10)
	return j
}

// awaitAnswers waits until both tasks answer at the allocation's address.
func awaitAnswers(t *testing.T, alloc *api.Allocation, when string) {
	t.Helper()
	client := http.Client{Timeout: 2 * time.Second}
	for port, want := range map[int]string{8001: "main\n", 8002: "second\n"} {
		url := fmt.Sprintf("http://%s:%d/", alloc.NetworkStatus.Address, port)
		nomadtest.Eventually(t, 2*nomadtest.Moment, func() error {
			req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
			if err != nil {
				return err
			}
			resp, err := client.Do(req)
			if err != nil {
				return fmt.Errorf("%s: %w", when, err)
			}
			defer func() { _ = resp.Body.Close() }()
			body, err := io.ReadAll(resp.Body)
			if err == nil && string(body) != want {
				err = fmt.Errorf("%s: %s answers %q, want %q", when, url, body, want)
			}
			return err
		})
	}
}

// A network, shared by two sandboxes, survives restarts of a task, of both, of
// the client (which lets CNI check the network) and of the driver.
func TestNetworkSurvivesRestarts(t *testing.T) {
	a := nomadtest.Start(t, nomadtest.Options{OwnServer: true})
	r := a.Run(t, networkJob(t, a.Image(t, "busybox", nil)).Job)
	alloc := r.Running(t)
	address := alloc.NetworkStatus.Address
	awaitAnswers(t, alloc, "after the start")

	restart := func(task string) {
		t.Helper()
		if err := a.Client.Allocations().Restart(alloc, task, nil); err != nil {
			t.Fatal(err)
		}
	}
	restart("main")
	awaitAnswers(t, alloc, "after a restart of one task")
	restart("")
	awaitAnswers(t, alloc, "after a restart of both")

	before, err := a.Sandbox(alloc)
	if err != nil {
		t.Fatal(err)
	}
	// Not a kill: Nomad notes an allocation's network when it stops, or once a
	// minute, and gives up allocations whose network it has not noted.
	a.InterruptAgent(t)
	awaitAnswers(t, alloc, "without an agent")
	a.Restart(t)
	if err := a.AwaitHealthy(); err != nil {
		t.Fatal(err)
	}
	awaitAnswers(t, alloc, "after a restart of the client")
	if after, err := a.Sandbox(alloc); err != nil || after != before {
		t.Errorf("sandbox %s, was %s: the client made the network anew (error %v)", after, before, err)
	}
	a.KillDriver()
	if err := a.AwaitHealthy(); err != nil {
		t.Fatal(err)
	}
	awaitAnswers(t, alloc, "after a crash of the driver")
	nomadtest.Eventually(t, 2*nomadtest.Moment, func() error { return a.Client.Allocations().Restart(alloc, "second", nil) })
	awaitAnswers(t, alloc, "after a restart of the other task")
	if alloc = r.Running(t); alloc.NetworkStatus.Address != address {
		t.Errorf("the address was %s and is %s", address, alloc.NetworkStatus.Address)
	}
}
