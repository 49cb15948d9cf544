package image

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"
)

// Bounds of one unpacked image, where Options leaves them zero.
const (
	DefaultMaxBytes   = 32 << 30
	DefaultMaxEntries = 2_000_000
)

// Options configures a Store. The zero value is usable.
type Options struct {
	// AllowedDirs are host directories that absolute paths of oci: and docker-archive: references may lie beneath. Empty allows none.
	AllowedDirs []string
	// MountPoints are made in every unpacked root that lacks them. Roots unpacked before are not changed.
	MountPoints []MountPoint
	// MaxBytes bounds the files of one image, holes included. 0 means DefaultMaxBytes.
	MaxBytes int64
	// MaxEntries bounds the count of files and directories of one image. 0 means DefaultMaxEntries.
	MaxEntries int
	// InsecureRegistries are host[:port] of registries that are spoken to by plain HTTP. Loopback always may be.
	InsecureRegistries []string
}

// Store keeps unpacked images below one directory. Its methods may be called
// concurrently, and several stores may share the directory.
type Store struct {
	dir       string // absolute, with the layout version
	opts      Options
	flights   *flights
	transport *guard
	backoff   remote.Backoff // between attempts of one request; tests shorten it
}

// Open prepares dir and removes what crashed unpacks left there. It refuses a
// directory that a newer version wrote. Close the store after use.
func Open(dir string, opts Options) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	if opts.MaxBytes <= 0 {
		opts.MaxBytes = DefaultMaxBytes
	}
	if opts.MaxEntries <= 0 {
		opts.MaxEntries = DefaultMaxEntries
	}
	for _, d := range opts.AllowedDirs {
		if !filepath.IsAbs(d) {
			return nil, fmt.Errorf("open image store: image directory %q is not absolute", d)
		}
	}
	s := &Store{
		dir: filepath.Join(dir, "v1"), opts: opts, flights: newFlights(),
		transport: newGuard(opts.InsecureRegistries),
		backoff:   remote.Backoff{Duration: 1e9, Factor: 3, Jitter: 0.1, Steps: 3}, // as go-containerregistry
	}
	if err := s.prepare(dir); err != nil {
		s.flights.close()
		return nil, fmt.Errorf("open image store %q: %w", dir, err)
	}
	return s, nil
}

// Close cancels every Get, waits for them, and releases connections.
func (s *Store) Close() error {
	s.flights.close()
	s.transport.base.CloseIdleConnections()
	return nil
}

func (s *Store) prepare(dir string) error {
	if fd, err := resolve(unix.AT_FDCWD, "/", unix.O_PATH); err != nil {
		return fmt.Errorf("openat2, which needs Linux 5.6: %w", err)
	} else {
		unix.Close(fd)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return diskError("create directory", err)
	}
	versionFile := filepath.Join(dir, "version.json")
	if err := readRecord(versionFile, &storeRecord{}); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, d := range []string{s.dir, s.path("rootfs"), s.path("refs"), s.path("tmp")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return diskError("create directory", err)
		}
	}
	// Roots hold setuid files: nobody else may walk in, also if the directory was there before.
	if err := os.Chmod(s.dir, 0o700); err != nil {
		return diskError("chmod", err)
	}
	return s.locked(func() error {
		if err := readRecord(versionFile, &storeRecord{}); errors.Is(err, os.ErrNotExist) {
			if err := writeRecord(versionFile, storeRecord{formatVersion}); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		return s.removeLeftovers()
	})
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// locked runs fn while no other store on the directory runs one.
func (s *Store) locked(fn func() error) error {
	f, err := os.OpenFile(s.path("lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return diskError("lock", err)
	}
	defer f.Close() // unlocks
	if err := flock(f, unix.LOCK_EX); err != nil {
		return diskError("lock", err)
	}
	return fn()
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// removeLeftovers removes temporary directories whose owner is gone: nobody holds
// the flock of their lock file. Callers hold the store's lock, under which temps are made.
func (s *Store) removeLeftovers() error {
	entries, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return diskError("read directory", err)
	}
	for _, e := range entries {
		dir := s.path("tmp", e.Name())
		f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
		if err == nil {
			err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
			if errors.Is(err, unix.EWOULDBLOCK) {
				f.Close()
				continue
			}
		}
		rerr := os.RemoveAll(dir)
		if err == nil {
			f.Close()
		}
		if rerr != nil {
			return diskError("remove leftover", rerr)
		}
	}
	refs, err := os.ReadDir(s.path("refs"))
	if err != nil {
		return diskError("read directory", err)
	}
	for _, e := range refs {
		if strings.HasSuffix(e.Name(), ".tmp") {
			if err := os.Remove(s.path("refs", e.Name())); err != nil {
				return diskError("remove leftover", err)
			}
		}
	}
	return nil
}

// temp is the directory of one unpack. Its lock tells other stores that it is in use.
type temp struct {
	dir  string
	lock *os.File
}

func (s *Store) newTemp() (*temp, error) {
	t := &temp{dir: s.path("tmp", rand.Text())}
	err := s.locked(func() error {
		if err := os.Mkdir(t.dir, 0o700); err != nil {
			return diskError("create directory", err)
		}
		var err error
		t.lock, err = os.OpenFile(filepath.Join(t.dir, "lock"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return errors.Join(diskError("lock", err), os.Remove(t.dir))
		}
		return diskError("lock", flock(t.lock, unix.LOCK_EX))
	})
	if err != nil {
		if t.lock != nil {
			err = errors.Join(err, t.remove())
		}
		return nil, err
	}
	return t, nil
}

// remove takes the directory away. The lock is let go last.
func (t *temp) remove() error {
	err := os.RemoveAll(t.dir)
	t.lock.Close()
	return diskError("remove temporary directory", err)
}
