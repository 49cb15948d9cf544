// Command testsummary runs `go test -json` and reports in a form a reader of
// a CI log can use: one line per package as it ends, the whole output of every
// test that fails as it fails, a line now and then while a test takes long,
// every skipped test with its reason, and at the very end one plain line
//
//	N passed, N failed, N skipped
//
// It takes the arguments of one or more go test runs, each after a "--", and
// runs them one after the other:
//
//	testsummary -- -race ./a/... -- -race -p 1 ./e2e/...
//
// With CI=true or BIVOUAC_CI=1 in the environment a skipped test is a failure:
// a green run must not rest on tests that did not run.
//
// A test with subtests is not counted beside them, unless it fails by itself.
// A package that fails without a failing test (it does not build, its TestMain
// exits, it runs into the time limit) counts as one failure.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"
)

// heartbeat is how long the log may stay silent before a line says which
// tests are running.
const heartbeat = 30 * time.Second

func main() {
	runs, err := split(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r := newReport(os.Stdout)
	for _, args := range runs {
		if ctx.Err() == nil {
			goTest(ctx, r, args)
		}
	}
	noSkips := os.Getenv("BIVOUAC_CI") == "1" || os.Getenv("CI") == "true"
	if !r.finish(noSkips) {
		os.Exit(1)
	}
}

// split cuts the command line at each "--".
func split(args []string) ([][]string, error) {
	usage := errors.New("usage: testsummary -- GO_TEST_ARGUMENTS [-- GO_TEST_ARGUMENTS]")
	var runs [][]string
	for _, a := range args {
		switch {
		case a == "--":
			runs = append(runs, nil)
		case len(runs) == 0:
			return nil, usage
		default:
			runs[len(runs)-1] = append(runs[len(runs)-1], a)
		}
	}
	if len(runs) == 0 {
		return nil, usage
	}
	return runs, nil
}

// goTest runs `go test -json` once and feeds its events to r. An interrupt
// reaches the tests too, so that they can clean up.
func goTest(ctx context.Context, r *report, args []string) {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		r.broken(fmt.Sprintf("go test: %v", err))
		return
	}
	if err := cmd.Start(); err != nil {
		r.broken(fmt.Sprintf("go test: %v", err))
		return
	}
	failedBefore := r.failed
	readEvents(stdout, r)
	if err := cmd.Wait(); err != nil && r.failed == failedBefore {
		r.broken(fmt.Sprintf("go test: %v, without a failing test", err))
	}
}

// readEvents passes every event of in to r, and tells r when there was none
// for a while. It returns at the end of in.
func readEvents(in io.Reader, r *report) {
	lines := make(chan []byte)
	go func() { // ends with in; readEvents waits for it by the close
		defer close(lines)
		s := bufio.NewReader(in)
		for {
			line, err := s.ReadBytes('\n')
			if len(line) > 0 {
				lines <- line
			}
			if err != nil {
				return
			}
		}
	}()
	silent := time.NewTimer(heartbeat)
	defer silent.Stop()
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				return
			}
			var e event
			if err := json.Unmarshal(line, &e); err != nil {
				fmt.Fprintf(r.w, "%s", line) // not from test2json: show it as it is
				continue
			}
			if r.add(e) {
				silent.Reset(heartbeat)
			}
		case <-silent.C:
			r.stillRunning()
			silent.Reset(heartbeat)
		}
	}
}
