package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

// idle runs a task that does nothing, to exec into.
func idle(t *testing.T) *api.Allocation {
	t.Helper()
	j := nomadtest.Service(t, busybox(t), "trap 'exit 0' TERM; while :; do sleep 0.2; done")
	j.Task.Resources.MemoryMB = ptr(256)
	return agent(t).Run(t, j.Job).Running(t)
}

func TestExecExitCodes(t *testing.T) {
	t.Parallel()
	a, alloc := agent(t), idle(t)
	for _, tc := range []struct {
		cmd  []string
		want int
	}{
		{[]string{"true"}, 0},
		{[]string{"sh", "-c", "exit 3"}, 3},
		{[]string{"/etc/passwd"}, 126},
		{[]string{"no-such-command"}, 127},
		{[]string{"sh", "-c", "kill -9 $$"}, 137},
	} {
		code, out, errOut, err := a.Exec(t.Context(), alloc, nil, tc.cmd...)
		if err != nil || code != tc.want {
			t.Errorf("%q: exit code %d, want %d (error %v, output %q and %q)", tc.cmd, code, tc.want, err, out, errOut)
		}
	}
}

func TestExecStreams(t *testing.T) {
	t.Parallel()
	a, alloc := agent(t), idle(t)

	const inputSize = 1 << 20
	input := make([]byte, inputSize)
	if _, err := rand.Read(input); err != nil {
		t.Fatal(err)
	}
	code, out, _, err := a.Exec(t.Context(), alloc, bytes.NewReader(input), "sha256sum")
	if want := fmt.Sprintf("%x  -\n", sha256.Sum256(input)); err != nil || code != 0 || out != want {
		t.Errorf("sha256sum of %d bytes of input: %q, want %q (exit code %d, error %v)", inputSize, out, want, code, err)
	}

	const outputSize = 10 << 20
	code, out, errOut, err := a.Exec(t.Context(), alloc, nil, "sh", "-c", "yes | head -c 10485760; echo to-stderr >&2")
	if err != nil || code != 0 || len(out) != outputSize || strings.Trim(out, "y\n") != "" {
		t.Errorf("%d bytes of output, want %d (exit code %d, error %v)", len(out), outputSize, code, err)
	}
	if errOut != "to-stderr\n" {
		t.Errorf("stderr: %q", errOut)
	}
}

func TestExecManyAtOnce(t *testing.T) {
	t.Parallel()
	a, alloc := agent(t), idle(t)
	const n = 50
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			want := fmt.Sprintf("exec %d\n", i)
			code, out, _, err := a.Exec(t.Context(), alloc, nil, "sh", "-c", fmt.Sprintf("echo exec %d; exit %d", i, i%5))
			if err != nil || code != i%5 || out != want {
				errs[i] = errors.Join(fmt.Errorf("exec %d: exit code %d, output %q", i, code, out), err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

func TestExecTerminal(t *testing.T) {
	t.Parallel()
	a, alloc := agent(t), idle(t)
	term := a.OpenTerminal(t, alloc, "sh")
	// Typed text is echoed, so each expected word is one that only the shell
	// can make of what was typed.
	term.Resize(31, 117)
	nomadtest.Eventually(t, 20*time.Second, func() error {
		term.Type(t, "stty size\n")
		if !term.Shows("31 117") {
			return errors.New("stty does not show the size yet")
		}
		return nil
	})
	term.Type(t, "test -t 0 && test -t 1 && test -t 2; echo terminal-$?\n")
	term.Expect(t, "terminal-0")

	term.Resize(50, 200)
	nomadtest.Eventually(t, 20*time.Second, func() error {
		term.Type(t, "stty size\n")
		if !term.Shows("50 200") {
			return errors.New("stty does not show the new size yet")
		}
		return nil
	})

	// ^C ends what is in the foreground, and not the shell.
	term.Type(t, "sh -c 'echo ready-$((1+1)); exec sleep 100'\n")
	term.Expect(t, "ready-2")
	term.Type(t, "\x03")
	term.Type(t, "echo status-$?\n")
	term.Expect(t, "status-130")

	// Job control: background, list, foreground.
	term.Type(t, "sleep 100 &\njobs\n")
	term.Expect(t, "[1]+  Running")
	term.Type(t, "fg\n")
	term.Expect(t, "sleep 100")
	nomadtest.Eventually(t, 20*time.Second, func() error {
		term.Type(t, "\x03echo $((5+6))-back\n")
		if !term.Shows("11-back") {
			return errors.New("^C does not end the job in the foreground")
		}
		return nil
	})
	term.Type(t, "jobs; echo $((3+4))-done\n")
	if seen := term.Expect(t, "7-done"); strings.Contains(seen, "Running") {
		t.Errorf("the job is still there: %q", seen)
	}
	term.Type(t, "exit 5\n")
	if code := term.Wait(t); code != 5 {
		t.Errorf("exit code %d, want 5", code)
	}
}

// A client that goes away takes its command with it, as soon as that writes:
// Nomad 1.11 tells no driver of a client that is gone, it only fails to pass
// on what the command says.
func TestExecEndsWithItsClient(t *testing.T) {
	t.Parallel()
	a, alloc := agent(t), idle(t)
	t.Run("session", func(t *testing.T) {
		term := a.OpenTerminal(t, alloc, "sh", "-c", "mark=4321; while :; do echo up-$((1+1)); sleep 0.1; done")
		term.Expect(t, "up-2")
	})
	nomadtest.Eventually(t, 20*time.Second, func() error {
		if out := a.Sh(t, alloc, "ps -o args | grep '[4]321'; true"); out != "" {
			return fmt.Errorf("still running: %q", out)
		}
		return nil
	})
}
