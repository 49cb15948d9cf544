package image

import (
	"io"
	"sync"
)

// readahead reads in a goroutine of its own, so that decompressing a layer and
// writing its files overlap. With a 470 MB layer on
// two busy cores, unpacking took 0.5 of the time of umoci with it and 0.66 without.
type readahead struct {
	full chan []byte // closed at the end, after err is set
	free chan []byte
	err  error
	rest []byte // of buf, not read yet
	buf  []byte

	stopped chan struct{}
	wg      sync.WaitGroup
}

const (
	readaheadBuffers = 8
	readaheadSize    = 128 << 10
)

// newReadahead starts to read r. Call stop before r is used otherwise.
func newReadahead(r io.Reader) *readahead {
	a := &readahead{
		full:    make(chan []byte, readaheadBuffers),
		free:    make(chan []byte, readaheadBuffers),
		stopped: make(chan struct{}),
	}
	for range readaheadBuffers {
		a.free <- make([]byte, readaheadSize)
	}
	a.wg.Go(func() { a.run(r) }) // ended and waited for by stop
	return a
}

func (a *readahead) run(r io.Reader) {
	defer close(a.full)
	for {
		select {
		case <-a.stopped:
			return
		default:
		}
		var b []byte
		select {
		case b = <-a.free:
		case <-a.stopped:
			return
		}
		n := 0
		for n < len(b) && a.err == nil {
			var m int
			m, a.err = r.Read(b[n:])
			n += m
		}
		a.full <- b[:n] // never blocks: there are as many places as buffers
		if a.err != nil {
			return
		}
	}
}

// Read implements io.Reader.
func (a *readahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.buf != nil {
			a.free <- a.buf[:cap(a.buf)]
			a.buf = nil
		}
		b, ok := <-a.full
		if !ok {
			return 0, a.err
		}
		a.rest, a.buf = b, b
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// stop ends the goroutine, once its current read has returned.
func (a *readahead) stop() {
	close(a.stopped)
	a.wg.Wait()
}
