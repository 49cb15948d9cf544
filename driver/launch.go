package driver

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/shim"
)

// startShim executes the shim for the task in dir and returns what it says of
// the start, or an error after the timeout, with the shim killed.
func startShim(program, dir string, timeout time.Duration) (_ *shim.Started, err error) {
	log, err := os.OpenFile(filepath.Join(dir, shimLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open shim log: %w", err)
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make shim pipe: %w", err)
	}
	defer r.Close()
	lock, err := shim.Lock(dir)
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	defer lock.Close()
	cmd := exec.Command(program, dir) //nolint:noctx // it outlives every context of this process
	cmd.Dir = "/"
	cmd.Env = []string{"GOMAXPROCS=2", "GOGC=50"} // nothing of the agent's environment
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{w, lock} // become shim.StatusFD and shim.LockFD
	// A session of its own: a signal to the agent's process group is not for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return nil, fmt.Errorf("start shim: %w", err)
	}
	// The shim outlives this call, and maybe this process: whoever is its
	// parent then reaps it, until then it is this goroutine, which ends with
	// the shim.
	go func() { _ = cmd.Wait() }()
	_ = r.SetReadDeadline(time.Now().Add(timeout))
	line, err := bufio.NewReader(r).ReadBytes('\n')
	if err != nil {
		_ = cmd.Process.Kill()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, fmt.Errorf("no answer from the shim within %v: %w", timeout, errSlowStart)
		}
		return nil, fmt.Errorf("the shim ended without an answer: %s", tail(filepath.Join(dir, shimLog)))
	}
	started := &shim.Started{}
	if err := json.Unmarshal(line, started); err != nil {
		_ = cmd.Process.Kill()
		return nil, fmt.Errorf("decode the shim's answer: %w", err)
	}
	if started.Err != "" {
		return nil, sandboxError(started.Err)
	}
	return started, nil
}

// sandboxError says what runsc's words mean to the job's author, where that is
// known.
func sandboxError(msg string) error {
	switch {
	case strings.Contains(msg, shim.SlowStart):
		return fmt.Errorf("start sandbox: %s: %w", msg, errSlowStart)
	case strings.Contains(msg, "error finding executable"), strings.Contains(msg, "no such file or directory") && strings.Contains(msg, "failed to load"):
		return fmt.Errorf("start sandbox: the command is not in the image (%s): check command, entrypoint and PATH", lastPart(msg))
	case strings.Contains(msg, "permission denied") && strings.Contains(msg, "failed to load"):
		return fmt.Errorf("start sandbox: the command is not executable (%s)", lastPart(msg))
	default:
		return fmt.Errorf("start sandbox: %s", msg)
	}
}

// lastPart drops runsc's chain of prefixes.
func lastPart(msg string) string {
	if i := strings.Index(msg, "error finding"); i >= 0 {
		return msg[i:]
	}
	if i := strings.Index(msg, "failed to load"); i >= 0 {
		return msg[i:]
	}
	return msg
}

// tail returns the end of a log, for an error message.
func tail(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	const longest = 512
	if len(raw) > longest {
		raw = raw[len(raw)-longest:]
	}
	return strings.TrimSpace(string(raw))
}

// writeJSON writes a file that only its owner may read: a runtime spec holds
// the task's environment.
func writeJSON(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %q: %w", path, err)
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		return fmt.Errorf("write %q: %w", path, err)
	}
	return nil
}
