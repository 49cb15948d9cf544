package runsc

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// runtimeFor returns the pinned runsc with a root of the test's own, or skips;
// in CI a skip is a failure.
func runtimeFor(t *testing.T) *Runtime {
	t.Helper()
	path := os.Getenv("BIVOUAC_RUNSC")
	if path == "" || os.Geteuid() != 0 {
		if os.Getenv("BIVOUAC_CI") == "1" {
			t.Fatal("needs root and BIVOUAC_RUNSC")
		}
		t.Skip("needs root and BIVOUAC_RUNSC (make test sets it)")
	}
	root, err := os.MkdirTemp("/run", "bvr-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(filepath.Join(root, "null-netns"), unix.MNT_DETACH)
		if err := os.RemoveAll(root); err != nil {
			t.Error(err)
		}
	})
	return &Runtime{Path: path, Root: root, Platform: "systrap", CoreTags: CoreTagsSupported()}
}

// fake is a runsc that does what body says.
func fake(t *testing.T, body string) *Runtime {
	t.Helper()
	path := filepath.Join(t.TempDir(), "runsc")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &Runtime{Path: path, Root: t.TempDir(), Platform: "systrap"}
}

func TestVersion(t *testing.T) {
	v, err := runtimeFor(t).Version(t.Context())
	if err != nil || v.Release == "" || len(v.Commit) < 7 {
		t.Fatalf("version is %+v, %v", v, err)
	}
	if _, err := fake(t, "echo hello").Version(t.Context()); err == nil || !strings.Contains(err.Error(), "not runsc's answer") {
		t.Fatalf("got %v", err)
	}
	if _, err := (&Runtime{Path: "/no/such"}).Version(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("got %v", err)
	}
}

