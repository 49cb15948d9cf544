package image

import (
	"context"
	"sync"
)

// flights runs a function once for all callers that ask for the same key at the
// same time. It ends early only when every caller has gone, or at close.
type flights struct {
	base   context.Context // ends at close; a flight outlives the context of the caller that began it
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	m      map[string]*flight
	closed bool
}

type flight struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
	image  *Image // with err, written before done is closed
	err    error

	mu      sync.Mutex // held while callbacks run, so none runs after its caller left
	callers map[*func(Progress)]struct{}
	last    *Progress // for callers that join late
}

func newFlights() *flights {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &flights{base: ctx, cancel: cancel, m: map[string]*flight{}}
}

// do joins the flight of key, or starts it in a goroutine that close waits for.
func (g *flights) do(ctx context.Context, key string, progress func(Progress), fn func(context.Context, func(Progress)) (*Image, error)) (*Image, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return nil, ErrClosed
	}
	f := g.m[key]
	if f == nil {
		fctx, cancel := context.WithCancelCause(g.base)
		f = &flight{cancel: cancel, done: make(chan struct{}), callers: map[*func(Progress)]struct{}{}}
		g.m[key] = f
		g.wg.Go(func() { g.run(fctx, key, f, fn) })
	}
	f.join(&progress)
	g.mu.Unlock()

	select {
	case <-f.done:
		g.leave(key, f, &progress)
		return f.image, f.err
	case <-ctx.Done():
		g.leave(key, f, &progress)
		return nil, ctx.Err()
	}
}

func (g *flights) run(ctx context.Context, key string, f *flight, fn func(context.Context, func(Progress)) (*Image, error)) {
	f.image, f.err = fn(ctx, f.report)
	if f.err != nil && ctx.Err() != nil {
		f.err = context.Cause(ctx)
	}
	g.mu.Lock()
	if g.m[key] == f {
		delete(g.m, key)
	}
	g.mu.Unlock()
	close(f.done)
	f.cancel(nil)
}

func (f *flight) join(progress *func(Progress)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.callers[progress] = struct{}{}
	if f.last != nil && *progress != nil {
		(*progress)(*f.last)
	}
}

// leave takes a caller off. After the last one the flight is cancelled, and cannot be joined any more.
func (g *flights) leave(key string, f *flight, progress *func(Progress)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.callers, progress)
	if len(f.callers) == 0 {
		if g.m[key] == f {
			delete(g.m, key)
		}
		f.cancel(context.Canceled)
	}
}

func (f *flight) report(p Progress) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last = &p
	for c := range f.callers {
		if *c != nil {
			(*c)(p)
		}
	}
}

// close cancels every flight and waits for them.
func (g *flights) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel(ErrClosed)
	g.wg.Wait()
}
