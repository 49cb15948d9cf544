package main

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"time"
)

// startRows are the rows of `bench start`, in the order of the table.
var startRows = []string{rowRegister, rowStart, rowExec, rowStop, rowMemory}

const (
	rowRegister = "register_to_running"
	rowStart    = "StartTask"
	rowExec     = "exec"
	rowStop     = "stop_destroy"
	rowMemory   = "memory_pss_per_sandbox"

	peerRunsc   = "raw runsc"
	peerRawExec = "raw_exec"
)

// benchStart measures the rows that are wanted into r.
func benchStart(ctx context.Context, opts options, r *report) (err error) {
	r.sayf("preparing")
	loadBefore := loadAverage()
	h, err := newHost()
	if err != nil {
		return err
	}
	defer func() {
		if ctx.Err() != nil {
			err = errors.New("interrupted") // not by what happened to be under way
		}
		err = errors.Join(err, h.close())
	}()
	if opts.wants(rowRegister) {
		if err := benchRegister(ctx, h, max(opts.samples/4, 1), r); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(startRows[1:], opts.wants) {
		if err := benchPlugin(ctx, h, opts, r); err != nil {
			return err
		}
	}
	r.note("load average %s before, %s after: with other work on the machine the ratios say more than the times, and p99 little", loadBefore, loadAverage())
	return nil
}

// benchPlugin measures the rows for which the driver's plugin is enough.
func benchPlugin(ctx context.Context, h *host, opts options, r *report) error {
	p, err := startPlugin(ctx, h)
	if err != nil {
		return err
	}
	defer p.client.Kill()
	m, err := p.newTask(h)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		if err := m.remove(ctx); err != nil {
			r.sayf("clean-up: %v", err)
		}
	}()
	if _, err := m.start(ctx); err != nil {
		return err
	}
	raw, err := newPattern(m)
	if err != nil {
		return err
	}
	// The pattern has served: from here on only what is measured runs.
	if _, err := m.stop(ctx); err != nil {
		return err
	}
	if opts.wants(rowStart) || opts.wants(rowExec) || opts.wants(rowStop) {
		if err := benchCycles(ctx, h, p, raw, opts, r); err != nil {
			return err
		}
	}
	if opts.wants(rowMemory) {
		return benchMemory(ctx, h, p, raw, r)
	}
	return nil
}

// lifecycle is one sandbox, ours or the peer's. Each step says how long it
// took, without what the benchmark itself did around it.
type lifecycle interface {
	start(ctx context.Context) (time.Duration, error)
	exec(ctx context.Context) (time.Duration, error)
	stop(ctx context.Context) (time.Duration, error)
	remove(ctx context.Context) error
}

var (
	_ lifecycle = (*task)(nil)
	_ lifecycle = (*watchedTask)(nil)
	_ lifecycle = (*sandbox)(nil)
)

// times are the steps of many life cycles.
type times struct{ start, exec, stop samples }

// measure takes one life cycle through all steps and records it. The first
// exec, which loads /bin/true, is not counted.
func (t *times) measure(ctx context.Context, l lifecycle) (err error) {
	defer func() {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		err = errors.Join(err, l.remove(ctx))
	}()
	var took [4]time.Duration
	for i, step := range []func(context.Context) (time.Duration, error){l.start, l.exec, l.exec, l.stop} {
		if err := ctx.Err(); err != nil {
			return err
		}
		if took[i], err = step(ctx); err != nil {
			return err
		}
	}
	t.start.addTime(took[0])
	t.exec.addTime(took[2])
	t.stop.addTime(took[3])
	return nil
}

// cycles are the life cycles of both sides.
type cycles struct {
	ours, theirs times
	// create is the first half of the peer's start.
	create samples
	// parts is nil if StartTask is not wanted.
	parts *breakdown
}

