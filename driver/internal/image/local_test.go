package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	ggcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"
)

// writeLayout writes images by tag; the empty tag is none.
func writeLayout(t testing.TB, dir string, images map[string]v1.Image) {
	t.Helper()
	p, err := ggcrlayout.Write(dir, empty.Index)
	must.NoError(t, err)
	for tag, img := range images {
		var opts []ggcrlayout.Option
		if tag != "" {
			opts = append(opts, ggcrlayout.WithAnnotations(map[string]string{refNameAnnotation: tag}))
		}
		must.NoError(t, p.AppendImage(img, opts...))
	}
}

func TestGet_layout(t *testing.T) {
	t.Parallel()
	task, allowed, outside := t.TempDir(), t.TempDir(), t.TempDir()
	a, b := testImage(t, nil, layerTar(t, file("a", "1"))), testImage(t, nil, layerTar(t, file("b", "2")))
	must.NoError(t, os.Mkdir(filepath.Join(task, "local"), 0o755))
	writeLayout(t, filepath.Join(task, "local/two"), map[string]v1.Image{"a": a, "b": b})
	writeLayout(t, filepath.Join(allowed, "one"), map[string]v1.Image{"": a})
	writeLayout(t, filepath.Join(outside, "one"), map[string]v1.Image{"": a})
	writeLayout(t, filepath.Join(task, "local/leak"), map[string]v1.Image{"": a})
	must.NoError(t, os.Symlink(filepath.Join(outside, "one"), filepath.Join(task, "local/link")))
	must.NoError(t, os.Symlink("two", filepath.Join(task, "local/inner")))
	leak := filepath.Join(task, "local/leak/index.json")
	must.NoError(t, os.Remove(leak))
	must.NoError(t, os.Symlink(filepath.Join(outside, "one/index.json"), leak))
	writeLayout(t, filepath.Join(task, "local/fifo"), map[string]v1.Image{})
	must.NoError(t, os.Remove(filepath.Join(task, "local/fifo/index.json")))
	must.NoError(t, unix.Mkfifo(filepath.Join(task, "local/fifo/index.json"), 0o600))
	writeLayout(t, filepath.Join(task, "local/none"), map[string]v1.Image{})
	must.NoError(t, os.Mkdir(filepath.Join(task, "local/dir"), 0o755))

	s := openStore(t, t.TempDir(), Options{AllowedDirs: []string{allowed}})
	for ref, want := range map[string]any{
		"oci:local/two:a":                      a,
		"oci:local/two:b":                      b,
		"oci:./local/inner:b":                  b,
		"oci:" + allowed + "/one":              a,
		"oci:local/two":                        ErrInvalidReference,
		"oci:local/two:c":                      ErrNotFound,
		"oci:local/missing":                    ErrNotFound,
		"oci:local/dir":                        ErrNotFound,
		"oci:local/none":                       ErrNotFound,
		"oci:local/link":                       ErrNotAllowed,
		"oci:local/leak":                       ErrNotAllowed,
		"oci:local/fifo":                       ErrNotAllowed,
		"oci:../" + filepath.Base(outside):     ErrNotAllowed,
		"oci:" + outside + "/one":              ErrNotAllowed,
		"oci:" + allowed + "/../one":           ErrNotAllowed,
		"oci:" + allowed:                       ErrNotAllowed,
		"oci:":                                 ErrInvalidReference,
		"docker-archive:local":                 ErrNotAllowed,
		"not a reference":                      ErrInvalidReference,
		"x@sha512:" + strings.Repeat("a", 128): ErrInvalidReference,
	} {
		got, err := s.Get(t.Context(), Request{Ref: ref, Platform: amd64, TaskDir: task})
		if img, ok := want.(v1.Image); ok {
			must.NoError(t, err, must.Sprint(ref))
			must.Eq(t, digestOf(t, img), got.Digest)
		} else {
			must.ErrorIs(t, err, want.(error), must.Sprint(ref))
		}
	}
	_, err := s.Get(t.Context(), Request{Ref: "oci:local/two:a"})
	must.ErrorIs(t, err, ErrNotAllowed)
	_, err = s.Get(t.Context(), Request{Ref: "oci:local/two", Platform: amd64, TaskDir: task})
	must.ErrorContains(t, err, `["a" "b"]`)
	_, err = s.Get(t.Context(), Request{Ref: "oci:" + outside + "/one"})
	must.ErrorContains(t, err, "image_dirs")
	_, err = s.Get(t.Context(), Request{Ref: "oci:local/two:a", Platform: "linux/arm64", TaskDir: task})
	must.ErrorIs(t, err, ErrPlatform)
}

