package runsc

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/runtimelog"
	"golang.org/x/sys/unix"
)

// ErrNotRunning is returned for a sandbox that has ended or never was.
var ErrNotRunning = errors.New("sandbox is not running")

// Runtime is one runsc binary with the options that all its sandboxes share.
// It is a value without state; every method may be called concurrently.
type Runtime struct {
	// Path is the binary.
	Path string
	// Root is where runsc keeps its state, one per node. It must be short:
	// sockets live below it.
	Root string
	// Platform is how application code is intercepted: systrap or kvm.
	Platform string
	// CoreTags gives every sandbox a core scheduling tag of its own, so that
	// it never shares a physical core with another one (Linux 5.14 and
	// later, only where SMT is on).
	CoreTags bool
}

// Files are where the commands of one task write.
type Files struct {
	// Log takes errors as JSON records.
	Log string
	// PanicLog takes the last words of a crashing sandbox.
	PanicLog string
}

// flags are the options before the command.
func (r *Runtime) flags(f Files) []string {
	flags := []string{
		r.Path,
		"--root=" + r.Root,
		"--log=" + f.Log,
		"--log-format=json",
		"--platform=" + r.Platform,
		"--host-uds=none",
		"--host-fifo=none",
		"--net-raw=false",
		"--allow-packet-socket-write=false",
		"--allow-suid=false",
		"--file-access=exclusive",
		"--file-access-mounts=shared",
		"--character-device-policy=emulated-only",
		"--oci-seccomp=true",
		"--host-settings=ignore",
	}
	if r.CoreTags {
		flags = append(flags, "--enable-core-tags=true")
	}
	if f.PanicLog != "" {
		flags = append(flags, "--panic-log="+f.PanicLog)
	}
	return flags
}

// Sandbox is what Run needs to know of a sandbox beyond its bundle.
type Sandbox struct {
	ID string
	// Bundle is the directory with config.json.
	Bundle string
	// PIDFile receives the pid of the sandbox process.
	PIDFile string
	// Network is false for a sandbox with nothing but loopback.
	Network bool
	// OverlayDir is where changes to the root are kept while the sandbox
	// lives, in a file that has no name; "" keeps them in its memory.
	OverlayDir string
	// IgnoreCgroups runs the sandbox where the caller is.
	IgnoreCgroups bool
	Files         Files
}

// RunArgs is the command that creates and starts s and returns.
func (r *Runtime) RunArgs(s Sandbox) []string {
	args := r.flags(s.Files)
	network := "none"
	if s.Network {
		network = "sandbox"
	}
	overlay := "root:memory"
	if s.OverlayDir != "" {
		overlay = "root:dir=" + s.OverlayDir
	}
	args = append(args, "--network="+network, "--overlay2="+overlay)
	if s.IgnoreCgroups {
		args = append(args, "--ignore-cgroups")
	}
	return append(args, "run", "--detach", "--bundle="+s.Bundle, "--pid-file="+s.PIDFile, s.ID)
}

// DeleteArgs is the command that ends a sandbox if it still runs and removes
// what runsc keeps of it.
func (r *Runtime) DeleteArgs(id string, f Files) []string {
	return append(r.flags(Files{Log: f.Log}), "delete", "--force", id)
}

// Exists says whether runsc has a record of the sandbox, running or not.
func (r *Runtime) Exists(id string) bool { return len(r.stateFiles(id)) > 0 }

// Forget removes runsc's record of a sandbox of an earlier boot. Delete would
// signal the pid in it, which is some other process's by now.
func (r *Runtime) Forget(id string) error {
	var errs []error
	for _, path := range r.stateFiles(id) {
		errs = append(errs, os.Remove(path))
	}
	return errors.Join(errs...)
}

// stateFiles are the files that runsc keeps for a sandbox (runsc/container,
// state_file.go): record, lock and control socket.
func (r *Runtime) stateFiles(id string) []string {
	var files []string
	for _, pattern := range []string{id + "_sandbox:*", "runsc-" + id + ".sock"} {
		matches, _ := filepath.Glob(filepath.Join(r.Root, pattern)) // fails only for a bad pattern
		files = append(files, matches...)
	}
	return files
}

// Delete executes DeleteArgs. A sandbox that does not exist is no error.
func (r *Runtime) Delete(ctx context.Context, id string) error {
	_, err := r.output(ctx, "delete", "--force", id)
	if errors.Is(err, ErrNotRunning) {
		return nil
	}
	return err
}

