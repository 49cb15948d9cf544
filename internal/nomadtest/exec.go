package nomadtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
)

const execPatience = 60 * time.Second

// Exec runs a command in task main without a terminal and returns its exit
// code and output.
func (a *Agent) Exec(ctx context.Context, alloc *api.Allocation, stdin io.Reader, cmd ...string) (code int, stdout, stderr string, err error) {
	if stdin == nil {
		stdin = strings.NewReader("")
	}
	ctx, cancel := context.WithTimeout(ctx, execPatience)
	defer cancel()
	var out, errOut bytes.Buffer
	code, err = a.Client.Allocations().Exec(ctx, alloc, "main", false, cmd, stdin, &out, &errOut, nil, nil)
	return code, out.String(), errOut.String(), err
}

// Sh runs a shell script in task main, demands exit code 0, and returns its
// stdout without the last newline.
func (a *Agent) Sh(t testing.TB, alloc *api.Allocation, script string) string {
	t.Helper()
	code, out, errOut, err := a.Exec(t.Context(), alloc, nil, "sh", "-c", script)
	if err != nil || code != 0 {
		t.Fatalf("exec of %q: exit code %d, error %v, stderr %q", script, code, err, errOut)
	}
	return strings.TrimSuffix(out, "\n")
}

// Terminal is a command in task main with a terminal, as `nomad alloc exec
// -i -t` gives it.
type Terminal struct {
	in    *io.PipeWriter
	out   screen
	sizes chan api.TerminalSize
	done  chan struct{}
	code  int
	err   error
}

// OpenTerminal starts cmd. The terminal is closed when the test ends.
func (a *Agent) OpenTerminal(t testing.TB, alloc *api.Allocation, cmd ...string) *Terminal {
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	term := &Terminal{in: w, sizes: make(chan api.TerminalSize, 1), done: make(chan struct{})}
	go func() { // ends with the command, or with cancel
		defer close(term.done)
		term.code, term.err = a.Client.Allocations().Exec(ctx, alloc, "main", true, cmd, r, &term.out, io.Discard, term.sizes, nil)
		_ = r.Close()
	}()
	t.Cleanup(func() {
		cancel()
		_ = w.Close()
		<-term.done
	})
	return term
}

// Type sends keys.
func (term *Terminal) Type(t testing.TB, keys string) {
	t.Helper()
	if _, err := io.WriteString(term.in, keys); err != nil {
		t.Fatalf("type %q: %v", keys, err)
	}
}

// Resize tells the terminal a new size.
func (term *Terminal) Resize(rows, cols int) {
	term.sizes <- api.TerminalSize{Height: rows, Width: cols}
}

// Expect waits for text after what was expected before, and returns all
// output up to it.
func (term *Terminal) Expect(t testing.TB, text string) string {
	t.Helper()
	const patience = 20 * time.Second
	var seen string
	Eventually(t, patience, func() error {
		var ok bool
		if seen, ok = term.out.take(text); ok {
			return nil
		}
		err := fmt.Errorf("terminal shows %q, not %q", seen, text)
		select {
		case <-term.done:
			return final{errors.Join(fmt.Errorf("%w; it is closed, exit code %d", err, term.code), term.err)}
		default:
			return err
		}
	})
	return seen
}

// Shows waits a second for text, like Expect, and says whether it came.
func (term *Terminal) Shows(text string) bool {
	return poll(time.Second, func() error {
		if _, ok := term.out.take(text); !ok {
			return fmt.Errorf("no %q", text)
		}
		return nil
	}) == nil
}

// Wait returns the command's exit code.
func (term *Terminal) Wait(t testing.TB) int {
	t.Helper()
	select {
	case <-term.done:
	case <-time.After(execPatience):
		t.Fatalf("the command is still there after %v; the terminal shows %q", execPatience, term.out.rest())
	}
	if term.err != nil {
		t.Fatalf("terminal: %v", term.err)
	}
	return term.code
}

// screen collects output.
type screen struct {
	mu  sync.Mutex
	buf string
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.buf += string(p)
	return len(p), nil
}

// take removes and returns everything up to text, or returns what there is.
func (s *screen) take(text string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before, after, ok := strings.Cut(s.buf, text)
	if !ok {
		return s.buf, false
	}
	s.buf = after
	return before, true
}

func (s *screen) rest() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf
}
