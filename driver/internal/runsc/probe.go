package runsc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/runtimelog"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// probePath is where Probe's program lies in its root.
const probePath = "/probe"

// ProbeDirs matches the directories that Probe makes in its dir, for whoever
// removes those of a process that was killed.
const ProbeDirs = "probe-*"

// Probe boots a sandbox with one small static program in it and returns an
// error unless that program ran. program is the host path of an executable
// that, given --probe, prints a line and exits with 0; dir is an existing
// directory for Probe's files, which it removes. The sandbox is killed when
// ctx ends: the kvm platform can hang for ever at start.
func (r *Runtime) Probe(ctx context.Context, program, dir string) (err error) {
	dir, err = os.MkdirTemp(dir, ProbeDirs)
	if err != nil {
		return fmt.Errorf("boot check: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := writeProbeBundle(dir, program); err != nil {
		return fmt.Errorf("boot check: %w", err)
	}
	id := filepath.Base(dir)
	log := filepath.Join(dir, "log.json")
	// runsc's state goes with the directory, if this process is killed; only
	// what all sandboxes share stays where it is.
	probe := *r
	probe.Root = dir
	argv := append(probe.flags(Files{Log: log}), "--shared-root="+r.Root, "--network=none", "--overlay2=none", "--ignore-cgroups",
		"run", "--bundle="+dir, id)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = environment()
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	// Nor does the sandbox outlive this process: it ends with the thread that
	// started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, runErr := cmd.Output()
	// Whatever happened, nothing of the sandbox may stay.
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	deleteErr := probe.Delete(cleanup, id)
	switch {
	case ctx.Err() != nil:
		return errors.Join(fmt.Errorf("boot check: no sandbox within the time limit: %w", ctx.Err()), deleteErr)
	case runErr != nil:
		return errors.Join(classify("run", runtimelog.LastErrorIn(log), runErr), deleteErr)
	case !strings.Contains(string(out), "probe"):
		return errors.Join(fmt.Errorf("boot check: sandbox printed %q", out), deleteErr)
	}
	return deleteErr
}

func writeProbeBundle(dir, program string) error {
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := copyFile(program, filepath.Join(root, probePath)); err != nil {
		return err
	}
	spec := specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{Args: []string{probePath, "--probe"}, Cwd: "/", NoNewPrivileges: true},
		Root:    &specs.Root{Path: root, Readonly: true},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace},
			{Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
		}},
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600)
}

func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}
