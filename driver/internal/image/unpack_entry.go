package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// meta is the checked metadata of an entry.
type meta struct {
	uid, gid int
	mode     uint32 // permission, setuid, setgid and sticky bits
	mtime    time.Time
	xattrs   map[string]string
}

func metaOf(hdr *tar.Header) (meta, error) {
	for _, id := range []int{hdr.Uid, hdr.Gid} {
		// 1<<32-1 is -1, which chown(2) takes as "leave as it is".
		if id < 0 || id >= math.MaxUint32 {
			return meta{}, fmt.Errorf("%w: owner %d out of range", ErrUnsafe, id)
		}
	}
	m := meta{uid: hdr.Uid, gid: hdr.Gid, mode: uint32(hdr.Mode) & 0o7777, mtime: hdr.ModTime}
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok || name != capability && !strings.HasPrefix(name, "user.") {
			continue
		}
		if len(value) > maxXattr || strings.ContainsRune(name, 0) {
			return meta{}, fmt.Errorf("%w: extended attribute %q", ErrUnsafe, clip(name))
		}
		if m.xattrs == nil {
			m.xattrs = map[string]string{}
		}
		m.xattrs[name] = value
	}
	return m, nil
}

// apply sets owner, attributes and mode of an open file or directory, in the order
// in which the kernel does not undo them: chown(2) clears setuid bits and capabilities.
func (m meta) apply(fd int) error {
	if err := unix.Fchown(fd, m.uid, m.gid); err != nil {
		return diskError("chown", err)
	}
	for name, value := range m.xattrs {
		err := unix.Fsetxattr(fd, name, []byte(value), 0)
		switch {
		case err == nil:
		case errors.Is(err, unix.ENOTSUP) && name != capability:
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
			// ext4 says ENOSPC when the attributes of one inode exceed a block.
			return fmt.Errorf("%w: extended attribute %q of %d bytes", ErrTooLarge, clip(name), len(value))
		case errors.Is(err, unix.EINVAL):
			return fmt.Errorf("%w: extended attribute %q", ErrCorrupt, clip(name))
		default:
			return diskError(fmt.Sprintf("set extended attribute %q", clip(name)), err)
		}
	}
	return diskError("chmod", unix.Fchmod(fd, m.mode))
}

