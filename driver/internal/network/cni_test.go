package network

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// cni calls the stock bridge plugin on the node of a test, as libcni does.
type cni struct {
	w   *world
	dir string
}

// newCNI finds the plugins, or skips; in CI a skip is a failure.
func newCNI(w *world) *cni {
	w.t.Helper()
	for _, dir := range []string{os.Getenv("BIVOUAC_CNI_DIR"), "/tmp/tb"} {
		if _, err := os.Stat(filepath.Join(dir, "bridge")); dir != "" && err == nil {
			return &cni{w, dir}
		}
	}
	if os.Getenv("BIVOUAC_CI") == "1" {
		w.t.Fatal("needs BIVOUAC_CNI_DIR")
	}
	w.t.Skip("needs BIVOUAC_CNI_DIR (make test sets it)")
	return nil
}

func (c *cni) call(command string, prev json.RawMessage) (json.RawMessage, error) {
	c.w.t.Helper()
	conf := map[string]any{
		"cniVersion": "1.0.0", "name": "nomad", "type": "bridge", "bridge": "br1", "isGateway": true, "ipMasq": false,
		"ipam": map[string]any{
			"type": "host-local", "dataDir": filepath.Join(filepath.Dir(c.w.dir), "ipam"),
			"ranges": [][]map[string]string{{{"subnet": "10.66.0.0/24"}}, {{"subnet": "fd66::/64"}}},
			"routes": []map[string]string{{"dst": "0.0.0.0/0"}, {"dst": "::/0"}},
		},
	}
	if prev != nil {
		conf["prevResult"] = prev
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		c.w.t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", c.w.h, filepath.Join(c.dir, "bridge"))
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID=alloc-1", "CNI_NETNS="+c.w.path(),
		"CNI_IFNAME=eth0", "CNI_PATH="+c.dir)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("CNI %s: %w: %s", command, err, out)
	}
	return out, err
}

// Nomad runs CHECK when its client restarts, and on a failure makes the
// namespace anew under a running sandbox.
func TestCNICheckPassesBesideSandboxes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.sh("ip -n A link del eth0")
	c := newCNI(w)
	result, err := c.call("ADD", nil)
	if err != nil {
		t.Fatal(err)
	}
	before := w.state()
	check := func(when string) {
		t.Helper()
		if _, err := c.call("CHECK", result); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	check("before")
	a := w.attach(Options{ID: "web.1", Task: "web"})
	s := start(t, "web.1", a.Path)
	serve(t, s, "tcp", ":8080", "sandbox")
	b := w.attach(Options{ID: "log.1", Task: "log", Ports: []uint16{9999}})
	start(t, "log.1", b.Path)
	check("beside two sandboxes")
	answers(t, w.node(), "tcp", a.Addresses[0].String()+":8080", "sandbox 10.66.0.1")
	if _, err := ask(t, w.node(), "tcp", "["+a.Addresses[1].String()+"]:8080"); err != nil {
		t.Error(err)
	}
	s.delete()
	check("after one ended")
	w.detach(a)
	w.detach(b)
	check("after detaching")
	w.unchanged(before)

	// The control: without an inner namespace the same CHECK fails.
	direct := start(t, "direct.1", w.path())
	if _, err := c.call("CHECK", result); err == nil {
		t.Error("CHECK passes with a sandbox in the allocation's namespace: the test proves nothing")
	}
	direct.delete()
	if _, err := c.call("DEL", result); err != nil {
		t.Error(err)
	}
}
