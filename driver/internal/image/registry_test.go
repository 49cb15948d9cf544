package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/shoenig/test/must"
)

const tarFifo = tar.TypeFifo

var discardLog = log.New(io.Discard, "", 0)

// fixedLayer is a layer whose digests are what they are told to be.
type fixedLayer struct {
	v1.Layer
	diffID v1.Hash
}

func (l fixedLayer) DiffID() (v1.Hash, error) { return l.diffID, nil }

func sha(b []byte) v1.Hash {
	h, _, _ := v1.SHA256(bytes.NewReader(b))
	return h
}

func gz(b []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(b)
	w.Close()
	return buf.Bytes()
}

func zst(t testing.TB, b []byte) []byte {
	e, err := zstd.NewWriter(nil)
	must.NoError(t, err)
	return e.EncodeAll(b, nil)
}

// testImage makes an image of layer tars; compress defaults to gzip.
func testImage(t testing.TB, compress func([]byte) []byte, layers ...[]byte) v1.Image {
	t.Helper()
	if compress == nil {
		compress = gz
	}
	var ls []v1.Layer
	for _, l := range layers {
		ls = append(ls, fixedLayer{static.NewLayer(compress(l), types.OCILayer), sha(l)})
	}
	return withConfig(t, ls, "amd64")
}

func withConfig(t testing.TB, ls []v1.Layer, arch string) v1.Image {
	t.Helper()
	base := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	base = mutate.ConfigMediaType(base, types.OCIConfigJSON)
	cf := &v1.ConfigFile{OS: "linux", Architecture: arch, RootFS: v1.RootFS{Type: "layers"}, Config: v1.Config{
		Entrypoint: []string{"/e"}, Cmd: []string{"c"}, Env: []string{"A=b"}, User: "1:2", WorkingDir: "/w", StopSignal: "SIGINT", Labels: map[string]string{"k": "v"},
	}}
	img, err := mutate.ConfigFile(base, cf)
	must.NoError(t, err)
	img, err = mutate.AppendLayers(img, ls...)
	must.NoError(t, err)
	return img
}

func digestOf(t testing.TB, i interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	h, err := i.Digest()
	must.NoError(t, err)
	return h.String()
}

const amd64 = "linux/amd64"

func TestGet_registry(t *testing.T) {
	t.Parallel()
	layer := layerTar(t, file("a", "1"))
	for name, compress := range map[string]func([]byte) []byte{
		"gzip": gz, "zstd": func(b []byte) []byte { return zst(t, b) }, "plain": bytes.Clone,
		"two gzip members": func(b []byte) []byte { return append(gz(b[:700]), gz(b[700:])...) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newFakeRegistry(t)
			want := testImage(t, compress, layer, layerTar(t, file("b", "2")))
			reg.push(t, "x:1", want)
			s := openStore(t, t.TempDir(), Options{MountPoints: []MountPoint{{"/local", true}, {"/etc/hosts", false}}})
			var last Progress
			req := Request{Ref: reg.host + "/x:1", Platform: amd64, Progress: func(p Progress) { last = p }}
			img, err := s.Get(t.Context(), req)
			must.NoError(t, err)
			must.Eq(t, digestOf(t, want), img.Digest)
			must.Eq(t, req.Ref, img.Ref)
			must.Eq(t, []string{"a=1", "b=2", "etc/", "etc/hosts=", "local/"}, tree(t, img.Root))
			must.Eq(t, Config{[]string{"/e"}, []string{"c"}, []string{"A=b"}, "1:2", "/w", "SIGINT", map[string]string{"k": "v"}}, img.Config)
			must.Eq(t, PhaseUnpacking, last.Phase)
			must.Eq(t, last.TotalBytes, last.Bytes)
			must.Eq(t, 2, last.Layer)
		})
	}
}

