package network

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

// Several parties in one allocation: sandboxes, and sidecars on A's kernel.

func TestTwoSandboxesInOneAllocation(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := w.state()
	web := w.attach(Options{ID: "web.1", Task: "web", Ports: []uint16{8080}})
	log := w.attach(Options{ID: "agent.1", Task: "agent"})
	s1, s2 := start(t, "web.1", web.Path), start(t, "agent.1", log.Path)
	for _, network := range []string{"tcp", "udp"} {
		serve(t, s1, network, ":8080", "web")
		serve(t, s2, network, ":8080", "agent on web's port")
		serve(t, s2, network, ":7070", "agent")
		answers(t, w.node(), network, alloc4+":8080", "web "+node4)
		answers(t, w.node(), network, "["+alloc6+"]:8080", "web ["+node6+"]")
		answers(t, w.node(), network, alloc4+":7070", "agent "+node4)
	}
	// The same source port to the same destination, at the same time, over
	// every protocol, from both sandboxes and a sidecar.
	serve(t, w.node(), "tcp", ":9090", "node")
	serve(t, w.node(), "udp", ":9090", "node")
	for _, tc := range []struct{ network, local, remote string }{
		{"tcp", alloc4 + ":40000", node4 + ":9090"},
		{"udp", alloc4 + ":40000", node4 + ":9090"},
		{"tcp", "[" + alloc6 + "]:40000", "[" + node6 + "]:9090"},
		{"udp", "[" + alloc6 + "]:40000", "[" + node6 + "]:9090"},
	} {
		seen := map[string]bool{}
		var open []*held
		for _, p := range []place{s1, s2, w.sidecar()} {
			h := hold(t, p, tc.network, tc.local, tc.remote)
			open = append(open, h)
			seen[h.ask()] = true
		}
		for _, h := range open {
			if answer := h.ask(); !seen[answer] {
				t.Errorf("%s: an open connection changed to %q", tc.network, answer)
			}
		}
		if len(seen) != len(open) || !seen["node "+tc.local] {
			t.Errorf("%s: senders as the node sees them: %v", tc.network, seen)
		}
	}
	s1.delete()
	w.detach(web)
	answers(t, w.node(), "tcp", alloc4+":7070", "agent "+node4)
	answers(t, w.node(), "tcp", alloc4+":8080", "agent on web's port "+node4)
	s2.delete()
	w.detach(log)
	w.unchanged(before)
}

func TestASidecarFirstKeepsItsSourcePort(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	serve(t, w.node(), "tcp", ":9090", "node")
	early := hold(t, w.sidecar(), "tcp", alloc4+":40000", node4+":9090")
	want := early.ask()
	a := w.attach(Options{ID: "web.1"})
	s := start(t, "web.1", a.Path)
	if got := early.ask(); got != want {
		t.Errorf("a connection older than the attachment: %q, want %q", got, want)
	}
	later := hold(t, s, "tcp", alloc4+":40000", node4+":9090")
	if got := later.ask(); got == want || !strings.HasPrefix(got, "node "+alloc4) {
		t.Errorf("the sandbox is seen as %q beside %q", got, want)
	}
	if got := early.ask(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	w.detach(a)
	if got := early.ask(); got != want {
		t.Errorf("after detaching: %q, want %q", got, want)
	}
}

func TestSidecarsKeepTheirPorts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	serve(t, w.sidecar(), "tcp", ":7000", "sidecar") // before the attachment
	serve(t, w.node(), "tcp", ":9090", "node")
	a := w.attach(Options{ID: "web.1", Task: "web", Ports: []uint16{8080}})
	s := start(t, "web.1", a.Path)
	serve(t, s, "tcp", ":8080", "sandbox")
	serve(t, s, "udp", ":8080", "sandboxU")
	serve(t, s, "tcp", ":7000", "sandbox on the sidecar's port")
	serve(t, w.sidecar(), "udp", ":7001", "sidecarU") // after it
	serve(t, w.sidecar(), "tcp", alloc4+":7002", "sidecar")
	for range 5 { // the handshake, where there is no full socket yet
		answers(t, w.node(), "tcp", alloc4+":7000", "sidecar "+node4)
		answers(t, w.node(), "tcp", "["+alloc6+"]:7000", "sidecar ["+node6+"]")
		answers(t, w.node(), "udp", alloc4+":7001", "sidecarU "+node4)
		answers(t, w.node(), "tcp", alloc4+":7002", "sidecar "+node4)
	}
	answers(t, w.node(), "tcp", alloc4+":8080", "sandbox "+node4)
	asksNodeOnce(t, w)
	// Among themselves.
	answers(t, w.sidecar(), "tcp", alloc4+":7000", "sidecar "+alloc4)
	answers(t, w.sidecar(), "tcp", "127.0.0.1:7000", "sidecar 127.0.0.1")
	answers(t, w.sidecar(), "tcp", alloc4+":8080", "sandbox 169.254.0.1")
	answers(t, w.sidecar(), "udp", alloc4+":8080", "sandboxU 169.254.0.1")
	if got, err := ask(t, w.sidecar(), "tcp", "["+alloc6+"]:8080"); err != nil || !strings.HasPrefix(got, "sandbox [fe80::1") {
		t.Errorf("%q, %v", got, err)
	}
	answers(t, s, "tcp", "169.254.0.1:7000", "sidecar "+alloc4)
}

// asksNodeOnce checks a sidecar's own way out.
func asksNodeOnce(t *testing.T, w *world) {
	t.Helper()
	answers(t, w.sidecar(), "tcp", node4+":9090", "node "+alloc4)
	answers(t, w.sidecar(), "tcp", "["+node6+"]:9090", "node ["+alloc6+"]")
}

