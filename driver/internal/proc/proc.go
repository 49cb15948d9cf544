// Package proc names processes so that a reused pid is never mistaken for the
// process that had it before.
//
// An ID is a pid with the kernel's start time for it, the pair that survives
// in a state file while the writer is gone. Operations go through a pidfd
// opened first and checked against the start time after, so nothing else can
// slip in between. The package knows nothing of what the processes are.
package proc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone is returned for a process that has exited and been reaped, or whose
// pid now belongs to another one.
var ErrGone = errors.New("process is gone")

// ID names one process of this boot.
type ID struct {
	// PID is the process id in the initial pid namespace; 0 means none.
	PID int `json:"pid"`
	// Start is the start time in clock ticks since boot (proc(5), field 22
	// of /proc/PID/stat).
	Start uint64 `json:"start"`
}

// Lookup returns the ID of the process that has pid now. It returns ErrGone if
// there is none.
func Lookup(pid int) (ID, error) {
	start, err := startTicks(pid)
	if err != nil {
		return ID{}, err
	}
	return ID{pid, start}, nil
}

// startTicks reads field 22 of /proc/PID/stat. The second field, the command
// name, may contain anything, so fields are counted after its last ')'.
func startTicks(pid int) (uint64, error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, fmt.Errorf("look up process %d: %w", pid, ErrGone)
	}
	if err != nil {
		return 0, fmt.Errorf("look up process %d: %w", pid, err)
	}
	return parseStartTicks(raw)
}

func parseStartTicks(stat []byte) (uint64, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, fmt.Errorf("parse process stat: no command name in %q", stat)
	}
	const afterName = 22 - 3 // fields 3.. follow the name; field 22 is index 19
	fields := bytes.Fields(stat[end+1:])
	if len(fields) <= afterName {
		return 0, fmt.Errorf("parse process stat: %d fields after the name", len(fields))
	}
	ticks, err := strconv.ParseUint(string(fields[afterName]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("parse process stat: start time: %w", err)
	}
	return ticks, nil
}

// Open returns a pidfd of the process, or ErrGone.
func (id ID) Open() (*os.File, error) {
	if id.PID <= 0 {
		return nil, ErrGone
	}
	// Not blocking, so that Go waits for it in its poller and a waiter costs
	// no thread.
	fd, err := unix.PidfdOpen(id.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("open process %d: %w", id.PID, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", id.PID, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	start, err := startTicks(id.PID)
	if err == nil && start != id.Start {
		err = fmt.Errorf("open process %d: pid was reused: %w", id.PID, ErrGone)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Alive says whether the process exists and is not a zombie.
func (id ID) Alive() bool {
	f, err := id.Open()
	if err != nil {
		return false
	}
	defer f.Close()
	alive := false
	err = control(f, func(fd uintptr) { alive = !exited(fd) })
	return err == nil && alive
}

// Signal sends sig. It returns ErrGone if the process no longer exists.
func (id ID) Signal(sig unix.Signal) error {
	f, err := id.Open()
	if err != nil {
		return err
	}
	defer f.Close()
	var sendErr error
	err = control(f, func(fd uintptr) { sendErr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	if errors.Is(sendErr, unix.ESRCH) {
		sendErr = ErrGone
	}
	if err = errors.Join(err, sendErr); err != nil {
		return fmt.Errorf("signal process %d: %w", id.PID, err)
	}
	return nil
}

// Wait returns nil once the process has exited or is gone, and ctx's error if
// that ends first. It does not reap.
func (id ID) Wait(ctx context.Context) error {
	f, err := id.Open()
	if errors.Is(err, ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", id.PID, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = conn.Read(exited) // a pidfd is readable once its process has exited
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", id.PID, err)
	}
	return nil
}

// control calls do with f's descriptor, which stays open meanwhile.
func control(f *os.File, do func(fd uintptr)) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Control(do)
}

// exited says whether the process of a pidfd has exited.
func exited(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}
