package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotNetNS is returned for a path that is no network namespace.
var ErrNotNetNS = errors.New("not a network namespace")

// ErrNodeNetNS is returned for the node's own network namespace.
var ErrNodeNetNS = errors.New("it is the node's own network namespace")

// nsGetType asks a namespace for its kind (linux/nsfs.h, NS_GET_NSTYPE).
const nsGetType = 0xb703

// onThread runs f on an OS thread that nothing else runs on, before or after:
// f may change its namespace. The thread ends with f.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and /proc/self shows its
			// namespace. While it is held here, f gets another one.
			done <- onThread(f)
			runtime.UnlockOSThread()
			return
		}
		// Never unlocked: so the runtime ends the thread.
		done <- f()
	}()
	return <-done
}

// enter moves the calling thread into a network namespace.
func enter(ns *os.File) error {
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %q: %w", ns.Name(), err)
	}
	return nil
}

// openNetNS opens a network namespace by its path. The error wraps
// os.ErrNotExist, ErrNotNetNS or ErrNodeNetNS where that is the cause.
func openNetNS(path string) (_ *os.File, err error) {
	// A path that someone replaced by a FIFO must not hang the driver.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	kind, err := unix.IoctlRetInt(int(f.Fd()), nsGetType)
	if err != nil || kind != unix.CLONE_NEWNET {
		return nil, fmt.Errorf("open network namespace %q: %w", path, ErrNotNetNS)
	}
	same, err := sameFile(f, "/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	if first, _ := sameFile(f, "/proc/1/ns/net"); same || first { // process 1 may be out of sight
		return nil, fmt.Errorf("open network namespace %q: %w", path, ErrNodeNetNS)
	}
	return f, nil
}

func sameFile(f *os.File, path string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, fmt.Errorf("compare namespaces: %w", err)
	}
	b, err := os.Stat(path)
	if err != nil {
		return false, fmt.Errorf("compare namespaces: %w", err)
	}
	return os.SameFile(a, b), nil
}

const (
	// lockFiles bounds how many lock files lie in Dir for ever.
	lockFiles = 64
	// lockPatience is how long one operation waits for others on the same
	// allocation, of this process or of one before it.
	lockPatience = 10 * time.Second
)

// lock makes operations on one allocation's namespace exclusive, across
// processes too. Two allocations may share a lock.
func lock(dir string, ns *os.File) (unlock func(), err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		return nil, fmt.Errorf("lock %q: %w", ns.Name(), err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("lock %q: %w", ns.Name(), err)
	}
	name := filepath.Join(dir, fmt.Sprintf(".lock-%02d", st.Ino%lockFiles))
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %q: %w", ns.Name(), err)
	}
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("lock %q: %w", ns.Name(), err)
		}
	}
}
