package network

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/bivouac-run/bivouac/driver/internal/runsc"
)

// sandbox is a real one, with the peer program for its only file.
type sandbox struct {
	t     testing.TB
	id    string
	flags []string
	r     *runsc.Runtime
	files runsc.Files
	dead  bool
}

// start starts a sandbox in a namespace.
func start(t testing.TB, id, netns string) *sandbox {
	t.Helper()
	s := &sandbox{t: t, id: id}
	path := runscPath(t)
	root, err := os.MkdirTemp("/run", "bvm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(filepath.Join(root, "null-netns"), unix.MNT_DETACH)
		_ = os.RemoveAll(root)
	})
	s.r = &runsc.Runtime{Path: path, Root: root, Platform: "systrap"}
	bundle := t.TempDir()
	s.files = runsc.Files{Log: filepath.Join(bundle, "log")}
	writeBundle(t, bundle, netns)
	box := runsc.Sandbox{
		ID: id, Bundle: bundle, PIDFile: filepath.Join(bundle, "pid"),
		Network: true, IgnoreCgroups: true, Files: s.files,
	}
	args := s.r.RunArgs(box)
	cmd := exec.Command(args[0], args[1:]...) // a pipe for its output would stay open
	if err := cmd.Run(); err != nil {
		log, _ := os.ReadFile(s.files.Log)
		t.Fatalf("runsc run: %v: %s", err, log)
	}
	deleteArgs := s.r.DeleteArgs(id, s.files)
	s.flags = deleteArgs[:len(deleteArgs)-3] // less: delete --force ID
	t.Cleanup(s.delete)
	return s
}

// delete ends the sandbox.
func (s *sandbox) delete() {
	s.t.Helper()
	if s.dead {
		return
	}
	s.dead = true
	args := s.r.DeleteArgs(s.id, s.files)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		s.t.Errorf("runsc delete: %v: %s", err, out)
	}
}

func (s *sandbox) command(args ...string) *exec.Cmd {
	argv := slices.Concat(s.flags, []string{"exec", s.id}, args)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.WaitDelay = time.Second // a process in the sandbox survives runsc exec, with its output
	return cmd
}

// run returns what a command in the sandbox printed.
func (s *sandbox) run(args ...string) (string, error) {
	out, err := s.command(args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func writeBundle(t testing.TB, dir, netns string) {
	t.Helper()
	root := filepath.Join(dir, "root")
	for _, d := range []string{"proc", "bin"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range map[string]string{peerPath(t): "peer", "/usr/bin/busybox": "bin/busybox"} {
		raw, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, to), raw, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	spec := &specs.Spec{
		Version: specs.Version, Root: &specs.Root{Path: root, Readonly: true}, Hostname: "sandbox",
		Process: &specs.Process{Args: []string{"/peer", "sleep"}, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			{Type: specs.NetworkNamespace, Path: netns},
		}},
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600); err != nil {
		t.Fatal(err)
	}
}
