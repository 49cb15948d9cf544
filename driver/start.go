package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/bundle"
	"github.com/bivouac-run/bivouac/driver/internal/cgroup"
	"github.com/bivouac-run/bivouac/driver/internal/image"
	"github.com/bivouac-run/bivouac/driver/internal/network"
	"github.com/bivouac-run/bivouac/driver/internal/runsc"
	"github.com/bivouac-run/bivouac/driver/internal/shim"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// StartTask implements drivers.DriverPlugin. On error nothing of the task is
// left. A start that a crash of the plugin cut short is taken over: Nomad
// repeats it with the same task ID.
func (d *Driver) StartTask(cfg *drivers.TaskConfig) (*drivers.TaskHandle, *drivers.DriverNetwork, error) {
	handle, err := d.startTask(cfg)
	if err != nil {
		d.log.Error("task did not start", "task_id", cfg.ID, "error", err)
		shim.ReleaseFIFOs(cfg.AllocDir, cfg.StdoutPath, cfg.StderrPath)
		// The client looks at the error's own type: it must not be wrapped.
		return nil, nil, &startError{err: err, recoverable: recoverable(err)}
	}
	return handle, nil, nil
}

func (d *Driver) startTask(cfg *drivers.TaskConfig) (*drivers.TaskHandle, error) {
	h, err := d.ready()
	if err != nil {
		return nil, err
	}
	// Two invocations of one task share its cgroup and its output: never two
	// at once.
	defer d.starting.lock(containerPrefix(cfg.AllocID, cfg.Name))()
	s := &start{d: d, h: h, cfg: cfg}
	if err := s.decode(); err != nil {
		return nil, err
	}
	if t, err := d.lookup(cfg.ID); err == nil {
		if t.ConfigDigest != s.digest {
			return nil, fmt.Errorf("task %q is already started, with another configuration", cfg.ID)
		}
		return t.handle(cfg) // only the connection broke, and Nomad repeats it
	}
	t, err := d.adopt(h, cfg, s.digest)
	if err != nil {
		return nil, err
	}
	if t == nil {
		if t, err = s.do(); err != nil {
			return nil, err
		}
	}
	handle, err := t.handle(cfg)
	if err != nil {
		return nil, errors.Join(err, h.remove(t))
	}
	d.track(t)
	d.log.Info("task started", "task_id", cfg.ID, "container_id", t.ContainerID, "image_digest", t.ImageDigest)
	return handle, nil
}

// startError is a failed start as Nomad's client reads it.
type startError struct {
	err         error
	recoverable bool
}

func (e *startError) Error() string       { return e.err.Error() }
func (e *startError) Unwrap() error       { return e.err }
func (e *startError) IsRecoverable() bool { return e.recoverable }

// transientError is a failure of the node that a later attempt may not meet.
type transientError struct{ err error }

func (e *transientError) Error() string { return e.err.Error() }
func (e *transientError) Unwrap() error { return e.err }

// errSlowStart is a sandbox that did not come up in time: a loaded node, which
// a later attempt may find idle.
var errSlowStart = errors.New("sandbox did not start in time")

// recoverable says whether trying again can help.
func recoverable(err error) bool {
	var transient *transientError
	switch {
	case errors.As(err, &transient), image.Retryable(err), errors.Is(err, errSlowStart):
		return true
	case errors.Is(err, image.ErrClosed), errors.Is(err, context.Canceled):
		return true // the plugin is being stopped or configured anew
	}
	return false
}

// start is one StartTask under way.
type start struct {
	d   *Driver
	h   *host
	cfg *drivers.TaskConfig

	opts TaskConfig
	// digest is of everything in cfg but the invocation's ID.
	digest string
	// ports are the container ports behind opts.Ports.
	ports []uint16
	image *image.Image
	t     *task
	spec  bundle.Task
	// made says that the task has its directory, with a record in it that
	// host.remove takes every later step back by, after a crash too.
	made bool
}

// do takes the steps in order, and all of them back if one fails.
func (s *start) do() (_ *task, err error) {
	defer func() {
		if err != nil && s.made {
			err = errors.Join(err, s.h.remove(s.t))
		}
	}()
	for _, step := range []func() error{
		s.endFormerInvocations,
		s.getImage,
		s.makeDir,
		s.decideProcess,
		s.decideMounts,
		s.limit,
		s.attachNetwork,
		s.writeBundle,
		s.launch,
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return s.t, nil
}

// decode reads the task's config and refuses what is asked for and cannot be.
func (s *start) decode() error {
	s.opts = TaskConfig{ImagePullTimeout: defaultPullTimeout}
	if err := s.cfg.DecodeDriverConfig(&s.opts); err != nil {
		return fmt.Errorf("decode task config: %w", err)
	}
	var err error
	errs := []error{s.opts.validate()}
	if len(s.cfg.Devices) > 0 {
		errs = append(errs, errors.New("devices: host devices cannot be passed into a sandbox"))
	}
	if n := s.cfg.NetworkIsolation; n != nil && n.Mode == drivers.NetIsolationModeHost {
		errs = append(errs, errors.New("network: host mode would give the sandbox the node's network; use bridge or cni/NAME"))
	}
	s.ports, err = portsOf(s.cfg.Resources, s.opts.Ports)
	errs = append(errs, err)
	if err = errors.Join(errs...); err != nil {
		return fmt.Errorf("task config: %w", err)
	}
	s.digest, err = digestOf(s.cfg, &s.opts)
	return err
}

// digestOf is equal for two invocations of a task that its job describes in
// the same way.
func digestOf(cfg *drivers.TaskConfig, opts *TaskConfig) (string, error) {
	same := cfg.Copy()
	same.ID = ""
	raw, err := json.Marshal(struct {
		Task *drivers.TaskConfig
		Opts *TaskConfig
	}{same, opts})
	if err != nil {
		return "", fmt.Errorf("digest task config: %w", err)
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:]), nil
}

