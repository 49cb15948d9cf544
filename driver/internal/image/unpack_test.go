package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"
)

// Short forms of tar entries.
func file(name, body string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body))}, body}
}
func dir(name string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}
func link(name, to string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777}, ""}
}
func hard(name, to string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to, Mode: 0o644}, ""}
}
func node(name string, typ byte) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: typ, Mode: 0o600, Devmajor: 1, Devminor: 3}, ""}
}

type tarEntry struct {
	hdr  tar.Header
	body string
}

func layerTar(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		if e.hdr.ModTime.IsZero() && e.hdr.Typeflag != tar.TypeXGlobalHeader {
			e.hdr.ModTime = time.Unix(1e9, 0)
		}
		must.NoError(t, w.WriteHeader(&e.hdr))
		_, err := w.Write([]byte(e.body))
		must.NoError(t, err)
	}
	must.NoError(t, w.Close())
	return buf.Bytes()
}

// unpackAll applies layers to a root beside a canary file, and checks that nothing beside the root changed.
func unpackAll(t testing.TB, maxBytes int64, layers ...[]byte) (string, *unpacker, error) {
	t.Helper()
	base := t.TempDir()
	root := filepath.Join(base, "root")
	canary := filepath.Join(base, "canary")
	must.NoError(t, os.Mkdir(root, 0o755))
	must.NoError(t, os.WriteFile(canary, []byte("alive"), 0o644))
	u, err := newUnpacker(root, maxBytes, 1000)
	must.NoError(t, err)
	t.Cleanup(u.close)
	for _, l := range layers {
		if err = u.applyLayer(t.Context(), bytes.NewReader(l)); err != nil {
			break
		}
	}
	got, rerr := os.ReadFile(canary)
	must.NoError(t, rerr)
	must.Eq(t, "alive", string(got))
	names, rerr := os.ReadDir(base)
	must.NoError(t, rerr)
	must.Len(t, 2, names)
	return root, u, err
}

// tree lists a root: "path" for a directory, "path=content" for a file, "path->target" for a link.
func tree(t testing.TB, root string) []string {
	t.Helper()
	list := []string{}
	must.NoError(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		switch {
		case d.IsDir():
			list = append(list, rel+"/")
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(p)
			must.NoError(t, err)
			list = append(list, rel+"->"+target)
		case d.Type().IsRegular():
			data, err := os.ReadFile(p)
			must.NoError(t, err)
			list = append(list, rel+"="+string(data))
		default:
			list = append(list, rel+" "+d.Type().String())
		}
		return nil
	}))
	sort.Strings(list)
	return list
}

type entries = []tarEntry

