package shim

import (
	"path/filepath"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/proc"
	"github.com/bivouac-run/bivouac/internal/statefile"
)

// Version is the format of the files in a task's state directory.
const Version = 1

// StatusFD is the descriptor at which the shim finds the pipe for its one line
// about the start.
const StatusFD = 3

// Config tells a shim what to run. The driver writes it before it starts the
// shim.
type Config struct {
	// ContainerID is runsc's name for the sandbox; only for messages.
	ContainerID string `json:"container_id"`
	// Run is the command that creates and starts the sandbox and returns
	// (`runsc … run --detach … ID`).
	Run []string `json:"run"`
	// Delete is the command that removes what Run left behind.
	Delete []string `json:"delete"`
	// PIDFile is where Run writes the pid of the sandbox process.
	PIDFile string `json:"pid_file"`
	// RuntimeLog is where Run and Delete write their JSON log.
	RuntimeLog string `json:"runtime_log"`
	// PanicLog is where a crashing sandbox writes its last words.
	PanicLog string `json:"panic_log"`
	// AllocDir is the allocation's directory. Its own path is trusted;
	// below it tasks may have put links, and none is followed.
	AllocDir string `json:"alloc_dir"`
	// Stdout and Stderr are FIFOs of the log collector below AllocDir, or
	// /dev/null.
	Stdout string `json:"stdout"`
	Stderr string `json:"stderr"`
	// Binds are directories to mount, in a mount namespace of the shim's
	// own, before Run.
	Binds []Bind `json:"binds,omitempty"`
	// StartTimeout bounds Run.
	StartTimeout time.Duration `json:"start_timeout"`
	// OOMFile counts the task's OOM kills: memory.events (cgroup v2) or
	// memory.oom_control (v1). Empty means they are not counted.
	OOMFile string `json:"oom_file,omitempty"`
	// ScopeProcs is the cgroup.procs file that lists every process of the
	// sandbox.
	ScopeProcs string `json:"scope_procs,omitempty"`
	// CPUSetProcs, if set, is the cgroup.procs file of the cpuset that those
	// processes are moved to once started (cgroup v1 only, where Nomad keeps
	// cpusets in a tree of their own).
	CPUSetProcs string `json:"cpuset_procs,omitempty"`
	// Overlay, if set, is mounted there too.
	Overlay *Overlay `json:"overlay,omitempty"`
}

// Bind gives runsc a directory below AllocDir under a path that nobody can
// redirect, whatever happens to names in the allocation's directory.
type Bind struct {
	// Path is relative to AllocDir and has no links in it.
	Path string `json:"path"`
	// Target is an empty directory of the task's own.
	Target string `json:"target"`
}

// Overlay is a private view of a shared root, for tasks whose mount points the
// image lacks: runsc creates them, and must not do so in the shared root.
type Overlay struct {
	// Lower is the shared root; Upper, Work and Target are directories of
	// the task's own.
	Lower  string `json:"lower"`
	Upper  string `json:"upper"`
	Work   string `json:"work"`
	Target string `json:"target"`
}

// Started is the outcome of a start.
type Started struct {
	// Err is empty if the sandbox runs.
	Err string `json:"err,omitempty"`
	// Shim and Sandbox name the two processes.
	Shim    proc.ID `json:"shim"`
	Sandbox proc.ID `json:"sandbox"`
	// At is when Run returned.
	At time.Time `json:"at"`
}

// Exit is how a task ended.
type Exit struct {
	// Code is the main process's exit code; 128 + n for death by signal n.
	Code int `json:"code"`
	// Signal is set only if the sandbox process itself was killed.
	Signal int `json:"signal,omitempty"`
	// OOMKills is how many processes of the task the kernel's OOM killer
	// ended. OOMKilled says the main process was one of them.
	OOMKills  uint64 `json:"oom_kills,omitempty"`
	OOMKilled bool   `json:"oom_killed,omitempty"`
	// Err explains an end that was not the task's own doing.
	Err string `json:"err,omitempty"`
	// At is when the sandbox process was reaped.
	At time.Time `json:"at"`
}

// Files of a task's state directory.
const (
	configFile  = "shim.json"
	startedFile = "started.json"
	exitFile    = "exit.json"
)

// WriteConfig stores c in a task's state directory.
func WriteConfig(dir string, c *Config) error {
	return statefile.WriteVolatile(filepath.Join(dir, configFile), Version, c)
}

// ReadStarted returns the outcome of the start, or an error wrapping
// os.ErrNotExist while it is not known.
func ReadStarted(dir string) (*Started, error) {
	return read[Started](dir, startedFile)
}

// ReadExit returns how the task ended, or an error wrapping os.ErrNotExist
// while it runs.
func ReadExit(dir string) (*Exit, error) {
	return read[Exit](dir, exitFile)
}

// WriteExit records an end for a task whose shim can no longer do so.
func WriteExit(dir string, e *Exit) error {
	return statefile.WriteVolatile(filepath.Join(dir, exitFile), Version, e)
}

// reserveExit sets space aside for the exit record, so that a file system that
// is full when the task ends does not cost its exit code.
func reserveExit(dir string) error {
	return statefile.Reserve(filepath.Join(dir, exitFile))
}

// writeReservedExit is WriteExit into that space.
func writeReservedExit(dir string, e *Exit) error {
	return statefile.WriteReserved(filepath.Join(dir, exitFile), Version, e)
}

func read[T any](dir, name string) (*T, error) {
	v := new(T)
	if _, err := statefile.Read(filepath.Join(dir, name), Version, v); err != nil {
		return nil, err
	}
	return v, nil
}
