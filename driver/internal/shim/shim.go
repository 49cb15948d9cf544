package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/proc"
	"github.com/bivouac-run/bivouac/driver/internal/runtimelog"
	"github.com/bivouac-run/bivouac/internal/statefile"
	"golang.org/x/sys/unix"
)

const (
	// deleteTimeout bounds the clean-up command, which takes 10 ms when
	// nothing is wrong.
	deleteTimeout = 20 * time.Second
	// drainTimeout bounds how long output that nobody reads is kept after
	// the task has ended.
	drainTimeout = 3 * time.Second
)

// SlowStart is in the error of a start that took too long.
const SlowStart = "did not start the sandbox within"

// Main runs the shim of the task whose state directory is dir, and returns its
// process exit code. It reports the start on status, which it closes; it keeps
// lock for as long as it lives.
func Main(dir string, status, lock *os.File) int {
	// Two things belong to a thread, and children must be forked from it: the
	// mount namespace of an overlay, and their death with this process.
	runtime.LockOSThread()
	unix.CloseOnExec(StatusFD)
	unix.CloseOnExec(LockFD)
	s := &shim{dir: dir, lock: lock}
	err := s.start(status)
	if err != nil {
		return 1
	}
	s.finish()
	return 0
}

type shim struct {
	dir  string
	lock *os.File
	cfg  *Config
	// unclaimed holds the statuses of children reaped while waiting for
	// another one.
	unclaimed map[int]syscall.WaitStatus
	// fifos are where stdout and stderr go; out are their copiers, started
	// once copying.
	fifos     []fifo
	out       []*copier
	copying   bool
	oomBefore uint64
	sandbox   proc.ID
}

// start brings the sandbox up and reports the outcome. On error everything it
// made is gone when it returns.
func (s *shim) start(status *os.File) (err error) {
	started := &Started{}
	defer func() { err = s.report(status, started, err) }()
	if started.Shim, err = sign(s.lock); err != nil {
		return err
	}
	if s.cfg, err = read[Config](s.dir, configFile); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	if err := reserveExit(s.dir); err != nil {
		return err
	}
	if err := s.prepare(); err != nil {
		return err
	}
	s.oomBefore = readOOMKills(s.cfg.OOMFile)
	if err := s.run(); err != nil {
		return err
	}
	started.Sandbox = s.sandbox
	return nil
}

// report records the outcome of the start and tells the driver. A start that
// cannot be recorded has failed.
func (s *shim) report(status *os.File, started *Started, err error) error {
	started.At = time.Now()
	path := filepath.Join(s.dir, startedFile)
	if err == nil {
		err = statefile.WriteVolatile(path, Version, started)
	}
	if err != nil {
		s.abandon()
		started.Err = err.Error()
		_ = statefile.WriteVolatile(path, Version, started) // the line below says it too
	}
	raw, _ := json.Marshal(started) // a struct of plain values
	_, _ = status.Write(append(raw, '\n'))
	_ = status.Close()
	return err
}

// prepare opens what lies in the allocation's directory, before anything of
// the task runs.
func (s *shim) prepare() error {
	alloc, err := openAlloc(s.cfg.AllocDir)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(alloc) }()
	for _, path := range []string{s.cfg.Stdout, s.cfg.Stderr} {
		to, err := findFIFO(alloc, s.cfg.AllocDir, path)
		if err != nil {
			return err
		}
		s.fifos = append(s.fifos, to)
	}
	return mountPrivately(s.cfg)
}

// run executes the Run command with the task's output pipes and learns the
// sandbox's pid.
func (s *shim) run() error {
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer stdin.Close()
	files := []*os.File{stdin}
	for _, to := range s.fifos {
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("make output pipe: %w", err)
		}
		defer w.Close()
		files = append(files, w)
		s.out = append(s.out, newCopier(r, to))
	}
	ws, err := s.execute(s.cfg.Run, files, s.cfg.StartTimeout)
	if err != nil {
		return err
	}
	if ws.ExitStatus() != 0 {
		return s.runtimeError(ws)
	}
	pid, err := readPID(s.cfg.PIDFile)
	if err != nil {
		return err
	}
	if s.sandbox, err = s.identify(pid); err != nil {
		return err
	}
	if err := joinCPUSet(s.cfg.ScopeProcs, s.cfg.CPUSetProcs); err != nil {
		return err
	}
	for _, c := range s.out {
		c.start()
	}
	s.copying = true
	return nil
}

