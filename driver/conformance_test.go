package driver

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/plugins/drivers"
	dtestutil "github.com/hashicorp/nomad/plugins/drivers/testutils"
	"github.com/shoenig/test/must"
)

// Nomad's own kit for drivers, unchanged.
func TestNomadExecStreamingConformance(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "sleep 600"), nil)
	startTask(t, h, cfg)
	dtestutil.TestExecTaskStreamingBasicResponses(t, h, cfg.ID)
}

// Nomad's TestExecFSIsolation ends with a look for the host's cgroup path
// inside the task, which gVisor does not show. The test runs it, unchanged, in
// a process of its own, and holds it to that one failure.
func TestNomadExecFSIsolationFailsOnlyOnCgroupPath(t *testing.T) {
	n := needNode(t)
	const inner = "BIVOUAC_TEST_INNER"
	if os.Getenv(inner) != "" {
		h := n.harness(t)
		cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "sleep 600"), nil)
		startTask(t, h, cfg)
		dtestutil.TestExecFSIsolation(t, h, cfg.ID)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inner+"=1")
	raw, err := cmd.CombinedOutput()
	must.Error(t, err)
	// Every complaint of the kit names its file.
	var complaints []string
	for line := range strings.Lines(string(raw)) {
		if regexp.MustCompile(`^\s+exec_testing\.go:\d+: `).MatchString(line) &&
			!strings.Contains(line, "received std") && !strings.Contains(line, "created file in task") {
			complaints = append(complaints, line)
		}
	}
	must.Len(t, 1, complaints, must.Sprintf("%s", raw))
	v1, v2 := "unexpected freezer cgroup", "expected condition to be true"
	must.True(t, strings.Contains(complaints[0], v1) || strings.Contains(string(raw), v2), must.Sprint(complaints[0]))
}

func TestNomadDNSConformance(t *testing.T) {
	n := needNode(t)
	ref := n.image(t, "busybox", nil)
	for name, dns := range map[string]*drivers.DNSConfig{
		"node's own": nil,
		"servers":    {Servers: []string{"1.1.1.1", "2606:4700::1111"}},
		"all": {
			Servers: []string{"1.1.1.1"}, Searches: []string{"local.test", "node.consul"},
			Options: []string{"ndots:2", "edns0"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := n.harness(t)
			cfg := taskConfig(t, h, sh(ref, "sleep 600"), func(c *drivers.TaskConfig) { c.DNS = dns })
			startTask(t, h, cfg)
			dtestutil.TestTaskDNSConfig(t, h, cfg.ID, dns)
		})
	}
}
