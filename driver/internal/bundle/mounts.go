package bundle

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// defaultShmBytes is Docker's size of /dev/shm.
const defaultShmBytes = 64 << 20

// ownedTrees are the sandbox's own; a bind there could hide or fake them.
var ownedTrees = []string{"/proc", "/sys", "/dev"}

// baseMounts are Docker's (moby v28.5.2, oci/defaults.go) without the cgroup
// filesystem, parents first.
func baseMounts(shmBytes int64) []specs.Mount {
	if shmBytes == 0 {
		shmBytes = defaultShmBytes
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc",
			Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs",
			Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts",
			Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm",
			Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(shmBytes, 10)}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue",
			Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs",
			Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	}
}

// bindMounts checks a task's mounts and puts parents before children.
func bindMounts(mounts []Mount) ([]specs.Mount, []error) {
	var out []specs.Mount
	var errs []error
	seen := make(map[string]bool, len(mounts))
	for _, m := range mounts {
		prop, propErr := propagation(m.Propagation)
		err := errors.Join(checkDestination(m.Destination), checkSource(m.Source), propErr)
		if seen[m.Destination] {
			err = errors.Join(err, errors.New("destination given twice"))
		}
		seen[m.Destination] = true
		if err != nil {
			errs = append(errs, fmt.Errorf("mount %q: %w", m.Destination, err))
			continue
		}
		mode := "rw"
		if m.ReadOnly {
			mode = "ro"
		}
		out = append(out, specs.Mount{
			Destination: m.Destination, Type: "bind", Source: m.Source,
			Options: []string{"rbind", mode, prop},
		})
	}
	slices.SortStableFunc(out, func(a, b specs.Mount) int {
		return strings.Count(a.Destination, "/") - strings.Count(b.Destination, "/")
	})
	return out, errs
}

// propagation translates a mount's propagation to the spec's word for it.
func propagation(p string) (string, error) {
	switch p {
	case "", "private", "rprivate":
		return "rprivate", nil
	case "rslave", "host-to-task":
		return "rslave", nil
	case "rshared", "bidirectional":
		return "", fmt.Errorf(`propagation %q: gVisor keeps the sandbox's mounts to itself; use "private" or "host-to-task"`, p)
	}
	return "", fmt.Errorf(`propagation %q: unknown; use "private" or "host-to-task"`, p)
}

// checkDestination refuses a destination that is not plainly a place of the
// task's own.
func checkDestination(dest string) error {
	if err := checkPath(dest); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	for _, tree := range ownedTrees {
		if within(dest, tree) {
			return fmt.Errorf("destination: on or below %s, which belongs to the sandbox", tree)
		}
	}
	return nil
}

// checkSource refuses a source that is not an absolute, clean path. Unlike
// other paths it may be "/".
func checkSource(src string) error {
	if src == "/" {
		return nil
	}
	if err := checkPath(src); err != nil {
		return fmt.Errorf("source %q: %w", src, err)
	}
	return nil
}

// checkPath refuses what is not an absolute, clean path below "/".
func checkPath(p string) error {
	switch err := checkText(p); {
	case err != nil:
		return err
	case p == "":
		return errors.New("empty")
	case !path.IsAbs(p):
		return errors.New("not absolute")
	case path.Clean(p) != p:
		return fmt.Errorf("not clean; write %q", path.Clean(p))
	case p == "/":
		return errors.New(`is "/" itself`)
	}
	return nil
}

// within reports whether clean path p is tree or lies below it.
func within(p, tree string) bool {
	return p == tree || strings.HasPrefix(p, tree+"/")
}
