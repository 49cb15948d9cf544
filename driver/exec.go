package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/bundle"
	"github.com/bivouac-run/bivouac/driver/internal/runsc"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// maxExecOutput bounds what ExecTask keeps of each stream: Nomad's own limit
// for script checks is 4 KiB, template scripts may print more.
const maxExecOutput = 1 << 20

// ExecTask implements drivers.DriverPlugin: script checks, template scripts
// and actions.
func (d *Driver) ExecTask(taskID string, cmd []string, timeout time.Duration) (*drivers.ExecTaskResult, error) {
	ctx := d.ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	var stdout, stderr limitedBuffer
	code, err := d.exec(ctx, taskID, cmd, runsc.Exec{Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		return nil, err
	}
	return &drivers.ExecTaskResult{
		Stdout: stdout.Bytes(), Stderr: stderr.Bytes(),
		ExitResult: &drivers.ExitResult{ExitCode: code},
	}, nil
}

// ExecTaskStreaming implements drivers.ExecTaskStreamingDriver. It returns
// once all output has been passed on. Input that the command leaves is taken
// until ctx, the client's call, ends: if writing it failed, Nomad would report
// that instead of the exit code.
func (d *Driver) ExecTaskStreaming(ctx context.Context, taskID string, opts *drivers.ExecOptions) (*drivers.ExitResult, error) {
	hangUp := func() { // pipes within this process
		_ = opts.Stdout.Close()
		_ = opts.Stderr.Close()
	}
	defer hangUp()
	// Nomad stops reading, without a word, when its client has gone.
	context.AfterFunc(ctx, func() {
		hangUp()
		_ = opts.Stdin.Close()
	})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(d.ctx, func() {
		cancel()
		hangUp()
	})
	defer stop()
	code, err := d.exec(ctx, taskID, opts.Command, runsc.Exec{
		TTY: opts.Tty, Stdin: opts.Stdin, Stdout: opts.Stdout, Stderr: opts.Stderr,
		Resize: sizes(ctx, opts.ResizeCh),
	})
	if err != nil {
		return nil, err
	}
	// What was written last has been read, but maybe not sent on: Nomad's
	// reader takes this empty write only once it has.
	_, _ = opts.Stdout.Write(nil)
	_, _ = opts.Stderr.Write(nil)
	return &drivers.ExitResult{ExitCode: code}, nil
}

func (d *Driver) exec(ctx context.Context, taskID string, cmd []string, e runsc.Exec) (int, error) {
	t, err := d.lookup(taskID)
	if err != nil {
		return 0, err
	}
	if t.ended() {
		return 0, fmt.Errorf("exec in task %q: it is not running", taskID)
	}
	h, err := d.ready()
	if h == nil {
		return 0, err
	}
	process, err := bundle.ExecProcess(t.process, cmd, e.TTY)
	if err != nil {
		return 0, fmt.Errorf("exec in task %q: %w", taskID, err)
	}
	if e.Process, err = json.Marshal(process); err != nil {
		return 0, fmt.Errorf("exec in task %q: %w", taskID, err)
	}
	e.ID, e.Dir = t.ContainerID, t.dir
	code, err := h.runsc.Exec(ctx, e)
	if err != nil {
		return 0, fmt.Errorf("exec in task %q: %w", taskID, err)
	}
	return code, nil
}

// sizes converts terminal sizes until ctx ends. A nil in gives nil.
func sizes(ctx context.Context, in <-chan drivers.TerminalSize) <-chan runsc.Size {
	if in == nil {
		return nil
	}
	out := make(chan runsc.Size)
	go func() {
		defer close(out)
		for {
			select {
			case <-ctx.Done():
				return
			case s, ok := <-in:
				if !ok {
					return
				}
				select {
				case out <- runsc.Size{Rows: clampSize(s.Height), Cols: clampSize(s.Width)}:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out
}

func clampSize(n int) uint16 { return uint16(min(max(n, 0), 1<<16-1)) }

// limitedBuffer keeps the first maxExecOutput bytes and takes the rest.
type limitedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if room := maxExecOutput - b.buf.Len(); room > 0 {
		b.buf.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

func (b *limitedBuffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Bytes()
}
