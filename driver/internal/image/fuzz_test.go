package image

import (
	"archive/tar"
	"bytes"
	"fmt"
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

// FuzzUnpackEntries makes well-formed entries of the bytes, three each, from few
// names, so that links, whiteouts and replacements meet more often than in FuzzUnpack.
func FuzzUnpackEntries(f *testing.F) {
	f.Add([]byte{2, 0, 9, 0, 1, 1, 3, 2, 4, 0, 2, 0})
	f.Add([]byte{1, 0, 0, 2, 1, 8, 0, 3, 0, 7, 0, 0, 3, 4, 5, 0, 6, 0})
	names := []string{"a", "b", "a/b", "b/a", "a/b/c", "c", "canary", "a/canary", "..", "../..", "/", "/a", "/b/c", "../../canary", "a/../b", "."}
	f.Fuzz(func(t *testing.T, data []byte) {
		var layers [][]byte
		var list entries
		for ; len(data) >= 3 && len(list) < 40; data = data[3:] {
			name, target := names[int(data[1])%len(names)], names[int(data[2])%len(names)]
			switch data[0] % 9 {
			case 0:
				list = append(list, file(strings.Trim(name, "/")+"x", "new"))
			case 1:
				list = append(list, dir(name))
			case 2:
				list = append(list, link(name+"/"+"l", target))
			case 3:
				list = append(list, hard(name+"/"+"h", target))
			case 4:
				list = append(list, file(filepath.Dir(name)+"/.wh."+strings.Trim(filepath.Base(name), "/"), ""))
			case 5:
				list = append(list, file(name+"/.wh..wh..opq", ""))
			case 6:
				list = append(list, node(strings.TrimRight("./"+name, "/"), tar.TypeFifo))
			case 7:
				list = append(list, link(strings.TrimRight("./"+name, "/"), target))
			case 8:
				layers = append(layers, layerTar(t, list...))
				list = nil
			}
		}
		layers = append(layers, layerTar(t, list...))
		_, u, _ := unpackAll(t, 1<<20, layers...)
		for _, n := range names {
			_ = u.mountPoint(MountPoint{n, len(n)%2 == 0})
		}
		canary, err := os.ReadFile(filepath.Join(filepath.Dir(u.rootPath(t)), "canary"))
		must.NoError(t, err)
		must.Eq(t, "alive", string(canary))
	})
}

// rootPath is where the root lies.
func (u *unpacker) rootPath(t testing.TB) string {
	t.Helper()
	p, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", u.root))
	must.NoError(t, err)
	return p
}
