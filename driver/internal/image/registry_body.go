package image

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"path"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// guardedBody is a response body under the rules of guard.
type guardedBody struct {
	io.ReadCloser
	g      *guard
	ctx    context.Context // of this request, for the reason of its end
	cancel context.CancelCauseFunc
	timer  *time.Timer
	req    *http.Request
	left   int64     // bytes still allowed
	h      hash.Hash // nil unless the digest is known
	want   v1.Hash
}

func (g *guard) body(ctx context.Context, cancel context.CancelCauseFunc, timer *time.Timer, req *http.Request, resp *http.Response) io.ReadCloser {
	b := &guardedBody{ReadCloser: resp.Body, g: g, ctx: ctx, cancel: cancel, timer: timer, req: req, left: maxMetadata}
	// A blob may have been redirected to a URL that does not look like one.
	first := req
	for first.Response != nil && first.Response.Request != nil {
		first = first.Response.Request
	}
	dir, base := path.Split(first.URL.Path)
	if strings.HasSuffix(dir, "/blobs/") {
		b.left = 1 << 62
		return b
	}
	if want, err := v1.NewHash(base); err == nil && strings.HasSuffix(dir, "/manifests/") && first.Method == http.MethodGet && resp.StatusCode == http.StatusOK {
		if h, err := v1.Hasher(want.Algorithm); err == nil {
			b.h, b.want = h, want
		}
	}
	return b
}

// Read arms the stall timer only while it waits, so that slow unpacking is no stall.
func (b *guardedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("answer: %w: more than %d bytes", ErrTooLarge, maxMetadata)
	}
	b.timer.Reset(b.g.stall)
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.timer.Stop()
	b.left -= int64(n)
	if b.h != nil {
		b.h.Write(p[:n])
	}
	switch {
	case err == nil:
		return n, nil
	case !errors.Is(err, io.EOF):
		return n, b.g.mark(b.ctx, b.req, err)
	case b.h != nil && hex.EncodeToString(b.h.Sum(nil)) != b.want.Hex:
		return n, fmt.Errorf("manifest: %w: not the content of %s", ErrDigestMismatch, b.want)
	}
	return n, io.EOF
}

func (b *guardedBody) Close() error {
	b.timer.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
