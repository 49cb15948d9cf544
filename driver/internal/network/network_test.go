package network

import (
	"testing"
)

func TestServesAndAsksUnderTheAllocationsAddress(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	a := w.attach(Options{ID: "web.1", Task: "web"})
	s := start(t, "web.1", a.Path)
	serve(t, s, "tcp", alloc4+":8080", "sandbox")
	serve(t, s, "tcp", "["+alloc6+"]:8080", "sandbox6")
	serve(t, s, "udp", alloc4+":5353", "sandboxU")
	serve(t, s, "udp", "["+alloc6+"]:5353", "sandboxU6")
	answers(t, w.node(), "tcp", alloc4+":8080", "sandbox "+node4)
	answers(t, w.node(), "tcp", "["+alloc6+"]:8080", "sandbox6 ["+node6+"]")
	answers(t, w.node(), "udp", alloc4+":5353", "sandboxU "+node4)
	answers(t, w.node(), "udp", "["+alloc6+"]:5353", "sandboxU6 ["+node6+"]")

	serve(t, w.node(), "tcp", ":9090", "node")
	serve(t, w.node(), "udp", ":9091", "nodeU")
	answers(t, s, "tcp", node4+":9090", "node "+alloc4)
	answers(t, s, "tcp", "["+node6+"]:9090", "node ["+alloc6+"]")
	answers(t, s, "udp", node4+":9091", "nodeU "+alloc4)
	answers(t, s, "udp", "["+node6+"]:9091", "nodeU ["+alloc6+"]")

	w.sh("ip netns exec H ping -c1 -W2 " + alloc4 + "; ip netns exec H ping -c1 -W2 " + alloc6)
	if err := Check(a); err != nil {
		t.Error(err)
	}
	s.delete()
	w.detach(a)
	w.unchanged(before)
}
