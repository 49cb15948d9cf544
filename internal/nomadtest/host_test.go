package nomadtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// messy makes an agent that was never started, with one leftover of each kind
// that can be made without Nomad.
func messy(t *testing.T) *Agent {
	t.Helper()
	Need(t)
	l, err := newLayout()
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{l: l, allocs: map[string]bool{}}
	t.Cleanup(func() {
		if err := l.wipe(a.seen()); err != nil {
			t.Error(err)
		}
	})
	mount := filepath.Join(l.dir, "mnt")
	for _, dir := range []string{mount, l.data(), l.run + "/tasks/one", l.run + "/runsc", l.state() + "/images/v1/tmp/two"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(l.data(), "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.run+"/runsc/three.state", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	cmd.Env = []string{"BVT_TOKEN=" + l.token}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // before the wipe's last look, the child must be reaped
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return a
}

func TestLeftoversAreFound(t *testing.T) {
	t.Parallel()
	a := messy(t)
	left := strings.Join(a.Leftovers(), "\n")
	for _, want := range []string{"sleep", "mount " + a.l.dir + "/mnt", "/tasks/one", "/tmp/two", "/fifo", "three.state"} {
		if !strings.Contains(left, want) {
			t.Errorf("%q is not among the leftovers:\n%s", want, left)
		}
	}
	if n := strings.Count(left, "\n") + 1; n != 6 {
		t.Errorf("%d leftovers, want 6:\n%s", n, left)
	}
}

// An agent whose test process is gone is removed by the next; one whose test
// lives is left alone.
func TestAbandonedAgentsAreWiped(t *testing.T) {
	t.Parallel()
	dead, alive := messy(t), messy(t)
	if err := writeOwner(alive.l); err != nil {
		t.Fatal(err)
	}
	// This process's pid, but started at another time.
	if err := os.WriteFile(dead.l.owner(), fmt.Appendf(nil, "%d 1", os.Getpid()), 0o600); err != nil {
		t.Fatal(err)
	}
	wipeAbandoned()
	for _, dir := range []string{dead.l.dir, dead.l.run} {
		if _, err := os.Lstat(dir); err == nil {
			t.Errorf("%s is still there", dir)
		}
	}
	if left := processes(dead.l.token); len(left) > 0 {
		t.Errorf("still running: %v", left)
	}
	if left := processes(alive.l.token); len(left) != 1 {
		t.Errorf("of the agent in use %d processes are left, want 1", len(left))
	}
	if _, err := os.Lstat(alive.l.dir); err != nil {
		t.Error(err)
	}
}

func TestStartTimeNamesAProcess(t *testing.T) {
	t.Parallel()
	a, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	b, err := startTime(1)
	if err != nil {
		t.Fatal(err)
	}
	if a == "" || a == b {
		t.Errorf("start times of this process and init: %q and %q", a, b)
	}
}
