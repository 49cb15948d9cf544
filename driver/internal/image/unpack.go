package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// unpacker applies layers to one root directory. The layers are hostile, the
// directory is ours alone: nothing else changes it meanwhile, and it is reached only
// through root. Two rules keep every write inside:
//
//   - the directory part of a name is resolved by resolve, in the root, never by string;
//   - the last component is used only with *at calls that do not follow symbolic
//     links, and whatever was there is unlinked first, never opened for writing. So
//     neither a link planted by an earlier entry nor a shared inode is written through.
//
// Not safe for concurrent use.
type unpacker struct {
	root       int // O_PATH
	bytes      int64
	maxBytes   int64
	entries    int
	maxEntries int
	devices    int // device nodes skipped

	depth map[uint64]int // by inode of a directory that was made

	// One parent directory is kept open, since entries come in directory order.
	cache    folder
	cacheDir string
	cached   bool

	// What follows is for the layer being applied.
	added  map[slot]struct{}   // names that this layer put in place; whiteouts spare them
	nodes  map[string]struct{} // names of skipped devices, which hard links may refer to
	dirs   []dirTime
	buffer []byte
}

// slot is a name in a directory, independent of the path that led there. Should
// the inode number be used again after the directory was removed, then for another
// directory of the same layer, whose content is the layer's own.
type slot struct {
	dir  uint64
	name string
}

// dirTime is a modification time to set after a directory has its content.
type dirTime struct {
	path  string
	ino   uint64
	mtime time.Time
}

// newUnpacker returns an unpacker for the existing directory root. Close it.
func newUnpacker(root string, maxBytes int64, maxEntries int) (*unpacker, error) {
	fd, err := openRoot(root)
	if err != nil {
		return nil, fmt.Errorf("open root: %w", err)
	}
	u := &unpacker{
		root: fd, maxBytes: maxBytes, maxEntries: maxEntries,
		depth: map[uint64]int{}, buffer: make([]byte, 256<<10),
	}
	u.startLayer()
	return u, nil
}

func (u *unpacker) close() {
	u.dropCache()
	unix.Close(u.root)
}

func (u *unpacker) startLayer() {
	u.added = map[slot]struct{}{}
	u.nodes = map[string]struct{}{}
	u.dirs = nil
}

// count books entries and bytes that are about to be written.
func (u *unpacker) count(entries int, bytes int64) error {
	if bytes > u.maxBytes-u.bytes {
		return fmt.Errorf("%w: more than %d bytes unpacked", ErrTooLarge, u.maxBytes)
	}
	if entries > u.maxEntries-u.entries {
		return fmt.Errorf("%w: more than %d files", ErrTooLarge, u.maxEntries)
	}
	u.bytes += bytes
	u.entries += entries
	return nil
}

// applyLayer unpacks one uncompressed layer on top of those before it.
func (u *unpacker) applyLayer(ctx context.Context, r io.Reader) error {
	u.startLayer()
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: read layer: %w", ErrCorrupt, err)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := u.entry(ctx, hdr, tr); err != nil {
			return fmt.Errorf("entry %q: %w", clip(hdr.Name), err)
		}
	}
	return u.setDirTimes()
}

const (
	whiteoutPrefix = ".wh."          // image-spec layer.md, "Whiteouts"
	opaqueName     = ".wh..wh..opq"  // ibid., "Opaque Whiteout"
	aufsPrefix     = ".wh..wh."      // AUFS metadata; moby pkg/archive WhiteoutMetaPrefix
	xattrPrefix    = "SCHILY.xattr." // PAX key of an extended attribute
	capability     = "security.capability"
	maxXattr       = 64 << 10 // XATTR_SIZE_MAX, include/uapi/linux/limits.h
)

// entry applies one entry of a layer.
func (u *unpacker) entry(ctx context.Context, hdr *tar.Header, body io.Reader) error {
	if err := u.count(1, 0); err != nil {
		return err
	}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	dir, base := splitName(name)
	switch {
	case base == opaqueName:
		return u.opaque(dir)
	case strings.HasPrefix(name, aufsPrefix), strings.Contains(name, "/"+aufsPrefix):
		return nil
	case strings.HasPrefix(base, whiteoutPrefix):
		return u.whiteout(dir, strings.TrimPrefix(base, whiteoutPrefix))
	}
	m, err := metaOf(hdr)
	if err != nil {
		return err
	}
	if name == "." {
		if hdr.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: the root must be a directory", ErrUnsafe)
		}
		return u.dirMeta(u.root, ".", name, m)
	}
	f, err := u.parent(dir)
	if err != nil {
		return err
	}
	if err := u.create(ctx, f, name, base, hdr, m, body); err != nil {
		return err
	}
	u.added[slot{f.ino, base}] = struct{}{}
	return nil
}

// create makes the last component of an entry.
func (u *unpacker) create(ctx context.Context, f folder, name, base string, hdr *tar.Header, m meta, body io.Reader) error {
	switch hdr.Typeflag {
	case tar.TypeDir:
		return u.directory(f, name, base, m)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return u.regular(ctx, f, base, hdr, m, body)
	case tar.TypeSymlink:
		return u.symlink(f, base, hdr.Linkname, m)
	case tar.TypeLink:
		return u.hardlink(f, base, hdr.Linkname)
	case tar.TypeFifo:
		return u.fifo(f, base, m)
	case tar.TypeChar, tar.TypeBlock:
		u.devices++
		u.nodes[name] = struct{}{}
		return u.remove(f, base)
	}
	return fmt.Errorf("%w: unknown entry type %q", ErrCorrupt, hdr.Typeflag)
}

// setDirTimes sets the times of the layer's directories, now that nothing more is
// put into them. A directory that was replaced since is left alone.
func (u *unpacker) setDirTimes() error {
	for _, d := range u.dirs {
		f, err := u.open(d.path)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue
		}
		if err != nil {
			return diskError("set directory time", err)
		}
		if f.ino == d.ino {
			err = setTime(f.fd, ".", d.mtime)
		}
		unix.Close(f.fd)
		if err != nil {
			return err
		}
	}
	return nil
}
