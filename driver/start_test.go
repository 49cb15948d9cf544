package driver

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/shoenig/test/must"
)

// nothingLeft fails if a start that failed left something on the node.
func nothingLeft(t *testing.T, d *Driver) {
	t.Helper()
	for _, dir := range []string{d.host.tasksDir(), d.host.runscRoot()} {
		entries, err := os.ReadDir(dir)
		must.NoError(t, err)
		for _, e := range entries {
			must.Eq(t, "null-netns", e.Name())
		}
	}
}

func TestBadTasksAreRefused(t *testing.T) {
	n := needNode(t)
	ref := n.image(t, "busybox", nil)
	for name, c := range map[string]struct {
		opts        *TaskConfig
		change      func(*drivers.TaskConfig)
		want        []string
		recoverable bool
	}{
		"no such command": {opts: &TaskConfig{Image: ref, Command: "nosuch"}, want: []string{"not in the image", "nosuch"}},
		"no such path":    {opts: &TaskConfig{Image: ref, Command: "/no/such"}, want: []string{"not in the image"}},
		"not executable":  {opts: &TaskConfig{Image: ref, Command: "/etc/passwd"}, want: []string{"not executable"}},
		"no such user":    {opts: sh(ref, ":"), change: func(c *drivers.TaskConfig) { c.User = "nobody-here" }, want: []string{"nobody-here"}},
		"no image":        {opts: &TaskConfig{Command: "sh"}, want: []string{"image: set an image"}},
		"image elsewhere": {opts: sh("oci:/etc", ":"), want: []string{"/etc", "image_dirs"}},
		"no registry":     {opts: sh("127.0.0.1:1/x:y", ":"), want: []string{"127.0.0.1:1/x:y"}, recoverable: true},
		"all at once":     {opts: &TaskConfig{PidsLimit: -1, CPUCFSPeriod: 5, Hostname: "a b", ImagePullTimeout: "x"}, want: []string{"image:", "pids_limit", "cpu_cfs_period", "hostname", "image_pull_timeout"}},
		"host network":    {opts: sh(ref, ":"), change: hostNetwork, want: []string{"host mode"}},
		"a device": {opts: sh(ref, ":"), change: func(c *drivers.TaskConfig) {
			c.Devices = []*drivers.DeviceConfig{{TaskPath: "/dev/x", HostPath: "/dev/null"}}
		}, want: []string{"devices"}},
		"mount over /proc": {opts: sh(ref, ":"), change: func(c *drivers.TaskConfig) { c.Mounts = []*drivers.MountConfig{{TaskPath: "/proc", HostPath: "/tmp"}} }, want: []string{"/proc"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := n.harness(t)
			cfg := badTaskConfig(t, h, c.opts, c.change)
			_, _, err := driverOf(h).StartTask(cfg)
			must.Error(t, err)
			for _, want := range c.want {
				must.StrContains(t, err.Error(), want)
			}
			rec, ok := err.(interface{ IsRecoverable() bool })
			must.True(t, ok)
			must.Eq(t, c.recoverable, rec.IsRecoverable())
			nothingLeft(t, driverOf(h))
			must.True(t, notFound(h.DestroyTask(cfg.ID, true)))
		})
	}
}

func hostNetwork(c *drivers.TaskConfig) {
	c.NetworkIsolation = &drivers.NetworkIsolationSpec{Mode: drivers.NetIsolationModeHost}
}

func TestSlowStartIsRetried(t *testing.T) {
	n := needNode(t)
	cfg := n.config(t)
	cfg.RunscPath = filepath.Join(t.TempDir(), "runsc")
	must.NoError(t, os.WriteFile(cfg.RunscPath, []byte("#!/bin/sh\ncase \"$*\" in *delete*) exit;; esac\nsleep 300\n"), 0o755))
	cfg.StartTimeout = "300ms"
	h := harnessOf(t, newDriver(t, cfg))
	d := driverOf(h)
	_, _, err := d.StartTask(badTaskConfig(t, h, sh(n.image(t, "busybox", nil), ":"), nil))
	must.ErrorContains(t, err, "did not start the sandbox within 300ms")
	var failed *startError
	must.True(t, errors.As(err, &failed) && failed.IsRecoverable())
	nothingLeft(t, d)
}

