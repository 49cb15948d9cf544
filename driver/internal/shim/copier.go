package shim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// copier moves one output stream of the sandbox from its pipe to a FIFO.
//
// Without a reader at the FIFO it waits, and the task, once its pipe is full,
// waits with it: nothing is dropped while the task lives. After the task has
// ended, drain bounds the wait. A FIFO that cannot be used at all costs the
// output, never the task: the pipe is read to its end.
type copier struct {
	src  *os.File
	fifo string
	done chan struct{}
	wake chan struct{} // closed by drain

	mu sync.Mutex
	// dst is the open FIFO, or nil.
	dst *os.File
	// until is when nobody waits for a reader any more; zero means no end.
	until time.Time
}

func newCopier(src *os.File, fifo string) *copier {
	return &copier{src: src, fifo: fifo, done: make(chan struct{}), wake: make(chan struct{})}
}

// start begins to copy. drain waits for the end.
func (c *copier) start() {
	go func() {
		defer close(c.done)
		defer c.src.Close()
		defer c.setDst(nil)
		if err := c.copy(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			_, _ = io.Copy(io.Discard, c.src)
		}
	}()
}

// discard drops what the pipe holds, for a copier that was never started.
func (c *copier) discard() { _ = c.src.Close() }

// drain waits until all output has been passed on or the deadline has passed.
// Every writer of the pipe must be gone or about to be.
func (c *copier) drain(deadline time.Time) {
	c.mu.Lock()
	c.until = deadline
	if c.dst != nil {
		_ = c.dst.SetWriteDeadline(deadline)
	}
	c.mu.Unlock()
	close(c.wake)
	_ = c.src.SetReadDeadline(deadline)
	<-c.done
}

// setDst closes the FIFO in use and takes f, which may be nil, in its place.
func (c *copier) setDst(f *os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dst != nil {
		_ = c.dst.Close()
	}
	c.dst = f
	if f != nil && !c.until.IsZero() {
		_ = f.SetWriteDeadline(c.until)
	}
}

// copy opens the FIFO at once, output or not: Nomad's log collector waits for
// a writer, and takes two seconds to stop if none ever came.
func (c *copier) copy() error {
	if err := c.open(); err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := c.src.Read(buf)
		if n > 0 {
			if werr := c.write(buf[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read task output: %w", err)
		}
	}
}

// write passes p on whole, opening the FIFO as often as its reader goes away.
func (c *copier) write(p []byte) error {
	for len(p) > 0 {
		if c.dst == nil {
			if err := c.open(); err != nil {
				return err
			}
		}
		n, err := c.dst.Write(p)
		p = p[n:]
		switch {
		case errors.Is(err, unix.EPIPE):
			c.setDst(nil)
		case err != nil:
			return fmt.Errorf("write task output: %w", err)
		}
	}
	return nil
}

// open waits for a reader at the FIFO.
func (c *copier) open() error {
	const first, longest = 2 * time.Millisecond, 250 * time.Millisecond
	for delay := first; ; delay = min(2*delay, longest) {
		f, err := openFIFO(c.fifo)
		if err == nil {
			c.setDst(f)
			return nil
		}
		if !errors.Is(err, unix.ENXIO) && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if c.expired() {
			return fmt.Errorf("open log FIFO %q: nobody reads it: output dropped", c.fifo)
		}
		c.pause(delay)
	}
}

// pause sleeps for d, or until drain is called if it has not been yet.
func (c *copier) pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-c.wake:
		<-timer.C
		return
	default:
	}
	select {
	case <-timer.C:
	case <-c.wake:
	}
}

func (c *copier) expired() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.until.IsZero() && !time.Now().Before(c.until)
}

// ReleaseFIFO lets go of a log collector that waits for a writer, for a task
// that did not start: it would take seconds to stop otherwise.
func ReleaseFIFO(path string) {
	if f, err := openFIFO(path); err == nil {
		_ = f.Close()
	}
}

// openFIFO opens path for writing without waiting for a reader (ENXIO if there
// is none). Anything but a FIFO or /dev/null is refused: a task must not be
// able to have its output written elsewhere by putting a link there.
func openFIFO(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open log FIFO: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open log FIFO %q: %w", path, err)
	}
	isNull := st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
	if st.Mode&unix.S_IFMT != unix.S_IFIFO && !isNull {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open log FIFO %q: not a FIFO", path)
	}
	return os.NewFile(uintptr(fd), path), nil
}
