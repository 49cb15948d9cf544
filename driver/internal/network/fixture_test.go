package network

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test's addresses: H stands for the node, A for the allocation.
const (
	node4, alloc4 = "10.9.0.1", "10.9.0.7"
	node6, alloc6 = "fd09::1", "fd09::7"
)

// needRoot skips the test without root; in CI a skip is a failure.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("BIVOUAC_CI") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

// runscPath returns the pinned runsc, or skips; in CI a skip is a failure.
func runscPath(t testing.TB) string {
	t.Helper()
	for _, path := range []string{os.Getenv("BIVOUAC_RUNSC"), "/tmp/tb/runsc"} {
		if _, err := os.Stat(path); path != "" && err == nil {
			return path
		}
	}
	if os.Getenv("BIVOUAC_CI") == "1" {
		t.Fatal("needs BIVOUAC_RUNSC")
	}
	t.Skip("needs BIVOUAC_RUNSC (make test sets it)")
	return ""
}

// peerDir is what peer made, for TestMain to remove.
var peerDir string

// peer builds testdata/peer, once.
var peer = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "peer-")
	if err != nil {
		return "", err
	}
	peerDir = dir
	path := filepath.Join(dir, "peer")
	cmd := exec.Command("go", "build", "-o", path, "./testdata/peer")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build peer: %w: %s", err, out)
	}
	return path, nil
})

func peerPath(t testing.TB) string {
	t.Helper()
	path, err := peer()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(killedAttach); dir != "" {
		attachAndDetachForEver(dir)
	}
	code := m.Run()
	if peerDir != "" {
		_ = os.RemoveAll(peerDir)
	}
	os.Exit(code) // deferred calls are done
}

// world is a node and an allocation, each a network namespace.
type world struct {
	t    testing.TB
	dir  string // for inner namespaces
	h, a string // names
}

// newWorld makes the namespaces, with a bridge and a veth pair as the CNI
// bridge plugin would.
func newWorld(t testing.TB) *world {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("/run", "bvn-")
	if err != nil {
		t.Fatal(err)
	}
	tag := strings.TrimPrefix(filepath.Base(dir), "bvn-")
	w := &world{t: t, dir: filepath.Join(dir, "netns"), h: "bvh" + tag, a: "bva" + tag}
	t.Cleanup(func() {
		for _, ns := range []string{w.h, w.a} {
			_ = exec.Command("ip", "netns", "del", ns).Run()
		}
		left, _ := filepath.Glob(w.dir + "/[^.]*")
		for _, path := range left {
			t.Errorf("left behind: %s", path)
			_ = unix.Unmount(path, unix.MNT_DETACH)
		}
		_ = os.RemoveAll(dir)
	})
	w.sh(`ip netns add H; ip netns add A
ip -n H link set lo up; ip -n A link set lo up
ip -n H link add br0 type bridge; ip -n H link set br0 up
ip -n H addr add 10.9.0.1/24 dev br0; ip -n H addr add fd09::1/64 dev br0 nodad
ip netns exec H sysctl -qw net.ipv4.ip_forward=1
ip netns exec A sysctl -qw net.ipv4.ip_forward=0 net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1 \
	net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0`)
	w.newAlloc()
	return w
}

// newAlloc gives A its interface.
func (w *world) newAlloc() {
	w.t.Helper()
	w.sh(`ip -n H link add vA type veth peer name eth0 netns A
ip -n H link set vA master br0 up
ip -n A addr add 10.9.0.7/24 dev eth0; ip -n A addr add fd09::7/64 dev eth0 nodad
ip -n A link set eth0 up
ip -n A route add default via 10.9.0.1; ip -n A -6 route add default via fd09::1`)
}

func (w *world) path() string { return "/run/netns/" + w.a }

// sh runs a script in which H and A, alone, are the namespaces.
func (w *world) sh(script string) string {
	w.t.Helper()
	out, err := w.try(script)
	if err != nil {
		w.t.Fatalf("%s: %v: %s", script, err, out)
	}
	return out
}