// setTime sets both times of a name in a directory, not following a symbolic link.
func setTime(dir int, name string, t time.Time) error {
	ts := unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	return diskError("set time", unix.UtimesNanoAt(dir, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}

// replace runs do, which makes base in f and fails with EEXIST where there is
// something; then it removes that and tries once more.
func (u *unpacker) replace(f folder, base, op string, do func() error) error {
	err := do()
	if errors.Is(err, unix.EEXIST) {
		if err := u.remove(f, base); err != nil {
			return err
		}
		err = do()
	}
	return diskError(op, err)
}

// directory keeps a directory that is there, with its content; anything else, also a
// symbolic link to a directory, gives way, as in Docker and containerd.
func (u *unpacker) directory(f folder, name, base string, m meta) error {
	var st unix.Stat_t
	err := unix.Fstatat(f.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return u.dirMeta(f.fd, base, name, m)
	case err == nil:
		if err := u.remove(f, base); err != nil {
			return err
		}
	case !errors.Is(err, unix.ENOENT):
		return diskError("stat", err)
	}
	u.entries-- // mkdir counts it again
	if err := u.mkdir(f, base); err != nil {
		return err
	}
	return u.dirMeta(f.fd, base, name, m)
}

// dirMeta applies the metadata of a directory now, and its time after the layer.
func (u *unpacker) dirMeta(dir int, base, name string, m meta) error {
	fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return diskError("open directory", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return diskError("stat", err)
	}
	u.dirs = append(u.dirs, dirTime{path: name, ino: st.Ino, mtime: m.mtime})
	return m.apply(fd)
}

func (u *unpacker) regular(ctx context.Context, f folder, base string, hdr *tar.Header, m meta, body io.Reader) error {
	// The size is that of the file with its holes: a sparse header cannot promise
	// terabytes either.
	if err := u.count(0, hdr.Size); err != nil {
		return err
	}
	var fd int
	err := u.replace(f, base, "create file", func() (err error) {
		fd, err = unix.Openat(f.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	err = u.copyBody(ctx, fd, body, hdr.Size, isSparse(hdr))
	if err == nil {
		err = m.apply(fd)
	}
	if cerr := unix.Close(fd); err == nil {
		err = diskError("close", cerr)
	}
	if err != nil {
		return err
	}
	return setTime(f.fd, base, m.mtime)
}

func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// copyBody writes size bytes of body to fd. In a sparse file, blocks of zeros stay holes.
func (u *unpacker) copyBody(ctx context.Context, fd int, body io.Reader, size int64, sparse bool) error {
	for left := size; left > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		buf := u.buffer[:min(left, int64(len(u.buffer)))]
		if _, err := io.ReadFull(body, buf); err != nil {
			return fmt.Errorf("%w: file of %d bytes ends early: %w", ErrCorrupt, size, err)
		}
		left -= int64(len(buf))
		if sparse && allZero(buf) {
			if _, err := unix.Seek(fd, int64(len(buf)), io.SeekCurrent); err != nil {
				return diskError("seek", err)
			}
			continue
		}
		if err := writeAll(fd, buf); err != nil {
			return diskError("write", err)
		}
	}
	if sparse {
		return diskError("truncate", unix.Ftruncate(fd, size))
	}
	return nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// symlink stores the target as it is: it means something only inside a root, where
// resolve and the sandbox confine it.
func (u *unpacker) symlink(f folder, base, target string, m meta) error {
	if target == "" || len(target) >= maxPathLen || strings.ContainsRune(target, 0) {
		return fmt.Errorf("%w: symbolic link target of %d bytes", ErrUnsafe, len(target))
	}
	err := u.replace(f, base, "create symbolic link", func() error {
		return unix.Symlinkat(target, f.fd, base)
	})
	if err != nil {
		return err
	}
	if err := unix.Fchownat(f.fd, base, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return diskError("chown", err)
	}
	return setTime(f.fd, base, m.mtime)
}

func (u *unpacker) fifo(f folder, base string, m meta) error {
	err := u.replace(f, base, "create fifo", func() error {
		return unix.Mknodat(f.fd, base, unix.S_IFIFO|0o600, 0)
	})
	if err != nil {
		return err
	}
	if err := unix.Fchownat(f.fd, base, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return diskError("chown", err)
	}
	// Follows symbolic links, but this name was made a FIFO two lines ago.
	if err := unix.Fchmodat(f.fd, base, m.mode, 0); err != nil {
		return diskError("chmod", err)
	}
	return setTime(f.fd, base, m.mtime)
}

// hardlink links base to a file of this or an earlier layer. The target is a path
// in the root; if it is a symbolic link, the link itself is linked. The entry's
// metadata is the target's own, as in GNU tar.
func (u *unpacker) hardlink(f folder, base, linkname string) error {
	target, err := cleanName(linkname)
	if err != nil {
		return fmt.Errorf("hard link target: %w", err)
	}
	if _, ok := u.nodes[target]; ok {
		u.devices++
		return u.remove(f, base)
	}
	dir, tbase := splitName(target)
	t, err := u.open(dir)
	if err != nil {
		return diskError(fmt.Sprintf("hard link to %q", clip(target)), missing(err))
	}
	defer unix.Close(t.fd)
	var st unix.Stat_t
	if err := unix.Fstatat(t.fd, tbase, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return diskError(fmt.Sprintf("hard link to %q", clip(target)), missing(err))
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFLNK, unix.S_IFIFO:
	default:
		return fmt.Errorf("%w: hard link to %q, which is not a file", ErrUnsafe, clip(target))
	}
	if t.ino == f.ino && tbase == base {
		return nil
	}
	err = u.replace(f, base, "create hard link", func() error {
		return missing(unix.Linkat(t.fd, tbase, f.fd, base, 0))
	})
	return err
}

// missing says that a file which the layer refers to is not there, which is the
// image's fault and no ErrNotExist of ours.
func missing(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: no such file in the image", ErrCorrupt)
	}
	return err
}