// endFormerInvocations ends what was started for this task, Nomad does not
// know of, and adopt did not take: Nomad never starts a task before it has
// destroyed the former one.
func (s *start) endFormerInvocations() error {
	if err := s.d.endInvocations(s.h, s.cfg.AllocID, s.cfg.Name); err != nil {
		return &transientError{err}
	}
	return nil
}

func (s *start) getImage() error {
	ctx, cancel := context.WithTimeout(s.d.ctx, s.opts.pullTimeout)
	defer cancel()
	progress := newPullProgress(s.opts.Image, func(msg string) { s.d.emit(s.cfg, msg) })
	img, err := s.h.images.Get(ctx, image.Request{
		Ref:      s.opts.Image,
		Platform: s.opts.Platform,
		TaskDir:  s.cfg.TaskDir().Dir,
		Progress: progress.report,
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("get image %q: not done within image_pull_timeout (%v): %w", s.opts.Image, s.opts.pullTimeout, err)
	}
	s.image = img
	return err
}

// makeDir makes the task's state directory with its record in it.
func (s *start) makeDir() error {
	if s.cfg.Resources == nil || s.cfg.Resources.LinuxResources == nil {
		return errors.New("the task has no resources")
	}
	id := containerIDOf(s.cfg.AllocID, s.cfg.Name, s.cfg.ID)
	s.t = &task{dir: s.h.taskDir(id), done: make(chan struct{}), record: record{
		TaskID: s.cfg.ID, AllocID: s.cfg.AllocID, TaskName: s.cfg.Name, AllocDir: s.cfg.AllocDir,
		ContainerID: id, CgroupPath: s.cfg.Resources.LinuxResources.CpusetCgroupPath,
		ImageRef: s.opts.Image, ImageDigest: s.image.Digest, StopSignal: s.image.Config.StopSignal,
		Platform: s.h.cfg.Platform, ConfigDigest: s.digest,
	}}
	if v := s.d.runscVersion.Load(); v != nil {
		s.t.RunscVersion = v.Release
	}
	if err := os.Mkdir(s.t.dir, 0o700); err != nil {
		return fmt.Errorf("make task directory: %w", err)
	}
	if n := s.cfg.NetworkIsolation; n != nil && n.Path != "" {
		s.t.Network = network.Planned(n.Path, s.networkOptions())
	}
	s.made = true
	for _, name := range []string{logsDir, scratchDir} {
		if err := os.Mkdir(filepath.Join(s.t.dir, name), 0o700); err != nil {
			return fmt.Errorf("make task directory: %w", err)
		}
	}
	return s.t.writeRecord()
}

// limit opens Nomad's cgroup for the task and writes the limits, before there
// is a process to escape them.
func (s *start) limit() error {
	scope, err := cgroup.Open(cgroup.DefaultRoot, s.t.CgroupPath, s.cfg.AllocID, s.cfg.Name)
	if err != nil {
		return err
	}
	s.t.scope = scope
	l := limitsOf(s.cfg.Resources, &s.opts, s.h)
	s.spec.CgroupsPath = scope.RuntimePath()
	s.spec.Limits = l
	return scope.Apply(cgroup.Limits{
		CPUShares: l.CPUShares, CPUQuota: l.CPUQuota, CPUPeriod: l.CPUPeriod,
		MemoryBytes: l.MemoryBytes, MemoryReservationBytes: l.MemoryReservationBytes, PidsMax: l.PidsMax,
		CPUs: l.CPUs,
	})
}

func (s *start) writeBundle() error {
	spec, err := bundle.Spec(s.spec)
	if err != nil {
		return fmt.Errorf("task config: %w", err)
	}
	s.t.process = spec.Process
	return writeJSON(filepath.Join(s.t.dir, specFile), spec)
}

// launch starts the shim and waits for its word about the sandbox.
func (s *start) launch() error {
	dir := s.t.dir
	files := runsc.Files{Log: filepath.Join(dir, runtimeLog), PanicLog: filepath.Join(dir, panicLog)}
	sandbox := runsc.Sandbox{
		ID: s.t.ContainerID, Bundle: dir, PIDFile: filepath.Join(dir, sandboxPID),
		Network: s.spec.NetNS != "", OverlayDir: filepath.Join(dir, scratchDir), Files: files,
	}
	cfg := &shim.Config{
		ContainerID: s.t.ContainerID,
		Run:         s.h.runsc.RunArgs(sandbox), Delete: s.h.runsc.DeleteArgs(s.t.ContainerID, files),
		PIDFile: sandbox.PIDFile, RuntimeLog: files.Log, PanicLog: files.PanicLog,
		AllocDir: s.cfg.AllocDir, Stdout: s.cfg.StdoutPath, Stderr: s.cfg.StderrPath,
		StartTimeout: s.h.cfg.startTimeout,
		OOMFile:      s.t.scope.OOMFile(), ScopeProcs: s.t.scope.ProcsFile(), CPUSetProcs: s.t.scope.CPUSetProcsFile(),
		Binds: s.binds(), Overlay: s.privateRoot(),
	}
	if err := shim.WriteConfig(dir, cfg); err != nil {
		return err
	}
	started, err := startShim(s.h.shim, dir, s.h.cfg.startTimeout+shimGrace)
	if err != nil {
		return err
	}
	s.t.started = started
	return nil
}

// shimGrace is what the shim gets beyond the start timeout to clean up after
// a start that failed and to say so.
const shimGrace = 30 * time.Second
