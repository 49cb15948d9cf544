package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/nomad/client/lib/cgroupslib"
	"golang.org/x/sys/unix"
)

// watcher notes when files are first touched, by inotify: our copies of the
// shim and of runsc are opened when they are executed, the tasks directory
// gets an entry, the cpuset of the tasks is opened once the sandbox runs.
type watcher struct {
	fd    int
	marks map[int32]string // by watch descriptor
	done  chan struct{}    // closed when read has ended

	mu   sync.Mutex
	seen map[string]time.Time
}

// The marks, in their order.
const (
	markDirectory = "directory"
	markShim      = "shim"
	markRunsc     = "runsc"
	markCPUSet    = "cpuset"
)

func newWatcher(h *host, p *plugin) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch files: %w", err)
	}
	w := &watcher{fd: fd, marks: map[int32]string{}, seen: map[string]time.Time{}, done: make(chan struct{})}
	watches := []struct {
		mark, path string
		mask       uint32
	}{
		{markDirectory, p.tasksDir(), unix.IN_CREATE},
		{markShim, h.shim, unix.IN_OPEN},
		{markRunsc, h.runsc, unix.IN_OPEN},
	}
	if cgroupslib.GetMode() == cgroupslib.CG1 {
		watches = append(watches, struct {
			mark, path string
			mask       uint32
		}{markCPUSet, filepath.Join(cgroupslib.LinuxResourcesPath("", "", false), "cgroup.procs"), unix.IN_OPEN})
	}
	for _, x := range watches {
		wd, err := unix.InotifyAddWatch(fd, x.path, x.mask)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("watch %q: %w", x.path, err), unix.Close(fd))
		}
		w.marks[int32(wd)] = x.mark
	}
	go w.read() // until close
	return w, nil
}

// read notes the first event of each mark, at the time it is read, until close
// removes a watch. It has a thread that runs before all others, since the
// starts it watches keep every core busy.
func (w *watcher) read() {
	defer close(w.done)
	runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
	// Where real time is not to be had, times are a little late.
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(w.fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || w.note(buf[:n], time.Now()) {
			return
		}
	}
}

// note records events and says whether a watch was removed.
func (w *watcher) note(events []byte, now time.Time) (removed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for b := events; len(b) >= unix.SizeofInotifyEvent; {
		// struct inotify_event, inotify(7)
		wd, mask, nameLen := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[12:])
		b = b[unix.SizeofInotifyEvent+int(nameLen):]
		removed = removed || mask&unix.IN_IGNORED != 0
		mark := w.marks[wd]
		if _, ok := w.seen[mark]; !ok {
			w.seen[mark] = now
		}
	}
	return removed
}

// take returns what was seen and forgets it.
func (w *watcher) take() map[string]time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	seen := w.seen
	w.seen = map[string]time.Time{}
	return seen
}

func (w *watcher) close() {
	for wd := range w.marks {
		_, _ = unix.InotifyRmWatch(w.fd, uint32(wd)) // the event ends read
	}
	<-w.done
	_ = unix.Close(w.fd)
}

// breakdown splits StartTask into parts by what a watcher sees. The starts are
// the ones that are measured: an event costs some microseconds, and runsc's own
// starts cause them too.
type breakdown struct {
	w *watcher
	// parts are in the order of time.
	parts []part
	// missed counts the starts whose parts were not told apart.
	missed int
	// call is a gRPC call that does nothing.
	call samples
}

type part struct {
	name  string
	times samples
}

// watchedTask is a task whose start is split.
type watchedTask struct {
	*task
	into *breakdown
}

func (t *watchedTask) start(ctx context.Context) (time.Duration, error) {
	t.into.w.take()
	began := time.Now()
	took, err := t.task.start(ctx)
	if err != nil {
		return 0, err
	}
	if err := t.into.split(t.task, began, began.Add(took)); err != nil {
		return 0, err
	}
	return took, t.into.timeCall(t.task)
}

// split records the parts of a start, unless a mark between them was missed:
// inotify may merge events, and its reader may come late.
func (b *breakdown) split(t *task, began, ended time.Time) error {
	seen := b.w.take()
	started, err := t.started()
	if err != nil {
		return err
	}
	marks := []struct {
		part string
		end  time.Time
	}{
		{"call, config, image lookup", seen[markDirectory]},
		{"files, cgroup, spec", seen[markShim]},
		{"shim start-up", seen[markRunsc]},
		{"runsc run", seen[markCPUSet]},
		{"move to cpuset", started.At},
		{"report back", ended},
	}
	if cgroupslib.GetMode() == cgroupslib.CG2 { // the scope is the cpuset
		const run = 3
		marks[run].end = started.At
		marks = slices.Delete(marks, run+1, run+2)
	}
	if b.parts == nil {
		b.parts = make([]part, len(marks))
	}
	for _, m := range marks {
		if m.end.IsZero() {
			b.missed++
			return nil
		}
	}
	last := began
	for i, m := range marks {
		b.parts[i].name = m.part
		// Round(0): the shim's clock reading is wall time only.
		b.parts[i].times.addTime(m.end.Round(0).Sub(last.Round(0)))
		last = m.end
	}
	return nil
}

func (b *breakdown) timeCall(t *task) error {
	began := time.Now()
	_, err := t.p.driver.InspectTask(t.cfg.ID)
	b.call.addTime(time.Since(began))
	return err
}

// report adds a row for each part.
func (b *breakdown) report(r *report) {
	for _, p := range b.parts {
		if p.name == "" {
			continue // no start was told apart
		}
		r.add(rowStart+": "+p.name, "ms", p.times, "", nil)
	}
	if b.missed > 0 {
		r.note("the parts of StartTask leave out %d starts whose marks were missed", b.missed)
	}
	r.note("the parts of StartTask are of the same starts, told apart by inotify; a gRPC call that does nothing takes %.2f ms (p50)", b.call.percentile(50))
}