// benchCycles measures StartTask, exec and stop_destroy, ours and runsc's in
// turns, and who goes first in turns too.
func benchCycles(ctx context.Context, h *host, p *plugin, raw *pattern, opts options, r *report) error {
	const warmUp = 3
	var warm, c cycles
	for i := range warmUp {
		if err := warm.measure(ctx, h, p, raw, i%2 == 0); err != nil {
			return err
		}
	}
	if opts.wants(rowStart) {
		w, err := newWatcher(h, p)
		if err != nil {
			return err
		}
		defer w.close()
		c.parts = &breakdown{w: w}
	}
	for i := range opts.samples {
		if err := c.measure(ctx, h, p, raw, i%2 == 0); err != nil {
			return err
		}
		if n := i + 1; n%10 == 0 {
			r.sayf("life cycles: %d of %d", n, opts.samples)
		}
	}
	if opts.wants(rowStart) {
		addCompared(r, rowStart, c.ours.start, c.theirs.start)
		r.note("raw runsc create alone takes %.2f ms of its %.2f ms (p50)", c.create.percentile(50), c.theirs.start.percentile(50))
		c.parts.report(r)
	}
	if opts.wants(rowExec) {
		addCompared(r, rowExec, c.ours.exec, c.theirs.exec)
	}
	if opts.wants(rowStop) {
		addCompared(r, rowStop, c.ours.stop, c.theirs.stop)
	}
	return nil
}

// measure takes one sandbox of each side through its life.
func (c *cycles) measure(ctx context.Context, h *host, p *plugin, raw *pattern, oursFirst bool) error {
	t, err := p.newTask(h)
	if err != nil {
		return err
	}
	s, err := raw.newSandbox(h)
	if err != nil {
		return errors.Join(err, t.remove(ctx))
	}
	var own lifecycle = t
	if c.parts != nil {
		own = &watchedTask{t, c.parts}
	}
	steps := []func() error{
		func() error { return c.ours.measure(ctx, own) },
		func() error { return c.theirs.measure(ctx, s) },
	}
	if !oursFirst {
		slices.Reverse(steps)
	}
	if err := errors.Join(steps[0](), steps[1]()); err != nil {
		return err
	}
	c.create.addTime(s.created)
	return nil
}

// addCompared adds a row and what a noisy machine cannot hide of it.
func addCompared(r *report, name string, ours, theirs samples) {
	r.add(name, "ms", ours, peerRunsc, theirs)
	r.note("%s: N = %d each; fastest %.2f ms against %.2f ms; median ratio pair by pair %.2f",
		name, len(ours), ours.least(), theirs.least(), pairRatios(ours, theirs).percentile(50))
}

// benchMemory measures ten idle sandboxes of each side, one side after the
// other, so that neither shares pages with the other.
func benchMemory(ctx context.Context, h *host, p *plugin, raw *pattern, r *report) error {
	const count = 10
	const settle = time.Second
	r.sayf("memory: %d sandboxes of each side", count)
	var all []lifecycle
	removeAll := func() (err error) {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		for _, l := range all {
			err = errors.Join(err, l.remove(ctx))
		}
		all = nil
		return err
	}
	defer func() { _ = removeAll() }() // for the paths that already return an error

	begin := func(l lifecycle) error {
		all = append(all, l)
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := l.start(ctx)
		return err
	}
	var tasks []*task
	for range count {
		t, err := p.newTask(h)
		if err != nil {
			return err
		}
		tasks = append(tasks, t)
		if err := begin(t); err != nil {
			return err
		}
	}
	time.Sleep(settle)
	var ours, shims samples
	for _, t := range tasks {
		shim, pids, err := t.pids()
		if err != nil {
			return err
		}
		own := pssMiB(shim)
		shims = append(shims, own)
		ours = append(ours, own+pssMiB(pids...))
	}
	rss, err := p.rssMiB()
	if err != nil {
		return err
	}
	if err := removeAll(); err != nil {
		return err
	}

	var sandboxes []*sandbox
	for range count {
		s, err := raw.newSandbox(h)
		if err != nil {
			return err
		}
		sandboxes = append(sandboxes, s)
		if err := begin(s); err != nil {
			return err
		}
	}
	time.Sleep(settle)
	var theirs samples
	for _, s := range sandboxes {
		pids, err := scopePIDs(s.allocID)
		if err != nil {
			return err
		}
		theirs = append(theirs, pssMiB(pids...))
	}
	r.add(rowMemory, "MiB", ours, peerRunsc, theirs)
	r.note("%s: %d idle sandboxes; ours includes the shim, %.2f MiB each; raw runsc has nobody to keep its exit status and logs", rowMemory, count, shims.percentile(50))
	r.note("%s: beside that the plugin process, one per node, has %.1f MiB resident with %d tasks", rowMemory, rss, count)
	return removeAll()
}

// tasksDir is where the driver makes a directory for each task.
func (p *plugin) tasksDir() string { return filepath.Join(p.runDir, "tasks") }
