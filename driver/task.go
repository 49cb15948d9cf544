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
	"strings"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/cgroup"
	"github.com/bivouac-run/bivouac/driver/internal/network"
	"github.com/bivouac-run/bivouac/driver/internal/shim"
	"github.com/bivouac-run/bivouac/internal/statefile"
	"github.com/hashicorp/nomad/plugins/drivers"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// recordVersion is the format of a task record and of the driver state in a
// task handle.
const recordVersion = 1

// record is what a later driver process must know of a task. It is written
// before the shim is started, so a directory with a shim always has one.
type record struct {
	TaskID      string `json:"task_id"`
	AllocID     string `json:"alloc_id"`
	TaskName    string `json:"task_name"`
	AllocDir    string `json:"alloc_dir"`
	ContainerID string `json:"container_id"`
	// CgroupPath is the path as Nomad gave it.
	CgroupPath  string `json:"cgroup_path"`
	ImageRef    string `json:"image_ref"`
	ImageDigest string `json:"image_digest"`
	StopSignal  string `json:"stop_signal,omitempty"`
	// RunscVersion and Platform are those the sandbox was started with.
	RunscVersion string `json:"runsc_version,omitempty"`
	Platform     string `json:"platform"`
	// Network is the sandbox's way into the allocation's network, nil if it
	// has none. It is noted before it is made.
	Network *network.Attachment `json:"network,omitempty"`
	// ConfigDigest is of all that the job said about the task.
	ConfigDigest string `json:"config_digest"`
}

// Files of a task's state directory besides the shim's.
const (
	recordFile = "task.json"
	specFile   = "config.json"
	runtimeLog = "runsc.log"
	panicLog   = "panic.log"
	shimLog    = "shim.log"
	// logsDir and scratchDir are where the shim mounts the allocation's logs
	// and the task's own directory.
	logsDir    = "logs"
	scratchDir = "scratch"
	// releasedFile says that Nomad has asked for the end of this invocation.
	releasedFile = "released"
	sandboxPID   = "sandbox.pid"
	resolvConf   = "resolv.conf"
	hostsFile    = "hosts"
	hostnameFile = "hostname"
)

// task is one sandbox that this driver process knows.
type task struct {
	record
	dir     string
	scope   *cgroup.Scope
	process *specs.Process
	started *shim.Started

	// done is closed once exit and endedAt are set.
	done    chan struct{}
	exit    *drivers.ExitResult
	endedAt time.Time
}

// containerIDOf derives runsc's name for a task's sandbox, the same for every
// driver process: the task's name, then a part that all invocations of one task
// share, then one of this invocation.
func containerIDOf(allocID, taskName, taskID string) string {
	return containerPrefix(allocID, taskName) + shortHash(taskID)
}

// containerPrefix is what the IDs of all invocations of one task begin with.
func containerPrefix(allocID, taskName string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_':
			return r
		}
		return '-'
	}, taskName)
	const longestName = 20
	if len(name) > longestName {
		name = name[:longestName]
	}
	return name + "." + shortHash(allocID+"/"+taskName) + "."
}

func shortHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:5])
}

// errRebooted is returned for a task of an earlier boot: nothing of it runs.
var errRebooted = errors.New("the node was rebooted since it started")

// readTask loads a task from its state directory. The error wraps
// os.ErrNotExist if there is no record, statefile.ErrNewer if it is of a newer
// release, and errRebooted, with the task beside it, if it is of an earlier
// boot.
func readTask(dir string) (*task, error) {
	t := &task{dir: dir, done: make(chan struct{})}
	meta, err := statefile.Read(filepath.Join(dir, recordFile), recordVersion, &t.record)
	if err != nil {
		return nil, err
	}
	boot, err := statefile.BootID()
	if err != nil {
		return nil, err
	}
	if meta.BootID != boot {
		return t, fmt.Errorf("task %q: %w", t.TaskID, errRebooted)
	}
	return t, nil
}

func (t *task) writeRecord() error {
	return statefile.WriteVolatile(filepath.Join(t.dir, recordFile), recordVersion, &t.record)
}

