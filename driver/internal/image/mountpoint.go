package image

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// MountPoint is a path that every unpacked root gets if the image lacks it, so that
// the runtime never has to write to a shared root.
type MountPoint struct {
	Path string // absolute in the root
	Dir  bool   // a directory, otherwise a file
}

// mountPoints makes the missing ones, as root 0755 directories and 0644 empty files.
func (u *unpacker) mountPoints(points []MountPoint) error {
	for _, p := range points {
		if err := u.mountPoint(p); err != nil {
			return fmt.Errorf("mount point %q: %w", p.Path, err)
		}
	}
	return nil
}

func (u *unpacker) mountPoint(p MountPoint) error {
	name, err := cleanName(p.Path)
	if err != nil {
		return err
	}
	if p.Dir {
		if err := u.mkdirAll(name, false); err != nil {
			return err
		}
		return u.mountPointIs(name, true)
	}
	for range maxLinks {
		err := u.mountPointIs(name, false)
		if !errors.Is(err, unix.ENOENT) {
			return err
		}
		dir, base := splitName(name)
		if base == ".." || base == "." {
			return fmt.Errorf("%w: symbolic link to %q", ErrUnsafe, clip(name))
		}
		if err := u.mkdirAll(dir, false); err != nil {
			return err
		}
		f, err := u.open(dir)
		if err != nil {
			return diskError("parent directory", err)
		}
		target, err := u.emptyFile(f, base)
		unix.Close(f.fd)
		if err != nil || target == "" {
			return err
		}
		// A link to nothing, such as /etc/resolv.conf to ../run/…: make what it points
		// at. The name is not cleaned: ".." is the parent of where the link leads.
		if name = strings.TrimRight(target, "/"); !strings.HasPrefix(target, "/") {
			name = dir + "/" + name
		}
		if len(name) > maxPathLen {
			break
		}
	}
	return fmt.Errorf("%w: too many symbolic links", ErrUnsafe)
}

// mountPointIs returns nil if name is there and of the right kind, ENOENT if it is
// not there.
func (u *unpacker) mountPointIs(name string, dir bool) error {
	fd, err := resolve(u.root, name, unix.O_PATH)
	if err != nil {
		return diskError("look up", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return diskError("look up", err)
	}
	if isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR; isDir != dir {
		return fmt.Errorf("%w: the image has a %s there", ErrUnsafe, map[bool]string{true: "directory", false: "file"}[isDir])
	}
	return nil
}

// emptyFile makes an empty file. If base is a symbolic link, it makes nothing and
// returns the link's target.
func (u *unpacker) emptyFile(f folder, base string) (target string, err error) {
	buf := make([]byte, maxPathLen)
	if n, err := unix.Readlinkat(f.fd, base, buf); err == nil {
		return string(buf[:n]), nil
	}
	if err := u.count(1, 0); err != nil {
		return "", err
	}
	fd, err := unix.Openat(f.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return "", diskError("create", err)
	}
	defer unix.Close(fd)
	if err := unix.Fchown(fd, 0, 0); err != nil {
		return "", diskError("chown", err)
	}
	return "", diskError("chmod", unix.Fchmod(fd, 0o644))
}
