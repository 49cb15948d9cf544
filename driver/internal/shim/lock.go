package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/proc"
	"golang.org/x/sys/unix"
)

// LockFD is the descriptor at which the shim finds its lock. The driver takes
// the lock and hands it down, so there is no moment between the two in which
// a live start looks dead; the kernel releases it when the shim ends, however
// it ends.
const LockFD = 4

const lockFile = "lock"

// Lock makes and takes the lock of a task's state directory, for a shim about
// to be started.
func Lock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make shim lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %q: %w", f.Name(), err), f.Close())
	}
	return f, nil
}

// Running says whether a shim works on dir, or is about to.
func Running(dir string) (bool, error) {
	f, err := os.Open(filepath.Join(dir, lockFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at shim lock: %w", err)
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at shim lock: %w", err)
	}
	return false, nil
}

// Kill ends the shim that works on dir, if there is one, and returns once it
// is gone. The sandbox is not touched.
func Kill(dir string) error {
	const patience = 10 * time.Second
	deadline := time.Now().Add(patience)
	for {
		running, err := Running(dir)
		if err != nil || !running {
			return err
		}
		// The lock names its holder as soon as that has read its own pid.
		if id, err := holder(dir); err == nil {
			if err := id.Signal(unix.SIGKILL); err != nil && !errors.Is(err, proc.ErrGone) {
				return err
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("shim of %q is still there after %v", dir, patience)
		}
		time.Sleep(time.Millisecond)
	}
}

// sign writes the calling process into its lock.
func sign(lock *os.File) (proc.ID, error) {
	id, err := proc.Lookup(os.Getpid())
	if err != nil {
		return id, err
	}
	raw, err := json.Marshal(id)
	if err != nil {
		return id, fmt.Errorf("sign shim lock: %w", err)
	}
	if _, err := lock.WriteAt(raw, 0); err != nil {
		return id, fmt.Errorf("sign shim lock: %w", err)
	}
	return id, nil
}

func holder(dir string) (proc.ID, error) {
	var id proc.ID
	f, err := os.Open(filepath.Join(dir, lockFile))
	if err != nil {
		return id, err
	}
	defer f.Close()
	const longest = 256
	raw, err := io.ReadAll(io.LimitReader(f, longest))
	if err != nil {
		return id, err
	}
	return id, json.Unmarshal(raw, &id)
}
