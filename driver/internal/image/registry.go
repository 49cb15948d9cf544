package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// stallTimeout is how long a registry may send nothing while we wait.
const stallTimeout = 60 * time.Second

// registry reads from one repository. It implements blobs.
type registry struct {
	repo   name.Repository
	puller *remote.Puller
}

var _ blobs = (*registry)(nil)

func (s *Store) registry(ctx context.Context, ref name.Reference) (*registry, error) {
	opts := []remote.Option{
		remote.WithContext(ctx),
		remote.WithTransport(s.transport),
		remote.WithAuth(authn.Anonymous),
		remote.WithUserAgent("bivouac"),
		remote.WithRetryBackoff(s.backoff),
	}
	p, err := remote.NewPuller(opts...)
	if err != nil {
		return nil, fmt.Errorf("registry client: %w", err)
	}
	return &registry{repo: ref.Context(), puller: p}, nil
}

// get fetches what ref names: a manifest or an index.
func (r *registry) get(ctx context.Context, ref name.Reference) (v1.Descriptor, []byte, error) {
	d, err := r.puller.Get(ctx, ref)
	if err != nil {
		return v1.Descriptor{}, nil, registryError("get manifest", err)
	}
	return d.Descriptor, d.Manifest, nil
}

// head asks for the digest of ref only.
func (r *registry) head(ctx context.Context, ref name.Reference) (string, error) {
	d, err := r.puller.Head(ctx, ref)
	if err != nil {
		return "", registryError("head manifest", err)
	}
	return d.Digest.String(), nil
}

func (r *registry) manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	_, raw, err := r.get(ctx, r.repo.Digest(d.Digest.String()))
	return raw, err
}

// blob does not use the descriptor's urls: an image cannot make the node fetch from elsewhere.
func (r *registry) blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	l, err := r.puller.Layer(ctx, r.repo.Digest(d.Digest.String()))
	if err != nil {
		return nil, registryError("get blob", err)
	}
	rc, err := l.Compressed()
	if err != nil {
		return nil, registryError("get blob", err)
	}
	return rc, nil
}

// registryError finds the cause in an error of go-containerregistry. Its text can
// hold a response body or a signed URL, so only what is known to be harmless is kept.
func registryError(op string, err error) error {
	var te *transport.Error
	if errors.As(err, &te) {
		return fmt.Errorf("%s: %w: status %d %s", op, statusError(te.StatusCode), te.StatusCode, http.StatusText(te.StatusCode))
	}
	for _, known := range []error{context.Canceled, context.DeadlineExceeded, ErrDigestMismatch, ErrTooLarge} {
		if errors.Is(err, known) {
			return fmt.Errorf("%s: %w", op, known)
		}
	}
	var ne *networkError
	if errors.As(err, &ne) {
		return fmt.Errorf("%s: %w", op, ne)
	}
	var ue *url.Error
	for errors.As(err, &ue) {
		err = ue.Err
	}
	return fmt.Errorf("%s: unexpected answer: %w", op, err)
}

func statusError(status int) error {
	switch {
	case status == http.StatusNotFound:
		return ErrNotFound
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return ErrUnauthorized
	case status == http.StatusTooManyRequests, status == http.StatusRequestTimeout, status >= 500, status == 499:
		return ErrUnavailable
	}
	return errRefused
}

var errRefused = errors.New("registry refused the request")

// networkError is a failure to talk to a registry at all. It is ErrUnavailable
// except where waiting cannot help, as with a bad certificate.
type networkError struct{ err error }

func (e *networkError) Error() string { return e.err.Error() }
func (e *networkError) Unwrap() error { return e.err }
func (e *networkError) Is(target error) bool {
	var certificate *tls.CertificateVerificationError
	return target == ErrUnavailable && !errors.As(e.err, &certificate)
}

// guard is the transport below go-containerregistry. It cancels a request that
// stalls, bounds what is not a blob, verifies manifests asked for by digest, marks
// network errors, and never speaks plain HTTP but to loopback and listed hosts.
type guard struct {
	base     *http.Transport
	stall    time.Duration
	insecure []string
}

func newGuard(insecure []string) *guard {
	return &guard{
		stall:    stallTimeout,
		insecure: insecure,
		base: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			ForceAttemptHTTP2:      true,
			MaxIdleConnsPerHost:    4,
			IdleConnTimeout:        30 * time.Second,
			TLSHandshakeTimeout:    15 * time.Second,
			MaxResponseHeaderBytes: 1 << 20,
			DisableCompression:     true, // digests are over the bytes as sent
		},
	}
}

// RoundTrip implements http.RoundTripper.
func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(g.stall, func() { cancel(errStalled{g.stall}) })
	out := req.Clone(ctx)
	if out.URL.Scheme == "http" && !g.plainHTTP(out.URL) {
		out.URL.Scheme = "https"
	}
	resp, err := g.base.RoundTrip(out)
	timer.Stop()
	if err != nil {
		err = g.mark(ctx, req, err)
		cancel(nil)
		return nil, err
	}
	resp.Body = g.body(ctx, cancel, timer, req, resp)
	return resp, nil
}

// mark replaces the error of a cancelled request by the reason for it.
func (g *guard) mark(ctx context.Context, req *http.Request, err error) error {
	if req.Context().Err() != nil {
		return req.Context().Err()
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return &networkError{err}
}

func (g *guard) plainHTTP(u *url.URL) bool {
	for _, h := range g.insecure {
		if u.Host == h {
			return true
		}
	}
	host := u.Hostname()
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

type errStalled struct{ after time.Duration }

func (e errStalled) Error() string { return fmt.Sprintf("no data for %s", e.after) }