func TestUnpack_tree(t *testing.T) {
	t.Parallel()
	cases := map[string]struct {
		layers []entries
		want   []string
	}{
		"missing parents are made":        {[]entries{{file("a/b/c", "x")}}, []string{"a/", "a/b/", "a/b/c=x"}},
		"absolute name is in the root":    {[]entries{{file("/etc/x", "1")}}, []string{"etc/", "etc/x=1"}},
		"dots inside a name":              {[]entries{{file("a/../b/./c", "1")}}, []string{"b/", "b/c=1"}},
		"file replaces file":              {[]entries{{file("a", "1")}, {file("a", "2")}}, []string{"a=2"}},
		"file replaces tree":              {[]entries{{file("a/b/c", "1")}, {file("a", "2")}}, []string{"a=2"}},
		"dir replaces file":               {[]entries{{file("a", "1")}, {dir("a"), file("a/b", "2")}}, []string{"a/", "a/b=2"}},
		"dir over dir keeps content":      {[]entries{{file("a/b", "1")}, {dir("a")}}, []string{"a/", "a/b=1"}},
		"dir replaces link to dir":        {[]entries{{dir("a"), link("l", "a")}, {dir("l"), file("l/x", "1")}}, []string{"a/", "l/", "l/x=1"}},
		"file replaces link":              {[]entries{{file("a", "1"), link("l", "a")}, {file("l", "2")}}, []string{"a=1", "l=2"}},
		"absolute link as parent":         {[]entries{{dir("run"), dir("var"), link("var/run", "/run")}, {file("var/run/x", "1")}}, []string{"run/", "run/x=1", "var/", "var/run->/run"}},
		"link that climbs as parent":      {[]entries{{link("l", "../../../../a"), dir("a"), file("l/x", "1")}}, []string{"a/", "a/x=1", "l->../../../../a"}},
		"link to nothing as parent":       {[]entries{{link("var/run", "/run/deep"), file("var/run/x", "1")}}, []string{"run/", "run/deep/", "run/deep/x=1", "var/", "var/run->/run/deep"}},
		"relative link to nothing":        {[]entries{{link("a/l", "../b/c"), file("a/l/x", "1")}}, []string{"a/", "a/l->../b/c", "b/", "b/c/", "b/c/x=1"}},
		"hard link":                       {[]entries{{file("a", "1"), hard("d/b", "a")}}, []string{"a=1", "d/", "d/b=1"}},
		"hard link, absolute target":      {[]entries{{file("a", "1"), hard("b", "/a")}}, []string{"a=1", "b=1"}},
		"hard link across layers":         {[]entries{{file("a", "1")}, {hard("b", "a")}}, []string{"a=1", "b=1"}},
		"hard link to itself":             {[]entries{{file("a", "1"), hard("a", "a")}}, []string{"a=1"}},
		"hard link to link":               {[]entries{{link("l", "/etc/passwd"), hard("b", "l")}}, []string{"b->/etc/passwd", "l->/etc/passwd"}},
		"hard link through link":          {[]entries{{link("l", "/d"), file("d/f", "1"), hard("b", "l/f")}}, []string{"b=1", "d/", "d/f=1", "l->/d"}},
		"write does not follow hard link": {[]entries{{file("a", "1"), hard("b", "a"), file("b", "2")}}, []string{"a=1", "b=2"}},
		"devices are skipped":             {[]entries{{node("dev/null", tar.TypeChar), node("dev/sda", tar.TypeBlock)}}, []string{"dev/"}},
		"device hides lower file":         {[]entries{{file("x", "1")}, {node("x", tar.TypeChar)}}, []string{}},
		"hard link to a skipped device":   {[]entries{{node("null", tar.TypeChar), hard("zero", "null")}}, []string{}},
		"fifo":                            {[]entries{{node("p", tar.TypeFifo)}}, []string{"p p---------"}},
		"whiteout":                        {[]entries{{file("a/x", "1"), file("a/y", "2")}, {file("a/.wh.x", "")}}, []string{"a/", "a/y=2"}},
		"whiteout of tree":                {[]entries{{file("a/b/c", "1")}, {file(".wh.a", "")}}, []string{}},
		"whiteout of nothing":             {[]entries{{file("no/.wh.x", "")}}, []string{}},
		"whiteout of link":                {[]entries{{dir("a"), link("l", "a")}, {file(".wh.l", "")}}, []string{"a/"}},
		"whiteout after new content":      {[]entries{{file("a/old", "1")}, {dir("a"), file("a/new", "2"), file(".wh.a", "")}}, []string{"a/", "a/new=2"}},
		"whiteout after a child only":     {[]entries{{file("a/old", "1")}, {file("a/new", "2"), file(".wh.a", "")}}, []string{"a/", "a/new=2"}},
		"whiteout before new content":     {[]entries{{file("a/old", "1")}, {file(".wh.a", ""), dir("a"), file("a/new", "2")}}, []string{"a/", "a/new=2"}},
		"opaque first":                    {[]entries{{file("a/old", "1"), file("a/s/old", "1")}, {dir("a"), file("a/.wh..wh..opq", ""), file("a/new", "2")}}, []string{"a/", "a/new=2"}},
		"opaque last":                     {[]entries{{file("a/old", "1"), file("a/s/old", "1")}, {dir("a"), file("a/s/new", "2"), file("a/.wh..wh..opq", "")}}, []string{"a/", "a/s/", "a/s/new=2"}},
		"opaque root":                     {[]entries{{file("a/old", "1"), file("b", "1")}, {file("new", "2"), file(".wh..wh..opq", "")}}, []string{"new=2"}},
		"opaque through link":             {[]entries{{file("d/old", "1"), link("l", "/d")}, {file("l/.wh..wh..opq", "")}}, []string{"d/", "l->/d"}},
		"opaque is not for own layer":     {[]entries{{file("a/x", "1")}, {file("a/x", "2"), file("a/.wh..wh..opq", "")}}, []string{"a/", "a/x=2"}},
		"aufs metadata":                   {[]entries{{file(".wh..wh.aufs", ""), dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", "x")}}, []string{}},
		"global header":                   {[]entries{{{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, ""}, file("a", "1")}}, []string{"a=1"}},
		"empty layer":                     {[]entries{{}}, []string{}},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var layers [][]byte
			for _, l := range tc.layers {
				layers = append(layers, layerTar(t, l...))
			}
			root, _, err := unpackAll(t, 1<<20, layers...)
			must.NoError(t, err)
			must.Eq(t, tc.want, tree(t, root))
		})
	}
}

func TestUnpack_hostile(t *testing.T) {
	t.Parallel()
	uid := file("a", "")
	uid.hdr.Uid = 1<<32 - 1
	deep := make(entries, 0, 3)
	deep = append(deep, dir(strings.Repeat("d/", 200)), link("l", "/"+strings.Repeat("d/", 200)), dir("l/"+strings.Repeat("e/", 200)))
	cases := map[string]struct {
		entries entries
		want    error
	}{
		"climbs":                       {entries{file("../canary", "x")}, ErrUnsafe},
		"climbs inside":                {entries{file("a/../../canary", "x")}, ErrUnsafe},
		"absolute climb":               {entries{file("/../canary", "x")}, ErrUnsafe},
		"parent itself":                {entries{dir("..")}, ErrUnsafe},
		"root as link":                 {entries{link(".", "/etc")}, ErrUnsafe},
		"hard link climbs":             {entries{hard("a", "../canary")}, ErrUnsafe},
		"hard link to outside":         {entries{hard("a", "/etc/passwd")}, ErrCorrupt},
		"hard link through link":       {entries{link("l", "/etc"), hard("a", "l/passwd")}, ErrCorrupt},
		"hard link through climb":      {entries{link("l", "../.."), hard("a", "l/canary")}, ErrCorrupt},
		"hard link to dir":             {entries{dir("d"), hard("a", "d")}, ErrUnsafe},
		"hard link to root":            {entries{hard("a", "/")}, ErrUnsafe},
		"file as parent":               {entries{file("a", ""), file("a/b", "")}, ErrCorrupt},
		"link loop as parent":          {entries{link("a", "b"), link("b", "a"), file("a/x", "")}, ErrUnsafe},
		"links to nothing without end": {entries{link("a", "a/a"), file("a/x", "")}, ErrUnsafe},
		"magic link":                   {entries{link("p", "/proc/self/cwd"), file("p/x", "")}, nil},
		"whiteout of parent":           {entries{file("a/.wh...", "")}, ErrUnsafe},
		"whiteout of self":             {entries{file("a/.wh..", "")}, ErrUnsafe},
		"whiteout of empty":            {entries{file("a/.wh.", "")}, ErrUnsafe},
		"whiteout outside":             {entries{link("l", "../.."), file("l/.wh.canary", "")}, nil},
		"opaque outside":               {entries{link("l", "../.."), dir("x"), file("l/.wh..wh..opq", "")}, nil},
		"owner -1":                     {entries{uid}, ErrUnsafe},
		"long component":               {entries{file(strings.Repeat("a", 300), "")}, ErrUnsafe},
		"long name":                    {entries{file(strings.Repeat("a/", 2500)+"a", "")}, ErrUnsafe},
		"deep through links":           {deep, ErrTooLarge},
		"long link":                    {entries{link("l", strings.Repeat("a", 5000))}, ErrUnsafe},
		"too large":                    {entries{file("a", strings.Repeat("x", 1<<20+1))}, ErrTooLarge},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, err := unpackAll(t, 1<<20, layerTar(t, tc.entries...))
			if tc.want == nil {
				must.NoError(t, err)
				return
			}
			must.ErrorIs(t, err, tc.want)
			must.False(t, Retryable(err))
		})
	}
}

