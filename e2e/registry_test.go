package e2e

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"archive/tar"

	"github.com/bivouac-run/bivouac/internal/testimage"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// registry is a real one on loopback, which can be told to misbehave.
type registry struct {
	host string
	// layers counts the GETs of blobs.
	layers atomic.Int32
	// before sees each request and may answer it in the registry's place.
	before atomic.Pointer[func(http.ResponseWriter, *http.Request) bool]
}

func startRegistry(t *testing.T) *registry {
	r := &registry{}
	backend := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if f := r.before.Load(); f != nil && (*f)(w, req) {
			return
		}
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
			r.layers.Add(1)
		}
		backend.ServeHTTP(w, req)
	}))
	t.Cleanup(server.Close)
	r.host = strings.TrimPrefix(server.URL, "http://")
	return r
}

// misbehave sets what happens before the registry sees a request.
func (r *registry) misbehave(f func(http.ResponseWriter, *http.Request) bool) { r.before.Store(&f) }

// push stores an image and returns its reference.
func (r *registry) push(t *testing.T, repo string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(r.host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

// newImage returns a busybox image that no other test has: its label says so.
func newImage(t *testing.T, label string) v1.Image {
	t.Helper()
	img, err := testimage.Busybox(func(c *v1.Config) { c.Labels = map[string]string{"test": t.Name() + label} })
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// imageWith returns a busybox image with one more layer of one file.
func imageWith(t *testing.T, h tar.Header, content string) v1.Image {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	h.Size = int64(len(content))
	if err := w.WriteHeader(&h); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := newImage(t, "").ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	own, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	own = own.DeepCopy()
	own.OS, own.Architecture, own.Config = cfg.OS, cfg.Architecture, cfg.Config
	if img, err = mutate.ConfigFile(img, own); err != nil {
		t.Fatal(err)
	}
	return img
}
