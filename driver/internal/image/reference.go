package image

import (
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

type refKind int

const (
	kindRegistry refKind = iota
	kindOCI
	kindArchive
)

// reference is a parsed Request.Ref.
type reference struct {
	kind refKind
	// Of a registry image:
	remote name.Reference
	// Of a local image:
	path, tag string // tag may be empty
}

// maxRefLen is above what registries accept: 255 for the name, 128 for the tag, a digest.
const maxRefLen = 1024

// parseReference parses a Request.Ref. insecure lists registries to be reached by plain HTTP.
func parseReference(s string, insecure []string) (reference, error) {
	if len(s) > maxRefLen+maxPathLen {
		return reference{}, fmt.Errorf("%w: %d bytes long", ErrInvalidReference, len(s))
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f {
			return reference{}, fmt.Errorf("%w: control character", ErrInvalidReference)
		}
	}
	for prefix, kind := range map[string]refKind{"oci:": kindOCI, "docker-archive:": kindArchive} {
		if rest, ok := strings.CutPrefix(s, prefix); ok {
			// As in skopeo, the path ends at the first colon.
			path, tag, _ := strings.Cut(rest, ":")
			if path == "" {
				return reference{}, fmt.Errorf("%w: no path after %q", ErrInvalidReference, prefix)
			}
			return reference{kind: kind, path: path, tag: tag}, nil
		}
	}
	// Nomad's docker driver drops "https://" too.
	s = strings.TrimPrefix(strings.TrimPrefix(s, "https://"), "docker://")
	ref, err := name.ParseReference(s, name.WeakValidation)
	if err != nil || len(s) > maxRefLen {
		return reference{}, fmt.Errorf("%w: want [REGISTRY/]NAME[:TAG][@sha256:DIGEST], oci:PATH[:TAG] or docker-archive:PATH[:TAG]", ErrInvalidReference)
	}
	for _, host := range insecure {
		if ref.Context().RegistryStr() == host {
			if ref, err = name.ParseReference(s, name.WeakValidation, name.Insecure); err != nil {
				return reference{}, fmt.Errorf("%w: %w", ErrInvalidReference, err)
			}
		}
	}
	if d, ok := ref.(name.Digest); ok && !strings.HasPrefix(d.DigestStr(), "sha256:") {
		return reference{}, fmt.Errorf("%w: only sha256 digests can be pinned", ErrInvalidReference)
	}
	return reference{kind: kindRegistry, remote: ref}, nil
}

// pinned reports the digest that the reference names, if it does.
func (r reference) pinned() (string, bool) {
	d, ok := r.remote.(name.Digest)
	if !ok {
		return "", false
	}
	return d.DigestStr(), true
}

// askRegistry reports whether the registry must be asked even if an image for the
// reference is held: Docker's and Nomad's rule for the tag "latest".
func (r reference) askRegistry() bool {
	t, ok := r.remote.(name.Tag)
	return ok && t.TagStr() == name.DefaultTag
}