func TestUnpack_malformed(t *testing.T) {
	t.Parallel()
	short := layerTar(t, file("a", strings.Repeat("x", 5000)))[:2000]
	var huge bytes.Buffer
	w := tar.NewWriter(&huge)
	must.NoError(t, w.WriteHeader(&tar.Header{Name: "a", Typeflag: tar.TypeReg, Size: 1 << 40}))
	badType := layerTar(t, tarEntry{tar.Header{Name: "a", Typeflag: 'Z'}, ""})
	for name, tc := range map[string]struct {
		data []byte
		want error
	}{
		"short body":   {short, ErrCorrupt},
		"huge claim":   {huge.Bytes(), ErrTooLarge},
		"no tar":       {bytes.Repeat([]byte("no tar "), 200), ErrCorrupt},
		"unknown type": {badType, ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, err := unpackAll(t, 1<<30, tc.data)
			if tc.want == nil {
				must.NoError(t, err)
			} else {
				must.ErrorIs(t, err, tc.want)
			}
		})
	}
}

func TestUnpack_tooManyEntries(t *testing.T) {
	t.Parallel()
	var list entries
	for i := range 1001 {
		list = append(list, file(fmt.Sprint(i), ""))
	}
	_, _, err := unpackAll(t, 1<<20, layerTar(t, list...))
	must.ErrorIs(t, err, ErrTooLarge)
}

