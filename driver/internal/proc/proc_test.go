package proc

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWaitReturnsWhenProcessExits(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := Lookup(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if !id.Alive() {
		t.Fatal("not alive")
	}
	done := make(chan error, 1)
	go func() { done <- id.Wait(context.Background()) }()
	if err := id.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if id.Alive() {
		t.Fatal("a zombie counts as alive")
	}
	_ = cmd.Wait()
	if err := id.Signal(unix.SIGTERM); !errors.Is(err, ErrGone) {
		t.Fatalf("signal after reaping: %v", err)
	}
	if err := id.Wait(context.Background()); err != nil {
		t.Fatalf("wait after reaping: %v", err)
	}
}

func TestWaitHonoursContext(t *testing.T) {
	id, err := Lookup(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := id.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
}

func TestReusedPIDIsGone(t *testing.T) {
	id, err := Lookup(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	id.Start++
	if id.Alive() {
		t.Fatal("alive with another start time")
	}
	if err := id.Signal(unix.Signal(0)); !errors.Is(err, ErrGone) {
		t.Fatalf("signal: %v", err)
	}
	if (ID{}).Alive() {
		t.Fatal("the zero ID is alive")
	}
}

func TestParseStartTicks(t *testing.T) {
	fields := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20"
	got, err := parseStartTicks([]byte("7 (evil) S 1 (x) )" + fields))
	if err != nil || got != 4242 {
		t.Fatalf("got %d, %v", got, err)
	}
	for _, bad := range []string{"", "7 (x) S 1", "7 x S 1 2", "7 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 z"} {
		if _, err := parseStartTicks([]byte(bad)); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func FuzzParseStartTicks(f *testing.F) {
	f.Add([]byte("7 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"))
	f.Fuzz(func(_ *testing.T, stat []byte) { _, _ = parseStartTicks(stat) })
}
