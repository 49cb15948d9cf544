package image

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	// maxMetadata bounds a manifest, an index and a config. Registries bound
	// manifests at 4 MiB (distribution-spec: "at least 4 megabytes").
	maxMetadata   = 8 << 20
	maxLayers     = 1000
	maxIndexDepth = 4
)

// source is an image that was found but not unpacked.
type source struct {
	digest string // sha256:… of the manifest
	config *v1.ConfigFile
	layers []layer
}

// layer is one layer of a source.
type layer struct {
	digest v1.Hash // of the bytes that open gives; zero if only diffID is known
	diffID v1.Hash // of the same bytes decompressed
	size   int64   // of the bytes that open gives
	open   func(context.Context) (io.ReadCloser, error)
}

// blobs is where manifests and blobs are read from. Neither method has to verify.
type blobs interface {
	manifest(ctx context.Context, d v1.Descriptor) ([]byte, error)
	blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
}

// findManifest follows indexes from a manifest or index down to the manifest for one platform.
func findManifest(ctx context.Context, b blobs, d v1.Descriptor, raw []byte, p v1.Platform) (v1.Descriptor, []byte, error) {
	for range maxIndexDepth {
		if err := verifyBytes(raw, d.Digest); err != nil {
			return d, nil, fmt.Errorf("manifest: %w", err)
		}
		switch {
		case d.MediaType == types.DockerManifestSchema1, d.MediaType == types.DockerManifestSchema1Signed:
			return d, nil, fmt.Errorf("%w: manifest schema 1 is not supported, push the image again", ErrCorrupt)
		case !d.MediaType.IsIndex():
			return d, raw, nil
		}
		index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
		if err != nil {
			return d, nil, fmt.Errorf("%w: index: not valid JSON for its type", ErrCorrupt)
		}
		if d, err = selectPlatform(index.Manifests, p); err != nil {
			return d, nil, err
		}
		if raw, err = b.manifest(ctx, d); err != nil {
			return d, nil, err
		}
	}
	return d, nil, fmt.Errorf("%w: indexes nest more than %d deep", ErrCorrupt, maxIndexDepth)
}

// newSource reads the config that a verified manifest names and pairs up the layers.
func newSource(ctx context.Context, b blobs, d v1.Descriptor, raw []byte, p v1.Platform) (*source, error) {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%w: manifest: not valid JSON for its type", ErrCorrupt)
	}
	if d.Digest.Algorithm != "sha256" {
		return nil, fmt.Errorf("%w: manifest digest is not sha256", ErrCorrupt)
	}
	if m.Config.Size < 0 || m.Config.Size > maxMetadata {
		return nil, fmt.Errorf("%w: config of %d bytes, %d are allowed", ErrTooLarge, m.Config.Size, maxMetadata)
	}
	rc, err := b.blob(ctx, m.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	defer rc.Close()
	rawConfig, err := readVerified(rc, m.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	config, err := parseConfig(rawConfig, len(m.Layers), p)
	if err != nil {
		return nil, err
	}
	s := &source{digest: d.Digest.String(), config: config}
	for i, ld := range m.Layers {
		if ld.Size < 0 {
			return nil, fmt.Errorf("%w: layer %d has a negative size", ErrCorrupt, i+1)
		}
		s.layers = append(s.layers, layer{
			digest: ld.Digest, diffID: config.RootFS.DiffIDs[i], size: ld.Size,
			open: func(ctx context.Context) (io.ReadCloser, error) { return b.blob(ctx, ld) },
		})
	}
	return s, nil
}

// parseConfig parses a config and checks that it fits its manifest and the platform.
func parseConfig(raw []byte, layers int, p v1.Platform) (*v1.ConfigFile, error) {
	c, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%w: config: not valid JSON for its type", ErrCorrupt)
	}
	if layers > maxLayers {
		return nil, fmt.Errorf("%w: %d layers, %d are allowed", ErrTooLarge, layers, maxLayers)
	}
	if len(c.RootFS.DiffIDs) != layers {
		return nil, fmt.Errorf("%w: %d layers but %d diff_ids in the config; is this a container image?", ErrCorrupt, layers, len(c.RootFS.DiffIDs))
	}
	return c, checkPlatform(c.OS, c.Architecture, p)
}

// readVerified reads a small blob whole.
func readVerified(r io.Reader, d v1.Descriptor) ([]byte, error) {
	c, err := newChecked(r, d.Digest, d.Size)
	if err != nil {
		return nil, err
	}
	data := make([]byte, d.Size)
	if _, err := io.ReadFull(c, data); err != nil && c.err != nil {
		return nil, c.err
	}
	return data, c.verify()
}

func verifyBytes(data []byte, want v1.Hash) error {
	h, err := v1.Hasher(want.Algorithm)
	if err != nil {
		return fmt.Errorf("%w: unknown digest algorithm", ErrCorrupt)
	}
	h.Write(data)
	if got := hex.EncodeToString(h.Sum(nil)); got != want.Hex {
		return fmt.Errorf("%w: got %s:%s, want %s", ErrDigestMismatch, want.Algorithm, got, want)
	}
	return nil
}

// readLimited reads at most maxMetadata bytes.
func readLimited(r io.Reader, what string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxMetadata+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if len(data) > maxMetadata {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", what, ErrTooLarge, maxMetadata)
	}
	return data, nil
}