func TestUnpack_metadata(t *testing.T) {
	t.Parallel()
	when := time.Unix(1234567890, 0)
	su := tarEntry{tar.Header{Name: "bin/su", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 0, Gid: 42, Size: 1, ModTime: when,
		PAXRecords: map[string]string{
			"SCHILY.xattr.user.note":              "hi",
			"SCHILY.xattr.security.capability":    "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			"SCHILY.xattr.trusted.overlay.opaque": "y",
		}}, "x"}
	tmp := tarEntry{tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 7, Gid: 8, ModTime: when}, ""}
	sgid := tarEntry{tar.Header{Name: "sg/", Typeflag: tar.TypeDir, Mode: 0o2770, Gid: 99, ModTime: when}, ""}
	ln := tarEntry{tar.Header{Name: "ln", Typeflag: tar.TypeSymlink, Linkname: "x", Uid: 5, Gid: 6, ModTime: when}, ""}
	top := tarEntry{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o750, Gid: 3, ModTime: when}, ""}
	big := tarEntry{tar.Header{Name: "big", Typeflag: tar.TypeReg, Mode: 0o600, Uid: 1<<32 - 2, Format: tar.FormatPAX}, ""}
	root, _, err := unpackAll(t, 1<<20, layerTar(t, top, su, tmp, file("tmp/x", "1"), sgid, file("sg/implied/x", ""), ln, big))
	must.NoError(t, err)
	for name, want := range map[string]struct {
		mode     uint32
		uid, gid uint32
		timed    bool
	}{
		".":          {unix.S_IFDIR | 0o750, 0, 3, true},
		"bin":        {unix.S_IFDIR | 0o755, 0, 0, false},
		"bin/su":     {unix.S_IFREG | 0o4755, 0, 42, true},
		"tmp":        {unix.S_IFDIR | 0o1777, 7, 8, true},
		"sg":         {unix.S_IFDIR | 0o2770, 0, 99, true},
		"sg/implied": {unix.S_IFDIR | 0o755, 0, 0, false},
		"ln":         {unix.S_IFLNK | 0o777, 5, 6, true},
		"big":        {unix.S_IFREG | 0o600, 1<<32 - 2, 0, false},
	} {
		var st unix.Stat_t
		must.NoError(t, unix.Lstat(filepath.Join(root, name), &st))
		must.Eq(t, fmt.Sprintf("%s %o %d:%d", name, want.mode, want.uid, want.gid), fmt.Sprintf("%s %o %d:%d", name, st.Mode, st.Uid, st.Gid))
		if want.timed {
			must.Eq(t, when.Unix(), st.Mtim.Sec)
		}
	}
	buf := make([]byte, 100)
	n, err := unix.Getxattr(filepath.Join(root, "bin/su"), "user.note", buf)
	must.NoError(t, err)
	must.Eq(t, "hi", string(buf[:n]))
	n, err = unix.Getxattr(filepath.Join(root, "bin/su"), "security.capability", buf)
	must.NoError(t, err)
	must.Eq(t, 20, n)
	_, err = unix.Getxattr(filepath.Join(root, "bin/su"), "trusted.overlay.opaque", buf)
	must.ErrorIs(t, err, unix.ENODATA)
}

