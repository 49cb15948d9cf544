package shim

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/internal/statefile"
	"golang.org/x/sys/unix"
)

// The test binary serves as the shim.
func TestMain(m *testing.M) {
	if dir := os.Getenv("BIVOUAC_TEST_SHIM"); dir != "" {
		os.Exit(Main(dir, os.NewFile(StatusFD, "status"), os.NewFile(LockFD, "lock")))
	}
	os.Exit(m.Run())
}

// script is a Run or Delete command. It gets the task's directory as $1.
func script(t *testing.T, dir, body string) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return []string{path, dir}
}

// daemon is a Run command that leaves an orphan, as runsc does with a sandbox.
// The orphan outlives it by a moment: a shell, unlike runsc, reaps a child that
// ends before it.
const daemon = `sh -c 'sleep 0.2; %s' & echo $! > $1/pid`

// launch runs a shim on a task whose commands are run and del, with output to
// nowhere, and returns its directory and process.
func launch(t *testing.T, run, del string, change func(*Config)) (string, *exec.Cmd) {
	t.Helper()
	dir := t.TempDir()
	cfg := &Config{
		Run: script(t, dir, run), Delete: script(t, dir, del), PIDFile: filepath.Join(dir, "pid"),
		RuntimeLog: filepath.Join(dir, "log"), PanicLog: filepath.Join(dir, "panic"),
		AllocDir: t.TempDir(), Stdout: os.DevNull, Stderr: os.DevNull, StartTimeout: 10 * time.Second,
	}
	if change != nil {
		change(cfg)
	}
	if err := WriteConfig(dir, cfg); err != nil {
		t.Fatal(err)
	}
	lock, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	_, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "BIVOUAC_TEST_SHIM="+dir)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{w, lock}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return dir, cmd
}

func TestExitOfOrphanIsRecorded(t *testing.T) {
	for name, c := range map[string]struct {
		body         string
		code, signal int
	}{
		"seven":   {"exit 7", 7, 0},
		"zero":    {"true", 0, 0},
		"killed":  {"kill -KILL $$", 137, 9},
		"segv":    {"kill -SEGV $$", 139, 11},
		"137 too": {"exit 137", 137, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, cmd := launch(t, fmt.Sprintf(daemon, c.body), "echo gone > $1/deleted", nil)
			if err := cmd.Wait(); err != nil {
				started, _ := ReadStarted(dir)
				t.Fatal(err, started)
			}
			exit, err := ReadExit(dir)
			if err != nil {
				t.Fatal(err)
			}
			if exit.Code != c.code || exit.Signal != c.signal || exit.OOMKilled || exit.Err != "" {
				t.Fatalf("exit is %+v", exit)
			}
			if _, err := os.Stat(filepath.Join(dir, "deleted")); err != nil {
				t.Fatal("the delete command was not run")
			}
			started, err := ReadStarted(dir)
			if err != nil || started.Err != "" || started.Shim.PID != cmd.Process.Pid {
				t.Fatalf("started is %+v, %v", started, err)
			}
			if running, err := Running(dir); running || err != nil {
				t.Fatalf("lock is held: %v", err)
			}
		})
	}
}

func TestFailedStartTellsRuntimesLastError(t *testing.T) {
	const run = `printf '{"msg":"first","level":"error"}{"msg":"careful","level":"warning"}{"msg":"the cause","level":"error"}' > $1/log; exit 128`
	dir, cmd := launch(t, run, "echo gone > $1/deleted", nil)
	if err := cmd.Wait(); err == nil {
		t.Fatal("the shim ended well")
	}
	started, err := ReadStarted(dir)
	if err != nil || started.Err != "the cause" {
		t.Fatalf("started is %+v, %v", started, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "deleted")); err != nil {
		t.Fatal("nothing was cleaned up")
	}
	if _, err := ReadExit(dir); err == nil {
		t.Fatal("an exit was recorded for a task that never ran")
	}
}

func TestHangingStartIsEnded(t *testing.T) {
	dir, cmd := launch(t, "sleep 300", ":", func(c *Config) { c.StartTimeout = 100 * time.Millisecond })
	_ = cmd.Wait()
	started, err := ReadStarted(dir)
	if err != nil || !strings.Contains(started.Err, SlowStart) {
		t.Fatalf("started is %+v, %v", started, err)
	}
}

func TestOOMVerdict(t *testing.T) {
	for name, c := range map[string]struct {
		ws      syscall.WaitStatus
		kills   uint64
		panics  string
		oom     bool
		code    int
		errText string
	}{
		"main process killed":        {137 << 8, 1, "", true, 137, ""},
		"sandbox killed":             {9, 2, "", true, 137, ""},
		"only a child was":           {5 << 8, 1, "", false, 5, ""},
		"killed, but not by the OOM": {9, 0, "", false, 137, ""},
		"runtime panic":              {2 << 8, 0, "panic: boom", false, 2, "sandbox runtime failed: panic: boom"},
	} {
		t.Run(name, func(t *testing.T) {
			e := &Exit{}
			e.fill(c.ws, c.kills, c.panics)
			if e.OOMKilled != c.oom || e.Code != c.code || e.Err != c.errText || e.OOMKills != c.kills {
				t.Fatalf("exit is %+v", e)
			}
		})
	}
}

