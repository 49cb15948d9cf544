package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

func TestHello(t *testing.T) {
	t.Parallel()
	a := agent(t)
	alloc := a.Run(t, nomadtest.Batch(t, busybox(t), "dmesg; cat /proc/version; echo to-stderr >&2").Job).Done(t)
	if alloc.ClientStatus != api.AllocClientStatusComplete {
		t.Fatalf("allocation is %s: %s", alloc.ClientStatus, nomadtest.Events(alloc, "main"))
	}
	out := a.AwaitLog(t, alloc, "stdout", func(s string) bool { return strings.Contains(s, "Linux version") })
	if !strings.Contains(out, "gVisor") {
		t.Errorf("dmesg does not name gVisor:\n%s", out)
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out, strings.TrimSpace(string(kernel))) {
		t.Errorf("the sandbox shows the host's kernel %s:\n%s", kernel, out)
	}
	if strings.Contains(out, "to-stderr") {
		t.Errorf("stderr is in stdout:\n%s", out)
	}
	a.AwaitLog(t, alloc, "stderr", func(s string) bool { return s == "to-stderr\n" })
}

// The job file that the README starts with.
func TestHelloJobFile(t *testing.T) {
	t.Parallel()
	a := agent(t)
	hcl, err := os.ReadFile("../jobspecs/hello.nomad.hcl")
	if err != nil {
		t.Fatal(err)
	}
	r := a.RunHCL(t, string(hcl), "image = \""+busybox(t)+"\"")
	out := a.AwaitLog(t, r.Running(t), "stdout", func(s string) bool { return strings.Contains(s, "\nup ") })
	for _, want := range []string{"kernel  Linux", "gvisor", "network     lo\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the output:\n%s", want, out)
		}
	}
	alloc := stop(t, r)
	a.AwaitLog(t, alloc, "stdout", func(s string) bool { return strings.HasSuffix(s, "bye\n") })
	if alloc.ClientStatus != api.AllocClientStatusComplete {
		t.Errorf("allocation is %s: %s", alloc.ClientStatus, nomadtest.Events(alloc, "main"))
	}
}
