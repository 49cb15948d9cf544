package shim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
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
	fifo fifo
	done chan struct{}
	wake chan struct{} // closed by drain

	mu sync.Mutex
	// dst is the open FIFO, or nil.
	dst *os.File
	// until is when nobody waits for a reader any more; zero means no end.
	until time.Time
}

func newCopier(src *os.File, to fifo) *copier {
	return &copier{src: src, fifo: to, done: make(chan struct{}), wake: make(chan struct{})}
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

// peek returns the start of what the pipe holds, for a copier that was never
// started: what a command printed that says nothing in its log.
func (c *copier) peek() string {
	const longest = 512
	buf := make([]byte, longest)
	_ = c.src.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	n, _ := c.src.Read(buf)
	return strings.TrimSpace(string(buf[:n]))
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
		f, err := c.fifo.open()
		if err == nil {
			c.setDst(f)
			return nil
		}
		if !errors.Is(err, unix.ENXIO) && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if c.expired() {
			return fmt.Errorf("open log FIFO %q: nobody reads it: output dropped", c.fifo.name)
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
