package image

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// whiteout hides name, which lower layers put into dir. What this layer put there
// itself stays, whichever entry came first (image-spec layer.md: whiteouts "MUST
// only apply to resources in lower/parent layers").
func (u *unpacker) whiteout(dir, name string) error {
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("%w: whiteout of %q", ErrUnsafe, name)
	}
	f, err := u.open(dir)
	if err != nil {
		return absent(err)
	}
	defer unix.Close(f.fd)
	u.dropCache()
	return u.prune(f, name, true)
}

// opaque hides everything that lower layers put into dir.
func (u *unpacker) opaque(dir string) error {
	f, err := u.open(dir)
	if err != nil {
		return absent(err)
	}
	defer unix.Close(f.fd)
	u.dropCache()
	return u.pruneAll(f, ".", true)
}

// absent drops the error of a directory that is not there: nothing to hide in it.
func absent(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return diskError("whiteout", err)
}

// remove takes away whatever base is, if it is anything.
func (u *unpacker) remove(f folder, base string) error {
	return u.prune(f, base, false)
}

// prune removes name and all below it. With spare set, what this layer added stays,
// and so do the directories that hold it. Nesting is bounded by maxDepth.
func (u *unpacker) prune(f folder, name string, spare bool) error {
	var st unix.Stat_t
	err := unix.Fstatat(f.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return diskError("remove", err)
	}
	_, ours := u.added[slot{f.ino, name}]
	keep := spare && ours
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if keep {
			return nil
		}
		return diskError("remove", unix.Unlinkat(f.fd, name, 0))
	}
	if err := u.pruneAll(f, name, spare); err != nil || keep {
		return err
	}
	err = unix.Unlinkat(f.fd, name, unix.AT_REMOVEDIR)
	if spare && errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return diskError("remove", err)
}

// pruneAll prunes every name in the directory name of f.
func (u *unpacker) pruneAll(f folder, name string, spare bool) error {
	fd, err := unix.Openat(f.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return diskError("remove", err)
	}
	d := os.NewFile(uintptr(fd), "directory") // the name would only show in errors
	defer d.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return diskError("remove", err)
	}
	names, err := d.Readdirnames(-1)
	if err != nil {
		return diskError("remove", err)
	}
	for _, n := range names {
		if err := u.prune(folder{fd: fd, ino: st.Ino}, n, spare); err != nil {
			return err
		}
	}
	return nil
}
