package driver

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/helper/uuid"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/shoenig/test/must"
)

// moveLogs is how a task gets rid of the mount on /alloc/logs: gVisor refuses
// to rename a mount point only in the mount namespace that it is one in. Inside
// a user namespace the task leaves the root behind, and then makes a namespace
// out of what is left.
const moveLogs = `cat > /tmp/a.sh <<'X'
mkdir -p /tmp/nr && mount -t tmpfs none /tmp/nr
mkdir -p /tmp/nr/old /tmp/nr/bin && cp /bin/busybox /tmp/nr/bin/busybox
cd /alloc
pivot_root /tmp/nr /tmp/nr/old
exec /bin/busybox sh -c '
/bin/busybox umount -l /old
exec /bin/busybox unshare -m /bin/busybox sh -c "
/bin/busybox mv logs logs2; /bin/busybox ln -s /etc logs"
'
X
busybox unshare -U -r -m sh /tmp/a.sh
busybox unshare -U -r -m sh -c 'mkdir /tmp/m; mount --move /alloc/logs /tmp/m; mv /alloc/logs /alloc/logs3'
busybox unshare -U -r -m sh -c 'umount -l /alloc/logs; mv /alloc/logs /alloc/logs4'
mv /alloc/logs /alloc/logs5; rmdir /alloc/logs; rm -rf /alloc/logs; touch /alloc/logs/x
echo done`

func TestTaskCannotMoveItsLogs(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), moveLogs), nil)
	startTask(t, h, cfg)
	wait(t, h, cfg.ID)
	out := output(t, cfg, "stdout", func(s string) bool { return strings.HasSuffix(s, "done\n") })
	entries, err := os.ReadDir(cfg.TaskDir().SharedAllocDir)
	must.NoError(t, err)
	for _, e := range entries {
		must.True(t, e.IsDir() && !strings.HasPrefix(e.Name(), "logs") || e.Name() == "logs" && e.IsDir(),
			must.Sprintf("%s is in /alloc: %s", e.Name(), out))
	}
	must.FileNotExists(t, filepath.Join(cfg.TaskDir().LogDir, "x"))
}

// A sibling task of another driver may have put the link there.
func TestLinkInPlaceOfLogsIsNotFollowed(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := badTaskConfig(t, h, sh(n.image(t, "busybox", nil), "ls /alloc/logs/"), nil)
	must.NoError(t, os.Rename(cfg.TaskDir().LogDir, cfg.TaskDir().LogDir+"2"))
	must.NoError(t, os.Symlink("/etc", cfg.TaskDir().LogDir))
	_, _, err := driverOf(h).StartTask(cfg)
	must.ErrorContains(t, err, "a link was put in its place")
	nothingLeft(t, driverOf(h))
}

func TestConcurrentInvocationsLeaveOne(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	d := driverOf(h)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "sleep 600"), nil)
	const invocations = 4
	errs := make(chan error, invocations)
	for range invocations {
		next := cfg.Copy()
		next.ID = cfg.AllocID + "/task/" + uuid.Short()
		go func() {
			_, _, err := d.StartTask(next)
			errs <- err
		}()
	}
	for range invocations {
		must.NoError(t, <-errs)
	}
	tasks := d.known(func(*record) bool { return true })
	must.Len(t, 1, tasks)
	must.True(t, tasks[0].started.Sandbox.Alive())
	entries, err := os.ReadDir(d.host.tasksDir())
	must.NoError(t, err)
	must.Len(t, 1, entries)
	must.NoError(t, d.DestroyTask(tasks[0].TaskID, true))
	nothingLeft(t, d)
}

func TestForeignRecordDoesNotStopStarts(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	d := driverOf(h)
	foreign := filepath.Join(d.host.tasksDir(), "other.0123456789.0123456789")
	must.NoError(t, os.Mkdir(foreign, 0o700))
	must.NoError(t, os.WriteFile(filepath.Join(foreign, recordFile), []byte(`{"version":99,"data":{}}`), 0o600))
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "exit 3"), nil)
	startTask(t, h, cfg)
	must.Eq(t, 3, wait(t, h, cfg.ID).ExitCode)
	d.sweep(d.sweep(nil))
	must.True(t, exists(foreign)) // a newer release's: not ours to remove
}

func TestShimKilledDuringStart(t *testing.T) {
	n := needNode(t)
	cfg := n.config(t)
	cfg.RunscPath = filepath.Join(t.TempDir(), "runsc")
	must.NoError(t, os.WriteFile(cfg.RunscPath, []byte("#!/bin/sh\ncase \"$*\" in *' run '*) "+n.runsc+
		" \"$@\"; kill -9 $PPID; exit 0;; esac\nexec "+n.runsc+" \"$@\"\n"), 0o755))
	h := harnessOf(t, newDriver(t, cfg))
	_, _, err := driverOf(h).StartTask(badTaskConfig(t, h, sh(n.image(t, "busybox", nil), "sleep 600"), nil))
	must.ErrorContains(t, err, "ended without an answer")
	nothingLeft(t, driverOf(h))
}

func TestTaskNameWithRunscsSeparators(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "echo x > /tmp/x; echo y > /y; exit 4"), func(c *drivers.TaskConfig) {
		c.Name = "a:b,size=1"
		c.Resources.LinuxResources.CpusetCgroupPath = ""
	})
	startTask(t, h, cfg)
	must.Eq(t, 4, wait(t, h, cfg.ID).ExitCode)
}

func TestExecTimeoutEndsTheWholeGroup(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "sleep 600"), nil)
	startTask(t, h, cfg)
	_, err := driverOf(h).ExecTask(cfg.ID, []string{"sh", "-c", "sleep 3333 & sleep 4444"}, 300_000_000)
	must.ErrorContains(t, err, "deadline")
	result, err := driverOf(h).ExecTask(cfg.ID, []string{"ps"}, 0)
	must.NoError(t, err)
	must.StrContains(t, string(result.Stdout), "sleep 600")
	must.StrNotContains(t, string(result.Stdout), "3333")
	must.StrNotContains(t, string(result.Stdout), "4444")
}

// A client that goes away stops reading; its command must not wait for it for
// ever.
func TestExecOfAClientThatHasGone(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "sleep 600"), nil)
	startTask(t, h, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	stdin, _ := io.Pipe()
	unread, stdout := io.Pipe()
	_, stderr := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := driverOf(h).ExecTaskStreaming(ctx, cfg.ID, &drivers.ExecOptions{
			Command: []string{"yes"}, Stdin: stdin, Stdout: stdout, Stderr: stderr,
		})
		done <- err
	}()
	_, err := unread.Read(make([]byte, 10)) // then never again
	must.NoError(t, err)
	cancel()
	select {
	case err := <-done:
		must.ErrorIs(t, err, context.Canceled)
	case <-time.After(20 * time.Second):
		t.Fatal("it is still there")
	}
}