func TestCommitOf(t *testing.T) {
	for in, want := range map[string]string{
		"v0.0.0-20260905035102-160fafc42237": "160fafc42237",
		"release-20260901.0-12-g0123456789":  "0123456789",
		"release-20260901.0":                 "",
		"VERSION_MISSING":                    "",
		"":                                   "",
	} {
		if got := commitOf(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestProbe(t *testing.T) {
	r := runtimeFor(t)
	shim := os.Getenv("BIVOUAC_SHIM")
	if shim == "" {
		t.Fatal("needs BIVOUAC_SHIM")
	}
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := r.Probe(ctx, shim, dir); err != nil {
		t.Fatal(err)
	}
	if err := r.Probe(ctx, "/bin/false", dir); err == nil {
		t.Error("a program that fails passes for one that ran")
	}
	short, cancelShort := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancelShort()
	err := fakeHang(t).Probe(short, shim, dir)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a platform that hangs: %v", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func fakeHang(t *testing.T) *Runtime {
	return fake(t, `case "$*" in *delete*) exit;; esac
exec sleep 300`)
}

func TestErrorsAreRunscsOwn(t *testing.T) {
	r := runtimeFor(t)
	if err := r.Kill(t.Context(), "nosuch", unix.SIGTERM); !errors.Is(err, ErrNotRunning) {
		t.Errorf("kill: %v", err)
	}
	if err := r.Delete(t.Context(), "nosuch"); err != nil {
		t.Errorf("delete: %v", err)
	}
	if r.Exists("nosuch") {
		t.Error("it exists")
	}
	logged := fake(t, `printf '{"msg":"the cause","level":"error"}' >&3; exit 128`)
	if err := logged.Kill(t.Context(), "x", unix.SIGTERM); err == nil || err.Error() != "runsc kill: the cause" {
		t.Errorf("got %v", err)
	}
	silent := fake(t, "exit 9")
	if err := silent.Kill(t.Context(), "x", unix.SIGTERM); err == nil || !strings.Contains(err.Error(), "exit status 9") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := fakeHang(t).Kill(ctx, "x", unix.SIGTERM); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestOptionsForUntrustedCode(t *testing.T) {
	r := &Runtime{Path: "runsc", Root: "/r", Platform: "systrap", CoreTags: true}
	args := strings.Join(r.RunArgs(Sandbox{ID: "x", Bundle: "/b", PIDFile: "/p", OverlayDir: "/o", Files: Files{Log: "/l", PanicLog: "/q"}}), " ")
	for _, want := range []string{
		"--host-uds=none", "--host-fifo=none", "--net-raw=false", "--allow-packet-socket-write=false", "--allow-suid=false",
		"--character-device-policy=emulated-only", "--oci-seccomp=true", "--network=none", "--overlay2=root:dir=/o", "--enable-core-tags=true",
		"--panic-log=/q", "run --detach --bundle=/b --pid-file=/p x",
	} {
		if !strings.Contains(args, want) {
			t.Errorf("%q is missing in %q", want, args)
		}
	}
	for _, never := range []string{"--network=host", "allow-flag-override", "--profile", "TESTONLY", "--debug"} {
		if strings.Contains(args, never) {
			t.Errorf("%q is in %q", never, args)
		}
	}
	if args := r.RunArgs(Sandbox{Network: true}); !strings.Contains(strings.Join(args, " "), "--network=sandbox --overlay2=root:memory") {
		t.Errorf("args are %q", args)
	}
}

func TestExitCodeOfCommandsThatCannotRun(t *testing.T) {
	for logged, want := range map[string]int{
		`executing: error finding executable "x" in PATH [/bin]: no such file or directory`: ExitNotFound,
		`executing: failed to load /etc/passwd: permission denied`:                          ExitCannotExecute,
		`executing: failed to load /x: exec format error`:                                   ExitCannotExecute,
	} {
		if got, err := exitCode(logged, nil); got != want || err != nil {
			t.Errorf("%q: %d, %v", logged, got, err)
		}
	}
	if _, err := exitCode("loading container: file does not exist", nil); !errors.Is(err, ErrNotRunning) {
		t.Errorf("got %v", err)
	}
}

// The environment of a command may hold secrets: it must reach runsc in a file
// without a name, not in its arguments.
func TestExecPassesTheProcessInAMemoryFile(t *testing.T) {
	secret := "hunter2"
	process, err := json.Marshal(specs.Process{Args: []string{"x"}, Cwd: "/", Env: []string{"PASSWORD=" + secret}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	r := fake(t, `echo "$@" > `+dir+`/args; env > `+dir+`/env; cat /proc/self/fd/4 > `+dir+`/process; cat; echo err >&2; exit 5`)
	var out, errOut strings.Builder
	code, err := r.Exec(t.Context(), Exec{
		ID: "x", Process: process, Dir: dir,
		Stdin: strings.NewReader("in"), Stdout: &out, Stderr: &errOut,
	})
	if err != nil || code != 5 || out.String() != "in" || errOut.String() != "err\n" {
		t.Fatalf("%d, %v, %q, %q", code, err, out.String(), errOut.String())
	}
	for file, want := range map[string]bool{"args": false, "env": false, "process": true} {
		raw, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil || strings.Contains(string(raw), secret) != want {
			t.Errorf("%s is %q, %v", file, raw, err)
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, "exec-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestExecOutputIsNeverCut(t *testing.T) {
	r := fake(t, "seq 1 300000")
	slow := &slowWriter{pause: 2 * time.Millisecond}
	code, err := r.Exec(t.Context(), Exec{ID: "x", Process: []byte("{}"), Dir: t.TempDir(), Stdout: slow})
	if err != nil || code != 0 {
		t.Fatalf("%d, %v", code, err)
	}
	if !strings.HasSuffix(slow.String(), "\n300000\n") {
		t.Fatalf("the end is missing after %d bytes", slow.Len())
	}
}

// slowWriter takes its time, so that output still waits when the command ends.
type slowWriter struct {
	strings.Builder
	pause time.Duration
}

func (w *slowWriter) Write(p []byte) (int, error) {
	time.Sleep(w.pause)
	return w.Builder.Write(p)
}

// A client may stop reading for longer than anybody would wait, `less` say.
func TestExecWaitsForASlowClient(t *testing.T) {
	for _, tty := range []bool{false, true} {
		slow := &slowWriter{pause: 1500 * time.Millisecond}
		const want = 3000
		code, err := fake(t, "head -c 3000 /dev/zero").Exec(t.Context(), Exec{ID: "x", Process: []byte("{}"), Dir: t.TempDir(), TTY: tty, Stdout: slow})
		if err != nil || code != 0 || slow.Len() != want {
			t.Errorf("tty %v: %d, %v, %d bytes", tty, code, err, slow.Len())
		}
	}
}

// What a command leaves of its input is read all the same.
func TestExecTakesAllInput(t *testing.T) {
	r, w := io.Pipe()
	go func() {
		for range 100 {
			if _, err := w.Write(make([]byte, 4096)); err != nil {
				t.Error(err)
			}
		}
		_ = w.Close()
	}()
	code, err := fake(t, "head -c 1 >/dev/null; exit 3").Exec(t.Context(), Exec{ID: "x", Process: []byte("{}"), Dir: t.TempDir(), Stdin: r})
	if err != nil || code != 3 {
		t.Fatalf("%d, %v", code, err)
	}
	if n, err := w.Write(nil); n != 0 || (err != nil && !errors.Is(err, io.ErrClosedPipe)) {
		t.Fatal(n, err)
	}
}

func TestExecEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var out strings.Builder
	_, err := fake(t, "exec sleep 300").Exec(ctx, Exec{ID: "x", Process: []byte("{}"), Dir: t.TempDir(), Stdout: &out})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
}

func TestExecOfBackgroundChildrenReturns(t *testing.T) {
	var out strings.Builder
	start := time.Now()
	_, err := fake(t, "(sleep 20; echo late) & echo now").Exec(t.Context(), Exec{ID: "x", Process: []byte("{}"), Dir: t.TempDir(), Stdout: &out})
	if err != nil || out.String() != "now\n" || time.Since(start) > 10*time.Second {
		t.Fatalf("%q after %v, %v", out.String(), time.Since(start), err)
	}
}

func TestTerminalSize(t *testing.T) {
	master, replica, err := openTerminal()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	defer replica.Close()
	if err := setSize(master, Size{Rows: 33, Cols: 77}); err != nil {
		t.Fatal(err)
	}
	ws, err := unix.IoctlGetWinsize(int(replica.Fd()), unix.TIOCGWINSZ)
	if err != nil || ws.Row != 33 || ws.Col != 77 {
		t.Fatalf("%+v, %v", ws, err)
	}
	if err := master.SetReadDeadline(time.Now()); err != nil {
		t.Fatalf("the master cannot be woken: %v", err)
	}
}
