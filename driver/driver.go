package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/bivouac-run/bivouac/driver/internal/image"
	"github.com/bivouac-run/bivouac/driver/internal/runsc"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/drivers/shared/eventer"
	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/shared/hclspec"
)

var (
	_ drivers.DriverPlugin            = (*Driver)(nil)
	_ drivers.ExecTaskStreamingDriver = (*Driver)(nil)
)

// Driver implements Nomad's driver interface. Make it with New; SetConfig
// comes before anything that touches the host, as Nomad does it.
type Driver struct {
	log    hclog.Logger
	events *eventer.Eventer
	// ctx is the plugin's life: gRPC gives a start none of its own. Close
	// ends it, and waits for wg.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// runscVersion is what the last check found; nil before.
	runscVersion atomic.Pointer[runsc.Version]

	// sweeping starts the sweep once.
	sweeping sync.Once
	// starting serialises the starts of one task.
	starting keyedMutex

	mu sync.Mutex
	// closed says that nothing may be spawned any more.
	closed bool
	// host is what SetConfig set up; nil before.
	host  *host
	tasks map[string]*task // by Nomad's task ID
}

// host is the driver's grip on the node: paths, programs, image store.
type host struct {
	cfg    PluginConfig
	images *image.Store
	runsc  *runsc.Runtime
	shim   string
	// missing says why no task can run: a program that was not found.
	missing error
	// mhzPerCore converts CPU time to Nomad's ticks; cores are those that
	// Nomad may use.
	mhzPerCore float64
	cores      int
}

// New returns a driver that logs to log.
func New(log hclog.Logger) *Driver {
	ctx, cancel := context.WithCancel(context.Background())
	log = log.Named(Name)
	return &Driver{
		log:    log,
		events: eventer.NewEventer(ctx, log),
		ctx:    ctx,
		cancel: cancel,
		tasks:  map[string]*task{},
	}
}

// Close stops everything the driver does, and leaves every sandbox running.
func (d *Driver) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.cancel()
	d.wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.host == nil {
		return nil
	}
	err := d.host.images.Close()
	d.host = nil
	return err
}

// spawn runs f, which must end with d.ctx, and Close waits for it. After Close
// f is still run, so that a channel it owns gets closed, but nobody waits: d.ctx
// has ended.
func (d *Driver) spawn(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		go f()
		return
	}
	d.wg.Go(f)
}

// PluginInfo implements base.BasePlugin.
func (d *Driver) PluginInfo() (*base.PluginInfoResponse, error) { return pluginInfo(), nil }

// ConfigSchema implements base.BasePlugin.
func (d *Driver) ConfigSchema() (*hclspec.Spec, error) { return pluginSpec, nil }

// TaskConfigSchema implements drivers.DriverPlugin.
func (d *Driver) TaskConfigSchema() (*hclspec.Spec, error) { return taskSpec, nil }

// Capabilities implements drivers.DriverPlugin.
func (d *Driver) Capabilities() (*drivers.Capabilities, error) { return capabilities(), nil }

// TaskEvents implements drivers.DriverPlugin.
func (d *Driver) TaskEvents(ctx context.Context) (<-chan *drivers.TaskEvent, error) {
	return d.events.TaskEvents(ctx)
}

// SetConfig implements base.BasePlugin. A configuration with a mistake is
// refused as a whole and leaves the one before in force.
func (d *Driver) SetConfig(c *base.Config) error {
	cfg := PluginConfig{
		StateDir: defaultStateDir, RunDir: defaultRunDir,
		Platform: defaultPlatform, StartTimeout: defaultStartTimeout,
	}
	if len(c.PluginConfig) > 0 {
		if err := base.MsgPackDecode(c.PluginConfig, &cfg); err != nil {
			return fmt.Errorf("decode plugin config: %w", err)
		}
	}
	if err := cfg.validate(); err != nil {
		return fmt.Errorf("plugin config of %q: %w", Name, err)
	}
	h, err := newHost(cfg)
	if err != nil {
		return fmt.Errorf("plugin config of %q: %w", Name, err)
	}
	h.cores = runtime.NumCPU()
	if compute := c.AgentConfig.Compute(); compute.NumCores > 0 {
		h.cores = compute.NumCores
		h.mhzPerCore = float64(compute.TotalCompute) / float64(compute.NumCores)
	}
	d.mu.Lock()
	old := d.host
	d.host = h
	d.mu.Unlock()
	if old != nil {
		if err := old.images.Close(); err != nil {
			d.log.Warn("closing the former image store", "error", err)
		}
	}
	d.sweeping.Do(func() { d.spawn(d.sweepAlways) })
	return nil
}

func newHost(cfg PluginConfig) (*host, error) {
	h := &host{cfg: cfg}
	for _, dir := range []string{h.runscRoot(), h.tasksDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make run_dir: %w", err)
		}
	}
	images, err := image.Open(filepath.Join(cfg.StateDir, "images"), image.Options{
		AllowedDirs: cfg.ImageDirs,
		MountPoints: mountPoints(),
	})
	if err != nil {
		return nil, err
	}
	h.images = images
	path, runscErr := findProgram(cfg.RunscPath, "runsc")
	h.runsc = &runsc.Runtime{
		Path: path, Root: h.runscRoot(), Platform: cfg.Platform, CoreTags: runsc.CoreTagsSupported(),
	}
	var shimErr error
	h.shim, shimErr = findProgram(cfg.ShimPath, "bivouac-shim")
	h.missing = errors.Join(runscErr, shimErr)
	return h, nil
}

func (h *host) runscRoot() string { return filepath.Join(h.cfg.RunDir, "runsc") }
func (h *host) tasksDir() string  { return filepath.Join(h.cfg.RunDir, "tasks") }

// taskDir is where a task keeps its state.
func (h *host) taskDir(containerID string) string { return filepath.Join(h.tasksDir(), containerID) }

// findProgram returns configured if it is set, else the file called name
// beside our own executable, else the one on PATH.
func findProgram(configured, name string) (string, error) {
	if configured != "" {
		if err := executable(configured); err != nil {
			return configured, fmt.Errorf("%s: %w", name, err)
		}
		return configured, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find own executable: %w", err)
	}
	if self, err = filepath.EvalSymlinks(self); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if executable(beside) == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is neither beside %q nor on PATH: install it or set %s_path in the plugin config",
			name, self, map[string]string{"runsc": "runsc", "bivouac-shim": "shim"}[name])
	}
	return filepath.Abs(path)
}

func executable(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
		return fmt.Errorf("%q is not an executable file", path)
	}
	return nil
}

// ready returns the host, or an error if no task can run.
func (d *Driver) ready() (*host, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.host == nil {
		return nil, errors.New("the plugin has no configuration yet")
	}
	return d.host, d.host.missing
}

// lookup returns the task with Nomad's id, or drivers.ErrTaskNotFound as it
// is, for Nomad compares it.
func (d *Driver) lookup(id string) (*task, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t, ok := d.tasks[id]; ok {
		return t, nil
	}
	return nil, drivers.ErrTaskNotFound
}