func TestTheReceiverDoesNotDependOnTheOrderOfStarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	receiver := func() string {
		return w.sh("ip netns exec A nft list map inet bivouac receiver | grep -o 'ipv4 : [^,]*'")
	}
	b := w.attach(Options{ID: "b.1", Task: "b"})
	alone := receiver()
	a := w.attach(Options{ID: "a.1", Task: "a"})
	both := receiver()
	if both == alone {
		t.Errorf("%s stays the receiver", b.ID)
	}
	w.detach(b)
	w.attach(Options{ID: "b.2", Task: "b"})
	if receiver() != both {
		t.Error("a restart of another moved the receiver")
	}
	claim := w.attach(Options{ID: "0.1", Task: "0", Ports: []uint16{80}})
	if receiver() != both {
		t.Error("one that claims a port became the receiver")
	}
	w.detach(a)
	if receiver() == both {
		t.Error("the receiver has gone and is the receiver")
	}
	w.detach(claim)
}

func TestAPortIsClaimedOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	many := make([]uint16, 0, 3000)
	for i := range cap(many) {
		many = append(many, uint16(1+i))
	}
	first := w.attach(Options{ID: "web.1", Task: "web", Ports: many})
	before := w.state()
	_, err := Attach(w.path(), w.options(Options{ID: "api.1", Task: "api", Ports: []uint16{9999, 80}}))
	if err == nil || !strings.Contains(err.Error(), `port 80 is claimed by task "web" (web.1)`) {
		t.Errorf("got %v", err)
	}
	w.unchanged(before)
	w.detach(first)
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := w.state()
	const n = 8
	errs := make(chan error, n)
	for i := range n {
		go func() { // ends with its one attachment; all are waited for below
			id := fmt.Sprintf("task.%d", i)
			a, err := Attach(w.path(), w.options(Options{ID: id, Ports: []uint16{uint16(8000 + i)}}))
			if err == nil {
				err = Check(a)
			}
			if err == nil && i%2 == 0 {
				err = Detach(a)
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	for i := range n {
		w.detach(Planned(w.path(), w.options(Options{ID: fmt.Sprintf("task.%d", i)})))
	}
	w.unchanged(before)
}

// A's kernel knows nothing of a sandbox's connections and would reset them, if
// it ever saw one of their packets.
func TestAKernelThatForgotAConnectionDoesNotResetIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.attach(Options{ID: "web.1"})
	s := start(t, "web.1", a.Path)
	serve(t, s, "tcp", ":8080", "sandbox")
	serve(t, w.node(), "tcp", ":9090", "node")
	for _, loose := range []string{"1", "0"} { // taken up midway, or invalid
		w.sh("ip netns exec A sysctl -qw net.netfilter.nf_conntrack_tcp_loose=" + loose)
		in := hold(t, w.node(), "tcp", "", alloc4+":8080")
		out := hold(t, s, "tcp", "", node4+":9090")
		first := [2]string{in.ask(), out.ask()}
		err := inAlloc(a, func(*os.File, *router) error { return forgetFlows(a.Mark) })
		if err != nil {
			t.Fatal(err)
		}
		if again := [2]string{in.ask(), out.ask()}; again != first {
			t.Errorf("loose=%s: %q, was %q", loose, again, first)
		}
	}
}

// What leaves a sandbox has its address, and goes nowhere in A by loopback.
func TestASandboxCannotForgeItsSource(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.attach(Options{ID: "evil.1"})
	serve(t, w.node(), "udp", ":9091", "node")
	// In I without runsc, where nothing but the rules stands in the way.
	evil := inNetNS{a.Path}
	answers(t, evil, "udp", node4+":9091", "node "+alloc4)
	w.sh("nsenter --net=" + a.Path + " ip addr add 10.9.0.66/32 dev eth0")
	w.sh("ip -n H route add 10.9.0.66 via 10.9.0.7")
	out, err := evil.command(peerPath(t), "ask", "udp", "10.9.0.66:0", node4+":9091").CombinedOutput()
	if err == nil {
		t.Errorf("an address that is not the sandbox's gets an answer: %s", out)
	}
}

// All parties have the address, so each can send an answer in another's name.
// The flow stays its owner's all the same.
func TestAnAnswerInAnothersNameTakesNoFlow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	web := w.attach(Options{ID: "web.1", Task: "web", Ports: []uint16{8080}})
	evil := w.attach(Options{ID: "evil.1", Task: "evil", Ports: []uint16{9999}})
	s1, s2 := start(t, "web.1", web.Path), start(t, "evil.1", evil.Path)
	serve(t, s1, "udp", ":8080", "web")
	serve(t, w.sidecar(), "udp", ":7001", "sidecar")
	for port, owner := range map[string]string{":8080": "web", ":7001": "sidecar"} {
		h := hold(t, w.node(), "udp", node4+":40000", alloc4+port)
		if got := h.ask(); !strings.HasPrefix(got, owner) {
			t.Fatalf("%s answers %q", port, got)
		}
		c := s2.command("/peer", "hold", "udp", alloc4+port, node4+":40000")
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(in, "\n")
		h.ask() // what it reads may be the forged datagram, and lag behind from here on
		_ = in.Close()
		_ = c.Wait()
		serve(t, s2, "udp", port, "evil")
		for range 3 {
			if got := h.ask(); strings.HasPrefix(got, "evil") {
				t.Errorf("%s, which belongs to %s, answers %q", port, owner, got)
			}
		}
		_ = h.in.(io.Closer).Close()
	}
}
