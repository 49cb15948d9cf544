package nomadtest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// pollPeriod is how often a condition is looked at.
const pollPeriod = 50 * time.Millisecond

// Moment is patience for what should be true at once but for a busy machine.
const Moment = 10 * time.Second

// final is an error that waiting does not cure.
type final struct{ error }

// poll calls f until it returns nil. At the timeout, or if f returns a final
// error, it returns f's last word.
func poll(timeout time.Duration, f func() error) error {
	deadline := time.Now().Add(timeout)
	for {
		err := f()
		if err == nil {
			return nil
		}
		if last := (final{}); errors.As(err, &last) {
			return last.error
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v: %w", timeout, err)
		}
		time.Sleep(pollPeriod)
	}
}

// Eventually fails the test unless f returns nil within the timeout.
func Eventually(t testing.TB, timeout time.Duration, f func() error) {
	t.Helper()
	if err := poll(timeout, f); err != nil {
		t.Fatal(err)
	}
}

// LogMark is the length of the agent's log now, for LogOnFailure.
func (a *Agent) LogMark() int64 {
	info, err := os.Stat(a.l.log())
	if err != nil {
		return 0
	}
	return info.Size()
}

// LogOnFailure copies the agent's log from the mark on into that of a test
// that has failed, without the noise.
func (a *Agent) LogOnFailure(t testing.TB, mark int64) {
	t.Helper()
	if !t.Failed() {
		return
	}
	t.Logf("agent log:\n%s", a.logTail(mark))
	// The whole of it, kept by go test -artifacts.
	raw, err := os.ReadFile(a.l.log())
	if err == nil {
		err = os.WriteFile(filepath.Join(t.ArtifactDir(), "agent.log"), raw, 0o600)
	}
	if err != nil {
		t.Logf("keep the agent's log: %v", err)
	}
}

// logTail returns the agent's log from offset on: its warnings, errors and
// what the driver and the task runner say, the end of it if that is long.
func (a *Agent) logTail(offset int64) string {
	raw, err := os.ReadFile(a.l.log())
	if err != nil {
		return err.Error()
	}
	if offset > int64(len(raw)) {
		offset = 0
	}
	var b bytes.Buffer
	for line := range strings.Lines(string(raw[offset:])) {
		debug := strings.Contains(line, "[DEBUG]") || strings.Contains(line, "[TRACE]")
		noise := strings.Contains(line, "exec session") || strings.Contains(line, "/exec?") || strings.Contains(line, "plugin_loader")
		if !noise && (!debug || strings.Contains(line, "gvisor")) && strings.Contains(line, "[") {
			b.WriteString(line)
		}
	}
	const longest = 16 << 10
	return tail(b.String(), longest)
}