// Kill sends sig to the main process of the sandbox. It returns ErrNotRunning
// if there is none.
func (r *Runtime) Kill(ctx context.Context, id string, sig unix.Signal) error {
	_, err := r.output(ctx, "kill", id, strconv.Itoa(int(sig)))
	return err
}

// killGroup sends SIGKILL to the process group that a process of the sandbox
// leads.
func (r *Runtime) killGroup(ctx context.Context, id string, leader int) error {
	_, err := r.output(ctx, "kill", "--pgid="+strconv.Itoa(leader), id, strconv.Itoa(int(unix.SIGKILL)))
	return err
}

// output executes a short command and returns what it printed. The error is
// runsc's own last error.
func (r *Runtime) output(ctx context.Context, command string, args ...string) ([]byte, error) {
	log, err := newLogPipe()
	if err != nil {
		return nil, err
	}
	defer log.close()
	argv := append(r.flags(Files{Log: log.path()}), command)
	cmd := exec.CommandContext(ctx, argv[0], append(argv[1:], args...)...)
	cmd.Env = environment()
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{log.w}
	out, err := cmd.Output()
	if err == nil {
		return out, nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("runsc %s: %w", command, ctx.Err())
	}
	return nil, classify(command, log.lastError(), err)
}

// classify makes an error of what runsc logged; cause is used if it logged
// nothing.
func classify(command, msg string, cause error) error {
	switch {
	case msg == "":
		return fmt.Errorf("runsc %s: %w", command, cause)
	case strings.Contains(msg, "file does not exist"), strings.Contains(msg, "container does not exist"),
		strings.Contains(msg, "not running"), strings.Contains(msg, "in state stopped"),
		strings.Contains(msg, "no such process"), strings.Contains(msg, "connection refused"):
		return fmt.Errorf("runsc %s: %s: %w", command, msg, ErrNotRunning)
	default:
		return fmt.Errorf("runsc %s: %s", command, msg)
	}
}

// environment is all that runsc inherits: nothing of the host's.
func environment() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
}

// Version identifies a runsc binary.
type Version struct {
	// Release is what `runsc --version` calls itself.
	Release string
	// Commit is the source revision, or "" if the binary does not tell.
	Commit string
}

// Version asks the binary.
func (r *Runtime) Version(ctx context.Context) (Version, error) {
	out, err := exec.CommandContext(ctx, r.Path, "--version").Output()
	if err != nil {
		return Version{}, fmt.Errorf("%s --version: %w", r.Path, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	release, ok := strings.CutPrefix(line, "runsc version ")
	if !ok {
		return Version{}, fmt.Errorf("%s --version: %q is not runsc's answer", r.Path, line)
	}
	v := Version{Release: release, Commit: commitOf(release)}
	if info, err := buildinfo.ReadFile(r.Path); err == nil && v.Commit == "" {
		v.Commit = commitOf(info.Main.Version)
	}
	return v, nil
}

// commitOf returns the revision at the end of a Go pseudo-version or of a
// `git describe`, or "".
func commitOf(version string) string {
	_, last, ok := cutLast(version, "-")
	if !ok {
		return ""
	}
	last = strings.TrimPrefix(last, "g")
	if len(last) < 7 || strings.Trim(last, "0123456789abcdef") != "" {
		return ""
	}
	return last
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// CoreTagsSupported says whether the kernel can tag cores for a sandbox.
func CoreTagsSupported() bool {
	var cookie uint64
	_, _, errno := unix.Syscall6(unix.SYS_PRCTL, unix.PR_SCHED_CORE, unix.PR_SCHED_CORE_GET, 0, 0, ptr(&cookie), 0)
	return errno == 0
}

// logPipe is a runsc log that is read instead of kept.
type logPipe struct{ r, w *os.File }

func newLogPipe() (*logPipe, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make runsc log pipe: %w", err)
	}
	return &logPipe{r, w}, nil
}

// path is the log's name in the child, where the pipe is the first extra file.
func (*logPipe) path() string { return "/proc/self/fd/3" }

func (l *logPipe) close() {
	_ = l.r.Close()
	_ = l.w.Close()
}

// lastError closes the writer and returns the last error that was logged. The
// child must have ended: it logs one short record per failure, which a pipe
// holds. Nobody else is waited for who may hold the pipe open.
func (l *logPipe) lastError() string {
	_ = l.w.Close()
	_ = l.r.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	return runtimelog.LastError(l.r)
}
