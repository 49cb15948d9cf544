package image

import (
	"fmt"
	"maps"
	"os"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// Request asks for one image.
type Request struct {
	// Ref is a registry reference ("alpine:3", "reg:5000/x@sha256:…"), "oci:PATH[:tag]" or "docker-archive:PATH[:tag]".
	Ref string
	// Platform is os/architecture[/variant]; empty means linux/<GOARCH>.
	Platform string
	// TaskDir is the host directory that relative paths of Ref are resolved beneath. Its content is not trusted, its own path is.
	TaskDir string
	// Progress, if set, is called from the goroutine that pulls, never after Get has returned. It must not block or call the store.
	Progress func(Progress)
}

// Phases of a pull, in order. A layer of a registry image is downloaded and unpacked in one stream, reported as PhasePulling.
const (
	PhaseResolving = "resolving" // finding the manifest
	PhasePulling   = "pulling"   // reading layers from a registry
	PhaseUnpacking = "unpacking" // reading layers of a local image, or finishing the root of any image
)

// Progress is how far a pull has come.
type Progress struct {
	Phase             string // one of the Phase constants
	Layer, Layers     int    // Layer counts from 1; both 0 while resolving
	Bytes, TotalBytes int64  // compressed bytes read so far, of all layers
}

// Image is an unpacked image. It stays valid as long as its directory is not removed; it holds no resources.
type Image struct {
	Digest string // of the manifest for one platform, "sha256:…"
	Root   string // absolute path of the unpacked root, shared: never write to it
	Ref    string // the reference as it was asked for
	Config Config
	// SkippedDevices counts the device nodes that the image holds and that were not made.
	SkippedDevices int
}

// Config is the part of an image's configuration that a task can inherit.
type Config struct {
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Cmd        []string          `json:"cmd,omitempty"`
	Env        []string          `json:"env,omitempty"` // KEY=value
	User       string            `json:"user,omitempty"`
	WorkingDir string            `json:"working_dir,omitempty"`
	StopSignal string            `json:"stop_signal,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
}

func configOf(c v1.Config) Config {
	return Config{
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, User: c.User,
		WorkingDir: c.WorkingDir, StopSignal: c.StopSignal, Labels: c.Labels,
	}
}

// withRef returns a copy that shares nothing with i, which several callers may have got.
func (i *Image) withRef(ref string) *Image {
	out := *i
	out.Ref = ref
	out.Config.Entrypoint = slices.Clone(i.Config.Entrypoint)
	out.Config.Cmd = slices.Clone(i.Config.Cmd)
	out.Config.Env = slices.Clone(i.Config.Env)
	out.Config.Labels = maps.Clone(i.Config.Labels)
	return &out
}

// OpenFile opens a regular file of the image for reading. Symbolic links, absolute
// ones too, are followed inside the root and cannot leave it. The error is
// os.ErrNotExist if there is no such file, ErrUnsafe if it is not a regular file.
func (i *Image) OpenFile(name string) (*os.File, error) {
	root, err := openRoot(i.Root)
	if err != nil {
		return nil, fmt.Errorf("open %q of image %q: %w", name, i.Ref, err)
	}
	defer unix.Close(root)
	// O_NONBLOCK: opening a FIFO must not wait for a writer.
	fd, err := resolve(root, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, fmt.Errorf("open %q of image %q: %w", name, i.Ref, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open %q of image %q: %w", name, i.Ref, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return nil, fmt.Errorf("open %q of image %q: %w: not a regular file", name, i.Ref, ErrUnsafe)
	}
	return os.NewFile(uintptr(fd), name), nil
}