func TestUnpack_sparse(t *testing.T) {
	t.Parallel()
	// Written by hand: archive/tar cannot. PAX 1.0: the map precedes the data.
	m := "1\n4194304\n4\n"
	body := m + strings.Repeat("\x00", 512-len(m)) + "data"
	e := tarEntry{tar.Header{Name: "GNUSparseFile.0/s", Typeflag: tar.TypeReg, Size: int64(len(body)), Mode: 0o600}, body}
	data := layerTar(t, e)
	pax := "22 GNU.sparse.major=1\n" + "22 GNU.sparse.minor=0\n" + "21 GNU.sparse.name=s\n" + "31 GNU.sparse.realsize=8388608\n"
	x := layerTar(t, tarEntry{tar.Header{Name: "x", Typeflag: tar.TypeReg, Size: int64(len(pax))}, pax})
	x[156] = tar.TypeXHeader
	fixChecksum(x)
	root, _, err := unpackAll(t, 9<<20, append(x[:1024:1024], data...))
	must.NoError(t, err)
	var st unix.Stat_t
	must.NoError(t, unix.Stat(filepath.Join(root, "s"), &st))
	must.Eq(t, 8<<20, st.Size)
	must.Less(t, 2<<20, st.Blocks*512)
	got, err := os.ReadFile(filepath.Join(root, "s"))
	must.NoError(t, err)
	must.Eq(t, "data", string(got[4<<20:4<<20+4]))

	_, _, err = unpackAll(t, 7<<20, append(x[:1024:1024], data...))
	must.ErrorIs(t, err, ErrTooLarge)
}

// fixChecksum recomputes the checksum of the first ustar header.
func fixChecksum(b []byte) {
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

func TestUnpack_countsDevices(t *testing.T) {
	t.Parallel()
	_, u, err := unpackAll(t, 1<<20, layerTar(t, node("a", tar.TypeChar), hard("b", "a"), node("c", tar.TypeBlock)))
	must.NoError(t, err)
	must.Eq(t, 3, u.devices)
}

func TestMountPoints(t *testing.T) {
	t.Parallel()
	layer := layerTar(t,
		dir("etc"), link("etc/resolv.conf", "../run/systemd/resolve/stub"), file("etc/hosts", "mine"),
		link("etc/hostname", "/etc/hosts"), dir("data"), link("secrets", "/data"), link("gone", "nowhere"), link("loop", "loop"),
		link("x/abs", "/y/../z"),
	)
	root, u, err := unpackAll(t, 1<<20, layer)
	must.NoError(t, err)
	must.NoError(t, u.mountPoints([]MountPoint{
		{"/etc/resolv.conf", false}, {"/etc/hosts", false}, {"/etc/hostname", false},
		{"/local", true}, {"/secrets", true}, {"/alloc/deep", true}, {"/opt/new", false},
	}))
	got := tree(t, root)
	for _, want := range []string{"run/systemd/resolve/stub=", "etc/hosts=mine", "local/", "alloc/deep/", "opt/new=", "secrets->/data"} {
		must.SliceContains(t, got, want)
	}
	for _, bad := range []MountPoint{
		{"/gone", true}, {"/gone/x", false}, {"/gone/x/y", true}, {"/etc/hosts/x", true}, {"/etc/hosts", true},
		{"/data", false}, {"/../x", true}, {"/loop", false}, {"/x/abs", false}, {"", true},
	} {
		err := u.mountPoint(bad)
		if bad.Path == "/x/abs" { // /y is made, then /z
			must.NoError(t, err)
			continue
		}
		must.True(t, errors.Is(err, ErrUnsafe) || errors.Is(err, ErrCorrupt), must.Sprint(bad, err))
	}
}

func TestImage_OpenFile(t *testing.T) {
	t.Parallel()
	root, _, err := unpackAll(t, 1<<20, layerTar(t,
		file("etc/passwd", "root:x:0:0"), link("p", "/etc/passwd"), link("out", "../../canary"), link("host", "/etc/shadow"),
		node("etc/group", tar.TypeFifo), dir("d"), link("pr", "/proc/self/root"),
	))
	must.NoError(t, err)
	img := &Image{Root: root, Ref: "x"}
	for _, name := range []string{"/etc/passwd", "etc/passwd", "/p", "/d/../../../etc/passwd"} {
		f, err := img.OpenFile(name)
		must.NoError(t, err)
		buf := make([]byte, 4)
		_, err = f.Read(buf)
		must.NoError(t, err)
		must.Eq(t, "root", string(buf))
		must.NoError(t, f.Close())
	}
	for _, name := range []string{"/none", "/out", "/host", "/pr/etc/shadow"} {
		_, err := img.OpenFile(name)
		must.ErrorIs(t, err, os.ErrNotExist)
	}
	for _, name := range []string{"/etc/group", "/d", "/"} {
		_, err := img.OpenFile(name)
		must.ErrorIs(t, err, ErrUnsafe)
	}
}