func TestGet_usesTheStore(t *testing.T) {
	t.Parallel()
	reg := newFakeRegistry(t)
	img1, img2 := testImage(t, nil, layerTar(t, file("a", "1"))), testImage(t, nil, layerTar(t, file("a", "2")))
	reg.push(t, "x:1", img1)
	reg.push(t, "x:latest", img1)
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	get := func(ref string) (*Image, error) {
		return s.Get(t.Context(), Request{Ref: reg.host + "/x" + ref, Platform: amd64})
	}
	for _, ref := range []string{":1", "", "@" + digestOf(t, img1)} {
		_, err := get(ref)
		must.NoError(t, err)
	}
	must.Eq(t, 1, reg.count("/blobs/"+mustLayer(t, img1))) // one pull for three names
	gets := reg.count("/manifests/")
	img, err := get("")
	must.NoError(t, err)
	must.Eq(t, digestOf(t, img1), img.Digest)
	must.Eq(t, gets, reg.count("/manifests/")) // HEAD was enough

	reg.push(t, "x:latest", img2)
	reg.push(t, "x:1", img2)
	img, err = get(":1")
	must.NoError(t, err)
	must.Eq(t, digestOf(t, img1), img.Digest)
	img, err = get(":latest")
	must.NoError(t, err)
	must.Eq(t, digestOf(t, img2), img.Digest)

	// Without a network, and after a restart.
	reg.setHook(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusBadGateway); return true })
	s = openStore(t, dir, Options{})
	for _, ref := range []string{":1", "@" + digestOf(t, img1), "@" + digestOf(t, img2)} {
		_, err := get(ref)
		must.NoError(t, err)
	}
	_, err = get("")
	must.ErrorIs(t, err, ErrUnavailable)
	_, err = s.Get(t.Context(), Request{Ref: reg.host + "/x@" + digestOf(t, img1), Platform: "linux/arm64"})
	must.ErrorIs(t, err, ErrPlatform)
}

func mustLayer(t testing.TB, img v1.Image) string {
	t.Helper()
	ls, err := img.Layers()
	must.NoError(t, err)
	return digestOf(t, ls[0])
}

func TestGet_index(t *testing.T) {
	t.Parallel()
	reg := newFakeRegistry(t)
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	images := map[string]v1.Image{}
	for _, p := range []v1.Platform{{OS: "unknown", Architecture: "unknown"}, {OS: "linux", Architecture: "arm", Variant: "v6"}, {OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"}} {
		l := layerTar(t, file("p", p.String()))
		img := withConfig(t, []v1.Layer{fixedLayer{static.NewLayer(gz(l), types.OCILayer), sha(l)}}, p.Architecture)
		images[p.String()] = img
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
	}
	reg.push(t, "x:1", idx)
	s := openStore(t, t.TempDir(), Options{})
	for want, p := range map[string]string{"linux/amd64": amd64, "linux/arm64/v8": "linux/arm64", "linux/arm/v6": "linux/arm"} {
		for _, ref := range []string{":1", "@" + digestOf(t, idx)} {
			img, err := s.Get(t.Context(), Request{Ref: reg.host + "/x" + ref, Platform: p})
			must.NoError(t, err)
			must.Eq(t, digestOf(t, images[want]), img.Digest)
		}
	}
	for _, p := range []string{"linux/riscv64", "linux/arm/v5", "windows/amd64", "linux"} {
		_, err := s.Get(t.Context(), Request{Ref: reg.host + "/x:1", Platform: p})
		must.ErrorIs(t, err, ErrPlatform)
	}
	reg.setHook(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true })
	_, err := s.Get(t.Context(), Request{Ref: reg.host + "/x@" + digestOf(t, idx), Platform: amd64})
	must.NoError(t, err) // a pinned index needs no network either
}

// answer replaces the answer to GETs of paths that contain part.
func answer(part string, status int, body []byte) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, part) {
			return false
		}
		w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.WriteHeader(status)
		w.Write(body)
		return true
	}
}

