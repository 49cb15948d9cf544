package network

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// killedAttach in the environment makes the test program attach and detach
// until it is killed. Its value is the directory and the namespace's path.
const killedAttach = "BIVOUAC_TEST_KILLED_ATTACH"

func attachAndDetachForEver(where string) {
	dir, path, _ := strings.Cut(where, " ")
	for {
		a, err := Attach(path, Options{ID: "killed.1", Dir: dir, Ports: []uint16{80, 443}})
		if err == nil {
			err = Detach(a)
		}
		if err != nil {
			os.Exit(1)
		}
	}
}

// A driver that is killed at any moment leaves nothing that Detach, or the
// next Attach, does not remove.
func TestKilledHalfway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := w.state()
	o := w.options(Options{ID: "killed.1", Ports: []uint16{80}})
	partial := 0
	const rounds = 40
	for i := range rounds {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killedAttach+"="+w.dir+" "+w.path())
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Any moment from the start of the work on: the steps below spread
		// over one attachment and its removal.
		waitFor(t, func() bool { _, err := os.Stat(o.Dir + "/killed.1"); return err == nil })
		time.Sleep(time.Duration(i) * time.Millisecond)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if cmd.ProcessState.Exited() {
			t.Fatal("it ended by itself: an attachment failed")
		}
		if w.state() != before {
			partial++
		}
		if i%2 == 0 {
			a, err := Attach(w.path(), o)
			if err != nil {
				t.Fatal(err)
			}
			if err := Check(a); err != nil {
				t.Error(err)
			}
		}
		w.detach(Planned(w.path(), o))
		w.unchanged(before)
		if t.Failed() {
			t.Fatalf("in round %d", i)
		}
	}
	t.Logf("%d of %d kills left something to remove", partial, rounds)
	if partial < rounds/4 {
		t.Error("too few kills hit the work")
	}
}

func waitFor(t *testing.T, what func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !what(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
	}
}

func TestTheAllocationsNamespaceGoesFirst(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.attach(Options{ID: "web.1"})
	s := start(t, "web.1", a.Path)
	w.sh("ip netns del A")
	if err := Check(a); err == nil {
		t.Error("the check passes")
	}
	s.delete()
	w.detach(a)
	w.detach(a)

	// Nomad makes it anew under the same name: the old one's sandbox must be
	// told, and detaching it must leave the new one's alone.
	w.sh("ip netns add A")
	w.newAlloc()
	old := w.attach(Options{ID: "web.2"})
	w.sh("ip netns del A; ip netns add A; ip -n H link del vA || true")
	w.newAlloc()
	before := w.state()
	if err := Check(old); err == nil {
		t.Error("the check passes in another namespace")
	}
	fresh := w.attach(Options{ID: "web.3"})
	w.detach(old)
	if err := Check(fresh); err != nil {
		t.Error(err)
	}
	w.detach(fresh)
	w.unchanged(before)
}

func TestDetachIsIdempotent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := w.state()
	w.detach(Planned(w.path(), w.options(Options{ID: "never.1"})))
	w.unchanged(before)
	a := w.attach(Options{ID: "web.1"})
	w.sh("ip -n A link del $(ip -n A -o link | grep -o 'bvk[^@:]*')") // an operator at work
	if err := Check(a); err == nil {
		t.Error("the check passes without a link")
	}
	w.detach(a)
	w.detach(a)
	w.unchanged(before)
}

// A failure at the last step undoes all before it.
func TestAFailureIsUndone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := w.state()
	first := w.attach(Options{ID: "first.1", Ports: []uint16{80}})
	during := w.state()
	if _, err := Attach(w.path(), w.options(Options{ID: "second.1", Ports: []uint16{80}})); err == nil {
		t.Error("a port was claimed twice")
	}
	w.unchanged(during)
	if _, err := os.Stat(w.dir + "/second.1"); err == nil {
		t.Error("the namespace is still there")
	}
	w.detach(first)
	w.unchanged(before)
}

// No thread may stay in a namespace that it was sent to.
func TestNoThreadStaysElsewhere(t *testing.T) {
	w := newWorld(t) // not parallel: others' threads are elsewhere for good reason
	for i := range 20 {
		w.detach(w.attach(Options{ID: fmt.Sprintf("t.%d", i)}))
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { // threads end a moment after their goroutines
		threads, err := filepath.Glob("/proc/self/task/*/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range threads {
			if ns, err := os.Readlink(path); err == nil && ns != own {
				return false
			}
		}
		return true
	})
}
