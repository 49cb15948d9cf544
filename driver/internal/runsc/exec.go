package runsc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Exit codes of a command that could not be executed, as shells and Docker
// have them.
const (
	ExitCannotExecute = 126
	ExitNotFound      = 127
)

// drainMax bounds what is read once the process has ended. What the process
// itself wrote is in the pipe by then, and a pipe holds less; only children
// that outlive it can write more.
const drainMax = 1 << 20

// Size is a terminal's, in characters.
type Size struct{ Rows, Cols uint16 }

// Exec is a command to run in a sandbox.
type Exec struct {
	// ID is the sandbox.
	ID string
	// Process is the OCI process object as JSON. Its terminal field must be
	// equal to TTY.
	Process []byte
	TTY     bool
	// Stdin is read to its end, also after the command has ended: whoever
	// writes to it must not get stuck or fail because nobody reads. With a
	// TTY everything goes to Stdout. nil means /dev/null.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Resize, which may be nil, delivers terminal sizes.
	Resize <-chan Size
	// Dir is a directory for short-lived files.
	Dir string
}

// Exec runs the command and returns its exit code (128 + n for death by signal
// n, 126 or 127 if it cannot be executed) once all its output has been passed
// on. When ctx ends the command is killed and ctx's error returned.
func (r *Runtime) Exec(ctx context.Context, e Exec) (int, error) {
	log, err := newLogPipe()
	if err != nil {
		return 0, err
	}
	defer log.close()
	process, err := memoryFile("process.json", e.Process)
	if err != nil {
		return 0, err
	}
	defer process.Close()
	pidFile, err := os.CreateTemp(e.Dir, "exec-*.pid")
	if err != nil {
		return 0, fmt.Errorf("make exec pid file: %w", err)
	}
	_ = pidFile.Close()
	defer os.Remove(pidFile.Name())

	argv := append(r.flags(Files{Log: log.path()}), "exec", "--process=/proc/self/fd/4",
		"--internal-pid-file="+pidFile.Name(), e.ID)
	cmd := exec.Command(argv[0], argv[1:]...) //nolint:noctx // the sandbox's process dies first, then this one
	cmd.Env = environment()
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{log.w, process}
	streams, err := connect(cmd, e)
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		streams.abort()
		return 0, fmt.Errorf("runsc exec: %w", err)
	}
	streams.started()
	ended, killed := make(chan struct{}), make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(killed)
		r.killExec(e.ID, pidFile.Name(), cmd.Process, ended)
	})
	err = cmd.Wait()
	close(ended)
	if !stop() {
		<-killed
	}
	streams.finish()
	if ctx.Err() != nil {
		return 0, fmt.Errorf("runsc exec: %w", ctx.Err())
	}
	return exitCode(log.lastError(), err)
}

// killExec ends the process group of a command, then the process that waits
// for it. The pid file may not have been written yet.
func (r *Runtime) killExec(id, pidFile string, waiter *os.Process, ended <-chan struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), killExecTimeout)
	defer cancel()
	for ctx.Err() == nil {
		raw, err := os.ReadFile(pidFile)
		if pid, aerr := strconv.Atoi(strings.TrimSpace(string(raw))); err == nil && aerr == nil && pid > 0 {
			_ = r.killGroup(ctx, id, pid) // it may have ended by itself
			break
		}
		select {
		case <-ended:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
	_ = waiter.Kill()
}

// killExecTimeout bounds the end of a command whose caller has gone.
const killExecTimeout = 5 * time.Second

// exitCode tells a failure to execute (runsc logged an error) from the
// command's own exit code.
func exitCode(logged string, err error) (int, error) {
	var exit *exec.ExitError
	switch {
	case logged != "":
		switch {
		case strings.Contains(logged, "no such file or directory"), strings.Contains(logged, "not found"):
			return ExitNotFound, nil
		case strings.Contains(logged, "permission denied"), strings.Contains(logged, "exec format error"),
			strings.Contains(logged, "is a directory"):
			return ExitCannotExecute, nil
		}
		return 0, classify("exec", logged, err)
	case err == nil:
		return 0, nil
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), nil
	default:
		return 0, fmt.Errorf("runsc exec: %w", err)
	}
}

// memoryFile returns an anonymous file with content, positioned at its start.
func memoryFile(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make anonymous file: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(content, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("fill anonymous file: %w", err), f.Close())
	}
	return f, nil
}

