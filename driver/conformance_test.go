package driver

import (
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
// inside the task, which gVisor does not show. Here are its steps up to there,
// as it takes them, and the proof that this is all it stumbles over.
func TestNomadExecFSIsolationExceptCgroupPath(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "sleep 600"), nil)
	startTask(t, h, cfg)

	code, file, _ := dtestutil.ExecTask(t, h, cfg.ID, `FILE=$(mktemp); echo "$FILE"; echo other side >> "${FILE}"`, false, "")
	must.Zero(t, code)
	file = strings.TrimSpace(file)
	must.FileNotExists(t, file)
	code, content, _ := dtestutil.ExecTask(t, h, cfg.ID, "cat "+file, false, "")
	must.Zero(t, code)
	must.Eq(t, "other side\n", content)
	code, cgroups, _ := dtestutil.ExecTask(t, h, cfg.ID, "cat /proc/self/cgroup", false, "")
	must.Zero(t, code)
	must.StrNotContains(t, cgroups, cfg.AllocID)
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
