package image

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcrregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"
)

// fakeRegistry is go-containerregistry's registry on loopback, with a count of GETs
// and a hook that may answer instead.
type fakeRegistry struct {
	host string
	mu   sync.Mutex
	gets map[string]int
	hook func(http.ResponseWriter, *http.Request) bool
}

func newFakeRegistry(t *testing.T) *fakeRegistry {
	t.Helper()
	f := &fakeRegistry{gets: map[string]int{}}
	inner := ggcrregistry.New(ggcrregistry.Logger(discardLog))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		if r.Method == http.MethodGet {
			f.gets[r.URL.Path]++
		}
		hook := f.hook
		f.mu.Unlock()
		if hook != nil && hook(w, r) {
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL)
	must.NoError(t, err)
	f.host = u.Host
	return f
}

func (f *fakeRegistry) setHook(h func(http.ResponseWriter, *http.Request) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = h
}

func (f *fakeRegistry) count(part string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for p, c := range f.gets {
		if strings.Contains(p, part) {
			n += c
		}
	}
	return n
}

func (f *fakeRegistry) push(t *testing.T, ref string, what remote.Taggable) {
	t.Helper()
	r, err := name.ParseReference(f.host + "/" + ref)
	must.NoError(t, err)
	switch x := what.(type) {
	case v1.Image:
		must.NoError(t, remote.Write(r, x))
	case v1.ImageIndex:
		must.NoError(t, remote.WriteIndex(r, x))
	}
	f.mu.Lock()
	f.gets = map[string]int{}
	f.mu.Unlock()
}

func openStore(t *testing.T, dir string, opts Options) *Store {
	t.Helper()
	s, err := Open(dir, opts)
	must.NoError(t, err)
	s.backoff = remote.Backoff{Duration: time.Millisecond, Factor: 1, Steps: 2}
	t.Cleanup(func() { must.NoError(t, s.Close()) })
	return s
}

// leftovers lists what is in the temporary directory of a store.
func leftovers(t *testing.T, dir string) []os.DirEntry {
	t.Helper()
	list, err := os.ReadDir(filepath.Join(dir, "v1", "tmp"))
	must.NoError(t, err)
	return list
}

func TestOpen_refusesNewerVersion(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	openStore(t, dir, Options{})
	openStore(t, dir, Options{})
	must.NoError(t, os.WriteFile(filepath.Join(dir, "version.json"), []byte(`{"version":2}`), 0o600))
	_, err := Open(dir, Options{})
	must.ErrorContains(t, err, "version 2")
	must.NoError(t, os.WriteFile(filepath.Join(dir, "version.json"), []byte(`{`), 0o600))
	_, err = Open(dir, Options{})
	must.ErrorIs(t, err, ErrCorrupt)
	_, err = Open(t.TempDir(), Options{AllowedDirs: []string{"relative"}})
	must.Error(t, err)
}

func TestOpen_keepsOthersOut(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must.NoError(t, os.Mkdir(filepath.Join(dir, "v1"), 0o755))
	openStore(t, dir, Options{})
	st, err := os.Stat(filepath.Join(dir, "v1"))
	must.NoError(t, err)
	must.Eq(t, os.FileMode(0o700), st.Mode().Perm())
}

func TestOpen_removesLeftovers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	crashed, err := s.newTemp()
	must.NoError(t, err)
	must.NoError(t, os.MkdirAll(filepath.Join(crashed.dir, "image", "root", "a", "b"), 0o700))
	must.NoError(t, os.Chmod(filepath.Join(crashed.dir, "image", "root", "a"), 0))
	must.NoError(t, crashed.lock.Close()) // as the kernel does at a crash
	running, err := s.newTemp()
	must.NoError(t, err)
	must.NoError(t, os.Mkdir(s.path("tmp", "nolock"), 0o700))
	must.NoError(t, os.WriteFile(s.path("refs", "x.json.tmp"), nil, 0o600))

	openStore(t, dir, Options{})
	list := leftovers(t, dir)
	must.Len(t, 1, list)
	must.Eq(t, filepath.Base(running.dir), list[0].Name())
	must.FileNotExists(t, s.path("refs", "x.json.tmp"))
	must.NoError(t, running.remove())
}

func TestGet_noSpace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { must.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	s := openStore(t, dir, Options{})
	task := t.TempDir()
	writeLayout(t, filepath.Join(task, "big"), map[string]v1.Image{"": testImage(t, nil, layerTar(t, file("big", strings.Repeat("x", 2<<20))))})
	_, err := s.Get(t.Context(), Request{Ref: "oci:big", TaskDir: task})
	must.ErrorIs(t, err, ErrNoSpace)
	must.True(t, Retryable(err))
	must.SliceEmpty(t, leftovers(t, dir))
}