func TestMissingShimAnswer(t *testing.T) {
	n := needNode(t)
	cfg := n.config(t)
	cfg.ShimPath = "/bin/false"
	h := harnessOf(t, newDriver(t, cfg))
	d := driverOf(h)
	_, _, err := d.StartTask(badTaskConfig(t, h, sh(n.image(t, "busybox", nil), ":"), nil))
	must.ErrorContains(t, err, "ended without an answer")
	nothingLeft(t, d)
}

func TestStartTwiceIsOneStart(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "sleep 600"), nil)
	startTask(t, h, cfg)
	sandbox := driverOf(h).tasks[cfg.ID].started.Sandbox
	_, _, err := h.StartTask(cfg)
	must.NoError(t, err)
	must.Eq(t, sandbox, driverOf(h).tasks[cfg.ID].started.Sandbox)
	other := cfg.Copy()
	other.User = "user"
	_, _, err = h.StartTask(other)
	must.ErrorContains(t, err, "already started")
}

func TestVolumeWithoutMountPointInImage(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	volume := t.TempDir()
	must.NoError(t, os.WriteFile(filepath.Join(volume, "in"), []byte("hello"), 0o644))
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "cat /data/deep/in; echo x > /data/deep/out; echo y > /ro/z; ls /"),
		func(c *drivers.TaskConfig) {
			c.Mounts = []*drivers.MountConfig{
				{TaskPath: "/data/deep", HostPath: volume},
				{TaskPath: "/ro", HostPath: volume, Readonly: true},
			}
		})
	startTask(t, h, cfg)
	must.Zero(t, wait(t, h, cfg.ID).ExitCode)
	out := output(t, cfg, "stdout", func(s string) bool { return strings.Contains(s, "ro\n") })
	must.StrHasPrefix(t, "hello", out)
	raw, err := os.ReadFile(filepath.Join(volume, "out"))
	must.NoError(t, err)
	must.Eq(t, "x\n", string(raw))
	must.FileNotExists(t, filepath.Join(volume, "z"))
	// The image, which other tasks share, is as it was.
	for _, name := range []string{"data", "ro"} {
		found, err := filepath.Glob(filepath.Join(n.stateDir, "images/v1/rootfs/*/root", name))
		must.NoError(t, err)
		must.SliceEmpty(t, found)
	}
}

func TestImageDecidesWhatJobLeavesOpen(t *testing.T) {
	n := needNode(t)
	ref := n.image(t, "configured", func(c *v1.Config) {
		c.Entrypoint = []string{"sh", "-c"}
		c.Cmd = []string{"id -u; id -g; pwd; echo $COLOUR $SHAPE; hostname"}
		c.Env = []string{"COLOUR=red", "SHAPE=round"}
		c.User = "user"
		c.WorkingDir = "/home/user"
	})
	h := n.harness(t)
	cfg := taskConfig(t, h, &TaskConfig{Image: ref, Hostname: "box"}, func(c *drivers.TaskConfig) {
		c.Env = map[string]string{"COLOUR": "blue"}
	})
	startTask(t, h, cfg)
	must.Zero(t, wait(t, h, cfg.ID).ExitCode)
	output(t, cfg, "stdout", func(s string) bool { return s == "1000\n1000\n/home/user\nblue round\nbox\n" })
}

func TestNoNetworkBlockMeansLoopbackOnly(t *testing.T) {
	n := needNode(t)
	h := n.harness(t)
	cfg := taskConfig(t, h, sh(n.image(t, "busybox", nil), "ip -o link | wc -l; ip -o link"), nil)
	startTask(t, h, cfg)
	must.Zero(t, wait(t, h, cfg.ID).ExitCode)
	out := output(t, cfg, "stdout", func(s string) bool { return strings.Contains(s, "lo") })
	must.StrHasPrefix(t, "1\n", out)
}

