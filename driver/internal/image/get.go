package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// Get returns the image for a request, pulling and unpacking it if it is not held.
//
// An image that is pinned by digest, or whose tag is not "latest", is taken from the
// store without asking the registry once it is there. For "latest", and where no
// tag is given, the registry is always asked, and Get fails if it cannot be reached.
// Local images are read anew each time, and unpacked if their digest is new.
//
// Calls for the same image share one pull, which is cancelled when the last of their
// contexts is done. Errors wrap one of the Err values of this package, or the
// context's error; see Retryable.
func (s *Store) Get(ctx context.Context, r Request) (*Image, error) {
	img, err := s.get(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", clip(r.Ref), err)
	}
	return img.withRef(r.Ref), nil
}

func (s *Store) get(ctx context.Context, r Request) (*Image, error) {
	ref, err := parseReference(r.Ref, s.opts.InsecureRegistries)
	if err != nil {
		return nil, err
	}
	p, err := parsePlatform(r.Platform)
	if err != nil {
		return nil, err
	}
	if ref.kind != kindRegistry {
		key := fmt.Sprintf("local\x00%s\x00%s\x00%s", r.Ref, p, r.TaskDir)
		return s.flights.do(ctx, key, r.Progress, func(ctx context.Context, report func(Progress)) (*Image, error) {
			report(Progress{Phase: PhaseResolving})
			return s.local(ctx, ref, r.TaskDir, p, report)
		})
	}
	if !ref.askRegistry() {
		if img, err := s.held(ref, p); img != nil || err != nil {
			return img, err
		}
	}
	key := fmt.Sprintf("registry\x00%s\x00%s", ref.remote.Name(), p)
	return s.flights.do(ctx, key, r.Progress, func(ctx context.Context, report func(Progress)) (*Image, error) {
		report(Progress{Phase: PhaseResolving})
		return s.pull(ctx, ref, p, report)
	})
}

// held returns the image that is recorded for a reference, or nil.
func (s *Store) held(ref reference, p v1.Platform) (*Image, error) {
	if digest, ok := ref.pinned(); ok {
		if img, err := s.load(digest, p); img != nil || err != nil {
			return img, err
		}
	}
	rec, err := s.readRef(ref, p)
	if rec == nil || err != nil {
		return nil, err
	}
	if digest, ok := ref.pinned(); ok && rec.Resolved != digest {
		return nil, nil
	}
	return s.load(rec.Digest, p)
}

// readRef returns the record of a reference. One that is missing or damaged is nil: it will be written again.
func (s *Store) readRef(ref reference, p v1.Platform) (*refRecord, error) {
	var rec refRecord
	err := readRecord(s.path("refs", refFile(ref.remote.Name(), p.String())), &rec)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrCorrupt) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if rec.Ref != ref.remote.Name() || rec.Platform != p.String() {
		return nil, nil
	}
	return &rec, nil
}

func (s *Store) writeRef(ref reference, p v1.Platform, resolved, digest string) error {
	rec := refRecord{formatVersion, ref.remote.Name(), p.String(), resolved, digest}
	return s.locked(func() error {
		return writeRecord(s.path("refs", refFile(rec.Ref, rec.Platform)), rec)
	})
}

// load returns the unpacked image with a digest, or nil if there is none.
func (s *Store) load(digest string, p v1.Platform) (*Image, error) {
	dir, err := s.imageDir(digest)
	if err != nil {
		return nil, err
	}
	var rec imageRecord
	err = readRecord(filepath.Join(dir, "image.json"), &rec)
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		err = fmt.Errorf("%w: no image.json", ErrCorrupt)
	}
	if err == nil && rec.Digest != digest {
		err = fmt.Errorf("%w: image.json is for another digest", ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("stored image: %w; remove %q when no task uses it", err, dir)
	}
	if err := checkPlatform(rec.OS, rec.Architecture, p); err != nil {
		return nil, err
	}
	return &Image{
		Digest: digest, Root: filepath.Join(dir, "root"),
		Config: rec.Config, SkippedDevices: rec.SkippedDevices,
	}, nil
}

func (s *Store) imageDir(digest string) (string, error) {
	h, err := v1.NewHash(digest) // checks that it is hexadecimal, of the right length
	if err != nil || h.Algorithm != "sha256" {
		return "", fmt.Errorf("%w: digest %q", ErrCorrupt, clip(digest))
	}
	return s.path("rootfs", h.Hex), nil
}

// pull resolves a registry reference, unpacks its image if need be, and records both.
func (s *Store) pull(ctx context.Context, ref reference, p v1.Platform, report func(Progress)) (*Image, error) {
	reg, err := s.registry(ctx, ref.remote)
	if err != nil {
		return nil, err
	}
	if img, err := s.current(ctx, reg, ref, p); img != nil || err != nil {
		return img, err
	}
	top, raw, err := reg.get(ctx, ref.remote)
	if err != nil {
		return nil, err
	}
	d, raw, err := findManifest(ctx, reg, top, raw, p)
	if err != nil {
		return nil, err
	}
	img, err := s.load(d.Digest.String(), p)
	if err != nil {
		return nil, err
	}
	if img == nil {
		src, err := newSource(ctx, reg, d, raw, p)
		if err != nil {
			return nil, err
		}
		if img, err = s.ensure(ctx, src, p, PhasePulling, report); err != nil {
			return nil, err
		}
	}
	return img, s.writeRef(ref, p, top.Digest.String(), img.Digest)
}