// load completes a task whose sandbox was started: how, and with what process.
func (t *task) load() error {
	var err error
	if t.started, err = shim.ReadStarted(t.dir); err != nil {
		return err
	}
	if t.started.Err != "" {
		return errors.New(t.started.Err)
	}
	raw, err := os.ReadFile(filepath.Join(t.dir, specFile))
	if err != nil {
		return fmt.Errorf("read runtime spec: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(raw, &spec); err != nil {
		return fmt.Errorf("read runtime spec: %w", err)
	}
	if t.process = spec.Process; t.process == nil {
		return errors.New("read runtime spec: it has no process")
	}
	// A task that has ended may have lost its scope: it needs none any more.
	t.scope, err = cgroup.Open(cgroup.DefaultRoot, t.CgroupPath, t.AllocID, t.TaskName)
	if errors.Is(err, os.ErrNotExist) && !t.started.Sandbox.Alive() {
		return nil
	}
	return err
}

// watch waits for the shim to end and publishes the task's exit. It returns
// early, without doing so, when ctx ends.
func (t *task) watch(ctx context.Context) {
	for {
		err := t.started.Shim.Wait(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			break
		}
		// Out of descriptors, say: look again later rather than never.
		select {
		case <-time.After(watchRetry):
		case <-ctx.Done():
			return
		}
	}
	exit, err := shim.ReadExit(t.dir)
	if err != nil {
		exit = t.shimLost(err)
	}
	t.exit = &drivers.ExitResult{ExitCode: exit.Code, Signal: exit.Signal, OOMKilled: exit.OOMKilled}
	switch {
	case exit.Err != "":
		t.exit.Err = errors.New(exit.Err)
	case exit.OOMKilled:
		t.exit.Err = errOOMKilled // the docker driver's words
	}
	t.endedAt = exit.At
	close(t.done)
}

var errOOMKilled = errors.New("OOM Killed")

// watchRetry is how long a watch that failed is put off.
const watchRetry = 200 * time.Millisecond

// shimLost ends a sandbox whose shim died without a record: its output goes
// nowhere and nobody will learn its exit status.
func (t *task) shimLost(cause error) *shim.Exit {
	_ = t.started.Sandbox.Signal(killSignal) // fails only if it is gone already
	if t.scope != nil {
		_ = t.scope.Kill(killTimeout) // remove tries again, and reports
	}
	exit := &shim.Exit{
		Code: 128 + int(killSignal), Signal: int(killSignal), At: time.Now(),
		Err: "the sandbox's shim ended without a record of the task's exit; the sandbox was ended",
	}
	if !errors.Is(cause, os.ErrNotExist) {
		exit.Err = fmt.Sprintf("%s (%v)", exit.Err, cause)
	}
	_ = shim.WriteExit(t.dir, exit) // for later readers; this one has it
	return exit
}

// release notes that Nomad has asked for the task's end: what is left of it is
// not to be taken over.
func (t *task) release() {
	// A full disk is no reason not to stop a task.
	_ = os.WriteFile(filepath.Join(t.dir, releasedFile), nil, 0o600)
}

func (t *task) released() bool {
	_, err := os.Stat(filepath.Join(t.dir, releasedFile))
	return !errors.Is(err, os.ErrNotExist)
}

// ended says whether watch has published the exit.
func (t *task) ended() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// status is the task in Nomad's words.
func (t *task) status() *drivers.TaskStatus {
	s := &drivers.TaskStatus{
		ID:        t.TaskID,
		Name:      t.TaskName,
		State:     drivers.TaskStateRunning,
		StartedAt: t.started.At,
		DriverAttributes: map[string]string{
			"container_id":  t.ContainerID,
			"image":         t.ImageRef,
			"image_digest":  t.ImageDigest,
			"platform":      t.Platform,
			"runsc_version": t.RunscVersion,
			"sandbox_pid":   fmt.Sprint(t.started.Sandbox.PID),
		},
	}
	if t.ended() {
		s.State = drivers.TaskStateExited
		s.CompletedAt = t.endedAt
		s.ExitResult = t.exit
	}
	return s
}

// handle is what Nomad keeps for RecoverTask. All of the state is in the
// task's directory, whose name follows from the task's ID.
func (t *task) handle(cfg *drivers.TaskConfig) (*drivers.TaskHandle, error) {
	h := drivers.NewTaskHandle(recordVersion)
	h.Config = cfg
	h.State = drivers.TaskStateRunning
	if t.ended() {
		h.State = drivers.TaskStateExited
	}
	if err := h.SetDriverState(&handleState{ContainerID: t.ContainerID}); err != nil {
		return nil, fmt.Errorf("encode task handle: %w", err)
	}
	return h, nil
}

// handleState is the driver's part of a task handle.
type handleState struct{ ContainerID string }