func TestGet_registryErrors(t *testing.T) {
	t.Parallel()
	layer := layerTar(t, file("a", strings.Repeat("x", 4096)))
	good := testImage(t, nil, layer)
	blob := "/blobs/" + mustLayer(t, good)
	raw, err := good.RawManifest()
	must.NoError(t, err)
	truncated := func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, blob) {
			w.Header().Set("Content-Length", fmt.Sprint(len(gz(layer))))
			w.Write(gz(layer)[:20])
			panic(http.ErrAbortHandler)
		}
		return false
	}
	var hugeConfig v1.Manifest
	must.NoError(t, json.Unmarshal(raw, &hugeConfig))
	hugeConfig.Config.Size = 1 << 30
	huge, err := json.Marshal(hugeConfig)
	must.NoError(t, err)
	secret := []byte(`{"errors":[{"code":"X","message":"s3cret"}]}`)
	cases := map[string]struct {
		hook func(http.ResponseWriter, *http.Request) bool
		want error
	}{
		"404":                  {answer("/manifests/", 404, secret), ErrNotFound},
		"401":                  {answer("/manifests/", 401, secret), ErrUnauthorized},
		"403":                  {answer("/manifests/", 403, secret), ErrUnauthorized},
		"500":                  {answer("/manifests/", 500, secret), ErrUnavailable},
		"429":                  {answer("/manifests/", 429, secret), ErrUnavailable},
		"400":                  {answer("/manifests/", 400, secret), errRefused},
		"ping 503":             {answer("/v2/", 503, secret), ErrUnavailable},
		"blob 404":             {answer(blob, 404, secret), ErrNotFound},
		"blob 500":             {answer(blob, 500, secret), ErrUnavailable},
		"truncated blob":       {truncated, ErrUnavailable},
		"short blob":           {answer(blob, 200, gz(layer)[:20]), ErrCorrupt},
		"other blob":           {answer(blob, 200, gz(layerTar(t, file("evil", "x")))), ErrCorrupt},
		"lying blob":           {answer(blob, 200, flip(gz(layer))), ErrDigestMismatch},
		"long blob":            {answer(blob, 200, append(gz(layer), 0)), ErrDigestMismatch},
		"html":                 {answer("/manifests/", 200, []byte("<html>")), ErrCorrupt},
		"config too large":     {answer("/manifests/", 200, huge), ErrTooLarge},
		"manifest too large":   {answer("/manifests/", 200, make([]byte, maxMetadata+1)), ErrTooLarge},
		"redirect to plain":    {redirect(blob, "http://registry.invalid/"), ErrUnavailable},
		"index without images": {indexAnswer, ErrPlatform},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newFakeRegistry(t)
			reg.push(t, "x:1", good)
			reg.setHook(tc.hook)
			dir := t.TempDir()
			s := openStore(t, dir, Options{})
			_, err := s.Get(t.Context(), Request{Ref: reg.host + "/x:1", Platform: amd64})
			must.ErrorIs(t, err, tc.want)
			must.StrNotContains(t, err.Error(), "s3cret")
			must.StrNotContains(t, err.Error(), "\n")
			must.Eq(t, errors.Is(tc.want, ErrUnavailable), Retryable(err))
			must.SliceEmpty(t, leftovers(t, dir))
			roots, rerr := os.ReadDir(filepath.Join(dir, "v1", "rootfs"))
			must.NoError(t, rerr)
			must.SliceEmpty(t, roots)
		})
	}
}

func redirect(part, to string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, part) {
			return false
		}
		http.Redirect(w, r, to, http.StatusTemporaryRedirect)
		return true
	}
}

func indexAnswer(w http.ResponseWriter, r *http.Request) bool {
	if !strings.Contains(r.URL.Path, "/manifests/") {
		return false
	}
	w.Header().Set("Content-Type", string(types.OCIImageIndex))
	io.WriteString(w, `{"schemaVersion":2,"manifests":[]}`)
	return true
}

// flip changes a byte in the middle.
func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)/2] ^= 1
	return b
}

func TestGet_wrongDigest(t *testing.T) {
	t.Parallel()
	reg := newFakeRegistry(t)
	img := testImage(t, nil, layerTar(t, file("a", "1")))
	reg.push(t, "x:1", img)
	raw, err := img.RawManifest()
	must.NoError(t, err)
	reg.setHook(answer("/manifests/", 200, append(raw, ' ')))
	s := openStore(t, t.TempDir(), Options{})
	_, err = s.Get(t.Context(), Request{Ref: reg.host + "/x@" + digestOf(t, img), Platform: amd64})
	must.ErrorIs(t, err, ErrDigestMismatch)
	reg.setHook(nil)
	_, err = s.Get(t.Context(), Request{Ref: reg.host + "/x@sha256:" + strings.Repeat("0", 64), Platform: amd64})
	must.ErrorIs(t, err, ErrNotFound)
}

func TestGet_lyingDiffID(t *testing.T) {
	t.Parallel()
	reg := newFakeRegistry(t)
	l := layerTar(t, file("a", "1"))
	reg.push(t, "x:1", withConfig(t, []v1.Layer{fixedLayer{static.NewLayer(gz(l), types.OCILayer), sha(nil)}}, "amd64"))
	// The tar ends before the stream: the rest counts too.
	trailing := append(bytes.Clone(l), make([]byte, 100_000)...)
	reg.push(t, "x:2", withConfig(t, []v1.Layer{fixedLayer{static.NewLayer(gz(trailing), types.OCILayer), sha(l)}}, "amd64"))
	reg.push(t, "x:3", withConfig(t, []v1.Layer{fixedLayer{static.NewLayer(gz(trailing), types.OCILayer), sha(trailing)}}, "amd64"))
	s := openStore(t, t.TempDir(), Options{})
	for ref, want := range map[string]error{"/x:1": ErrDigestMismatch, "/x:2": ErrDigestMismatch, "/x:3": nil} {
		_, err := s.Get(t.Context(), Request{Ref: reg.host + ref, Platform: amd64})
		if want == nil {
			must.NoError(t, err)
		} else {
			must.ErrorIs(t, err, want)
		}
	}
}

