package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

const (
	// tarOverhead is what the headers and padding of an image's layers may add to
	// its files, so that a stream of nothing but headers ends too.
	tarOverhead = 4 << 30
	// maxWindow bounds the memory of a zstd decoder; RFC 8878 section 3.1.1.1.2
	// recommends 8 MiB, zstd --ultra writes up to 128 MiB.
	maxWindow = 128 << 20
)

// applyVerified streams one layer into u and verifies both of its digests. On an
// error the root is unusable. budget is what may still be decompressed; read is
// called with the count of bytes just read.
func applyVerified(ctx context.Context, u *unpacker, l layer, budget *int64, read func(int)) error {
	if l.size > *budget {
		return fmt.Errorf("%w: layer of %d bytes", ErrTooLarge, l.size)
	}
	rc, err := l.open(ctx)
	if err != nil {
		return err
	}
	defer rc.Close()
	raw, err := newChecked(rc, l.digest, l.size)
	if err != nil {
		return err
	}
	raw.read = read
	err = applyStream(ctx, u, raw, l.diffID, budget)
	switch {
	case err == nil:
		return raw.verify()
	case raw.err != nil: // what broke the rest
		return raw.err
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrDigestMismatch):
		// Wrong bytes look like a malformed layer: say which it is.
		if verr := raw.verify(); verr != nil {
			return verr
		}
	}
	return err
}

// applyStream decompresses raw, unpacks it, and verifies the diffID.
func applyStream(ctx context.Context, u *unpacker, raw io.Reader, diffID v1.Hash, budget *int64) error {
	plain, closePlain, err := decompress(raw)
	if err != nil {
		return err
	}
	defer closePlain()
	h, err := v1.Hasher(diffID.Algorithm)
	if err != nil {
		return fmt.Errorf("%w: unknown diff_id algorithm", ErrCorrupt)
	}
	lr := &io.LimitedReader{R: plain, N: *budget}
	stream := newReadahead(io.TeeReader(lr, h))
	err = u.applyLayer(ctx, stream)
	if err == nil {
		// The tar may end before the stream does; the hash is over all of it.
		_, err = io.CopyBuffer(io.Discard, onlyReader{stream}, u.buffer)
		if err != nil {
			err = fmt.Errorf("%w: decompress layer: %w", ErrCorrupt, err)
		}
	}
	stream.stop()
	if *budget = lr.N; lr.N <= 0 {
		return fmt.Errorf("%w: layers decompress to more than the limit", ErrTooLarge)
	}
	if err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != diffID.Hex {
		return fmt.Errorf("%w: unpacked layer is %s:%s, the config says %s", ErrDigestMismatch, diffID.Algorithm, got, diffID)
	}
	return nil
}

// onlyReader hides WriteTo and ReadFrom, so that CopyBuffer uses its buffer.
type onlyReader struct{ io.Reader }

// decompress tells gzip, zstd and plain apart by their first bytes: media types are often wrong.
func decompress(r io.Reader) (io.Reader, func(), error) {
	br := bufio.NewReaderSize(r, 256<<10)
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("%w: read layer: %w", ErrCorrupt, err)
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}): // RFC 1952 section 2.3.1
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: gzip: %w", ErrCorrupt, err)
		}
		return zr, func() { _ = zr.Close() }, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}), isSkippable(head): // RFC 8878 sections 3.1.1 and 3.1.2
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(2), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: zstd: %w", ErrCorrupt, err)
		}
		return zr, zr.Close, nil
	}
	return br, func() {}, nil
}

func isSkippable(head []byte) bool {
	return len(head) == 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:], []byte{0x2a, 0x4d, 0x18})
}

// checked reads exactly the bytes that a descriptor promises and hashes them.
type checked struct {
	r    io.Reader
	h    hash.Hash
	want v1.Hash // zero: only the size is checked
	size int64
	n    int64
	err  error // of the underlying reader, other than io.EOF
	read func(int)
}

func newChecked(r io.Reader, want v1.Hash, size int64) (*checked, error) {
	c := &checked{r: r, want: want, size: size, read: func(int) {}}
	if want != (v1.Hash{}) {
		h, err := v1.Hasher(want.Algorithm)
		if err != nil {
			return nil, fmt.Errorf("%w: unknown digest algorithm", ErrCorrupt)
		}
		c.h = h
	}
	return c, nil
}

func (c *checked) Read(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	if c.n == c.size {
		return 0, io.EOF
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.size-c.n)])
	if c.h != nil {
		c.h.Write(p[:n])
	}
	c.n += int64(n)
	c.read(n)
	// go-containerregistry verifies as well and reports at the end; here the whole
	// blob has been read and verify will say the same.
	if err != nil && !errors.Is(err, io.EOF) && c.n < c.size {
		if !errors.Is(err, ErrUnavailable) && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("%w: %d of %d bytes: %w", ErrCorrupt, c.n, c.size, err)
		}
		c.err = err
		return n, err
	}
	if errors.Is(err, io.EOF) && n > 0 {
		err = nil
	}
	if err != nil {
		err = io.EOF
	}
	return n, err
}

// verify reads what is left and compares size and digest.
func (c *checked) verify() error {
	if _, err := io.Copy(io.Discard, onlyReader{c}); err != nil {
		return err
	}
	if c.n < c.size {
		return fmt.Errorf("%w: blob ends after %d of %d bytes", ErrCorrupt, c.n, c.size)
	}
	if n, _ := io.ReadFull(c.r, make([]byte, 1)); n > 0 {
		return fmt.Errorf("%w: blob is longer than the %d bytes promised", ErrDigestMismatch, c.size)
	}
	if c.h == nil {
		return nil
	}
	if got := hex.EncodeToString(c.h.Sum(nil)); got != c.want.Hex {
		return fmt.Errorf("%w: blob is %s:%s, want %s", ErrDigestMismatch, c.want.Algorithm, got, c.want)
	}
	return nil
}