// current returns the recorded image if the registry says that it is still what the
// reference names. A HEAD costs no pull in registries that count them.
func (s *Store) current(ctx context.Context, reg *registry, ref reference, p v1.Platform) (*Image, error) {
	rec, err := s.readRef(ref, p)
	if rec == nil || err != nil {
		return nil, err
	}
	digest, err := reg.head(ctx, ref.remote)
	if errors.Is(err, ErrUnavailable) {
		return nil, err
	}
	if err != nil || digest != rec.Resolved {
		return nil, nil //nolint:nilerr // some registries do not answer HEAD well: the GET that follows decides
	}
	return s.load(rec.Digest, p)
}

// local reads an OCI layout or docker archive.
func (s *Store) local(ctx context.Context, ref reference, taskDir string, p v1.Platform, report func(Progress)) (*Image, error) {
	base, rel, err := s.openBase(ref.path, taskDir)
	if err != nil {
		return nil, err
	}
	defer base.Close()
	var src *source
	if ref.kind == kindOCI {
		root, err := base.OpenRoot(rel)
		if err != nil {
			return nil, fmt.Errorf("open OCI layout: %w", rootError(err))
		}
		defer root.Close()
		if src, err = openLayout(ctx, root, ref.tag, p); err != nil {
			return nil, err
		}
	} else {
		f, _, err := openFile(base, rel)
		if err != nil {
			return nil, fmt.Errorf("open archive: %w", err)
		}
		defer f.Close()
		if src, err = openArchive(ctx, f, ref.tag, p); err != nil {
			return nil, err
		}
	}
	return s.ensure(ctx, src, p, PhaseUnpacking, report)
}

// ensure returns the image of a source, unpacking it unless it is there. Sources with
// the same digest, found under whatever names, are unpacked once.
func (s *Store) ensure(ctx context.Context, src *source, p v1.Platform, phase string, report func(Progress)) (*Image, error) {
	return s.flights.do(ctx, "digest\x00"+src.digest, report, func(ctx context.Context, report func(Progress)) (*Image, error) {
		if img, err := s.load(src.digest, p); img != nil || err != nil {
			return img, err
		}
		if err := s.unpack(ctx, src, phase, report); err != nil {
			return nil, err
		}
		return s.load(src.digest, p)
	})
}

// unpack makes the directory of an image. It appears whole or not at all.
func (s *Store) unpack(ctx context.Context, src *source, phase string, report func(Progress)) (err error) {
	dest, err := s.imageDir(src.digest)
	if err != nil {
		return err
	}
	t, err := s.newTemp()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.remove()) }()
	dir := filepath.Join(t.dir, "image")
	root := filepath.Join(dir, "root")
	for _, d := range []string{dir, root} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return diskError("create directory", err)
		}
	}
	if err := os.Chmod(root, 0o755); err != nil { // unless a layer says otherwise
		return diskError("chmod", err)
	}
	devices, err := s.unpackLayers(ctx, src, root, phase, report)
	if err != nil {
		return err
	}
	rec := imageRecord{formatVersion, src.digest, src.config.OS, src.config.Architecture, devices, configOf(src.config.Config)}
	return s.commit(ctx, dir, dest, rec)
}

// unpackLayers fills root, and returns how many devices it left out.
func (s *Store) unpackLayers(ctx context.Context, src *source, root, phase string, report func(Progress)) (int, error) {
	u, err := newUnpacker(root, s.opts.MaxBytes, s.opts.MaxEntries)
	if err != nil {
		return 0, err
	}
	defer u.close()
	budget := s.opts.MaxBytes + tarOverhead
	m := &meter{report: report, p: Progress{Phase: phase, Layers: len(src.layers)}}
	for _, l := range src.layers {
		m.p.TotalBytes += l.size
	}
	for i, l := range src.layers {
		m.p.Layer = i + 1
		m.now()
		if err := applyVerified(ctx, u, l, &budget, m.add); err != nil {
			return 0, fmt.Errorf("layer %d of %d: %w", i+1, len(src.layers), err)
		}
	}
	m.p.Phase = PhaseUnpacking
	m.now()
	return u.devices, u.mountPoints(s.opts.MountPoints)
}

// commit makes what was unpacked durable and moves it into place.
func (s *Store) commit(ctx context.Context, dir, dest string, rec imageRecord) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("image.json: %w", err)
	}
	if err := writeSynced(filepath.Join(dir, "image.json"), data); err != nil {
		return diskError("write image.json", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return diskError("sync", err)
	}
	defer d.Close()
	// One syncfs instead of an fsync per file; without it a power cut after the
	// rename could leave empty files under a name that says they are whole.
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return diskError("sync", err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err = os.Rename(dir, dest)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTEMPTY) {
		return nil // another store was faster
	}
	if err != nil {
		return diskError("rename", err)
	}
	return syncDir(filepath.Dir(dest))
}

// meter reports progress, not too often.
type meter struct {
	report func(Progress)
	p      Progress
	last   time.Time
}

// progressInterval is how often the bytes of a layer are reported.
const progressInterval = 250 * time.Millisecond

func (m *meter) add(n int) {
	m.p.Bytes += int64(n)
	if time.Since(m.last) >= progressInterval {
		m.now()
	}
}

func (m *meter) now() {
	m.last = time.Now()
	m.report(m.p)
}
