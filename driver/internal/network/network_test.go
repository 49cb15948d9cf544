package network

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestServesAndAsksUnderTheAllocationsAddress(t *testing.T) {
	t.Parallel()
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
	w.sh("ip netns exec H ping -c1 -W2 " + alloc4 + "; ip netns exec H ping -c1 -W2 " + alloc6)
	asksNode(t, w, s)
	if err := Check(a); err != nil {
		t.Error(err)
	}
	s.delete()
	w.detach(a)
	w.unchanged(before)
	if err := Check(a); err == nil {
		t.Error("a detached network passes the check")
	}
}

// asksNode checks what goes out, by every protocol.
func asksNode(t *testing.T, w *world, p place) {
	t.Helper()
	serve(t, w.node(), "tcp", ":9090", "node")
	serve(t, w.node(), "udp", ":9091", "nodeU")
	answers(t, p, "tcp", node4+":9090", "node "+alloc4)
	answers(t, p, "tcp", "["+node6+"]:9090", "node ["+alloc6+"]")
	answers(t, p, "udp", node4+":9091", "nodeU "+alloc4)
	answers(t, p, "udp", "["+node6+"]:9091", "nodeU ["+alloc6+"]")
}

func TestARestartFindsItsNetwork(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := w.state()
	serve(t, w.node(), "tcp", ":9090", "node")
	for _, id := range []string{"web.1", "web.2", "web.2"} { // Nomad may repeat a start
		a := w.attach(Options{ID: id, Task: "web", Ports: []uint16{8080}})
		s := start(t, id, a.Path)
		serve(t, s, "tcp", ":8080", id)
		answers(t, w.node(), "tcp", alloc4+":8080", id+" "+node4)
		answers(t, s, "tcp", node4+":9090", "node "+alloc4)
		s.delete()
		w.detach(a)
		w.unchanged(before)
	}
}

func TestPortMapReachesTheSandbox(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.attach(Options{ID: "web.1"})
	serve(t, start(t, "web.1", a.Path), "tcp", ":8080", "sandbox")
	// What the portmap plugin does on the node.
	w.sh(`ip netns exec H nft -f - <<E
table ip portmap {
	chain out { type nat hook output priority -100; ip daddr 127.0.0.1 tcp dport 20080 dnat to 10.9.0.7:8080; }
	chain post { type nat hook postrouting priority 100; ip saddr 127.0.0.1 snat to 10.9.0.1; }
}
E
ip netns exec H sysctl -qw net.ipv4.conf.all.route_localnet=1`)
	answers(t, w.node(), "tcp", "127.0.0.1:20080", "sandbox "+node4)
}

func TestRefusesWhatIsNoAllocationsNamespace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		path string
		want error
	}{
		{"/run/netns/no-such", os.ErrNotExist},
		{file, ErrNotNetNS},
		{fifo, ErrNotNetNS},
		{t.TempDir(), ErrNotNetNS},
		{"/proc/self/ns/mnt", ErrNotNetNS},
		{"/proc/self/ns/net", ErrNodeNetNS},
	} {
		if _, err := Attach(tc.path, w.options(Options{ID: "x.1"})); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.path, err, tc.want)
		}
	}
	for _, o := range []Options{{}, {ID: "../x"}, {ID: ".x"}, {ID: "x", Ports: []uint16{0}}} {
		if _, err := Attach(w.path(), w.options(o)); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
	if _, err := Attach(w.path(), Options{ID: "x", Dir: "relative"}); err == nil {
		t.Error("a relative directory is accepted")
	}
}

func TestWithoutAddressesThereIsLoopbackOnly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.sh(`ip -n A link del eth0; ip -n H link add vA type veth peer name eth0 netns A
ip -n A link set eth0 up; ip -n H link set vA up
for i in $(seq 200); do
  ip -n A link show eth0 | grep -q 'state UP' && ip -n A -6 addr show eth0 | grep fe80 | grep -qv tentative && exit
  sleep 0.05
done
exit 1`) // up, with nothing but a link-local address
	before := w.state()
	a := w.attach(Options{ID: "none.1"})
	if len(a.Addresses) > 0 || a.Mark != 0 {
		t.Errorf("it has %+v", a)
	}
	w.unchanged(before)
	links := w.sh("nsenter --net=" + a.Path + " ip -o link")
	if !strings.Contains(links, "LOOPBACK,UP") || strings.Contains(links, "eth0") {
		t.Errorf("links: %s", links)
	}
	if err := Check(a); err != nil {
		t.Error(err)
	}
	w.detach(a)
}

func TestSeveralInterfaces(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.sh(`ip -n H link add second type veth peer name eth1 netns A
ip -n H addr add 10.8.0.1/24 dev second; ip -n H link set second up
ip -n A addr add 10.8.0.7/24 dev eth1; ip -n A link set eth1 mtu 1400 up
ip -n A route add 10.7.0.0/16 via 10.8.0.1; ip -n H addr add 10.7.0.1/32 dev lo`)
	before := w.state()
	a := w.attach(Options{ID: "two.1"})
	want := []netip.Addr{netip.MustParseAddr(alloc4), netip.MustParseAddr(alloc6), netip.MustParseAddr("10.8.0.7")}
	if len(a.Addresses) != len(want) || a.Addresses[0] != want[0] || a.Addresses[1] != want[1] || a.Addresses[2] != want[2] {
		t.Errorf("addresses %v, want %v", a.Addresses, want)
	}
	s := start(t, "two.1", a.Path)
	serve(t, w.node(), "tcp", ":9090", "node")
	answers(t, s, "tcp", node4+":9090", "node "+alloc4)
	answers(t, s, "tcp", "10.8.0.1:9090", "node 10.8.0.7")
	answers(t, s, "tcp", "10.7.0.1:9090", "node 10.8.0.7")
	serve(t, s, "tcp", ":8080", "sandbox")
	answers(t, w.node(), "tcp", "10.8.0.7:8080", "sandbox 10.8.0.1")
	if out, err := s.run("/bin/busybox", "ip", "link"); err != nil || !strings.Contains(out, "mtu 1400") {
		t.Errorf("links in the sandbox: %s, %v", out, err)
	}
	s.delete()
	w.detach(a)
	w.unchanged(before)
}