// identify returns the ID of the sandbox process, which may have exited and
// been reaped by now.
func (s *shim) identify(pid int) (proc.ID, error) {
	if _, reaped := s.unclaimed[pid]; reaped {
		return proc.ID{PID: pid}, nil
	}
	id, err := proc.Lookup(pid)
	if errors.Is(err, proc.ErrGone) {
		return id, fmt.Errorf("sandbox process %d is not a child: %w", pid, err)
	}
	return id, err
}

// runtimeError turns the failure of the Run command into the last error of its
// log.
func (s *shim) runtimeError(ws syscall.WaitStatus) error {
	if ws.Signaled() && ws.Signal() == syscall.SIGKILL {
		return fmt.Errorf("runsc %s %v", SlowStart, s.cfg.StartTimeout)
	}
	if msg := runtimelog.LastErrorIn(s.cfg.RuntimeLog); msg != "" {
		return errors.New(msg)
	}
	return fmt.Errorf("runsc ended with %s: %q", describe(ws), s.out[1].peek())
}

// abandon ends and removes whatever a failed start left.
func (s *shim) abandon() {
	if s.cfg == nil {
		return
	}
	killScope(s.cfg.ScopeProcs)
	_, _ = s.execute(s.cfg.Delete, nil, deleteTimeout)
	for _, c := range s.out {
		if s.copying {
			c.drain(time.Now())
		} else {
			c.discard()
		}
	}
}

// finish waits for the sandbox, removes it, drains its output and records the
// end. The record is written before the clean-up, so that a clean-up that is
// cut short loses nothing.
func (s *shim) finish() {
	ws := s.waitFor(s.sandbox.PID)
	exit := &Exit{At: time.Now()}
	exit.fill(ws, readOOMKills(s.cfg.OOMFile)-s.oomBefore, lastPanic(s.cfg.PanicLog))
	if err := writeReservedExit(s.dir, exit); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	deadline := time.Now().Add(drainTimeout)
	if _, err := s.execute(s.cfg.Delete, nil, deleteTimeout); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	for _, c := range s.out {
		c.drain(deadline)
	}
}

// fill sets the verdict from the sandbox's wait status, the OOM kills while it
// ran and the first line of its panic log.
func (e *Exit) fill(ws syscall.WaitStatus, oomKills uint64, panicLine string) {
	e.Code = ws.ExitStatus()
	if ws.Signaled() {
		e.Signal = int(ws.Signal())
		e.Code = 128 + e.Signal
	}
	e.OOMKills = oomKills
	e.OOMKilled = oomKills > 0 && e.Code == 128+int(unix.SIGKILL)
	if panicLine != "" {
		e.Err = "sandbox runtime failed: " + panicLine
	}
}

// execute runs argv and waits for it, killing it (and the processes in the
// task's scope) at the timeout. nil files mean /dev/null.
func (s *shim) execute(argv []string, files []*os.File, timeout time.Duration) (syscall.WaitStatus, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	fds := []uintptr{null.Fd(), null.Fd(), null.Fd()}
	for i, f := range files {
		fds[i] = f.Fd()
	}
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: fds,
		Sys:   &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return 0, fmt.Errorf("execute %q: %w", argv[0], err)
	}
	timer := time.AfterFunc(timeout, func() {
		killScope(s.cfg.ScopeProcs)
		_ = unix.Kill(-pid, unix.SIGKILL)
	})
	defer timer.Stop()
	return s.waitFor(pid), nil
}

// waitFor reaps children until pid is among them. A pid that is not a child
// yields an exit status of 255.
func (s *shim) waitFor(pid int) syscall.WaitStatus {
	if ws, ok := s.unclaimed[pid]; ok {
		delete(s.unclaimed, pid)
		return ws
	}
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 255 << 8
		case got == pid:
			return ws
		default:
			if s.unclaimed == nil {
				s.unclaimed = map[int]syscall.WaitStatus{}
			}
			s.unclaimed[got] = ws
		}
	}
}

func readPID(path string) (int, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read sandbox pid: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || pid <= 0 {
		return 0, fmt.Errorf("read sandbox pid: %q in %q", raw, path)
	}
	return pid, nil
}

func describe(ws syscall.WaitStatus) string {
	if ws.Signaled() {
		return "signal " + ws.Signal().String()
	}
	return fmt.Sprintf("exit status %d", ws.ExitStatus())
}

// lastPanic returns the first line of a panic log, bounded, or "".
func lastPanic(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	buf := make([]byte, 512)
	n, _ := f.Read(buf)
	line, _, _ := strings.Cut(strings.TrimSpace(string(buf[:n])), "\n")
	return line
}
