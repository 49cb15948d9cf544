// Package testimage makes small container images out of a static busybox, for
// tests and for `make run` on machines that reach no registry.
//
// An image here is real: an OCI layout with a compressed layer, made by
// go-containerregistry. Nothing of the package is in a shipped binary.
package testimage

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// applets become links to busybox in /bin.
var applets = []string{
	"ash", "awk", "basename", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "dirname", "dmesg", "du", "echo",
	"env", "expr", "false", "find", "free", "grep", "head", "hostname", "httpd", "id", "ifconfig", "ip", "kill", "ln",
	"ls", "md5sum", "mkdir", "mkfifo", "mktemp", "mount", "mv", "nc", "netstat", "nice", "nohup", "nproc", "nslookup", "od",
	"ping", "pgrep", "printenv", "printf", "ps", "pwd", "readlink", "reset", "rm", "rmdir", "route", "sed", "seq", "setsid",
	"sh", "sha256sum", "sleep", "sort", "stat", "stty", "sync", "tail", "tar", "tee", "test", "time", "timeout", "top",
	"touch", "tr", "true", "tty", "ulimit", "umount", "uname", "uniq", "uptime", "vi", "wc", "wget", "which", "who", "whoami",
	"xargs", "yes",
}

// Path finds a static busybox: $BUSYBOX, or the one on PATH.
func Path() (string, error) {
	path := os.Getenv("BUSYBOX")
	if path == "" {
		var err error
		if path, err = exec.LookPath("busybox"); err != nil {
			return "", errors.New("no busybox: install the package busybox-static, or set BUSYBOX to a static one")
		}
	}
	f, err := elf.Open(path)
	if err != nil {
		return "", fmt.Errorf("look at busybox: %w", err)
	}
	defer func() { _ = f.Close() }()
	if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 {
		return "", fmt.Errorf("%q is not static (%v): install the package busybox-static", path, libs)
	}
	return path, nil
}

// Busybox returns an image with busybox and its applets, and whatever change
// (which may be nil) makes of its configuration.
func Busybox(change func(*v1.Config)) (v1.Image, error) {
	path, err := Path()
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read busybox: %w", err)
	}
	raw, err := pack(program)
	if err != nil {
		return nil, fmt.Errorf("pack image: %w", err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(raw)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, fmt.Errorf("pack image: %w", err)
	}
	img, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), layer)
	if err != nil {
		return nil, fmt.Errorf("pack image: %w", err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("pack image: %w", err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", runtime.GOARCH
	cfg.Config.Cmd = []string{"sh"}
	if change != nil {
		change(&cfg.Config)
	}
	return mutate.ConfigFile(img, cfg)
}

// Layout writes img as an OCI layout in dir, which must not exist.
func Layout(dir string, img v1.Image) error {
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write OCI layout: %w", err)
	}
	if err := l.AppendImage(img); err != nil {
		return fmt.Errorf("write OCI layout: %w", err)
	}
	return nil
}

// pack makes the layer.
func pack(busybox []byte) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	var errs []error
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		errs = append(errs, w.WriteHeader(&h))
		_, err := w.Write(content)
		errs = append(errs, err)
	}
	dir := func(name string, mode int64) {
		add(tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, nil)
	}
	for _, name := range []string{"bin/", "etc/", "home/", "home/user/", "root/", "usr/", "usr/bin/", "var/"} {
		dir(name, 0o755)
	}
	dir("tmp/", 0o1777)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, busybox)
	for _, name := range applets {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox", Mode: 0o777}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644},
		[]byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644},
		[]byte("root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"))
	errs = append(errs, w.Close())
	return buf.Bytes(), errors.Join(errs...)
}
