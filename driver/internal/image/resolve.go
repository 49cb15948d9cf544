package image

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxPathLen = 4096 // PATH_MAX, include/uapi/linux/limits.h
	// maxDepth bounds how deep directories nest, counted through symbolic links, so
	// that a tree can be removed with one descriptor per level.
	maxDepth = 256
	// maxLinks is the kernel's own bound on symbolic links in one lookup (MAXSYMLINKS).
	maxLinks = 40
)

// openRoot opens a directory that resolve can take as its root.
func openRoot(dir string) (int, error) {
	return unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// resolve opens name with root as "/" for every step, absolute symbolic links and
// ".." included, so that no path can name anything outside. The kernel does it
// (openat2(2), RESOLVE_IN_ROOT), atomically; flags may hold O_NOFOLLOW.
func resolve(root int, name string, flags uint64) (int, error) {
	if name == "" {
		name = "."
	}
	how := unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	// EAGAIN: a rename elsewhere raced with ".."; openat2(2) says to try again.
	for range 1000 {
		fd, err := unix.Openat2(root, name, &how)
		if err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
	return -1, unix.EAGAIN
}

// cleanName turns the name of a tar entry into a path relative to the root, without
// "..", "." or empty components. A leading slash is the root, as in Docker.
func cleanName(name string) (string, error) {
	switch {
	case name == "":
		return "", fmt.Errorf("%w: empty name", ErrUnsafe)
	case len(name) > maxPathLen:
		return "", fmt.Errorf("%w: name of %d bytes", ErrUnsafe, len(name))
	case strings.ContainsRune(name, 0):
		return "", fmt.Errorf("%w: NUL in name", ErrUnsafe)
	}
	c := path.Clean(strings.TrimLeft(name, "/"))
	if c == ".." || strings.HasPrefix(c, "../") {
		return "", fmt.Errorf("%w: name leaves the root", ErrUnsafe)
	}
	return c, nil
}

// splitName splits a clean name into directory ("" for the root) and last component.
func splitName(name string) (dir, base string) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i], name[i+1:]
	}
	return "", name
}

// folder is an open directory below the root, and what must be known about it.
type folder struct {
	fd    int // O_PATH
	ino   uint64
	depth int
}

// open opens a directory below the root. Errors are bare errnos.
func (u *unpacker) open(dir string) (folder, error) {
	fd, err := resolve(u.root, dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return folder{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return folder{}, err
	}
	return folder{fd: fd, ino: st.Ino, depth: u.depth[st.Ino]}, nil
}

// parent returns the directory an entry goes into, made if it is missing. The
// folder belongs to the unpacker and is good until the next call of parent or dropCache.
func (u *unpacker) parent(dir string) (folder, error) {
	if u.cached && u.cacheDir == dir {
		return u.cache, nil
	}
	f, err := u.open(dir)
	if errors.Is(err, unix.ENOENT) {
		if err := u.mkdirAll(dir, true); err != nil {
			return folder{}, err
		}
		f, err = u.open(dir)
	}
	if err != nil {
		return folder{}, diskError("parent directory", err)
	}
	u.dropCache()
	u.cache, u.cacheDir, u.cached = f, dir, true
	return f, nil
}

func (u *unpacker) dropCache() {
	if u.cached {
		unix.Close(u.cache.fd)
		u.cached = false
	}
}

// mkdirAll makes every missing directory of dir, below the root. Where a symbolic
// link on the way points at nothing, its target is made, or with follow unset the
// link is an error.
func (u *unpacker) mkdirAll(dir string, follow bool) error {
	var done string // exists; may hold symbolic links and ".."
	todo := strings.Split(dir, "/")
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if name == "" || name == "." {
			continue
		}
		next := name
		if done != "" {
			next = done + "/" + name
		}
		fd, err := resolve(u.root, next, unix.O_PATH|unix.O_DIRECTORY)
		if err == nil {
			unix.Close(fd)
			done = next
			continue
		}
		if !errors.Is(err, unix.ENOENT) {
			return diskError(fmt.Sprintf("parent directory %q", clip(next)), err)
		}
		target, err := u.mkdirOrReadlink(done, name)
		if err != nil {
			return err
		}
		if target == "" {
			done = next
			continue
		}
		if links++; links > maxLinks || !follow {
			return fmt.Errorf("%w: parent directory %q is a symbolic link to nothing", ErrUnsafe, clip(next))
		}
		if strings.HasPrefix(target, "/") {
			done = ""
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return nil
}

// mkdirOrReadlink makes the directory name in dir, which exists. If name is a
// symbolic link, it makes nothing and returns the link's target.
func (u *unpacker) mkdirOrReadlink(dir, name string) (target string, err error) {
	f, err := u.open(dir)
	if err != nil {
		return "", diskError("parent directory", err)
	}
	defer unix.Close(f.fd)
	buf := make([]byte, maxPathLen)
	n, err := unix.Readlinkat(f.fd, name, buf)
	switch {
	case err == nil:
		return string(buf[:n]), nil
	case errors.Is(err, unix.ENOENT):
		return "", u.mkdir(f, name)
	}
	return "", diskError(fmt.Sprintf("parent directory %q", clip(name)), err)
}

// mkdir makes one directory, 0755 and owned by root.
func (u *unpacker) mkdir(f folder, name string) error {
	if f.depth >= maxDepth {
		return fmt.Errorf("%w: directories nest more than %d deep", ErrTooLarge, maxDepth)
	}
	if err := u.count(1, 0); err != nil {
		return err
	}
	if err := unix.Mkdirat(f.fd, name, 0o755); err != nil {
		return diskError("mkdir", err)
	}
	fd, err := unix.Openat(f.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return diskError("mkdir", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return diskError("mkdir", err)
	}
	u.depth[st.Ino] = f.depth + 1
	u.added[slot{f.ino, name}] = struct{}{}
	// A setgid parent hands down its group and bit, and the umask takes bits away.
	if err := unix.Fchown(fd, 0, 0); err != nil {
		return diskError("chown", err)
	}
	return diskError("chmod", unix.Fchmod(fd, 0o755))
}

// clip shortens a name for an error message.
func clip(s string) string {
	const limit = 200
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
