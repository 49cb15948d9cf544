package image

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

// FuzzUnpack applies arbitrary bytes twice, as two layers. unpackAll asserts that a
// file beside the root is unchanged and that nothing appeared beside it.
func FuzzUnpack(f *testing.F) {
	f.Add([]byte{})
	f.Add(layerTar(f, file("a/b", "x"), link("l", "../.."), file("l/canary", "y"), hard("h", "l/canary"), file("h", "z")))
	f.Add(layerTar(f, dir("d"), file("d/x", ""), file("d/.wh..wh..opq", ""), file(".wh.d", ""), link("d", "/"), file("d/y", "")))
	f.Add(layerTar(f, file("../canary", ""), file("/../canary", ""), node("n", tar.TypeChar), node("p", tar.TypeFifo)))
	f.Add(layerTar(f, link("a", "b/c"), link("b", "../root/../canary"), file("a/x", ""), file("l/.wh.canary", "")))
	f.Fuzz(func(t *testing.T, data []byte) {
		root, u, _ := unpackAll(t, 1<<20, data, data)
		_ = u.mountPoints([]MountPoint{{"/etc/resolv.conf", false}, {"/local", true}, {"/a/x", true}})
		canary, err := os.ReadFile(filepath.Join(filepath.Dir(root), "canary"))
		must.NoError(t, err)
		must.True(t, bytes.Equal(canary, []byte("alive")))
		names, err := os.ReadDir(filepath.Dir(root))
		must.NoError(t, err)
		must.Len(t, 2, names)
	})
}

// FuzzReference asserts that what is accepted is of one kind, and that a path or tag is a part of the input.
func FuzzReference(f *testing.F) {
	for _, s := range []string{
		"alpine", "alpine:3", "reg:5000/x/y@sha256:" + strings.Repeat("a", 64), "oci:a/b:tag", "docker-archive:/x.tar:alpine:3",
		"oci:", "docker-archive::x", "https://ghcr.io/a/b", "[::1]:5000/x", "UPPER", "a@sha512:" + strings.Repeat("a", 128), "x\x00y", "../..", "oci:../..",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseReference(s, []string{"reg:5000"})
		if err != nil {
			must.ErrorIs(t, err, ErrInvalidReference)
			return
		}
		switch r.kind {
		case kindRegistry:
			must.NotNil(t, r.remote)
			must.StrNotContains(t, refFile(r.remote.Name(), "linux/amd64"), "/")
			if d, ok := r.pinned(); ok {
				must.StrHasPrefix(t, "sha256:", d)
				must.False(t, r.askRegistry())
			}
		default:
			must.NotEq(t, "", r.path)
			must.True(t, strings.Contains(s, r.path) && strings.Contains(s, r.tag))
		}
	})
}
