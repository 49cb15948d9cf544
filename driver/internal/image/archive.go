package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A docker save archive is a tar of manifest.json, configs and layers. It is read
// here and not by go-containerregistry's tarball package, which reads manifest.json
// and the config without a bound, scans the archive once per layer, and compresses
// every layer only to compute a manifest digest.
//
// The format stores no OCI manifest, so the digest of such an image is that of a
// manifest made from the config's digest and its diffIDs. The same content always
// gets the same digest, and never that of a registry image with other content.

// member is where a file lies in an archive.
type member struct{ offset, size int64 }

// archiveEntry is one image in manifest.json (moby image/tarexport, manifestItem).
type archiveEntry struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// maxMembers bounds the index of an archive.
const maxMembers = 100_000

// openArchive finds the image for tag. The source reads from f until it is closed.
func openArchive(ctx context.Context, f *os.File, tag string, p v1.Platform) (*source, error) {
	members, links, err := indexArchive(ctx, f)
	if err != nil {
		return nil, err
	}
	find := func(file string) (*io.SectionReader, error) {
		file = path.Clean(file)
		for range maxLinks {
			if m, ok := members[file]; ok {
				return io.NewSectionReader(f, m.offset, m.size), nil
			}
			target, ok := links[file]
			if !ok {
				break
			}
			file = target
		}
		return nil, fmt.Errorf("%w: no %q in the archive; is it from docker save?", ErrCorrupt, clip(file))
	}
	r, err := find("manifest.json")
	if err != nil {
		return nil, err
	}
	raw, err := readLimited(r, "manifest.json")
	if err != nil {
		return nil, err
	}
	var entries []archiveEntry
	if err := json.Unmarshal(raw, &entries); err != nil {
		return nil, fmt.Errorf("%w: manifest.json: not valid JSON for its type", ErrCorrupt)
	}
	e, err := pickEntry(entries, tag)
	if err != nil {
		return nil, err
	}
	return archiveSource(e, find, p)
}

// indexArchive notes where every regular file lies, and where links point.
func indexArchive(ctx context.Context, f *os.File) (map[string]member, map[string]string, error) {
	members, links := map[string]member{}, map[string]string{}
	tr := tar.NewReader(f) // skips content by seeking, and reads no further than a header
	for {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return members, links, nil
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%w: archive: %w (a compressed archive must be decompressed first)", ErrCorrupt, err)
		}
		if len(members)+len(links) >= maxMembers {
			return nil, nil, fmt.Errorf("%w: more than %d files in the archive", ErrTooLarge, maxMembers)
		}
		file := path.Clean(hdr.Name)
		switch {
		case hdr.Typeflag == tar.TypeReg && !isSparse(hdr):
			offset, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, nil, fmt.Errorf("archive: %w", err)
			}
			members[file] = member{offset, hdr.Size}
		case hdr.Typeflag == tar.TypeSymlink: // docker before 25 links equal layers
			links[file] = path.Join(path.Dir(file), hdr.Linkname)
		case hdr.Typeflag == tar.TypeLink:
			links[file] = path.Clean(hdr.Linkname)
		}
	}
}

// pickEntry finds the image with the tag, given in full ("repo:tag") or as the tag alone.
func pickEntry(entries []archiveEntry, tag string) (archiveEntry, error) {
	var found []archiveEntry
	tags := map[string]bool{}
	for _, e := range entries {
		match := tag == ""
		for _, t := range e.RepoTags {
			tags[t] = true
			match = match || sameTag(t, tag)
		}
		if match {
			found = append(found, e)
		}
	}
	switch {
	case len(entries) == 0:
		return archiveEntry{}, fmt.Errorf("%w: the archive holds no image", ErrNotFound)
	case len(found) == 0:
		return archiveEntry{}, fmt.Errorf("%w: no tag %q; there are %s", ErrNotFound, tag, tagList(tags))
	case len(found) > 1:
		return archiveEntry{}, fmt.Errorf("%w: several images, append :TAG, one of %s", ErrInvalidReference, tagList(tags))
	}
	return found[0], nil
}

func sameTag(have, want string) bool {
	h, err := name.NewTag(have, name.WeakValidation)
	if err != nil {
		return have == want
	}
	if h.TagStr() == want {
		return true
	}
	w, err := name.NewTag(want, name.WeakValidation)
	return err == nil && strings.ContainsAny(want, ":/") && h.Name() == w.Name()
}

func archiveSource(e archiveEntry, find func(string) (*io.SectionReader, error), p v1.Platform) (*source, error) {
	r, err := find(e.Config)
	if err != nil {
		return nil, err
	}
	raw, err := readLimited(r, "config")
	if err != nil {
		return nil, err
	}
	config, err := parseConfig(raw, len(e.Layers), p)
	if err != nil {
		return nil, err
	}
	digest, err := archiveDigest(raw, config.RootFS.DiffIDs)
	if err != nil {
		return nil, err
	}
	s := &source{digest: digest, config: config}
	for i, file := range e.Layers {
		sr, err := find(file)
		if err != nil {
			return nil, err
		}
		s.layers = append(s.layers, layer{
			diffID: config.RootFS.DiffIDs[i], size: sr.Size(),
			open: func(context.Context) (io.ReadCloser, error) {
				return io.NopCloser(io.NewSectionReader(sr, 0, sr.Size())), nil
			},
		})
	}
	return s, nil
}

// archiveDigest is the digest of a manifest with uncompressed layers of unknown size.
func archiveDigest(rawConfig []byte, diffIDs []v1.Hash) (string, error) {
	h, size, err := v1.SHA256(bytes.NewReader(rawConfig))
	if err != nil {
		return "", fmt.Errorf("config digest: %w", err)
	}
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.DockerManifestSchema2,
		Config:        v1.Descriptor{MediaType: types.DockerConfigJSON, Size: size, Digest: h},
	}
	for _, id := range diffIDs {
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: types.DockerUncompressedLayer, Digest: id})
	}
	data, err := json.Marshal(m)
	if err != nil {
		return "", fmt.Errorf("manifest: %w", err)
	}
	if h, _, err = v1.SHA256(bytes.NewReader(data)); err != nil {
		return "", fmt.Errorf("manifest digest: %w", err)
	}
	return h.String(), nil
}