// streams are the two ends of an exec's input and output.
type streams struct {
	exec Exec
	// child are the ends the command gets; parent are ours, stdin first.
	child []*os.File
	stdin *os.File
	outs  []outStream
	done  chan struct{} // closed when all outs have been copied
	ended chan struct{} // closed by finish
}

type outStream struct {
	from *os.File
	to   io.Writer
}

// connect gives cmd its standard files.
func connect(cmd *exec.Cmd, e Exec) (*streams, error) {
	s := &streams{exec: e, done: make(chan struct{}), ended: make(chan struct{})}
	if e.TTY {
		master, replica, err := openTerminal()
		if err != nil {
			return nil, err
		}
		s.child = []*os.File{replica}
		s.stdin, s.outs = master, []outStream{{master, e.Stdout}}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = replica, replica, replica
		cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
		return s, nil
	}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if e.Stdin != nil {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("make exec pipe: %w", err)
		}
		s.stdin, s.child = w, append(s.child, r)
		cmd.Stdin = r
	}
	for _, out := range []struct {
		to  io.Writer
		set func(*os.File)
	}{
		{e.Stdout, func(f *os.File) { cmd.Stdout = f }},
		{e.Stderr, func(f *os.File) { cmd.Stderr = f }},
	} {
		if out.to == nil {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			s.abort()
			return nil, fmt.Errorf("make exec pipe: %w", err)
		}
		s.child = append(s.child, w)
		s.outs = append(s.outs, outStream{r, out.to})
		out.set(w)
	}
	return s, nil
}

// abort closes everything of a command that was not started.
func (s *streams) abort() {
	for _, f := range s.child {
		_ = f.Close()
	}
	if s.stdin != nil {
		_ = s.stdin.Close()
	}
	for _, o := range s.outs {
		_ = o.from.Close()
	}
}

// started closes the command's ends and begins to copy. finish stops and waits
// for the copying, except of input: that ends when Stdin is closed.
func (s *streams) started() {
	for _, f := range s.child {
		_ = f.Close()
	}
	if s.stdin != nil && s.exec.Stdin != nil {
		go func() {
			_, _ = io.Copy(s.stdin, s.exec.Stdin)
			if !s.exec.TTY {
				_ = s.stdin.Close()
			}
			_, _ = io.Copy(io.Discard, s.exec.Stdin) // what the command left
		}()
	}
	if s.exec.TTY && s.exec.Resize != nil {
		go s.resize()
	}
	go func() {
		defer close(s.done)
		finished := make(chan struct{}, len(s.outs))
		for _, o := range s.outs {
			go func() {
				o.copy(s.ended)
				finished <- struct{}{}
			}()
		}
		for range s.outs {
			<-finished
		}
	}()
}

// copy passes output on until its end, or, once ended is closed, until the
// pipe is empty. It is read even when to fails, so that the command never
// blocks on a client that has gone.
func (o outStream) copy(ended <-chan struct{}) {
	buf := make([]byte, 32<<10)
	sink := o.to
	pass := func(p []byte) {
		if _, err := sink.Write(p); err != nil {
			sink = io.Discard
		}
	}
	for {
		n, err := o.from.Read(buf)
		pass(buf[:n])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			<-ended // finish has woken this read
			break
		}
		if err != nil {
			return
		}
	}
	for left := drainMax; left > 0; {
		n := readNow(o.from, buf)
		if n == 0 {
			return
		}
		pass(buf[:n])
		left -= n
	}
}

// readNow reads what is there, without waiting: 0 if that is nothing, or the
// end. (A Read past its deadline would not look.)
func readNow(f *os.File, buf []byte) int {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	err = conn.Control(func(fd uintptr) {
		for {
			m, err := unix.Read(int(fd), buf)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			n = max(m, 0)
			return
		}
	})
	if err != nil {
		return 0
	}
	return n
}

// resize applies terminal sizes until finish is called or the channel closes.
func (s *streams) resize() {
	for {
		select {
		case <-s.ended:
			return
		case size, ok := <-s.exec.Resize:
			if !ok {
				return
			}
			// The kernel tells the foreground process, runsc exec, by
			// SIGWINCH, which it passes on.
			_ = setSize(s.stdin, size)
		}
	}
}

// finish waits until the output of the command, which has ended, has been
// passed on, and closes everything.
func (s *streams) finish() {
	close(s.ended)
	for _, o := range s.outs {
		_ = o.from.SetReadDeadline(time.Now())
	}
	<-s.done
	if s.stdin != nil {
		_ = s.stdin.Close()
	}
	for _, o := range s.outs {
		_ = o.from.Close()
	}
}