func TestGet_storedImageDamaged(t *testing.T) {
	t.Parallel()
	dir, task := t.TempDir(), t.TempDir()
	s := openStore(t, dir, Options{})
	writeLayout(t, filepath.Join(task, "x"), map[string]v1.Image{"": testImage(t, nil, layerTar(t, file("a", "1")))})
	img, err := s.Get(t.Context(), Request{Ref: "oci:x", TaskDir: task})
	must.NoError(t, err)
	record := filepath.Join(filepath.Dir(img.Root), "image.json")
	for _, damage := range []string{"{", `{"version":2}`, `{"version":1,"digest":"sha256:00"}`} {
		must.NoError(t, os.WriteFile(record, []byte(damage), 0o600))
		_, err = s.Get(t.Context(), Request{Ref: "oci:x", TaskDir: task})
		must.ErrorContains(t, err, "remove")
	}
}

func TestClose_cancels(t *testing.T) {
	t.Parallel()
	reg := newFakeRegistry(t)
	reg.push(t, "x:1", testImage(t, nil, layerTar(t, file("a", "1"))))
	started := make(chan struct{})
	reg.setHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/manifests/") {
			return false
		}
		close(started)
		<-r.Context().Done()
		return true
	})
	s := openStore(t, t.TempDir(), Options{})
	failed := make(chan error, 1)
	go func() { // ends with Close, waited for below
		_, err := s.Get(context.Background(), Request{Ref: reg.host + "/x:1"})
		failed <- err
	}()
	<-started
	must.NoError(t, s.Close())
	must.ErrorIs(t, <-failed, ErrClosed)
	_, err := s.Get(t.Context(), Request{Ref: reg.host + "/x:1"})
	must.ErrorIs(t, err, ErrClosed)
}

// TestUnpack_asUmoci compares a tree with that of umoci, an independent implementation.
func TestUnpack_asUmoci(t *testing.T) {
	t.Parallel()
	umoci, err := exec.LookPath("umoci")
	if err != nil {
		if os.Getenv("BIVOUAC_CI") == "1" {
			t.Fatal("umoci is not installed: apt-get install umoci")
		}
		t.Skip("umoci is not installed")
	}
	task := t.TempDir()
	own := file("own", "x")
	own.hdr.Uid, own.hdr.Gid, own.hdr.Mode = 11, 12, 0o4750
	img := testImage(t, nil,
		layerTar(t, dir("a"), file("a/x", "1"), file("a/y", "2"), dir("b"), file("b/old", "3"), file("b/s/old", "4"), dir("run"), link("var/run", "/run"), own, hard("own2", "own"), file("swap/t", "")),
		layerTar(t, dir("a"), file("a/.wh.x", ""), dir("b"), file("b/.wh..wh..opq", ""), file("b/new", "5"), file("var/run/pid", "6"), node("p", tarFifo), file("swap", "7"), link("a/y", "x")),
	)
	writeLayout(t, filepath.Join(task, "img"), map[string]v1.Image{"latest": img})
	out, err := exec.CommandContext(t.Context(), umoci, "unpack", "--image", filepath.Join(task, "img")+":latest", filepath.Join(task, "bundle")).CombinedOutput()
	must.NoError(t, err, must.Sprint(string(out)))
	s := openStore(t, t.TempDir(), Options{})
	got, err := s.Get(t.Context(), Request{Ref: "oci:img:latest", TaskDir: task})
	must.NoError(t, err)
	want := filepath.Join(task, "bundle", "rootfs")
	must.Eq(t, tree(t, want), tree(t, got.Root))
	for _, e := range tree(t, want) {
		p := strings.TrimSuffix(strings.FieldsFunc(e, func(r rune) bool { return strings.ContainsRune("=- ", r) })[0], "/")
		var a, b unix.Stat_t
		must.NoError(t, unix.Lstat(filepath.Join(want, p), &a))
		must.NoError(t, unix.Lstat(filepath.Join(got.Root, p), &b))
		must.Eq(t, []uint32{a.Mode, a.Uid, a.Gid}, []uint32{b.Mode, b.Uid, b.Gid}, must.Sprint(p))
		must.Eq(t, a.Nlink, b.Nlink)
	}
}

func TestRetryable(t *testing.T) {
	t.Parallel()
	for _, err := range []error{ErrUnavailable, ErrNoSpace, context.DeadlineExceeded, &networkError{errors.New("x")}} {
		must.True(t, Retryable(err))
	}
	for _, err := range []error{nil, ErrNotFound, ErrDigestMismatch, ErrUnauthorized, ErrCorrupt, ErrUnsafe, ErrTooLarge, ErrInvalidReference, ErrNotAllowed, ErrPlatform, ErrClosed, context.Canceled} {
		must.False(t, Retryable(err))
	}
}

func TestWriteRecord(t *testing.T) {
	t.Parallel()
	f := filepath.Join(t.TempDir(), "r.json")
	want := refRecord{formatVersion, "r", "p", "x", "y"}
	must.NoError(t, writeRecord(f, refRecord{Version: 1}))
	must.NoError(t, writeRecord(f, want))
	var got refRecord
	must.NoError(t, readRecord(f, &got))
	must.Eq(t, want, got)
	data, err := json.Marshal(got)
	must.NoError(t, err)
	must.StrContains(t, string(data), `"version":1`)
}
