package shim

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/internal/statefile"
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
		Stdout: os.DevNull, Stderr: os.DevNull, StartTimeout: 10 * time.Second,
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
	for _, p := range []string{"/a,b", "/a:b", `/a\b`} {
		if err := mountOverlay(&Overlay{Lower: p}); err == nil {
			t.Errorf("%q accepted", p)
		}
	}
	if err := mountOverlay(nil); err != nil {
		t.Fatal(err)
	}
}

func FuzzLastError(f *testing.F) {
	f.Add([]byte(`{"msg":"a","level":"error"}{"msg":`))
	path := filepath.Join(f.TempDir(), "log")
	f.Fuzz(func(t *testing.T, log []byte) {
		if err := os.WriteFile(path, log, 0o600); err != nil {
			t.Fatal(err)
		}
		lastError(path)
	})
}