func TestGet_layoutTampered(t *testing.T) {
	t.Parallel()
	img := testImage(t, nil, layerTar(t, file("a", "1")))
	cfg, err := img.ConfigName()
	must.NoError(t, err)
	manifest, err := img.Digest()
	must.NoError(t, err)
	for name, hex := range map[string]string{"manifest": manifest.Hex, "config": cfg.Hex, "layer": strings.TrimPrefix(mustLayer(t, img), "sha256:")} {
		task := t.TempDir()
		writeLayout(t, filepath.Join(task, "x"), map[string]v1.Image{"": img})
		blob := filepath.Join(task, "x/blobs/sha256", hex)
		data, err := os.ReadFile(blob)
		must.NoError(t, err)
		must.NoError(t, os.WriteFile(blob, flip(data), 0o600))
		s := openStore(t, t.TempDir(), Options{})
		_, err = s.Get(t.Context(), Request{Ref: "oci:x", Platform: amd64, TaskDir: task})
		must.ErrorIs(t, err, ErrDigestMismatch, must.Sprint(name))
	}
}

func TestGet_archive(t *testing.T) {
	t.Parallel()
	task := t.TempDir()
	a, b := testImage(t, nil, layerTar(t, file("a", "1"))), testImage(t, bytes.Clone, layerTar(t, file("b", "2")))
	tagA, tagB := name.MustParseReference("alpine:3"), name.MustParseReference("reg.example/b:4")
	must.NoError(t, tarball.MultiRefWriteToFile(filepath.Join(task, "two.tar"), map[name.Reference]v1.Image{tagA: a, tagB: b}))
	must.NoError(t, tarball.WriteToFile(filepath.Join(task, "one.tar"), tagA, a))
	data, err := os.ReadFile(filepath.Join(task, "one.tar"))
	must.NoError(t, err)
	must.NoError(t, os.WriteFile(filepath.Join(task, "one.tar.gz"), gz(data), 0o600))
	must.NoError(t, os.WriteFile(filepath.Join(task, "empty.tar"), nil, 0o600))
	must.NoError(t, os.WriteFile(filepath.Join(task, "linked.tar"), linkedArchive(t, a), 0o600))
	s := openStore(t, t.TempDir(), Options{})
	digests := map[string]string{}
	for ref, want := range map[string]any{
		"one.tar":                 "a=1",
		"one.tar:3":               "a=1",
		"linked.tar":              "a=1",
		"two.tar:alpine:3":        "a=1",
		"two.tar:reg.example/b:4": "b=2",
		"two.tar:4":               "b=2",
		"two.tar":                 ErrInvalidReference,
		"two.tar:5":               ErrNotFound,
		"none.tar":                ErrNotFound,
		"one.tar.gz":              ErrCorrupt,
		"empty.tar":               ErrCorrupt,
	} {
		got, err := s.Get(t.Context(), Request{Ref: "docker-archive:" + ref, Platform: amd64, TaskDir: task})
		if e, ok := want.(error); ok {
			must.ErrorIs(t, err, e, must.Sprint(ref))
			continue
		}
		must.NoError(t, err, must.Sprint(ref))
		must.Eq(t, []string{want.(string)}, tree(t, got.Root))
		digests[ref] = got.Digest
	}
	must.Eq(t, digests["one.tar"], digests["two.tar:alpine:3"])
	must.Eq(t, digests["one.tar"], digests["linked.tar"])
}

// linkedArchive is an archive as docker before 25 writes it, with the layer behind a link.
func linkedArchive(t testing.TB, img v1.Image) []byte {
	t.Helper()
	config, err := img.RawConfigFile()
	must.NoError(t, err)
	manifest, err := json.Marshal([]archiveEntry{{Config: "c.json", Layers: []string{"b/layer.tar"}}})
	must.NoError(t, err)
	layer := string(layerTar(t, file("a", "1")))
	return layerTar(t, file("a/layer.tar", layer), link("b/layer.tar", "../a/layer.tar"),
		file("c.json", string(config)), file("manifest.json", string(manifest)))
}

func TestGet_archiveTampered(t *testing.T) {
	t.Parallel()
	task := t.TempDir()
	img := testImage(t, nil, layerTar(t, file("a", "1")))
	data := linkedArchive(t, img)
	must.NoError(t, os.WriteFile(filepath.Join(task, "x.tar"), bytes.Replace(data, append([]byte("1"), make([]byte, 511)...), append([]byte("2"), make([]byte, 511)...), 1), 0o600))
	s := openStore(t, t.TempDir(), Options{})
	_, err := s.Get(t.Context(), Request{Ref: "docker-archive:x.tar", Platform: amd64, TaskDir: task})
	must.ErrorIs(t, err, ErrDigestMismatch)
	// A sparse or special member is no layer.
	must.NoError(t, os.WriteFile(filepath.Join(task, "y.tar"), layerTar(t, node("manifest.json", tar.TypeFifo)), 0o600))
	_, err = s.Get(t.Context(), Request{Ref: "docker-archive:y.tar", Platform: amd64, TaskDir: task})
	must.ErrorIs(t, err, ErrCorrupt)
}
