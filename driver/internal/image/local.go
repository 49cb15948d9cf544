package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"encoding/json"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// openBase opens the directory that a local path may lie beneath, and returns the
// path relative to it. From there on os.Root confines every step.
func (s *Store) openBase(p, taskDir string) (*os.Root, string, error) {
	if !filepath.IsAbs(p) {
		if taskDir == "" {
			return nil, "", fmt.Errorf("%w: relative path without a task directory", ErrNotAllowed)
		}
		rel := path.Clean(p)
		if !filepath.IsLocal(rel) {
			return nil, "", fmt.Errorf("%w: path leaves the task directory", ErrNotAllowed)
		}
		r, err := os.OpenRoot(taskDir)
		if err != nil {
			return nil, "", fmt.Errorf("task directory: %w", err)
		}
		return r, rel, nil
	}
	clean := path.Clean(p)
	for _, dir := range s.opts.AllowedDirs {
		rel, ok := strings.CutPrefix(clean, strings.TrimSuffix(path.Clean(dir), "/")+"/")
		if !ok || !filepath.IsLocal(rel) {
			continue
		}
		r, err := os.OpenRoot(dir)
		if err != nil {
			return nil, "", fmt.Errorf("image directory: %w", err)
		}
		return r, rel, nil
	}
	return nil, "", fmt.Errorf("%w: add its directory to plugin option image_dirs, or put the image into the task directory", ErrNotAllowed)
}

// rootError classifies an error of os.Root. Its own refusals carry no errno.
func rootError(err error) error {
	var errno syscall.Errno
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case errors.As(err, &errno):
		return err
	}
	return fmt.Errorf("%w: %w", ErrNotAllowed, err)
}

// openFile opens a regular file below r. A FIFO does not hang it.
func openFile(r *os.Root, name string) (*os.File, int64, error) {
	f, err := r.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, 0, rootError(err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%w: %q is not a regular file", ErrNotAllowed, name)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

// layout reads an OCI layout (image-spec image-layout.md). It implements blobs.
type layout struct{ root *os.Root }

var _ blobs = (*layout)(nil)

func (l *layout) read(name, what string) ([]byte, error) {
	f, _, err := openFile(l.root, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer f.Close()
	return readLimited(f, what)
}

func blobPath(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

func (l *layout) manifest(_ context.Context, d v1.Descriptor) ([]byte, error) {
	return l.read(blobPath(d.Digest), "manifest")
}

func (l *layout) blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	f, _, err := openFile(l.root, blobPath(d.Digest))
	if err != nil {
		return nil, fmt.Errorf("blob: %w", err)
	}
	return f, nil
}

// refNameAnnotation holds the tag of a manifest (image-spec annotations.md).
const refNameAnnotation = "org.opencontainers.image.ref.name"

// openLayout finds the image for tag and platform. The source reads from root until it is closed.
func openLayout(ctx context.Context, root *os.Root, tag string, p v1.Platform) (*source, error) {
	l := &layout{root: root}
	raw, err := l.read("index.json", "OCI layout index.json")
	if err != nil {
		return nil, err
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, fmt.Errorf("%w: index.json: not valid JSON for its type", ErrCorrupt)
	}
	ms, err := byTag(index.Manifests, tag)
	if err != nil {
		return nil, err
	}
	d := ms[0]
	if len(ms) > 1 {
		if d, err = selectPlatform(ms, p); err != nil {
			return nil, err
		}
	}
	if raw, err = l.manifest(ctx, d); err != nil {
		return nil, err
	}
	if d, raw, err = findManifest(ctx, l, d, raw, p); err != nil {
		return nil, err
	}
	return newSource(ctx, l, d, raw, p)
}

// byTag keeps the manifests with the tag. Without one, all must have the same.
func byTag(all []v1.Descriptor, tag string) ([]v1.Descriptor, error) {
	var found []v1.Descriptor
	tags := map[string]bool{}
	for _, m := range all {
		t := m.Annotations[refNameAnnotation]
		tags[t] = true
		if tag == "" || t == tag {
			found = append(found, m)
		}
	}
	switch {
	case len(all) == 0:
		return nil, fmt.Errorf("%w: the layout holds no image", ErrNotFound)
	case len(found) == 0:
		return nil, fmt.Errorf("%w: no tag %q; there are %s", ErrNotFound, tag, tagList(tags))
	case tag == "" && len(tags) > 1:
		return nil, fmt.Errorf("%w: several images, append :TAG, one of %s", ErrInvalidReference, tagList(tags))
	}
	return found, nil
}

// maxTagsShown keeps an error message readable.
const maxTagsShown = 20

func tagList(tags map[string]bool) string {
	var list []string
	for t := range tags {
		if t != "" {
			list = append(list, clip(t))
		}
	}
	sort.Strings(list)
	if len(list) > maxTagsShown {
		list = append(list[:maxTagsShown], "…")
	}
	return fmt.Sprintf("%q", list)
}