func TestFingerprint(t *testing.T) {
	n := needNode(t)
	next := func(t *testing.T, ch <-chan *drivers.Fingerprint) *drivers.Fingerprint {
		t.Helper()
		select {
		case fp := <-ch:
			must.NotNil(t, fp)
			return fp
		case <-time.After(30 * time.Second):
			t.Fatal("no fingerprint")
			return nil
		}
	}
	t.Run("healthy", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		ch, err := newDriver(t, n.config(t)).Fingerprint(ctx)
		must.NoError(t, err)
		fp := next(t, ch)
		if fp.Health == drivers.HealthStateUnhealthy { // on a machine under load
			must.StrContains(t, fp.HealthDescription, "checking")
			fp = next(t, ch)
		}
		must.Eq(t, drivers.HealthStateHealthy, fp.Health, must.Sprint(fp.HealthDescription))
		for _, key := range []string{"driver.gvisor", "driver.gvisor.runsc.version", "driver.gvisor.platform", "driver.gvisor.cgroup"} {
			must.MapContainsKey(t, fp.Attributes, key)
		}
		cancel()
		for range ch { // closes
		}
	})
	t.Run("runsc missing", func(t *testing.T) {
		cfg := n.config(t)
		cfg.RunscPath = "/no/such/runsc"
		ch, err := newDriver(t, cfg).Fingerprint(t.Context())
		must.NoError(t, err)
		fp := next(t, ch)
		must.Eq(t, drivers.HealthStateUndetected, fp.Health)
		must.StrContains(t, fp.HealthDescription, "/no/such/runsc")
	})
	t.Run("runsc broken", func(t *testing.T) {
		cfg := n.config(t)
		cfg.RunscPath = filepath.Join(t.TempDir(), "runsc")
		must.NoError(t, os.WriteFile(cfg.RunscPath, []byte("#!/bin/sh\n[ \"$1\" = --version ] && echo runsc version 1 && exit\nexit 3\n"), 0o755))
		ch, err := newDriver(t, cfg).Fingerprint(t.Context())
		must.NoError(t, err)
		fp := next(t, ch)
		must.Eq(t, drivers.HealthStateUnhealthy, fp.Health)
		must.StrContains(t, fp.HealthDescription, "exit status 3")
	})
	t.Run("boot takes long", func(t *testing.T) {
		cfg := n.config(t)
		cfg.RunscPath = filepath.Join(t.TempDir(), "runsc")
		must.NoError(t, os.WriteFile(cfg.RunscPath, []byte("#!/bin/sh\n[ \"$1\" = --version ] && echo runsc version 1 && exit\ncase \"$*\" in *delete*) exit;; esac\nexec sleep 300\n"), 0o755))
		ctx, cancel := context.WithCancel(t.Context())
		ch, err := newDriver(t, cfg).Fingerprint(ctx)
		must.NoError(t, err)
		start := time.Now()
		must.StrContains(t, next(t, ch).HealthDescription, "checking")
		must.Less(t, 10*time.Second, time.Since(start))
		cancel()
		for range ch { // closes
		}
	})
	t.Run("unconfigured", func(t *testing.T) {
		d := New(testLogger(t))
		t.Cleanup(func() { must.NoError(t, d.Close()) })
		ch, err := d.Fingerprint(t.Context())
		must.NoError(t, err)
		must.Eq(t, drivers.HealthStateUndetected, next(t, ch).Health)
	})
}

func TestBadPluginConfigLeavesTheFormerInForce(t *testing.T) {
	n := needNode(t)
	d := newDriver(t, n.config(t))
	bad := n.config(t)
	bad.Platform, bad.RunDir, bad.StartTimeout, bad.PidsLimit = "vmware", "run", "soon", -4
	bad.ImageDirs = []string{"images"}
	var raw []byte
	must.NoError(t, base.MsgPackEncode(&raw, bad))
	err := d.SetConfig(&base.Config{PluginConfig: raw})
	for _, want := range []string{"platform", "run_dir", "start_timeout", "pids_limit", "image_dirs"} {
		must.ErrorContains(t, err, want)
	}
	h, err := d.ready()
	must.NoError(t, err)
	must.Eq(t, "systrap", h.cfg.Platform)
}
