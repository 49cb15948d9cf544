package image

import (
	"fmt"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// parsePlatform parses os/architecture[/variant]; empty is the host's.
func parsePlatform(s string) (v1.Platform, error) {
	if s == "" {
		return v1.Platform{OS: "linux", Architecture: runtime.GOARCH}, nil
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] != "linux" || parts[1] == "" {
		return v1.Platform{}, fmt.Errorf("%w %q: want linux/ARCHITECTURE[/VARIANT]", ErrPlatform, s)
	}
	p := v1.Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p, nil
}

// selectPlatform picks the manifest for p: the same variant if there is one; else,
// if none was asked for, the first. A manifest that names no platform is taken only
// if it is alone; its config is checked later.
func selectPlatform(ms []v1.Descriptor, p v1.Platform) (v1.Descriptor, error) {
	if len(ms) == 1 && ms[0].Platform == nil {
		return ms[0], nil
	}
	var found []v1.Descriptor
	var have []string
	for _, m := range ms {
		if m.Platform == nil {
			continue
		}
		if len(have) < 10 && m.Platform.OS != "unknown" { // attestations say unknown/unknown
			have = append(have, clip(m.Platform.String()))
		}
		if m.Platform.OS != p.OS || m.Platform.Architecture != p.Architecture {
			continue
		}
		if normalVariant(*m.Platform) == normalVariant(p) {
			return m, nil
		}
		found = append(found, m)
	}
	if len(found) > 0 && p.Variant == "" {
		return found[0], nil
	}
	return v1.Descriptor{}, fmt.Errorf("%w %s: the image is for %q", ErrPlatform, p, have)
}

// normalVariant treats a variant that says nothing as absent (containerd's platforms.Normalize).
func normalVariant(p v1.Platform) string {
	switch p.Architecture + "/" + p.Variant {
	case "arm64/v8", "arm64/8", "amd64/v1", "arm/v7", "arm/7":
		return ""
	}
	return p.Variant
}

// checkPlatform refuses an image whose config names another platform than p.
func checkPlatform(operatingSystem, architecture string, p v1.Platform) error {
	if operatingSystem != "" && operatingSystem != p.OS || architecture != "" && architecture != p.Architecture {
		return fmt.Errorf("%w %s: the image is for %q", ErrPlatform, p, clip(operatingSystem+"/"+architecture))
	}
	return nil
}
