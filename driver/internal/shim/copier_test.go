package shim

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pipeTo starts a copier to a path and returns the end the sandbox would hold.
func pipeTo(t *testing.T, path string) (*os.File, *copier) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	to := fifo{name: os.DevNull}
	if path != os.DevNull {
		dir, err := os.Open(filepath.Dir(path))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = dir.Close() })
		to = fifo{dir, filepath.Base(path)}
	}
	c := newCopier(r, to)
	c.start()
	return w, c
}

func makeFIFO(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func reader(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestCopierSurvivesItsReader(t *testing.T) {
	path := makeFIFO(t)
	w, c := pipeTo(t, path)
	if _, err := io.WriteString(w, "one\n"); err != nil { // before there is a reader
		t.Fatal(err)
	}
	r := reader(t, path)
	readLine(t, r, "one\n")
	_ = r.Close() // the log collector dies
	if _, err := io.WriteString(w, "two\n"); err != nil {
		t.Fatal(err)
	}
	r = reader(t, path)
	readLine(t, r, "two\n")
	_, _ = io.WriteString(w, "three\n")
	_ = w.Close()
	c.drain(time.Now().Add(10 * time.Second))
	readLine(t, r, "three\n")
	_ = r.Close()
}

// readLine waits until r has delivered want.
func readLine(t *testing.T, r *os.File, want string) {
	t.Helper()
	_ = r.SetReadDeadline(time.Now().Add(10 * time.Second))
	got := make([]byte, len(want))
	deadline := time.Now().Add(10 * time.Second)
	for n := 0; n < len(want); {
		m, err := r.Read(got[n:])
		n += m
		if err == io.EOF && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond) // no writer yet
			continue
		}
		if err != nil {
			t.Fatalf("read %q, then %v", got[:n], err)
		}
	}
	if string(got) != want {
		t.Fatalf("read %q, want %q", got, want)
	}
}

func TestDrainPassesOnAllThatIsThere(t *testing.T) {
	path := makeFIFO(t)
	r := reader(t, path)
	defer r.Close()
	w, c := pipeTo(t, path)
	const size = 3 << 20
	got := make(chan int, 1)
	go func() {
		n, _ := io.Copy(io.Discard, &untilClosed{f: r})
		got <- int(n)
	}()
	if _, err := io.WriteString(w, strings.Repeat("x", size)); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	c.drain(time.Now().Add(20 * time.Second))
	if n := <-got; n != size {
		t.Fatalf("%d of %d bytes arrived", n, size)
	}
}

// untilClosed reads a FIFO from its first writer to the last one's end.
type untilClosed struct {
	f    *os.File
	seen bool
}

func (u *untilClosed) Read(p []byte) (int, error) {
	for {
		n, err := u.f.Read(p)
		u.seen = u.seen || n > 0
		if err == io.EOF && !u.seen {
			time.Sleep(time.Millisecond) // no writer yet
			continue
		}
		return n, err
	}
}

func TestDrainWithoutReaderEnds(t *testing.T) {
	w, c := pipeTo(t, makeFIFO(t))
	_, _ = io.WriteString(w, "lost\n")
	_ = w.Close()
	start := time.Now()
	c.drain(start.Add(50 * time.Millisecond))
	if took := time.Since(start); took > 5*time.Second {
		t.Fatalf("took %v", took)
	}
}

func TestOutputIsNotWrittenThroughLinksOrToFiles(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(victim, link); err != nil {
		t.Fatal(err)
	}
	target := makeFIFO(t)
	fifoLink := filepath.Join(dir, "fifo-link")
	if err := os.Symlink(target, fifoLink); err != nil {
		t.Fatal(err)
	}
	r := reader(t, target)
	defer r.Close()
	for _, path := range []string{victim, link, fifoLink} {
		w, c := pipeTo(t, path)
		// The task must be able to write on, into nothing.
		if _, err := io.WriteString(w, strings.Repeat("evil", 100_000)); err != nil {
			t.Fatal(err)
		}
		_ = w.Close()
		c.drain(time.Now().Add(10 * time.Second))
	}
	raw, err := os.ReadFile(victim)
	if err != nil || string(raw) != "precious" {
		t.Fatalf("victim is %q, %v", raw, err)
	}
	if n, _ := r.Read(make([]byte, 10)); n > 0 {
		t.Fatal("output followed a link to a FIFO")
	}
}

// A task can rename the directory that its FIFOs are in, and put a link in its
// place.
func TestFIFOIsFoundOnceAndWithoutLinks(t *testing.T) {
	allocDir := t.TempDir()
	logs := filepath.Join(allocDir, "alloc", "logs")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(logs, "out"), 0o600); err != nil {
		t.Fatal(err)
	}
	alloc, err := openAlloc(allocDir)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(alloc)
	to, err := findFIFO(alloc, allocDir, filepath.Join(logs, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer to.close()
	trap := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(trap, "out"), 0o600); err != nil {
		t.Fatal(err)
	}
	trapped := reader(t, filepath.Join(trap, "out"))
	defer trapped.Close()
	moved := logs + "2"
	if err := errors.Join(os.Rename(logs, moved), os.Symlink(trap, logs)); err != nil {
		t.Fatal(err)
	}
	r := reader(t, filepath.Join(moved, "out"))
	defer r.Close()
	f, err := to.open()
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(f, "mine")
	_ = f.Close()
	readLine(t, r, "mine")
	if _, err := findFIFO(alloc, allocDir, filepath.Join(logs, "out")); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link is followed: %v", err)
	}
	for _, path := range []string{"/etc/passwd", allocDir + "x/out", filepath.Join(allocDir, "..", "out")} {
		if _, err := findFIFO(alloc, allocDir, path); err == nil {
			t.Errorf("%q accepted", path)
		}
	}
	ReleaseFIFOs(allocDir, filepath.Join(logs, "out"), os.DevNull, "/etc/passwd") // none of it opens
}

func TestDevNullTakesAll(t *testing.T) {
	w, c := pipeTo(t, os.DevNull)
	if _, err := io.WriteString(w, strings.Repeat("x", 1<<20)); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	c.drain(time.Now().Add(10 * time.Second))
}
