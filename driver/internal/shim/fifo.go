package shim

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// fifo names a FIFO by the directory it is in, held open, so that output goes
// there whatever a task renames around it. Without a directory it is
// /dev/null.
type fifo struct {
	dir  *os.File
	name string
}

// findFIFO opens the directory of a path that lies below allocDir, open as
// alloc.
func findFIFO(alloc int, allocDir, path string) (fifo, error) {
	if path == "" || path == os.DevNull {
		return fifo{name: os.DevNull}, nil
	}
	rel, ok := strings.CutPrefix(path, allocDir+"/")
	if !ok {
		return fifo{}, fmt.Errorf("open log FIFO %q: not below %q", path, allocDir)
	}
	fd, err := openBeneath(alloc, filepath.Dir(rel), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fifo{}, fmt.Errorf("open log FIFO %q: %w", path, err)
	}
	return fifo{os.NewFile(uintptr(fd), filepath.Dir(path)), filepath.Base(path)}, nil
}

// open opens the FIFO for writing without waiting for a reader (ENXIO if there
// is none). Anything but a FIFO or /dev/null is refused: a task must not be
// able to have its output written elsewhere by putting a link there.
func (f fifo) open() (*os.File, error) {
	dir := unix.AT_FDCWD
	if f.dir != nil {
		dir = int(f.dir.Fd())
	}
	fd, err := unix.Openat(dir, f.name, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open log FIFO: %w", &os.PathError{Op: "open", Path: f.name, Err: err})
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open log FIFO %q: %w", f.name, err)
	}
	isNull := f.dir == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR
	if st.Mode&unix.S_IFMT != unix.S_IFIFO && !isNull {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open log FIFO %q: not a FIFO", f.name)
	}
	return os.NewFile(uintptr(fd), f.name), nil
}

func (f fifo) close() {
	if f.dir != nil {
		_ = f.dir.Close()
	}
}

// ReleaseFIFOs lets go of log collectors that wait for a writer, for a task
// that did not start: they would take seconds to stop otherwise.
func ReleaseFIFOs(allocDir string, paths ...string) {
	alloc, err := openAlloc(allocDir)
	if err != nil {
		return
	}
	defer func() { _ = unix.Close(alloc) }()
	for _, path := range paths {
		to, err := findFIFO(alloc, allocDir, path)
		if err != nil {
			continue
		}
		if f, err := to.open(); err == nil {
			_ = f.Close()
		}
		to.close()
	}
}

// openAlloc opens an allocation's directory, whose own path is trusted.
func openAlloc(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open allocation directory %q: %w", dir, err)
	}
	return fd, nil
}