func (w *world) try(script string) (string, error) {
	script = strings.NewReplacer(" H ", " "+w.h+" ", " A ", " "+w.a+" ", " A\n", " "+w.a+"\n", " H;", " "+w.h+";", " A;", " "+w.a+";").Replace(script + "\n")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "bash", "-ec", script).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// state is everything of A that a user can see.
func (w *world) state() string {
	w.t.Helper()
	// Without standard error: ip says there what it thinks of the
	// namespaces that tests beside this one are deleting.
	return w.sh(`exec 2>/dev/null; ip -n A -d addr | grep -v valid_lft; ip -n A route show table all; ip -n A -6 route show table all
ip -n A rule; ip -n A -6 rule; ip -n A neigh | grep PERM || true; ip netns exec A nft list ruleset
ip netns exec A sysctl -a -r '^net\.ipv[46]\.(ip_forward|ip_early_demux|conf\..*\.(forwarding|rp_filter|accept_ra|accept_local|src_valid_mark))$'`)
}

// unchanged fails the test for each line of A's state that is not as before.
func (w *world) unchanged(before string) {
	w.t.Helper()
	after := strings.Split(w.state(), "\n")
	was := strings.Split(before, "\n")
	for _, line := range was {
		if !slices.Contains(after, line) {
			w.t.Errorf("A has lost: %s", line)
		}
	}
	for _, line := range after {
		if !slices.Contains(was, line) {
			w.t.Errorf("A has got: %s", line)
		}
	}
}

// attach attaches and detaches at the end of the test.
func (w *world) attach(o Options) *Attachment {
	w.t.Helper()
	a, err := Attach(w.path(), w.options(o))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { w.detach(a) })
	return a
}

func (w *world) options(o Options) Options {
	o.Dir = w.dir
	return o
}

func (w *world) detach(a *Attachment) {
	w.t.Helper()
	if err := Detach(a); err != nil {
		w.t.Error(err)
	}
}

// place is where a peer runs: a namespace or a sandbox.
type place interface {
	command(args ...string) *exec.Cmd
}

type inNetNS struct{ path string }

func (p inNetNS) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + p.path}, args...)...)
}

func (w *world) node() place    { return inNetNS{"/run/netns/" + w.h} }
func (w *world) sidecar() place { return inNetNS{w.path()} }

// serve starts a server that answers with name, until the test ends.
func serve(t testing.TB, p place, network, addr, name string) {
	t.Helper()
	cmd := p.command(peerIn(p, t), "serve", network, addr, name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "stderr")
	if cmd.Stderr, err = os.Create(log); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		said, _ := os.ReadFile(log)
		t.Fatalf("serve %s %s: %q, %v: %s", network, addr, line, err, said)
	}
}

func peerIn(p place, t testing.TB) string {
	if _, ok := p.(*sandbox); ok {
		return "/peer"
	}
	return peerPath(t)
}

// ask returns a server's answer without the sender's port, or the error.
func ask(t testing.TB, p place, network, remote string) (string, error) {
	t.Helper()
	out, err := p.command(peerIn(p, t), "ask", network, "", remote).CombinedOutput()
	answer := strings.TrimSpace(string(out))
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, answer)
	}
	return answer[:strings.LastIndex(answer, ":")], nil
}

// answers fails the test unless the server's answer is want.
func answers(t testing.TB, p place, network, remote, want string) {
	t.Helper()
	if got, err := ask(t, p, network, remote); err != nil || got != want {
		t.Errorf("%s %s: %q, %v, want %q", network, remote, got, err, want)
	}
}

// held is a connection that stays open.
type held struct {
	t   testing.TB
	in  io.Writer
	out *bufio.Reader
}

func hold(t testing.TB, p place, network, local, remote string) *held {
	t.Helper()
	cmd := p.command(peerIn(p, t), "hold", network, local, remote)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return &held{t, in, bufio.NewReader(out)}
}

// ask returns the whole answer.
func (h *held) ask() string {
	h.t.Helper()
	if _, err := io.WriteString(h.in, "\n"); err != nil {
		h.t.Error(err)
		return ""
	}
	line, err := h.out.ReadString('\n')
	if err != nil {
		h.t.Errorf("no answer on an open connection: %v", err)
	}
	return strings.TrimSpace(line)
}