func TestReadOOMKills(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	for content, want := range map[string]uint64{
		"oom_kill_disable 0\nunder_oom 0\noom_kill 3\n":                3, // v1
		"low 0\nhigh 0\nmax 12\noom 4\noom_kill 2\noom_group_kill 0\n": 2, // v2
		"": 0, "oom_kill x\n": 0,
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := readOOMKills(path); got != want {
			t.Errorf("%q: %d, want %d", content, got, want)
		}
	}
	if readOOMKills("/no/such") != 0 || readOOMKills("") != 0 {
		t.Error("a missing file counts")
	}
}

func TestKillEndsTheShimThatHoldsTheLock(t *testing.T) {
	dir, cmd := launch(t, fmt.Sprintf(daemon, "exec sleep 300"), ":", nil)
	waitStarted(t, dir)
	started, _ := ReadStarted(dir)
	defer started.Sandbox.Signal(syscall.SIGKILL)
	reaped := make(chan struct{})
	go func() { _ = cmd.Wait(); close(reaped) }()
	if err := Kill(dir); err != nil {
		t.Fatal(err)
	}
	<-reaped
	if !started.Sandbox.Alive() {
		t.Fatal("the sandbox was touched")
	}
	if err := Kill(dir); err != nil { // again
		t.Fatal(err)
	}
	if err := Kill(t.TempDir()); err != nil { // never was
		t.Fatal(err)
	}
}

func waitStarted(t *testing.T, dir string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := ReadStarted(dir); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no start")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestNewerConfigIsRefused(t *testing.T) {
	dir, cmd := launch(t, ":", ":", nil)
	_ = cmd.Wait()
	if err := statefile.WriteVolatile(filepath.Join(dir, configFile), Version+1, &Config{}); err != nil {
		t.Fatal(err)
	}
	if _, err := read[Config](dir, configFile); err == nil || !strings.Contains(err.Error(), "newer") {
		t.Fatalf("got %v", err)
	}
}

func TestOverlayRefusesSeparators(t *testing.T) {
	for _, p := range []string{"/a,b", "/a:b", `/a\b`} { // fails before it mounts
		if err := mountOverlay(&Overlay{Lower: p}); err == nil {
			t.Errorf("%q accepted", p)
		}
	}
	if err := mountOverlay(nil); err != nil {
		t.Fatal(err)
	}
}

func TestCommandThatOnlyPrintsItsError(t *testing.T) {
	dir, cmd := launch(t, "echo bad flag >&2; exit 2", ":", nil)
	_ = cmd.Wait()
	started, err := ReadStarted(dir)
	if err != nil || !strings.Contains(started.Err, "exit status 2") || !strings.Contains(started.Err, "bad flag") {
		t.Fatalf("started is %+v, %v", started, err)
	}
}

// needRoot skips, or fails in CI, where the test cannot mount.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("BIVOUAC_CI") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

func TestBindsAreOfTheDirectoryItself(t *testing.T) {
	needRoot(t)
	allocDir, target := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(allocDir, "alloc/logs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(allocDir, "alloc/logs/mark"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	change := func(c *Config) {
		c.AllocDir = allocDir
		c.Binds = []Bind{{"alloc/logs", target}}
	}
	dir, cmd := launch(t, "ls "+target+" > $1/seen; "+fmt.Sprintf(daemon, "true"), ":", change)
	if err := cmd.Wait(); err != nil {
		started, _ := ReadStarted(dir)
		t.Fatal(err, started)
	}
	if raw, err := os.ReadFile(filepath.Join(dir, "seen")); err != nil || string(raw) != "mark\n" {
		t.Fatalf("the command saw %q, %v", raw, err)
	}
	if left, err := os.ReadDir(target); err != nil || len(left) > 0 {
		t.Fatalf("the node sees the mount: %v, %v", left, err)
	}
	// The same with a link in the place of the directory.
	if err := os.Rename(filepath.Join(allocDir, "alloc/logs"), filepath.Join(allocDir, "logs2")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc", filepath.Join(allocDir, "alloc/logs")); err != nil {
		t.Fatal(err)
	}
	dir, cmd = launch(t, "echo ran > $1/ran", ":", change)
	_ = cmd.Wait()
	started, err := ReadStarted(dir)
	if err != nil || !strings.Contains(started.Err, "a link was put in its place") {
		t.Fatalf("started is %+v, %v", started, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "ran")); err == nil {
		t.Fatal("the command was run all the same")
	}
}

// A file system that is full when the task ends must not cost its exit code.
func TestExitIsRecordedOnAFullDisk(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := reserveExit(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	if err := WriteExit(dir, &Exit{Code: 1}); err == nil {
		t.Fatal("the disk is not full")
	}
	if err := writeReservedExit(dir, &Exit{Code: 7}); err != nil {
		t.Fatal(err)
	}
	exit, err := ReadExit(dir)
	if err != nil || exit.Code != 7 {
		t.Fatalf("exit is %+v, %v", exit, err)
	}
}