func TestGet_stall(t *testing.T) {
	t.Parallel()
	layer := layerTar(t, file("a", strings.Repeat("x", 4096)))
	img := testImage(t, bytes.Clone, layer)
	for name, part := range map[string]string{"before the headers": "/manifests/", "inside a blob": mustLayer(t, img)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newFakeRegistry(t)
			reg.push(t, "x:1", img)
			reg.setHook(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, part) {
					return false
				}
				if part != "/manifests/" {
					w.Write(layer[:1000])
					w.(http.Flusher).Flush()
				}
				<-r.Context().Done()
				return true
			})
			s := openStore(t, t.TempDir(), Options{})
			s.transport.stall = 100 * time.Millisecond
			_, err := s.Get(t.Context(), Request{Ref: reg.host + "/x:1", Platform: amd64})
			must.ErrorIs(t, err, ErrUnavailable)
			must.ErrorContains(t, err, "no data for 100ms")
			must.True(t, Retryable(err))
		})
	}
}

func TestGet_connectionRefused(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	must.NoError(t, l.Close())
	s := openStore(t, t.TempDir(), Options{})
	_, err = s.Get(t.Context(), Request{Ref: l.Addr().String() + "/x"})
	must.ErrorIs(t, err, ErrUnavailable)
}

func TestGet_20parallel(t *testing.T) {
	t.Parallel()
	reg := newFakeRegistry(t)
	img := testImage(t, nil, layerTar(t, file("a", "1")), layerTar(t, file("b", "2")))
	reg.push(t, "x:1", img)
	reg.push(t, "y:latest", img)
	s := openStore(t, t.TempDir(), Options{})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			ref := []string{"/x:1", "/y"}[i%2]
			got, err := s.Get(t.Context(), Request{Ref: reg.host + ref, Platform: amd64, Progress: func(Progress) {}})
			if err != nil || got.Digest != digestOf(t, img) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	wg.Wait()
	ls, err := img.Layers()
	must.NoError(t, err)
	for _, l := range ls {
		must.Eq(t, 1, reg.count(digestOf(t, l)))
	}
	must.Eq(t, 2, reg.count("/manifests/"))
}

func TestGet_cancel(t *testing.T) {
	t.Parallel()
	reg := newFakeRegistry(t)
	img := testImage(t, nil, layerTar(t, file("a", "1")))
	reg.push(t, "x:1", img)
	started, gone, release := make(chan struct{}, 9), make(chan struct{}, 9), make(chan struct{})
	reg.setHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, mustLayer(t, img)) {
			return false
		}
		started <- struct{}{}
		select {
		case <-r.Context().Done():
			gone <- struct{}{}
			return true
		case <-release:
			return false
		}
	})
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	get := func(ctx context.Context) chan error {
		done := make(chan error, 1)
		go func() { // ends with Get, which the test waits for
			_, err := s.Get(ctx, Request{Ref: reg.host + "/x:1", Platform: amd64})
			done <- err
		}()
		return done
	}
	// One of two leaves: the pull goes on for the other.
	ctx1, cancel1 := context.WithCancel(t.Context())
	ctx2, cancel2 := context.WithCancel(t.Context())
	first := get(ctx1)
	<-started
	second := get(ctx2)
	waitFor(t, func() bool { return callers(s) == 2 })
	cancel1()
	must.ErrorIs(t, <-first, context.Canceled)
	must.Eq(t, 0, len(gone))
	// The last leaves: the pull ends.
	cancel2()
	must.ErrorIs(t, <-second, context.Canceled)
	<-gone
	waitFor(t, func() bool { return len(leftovers(t, dir)) == 0 })
	// A new caller does not join the cancelled pull.
	third := get(t.Context())
	<-started
	close(release)
	must.NoError(t, <-third)
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		must.True(t, time.Now().Before(end), must.Sprint("condition not reached in time"))
	}
}

// callers counts those that wait for a registry image.
func callers(s *Store) (n int) {
	s.flights.mu.Lock()
	defer s.flights.mu.Unlock()
	for key, f := range s.flights.m {
		if strings.HasPrefix(key, "registry") {
			f.mu.Lock()
			n += len(f.callers)
			f.mu.Unlock()
		}
	}
	return n
}

func TestGuard_plainHTTP(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir(), Options{InsecureRegistries: []string{"reg.example:5000"}})
	for host, want := range map[string]bool{
		"127.0.0.1:5000": true, "[::1]:5000": true, "localhost:1": true, "reg.example:5000": true,
		"reg.example": false, "10.0.0.1:5000": false, "localhost.evil.example": false,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+host+"/v2/", nil)
		must.NoError(t, err)
		must.Eq(t, want, s.transport.plainHTTP(req.URL), must.Sprint(host))
	}
}
