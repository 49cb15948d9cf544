package driver

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/bivouac-run/bivouac/driver/internal/bundle"
	"github.com/bivouac-run/bivouac/driver/internal/image"
	"github.com/bivouac-run/bivouac/driver/internal/shim"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// Nomad's directories as a task sees them.
const (
	allocDest   = "/alloc"
	logsDest    = "/alloc/logs"
	localDest   = "/local"
	secretsDest = "/secrets"
)

// mountPoints are the places that every task mounts something on. The image
// store makes them in each root once, because runsc would otherwise do so in
// the shared root at every start.
func mountPoints() []image.MountPoint {
	return []image.MountPoint{
		{Path: allocDest, Dir: true}, {Path: localDest, Dir: true}, {Path: secretsDest, Dir: true},
		{Path: "/proc", Dir: true}, {Path: "/sys", Dir: true}, {Path: "/dev", Dir: true},
		{Path: "/etc/resolv.conf"}, {Path: "/etc/hosts"}, {Path: "/etc/hostname"},
	}
}

// decideProcess merges image and job into what runs, and as whom.
func (s *start) decideProcess() error {
	img := s.image.Config
	p, err := bundle.Merge(bundle.ImageConfig{
		Entrypoint: img.Entrypoint, Cmd: img.Cmd, Env: img.Env, User: img.User, WorkingDir: img.WorkingDir,
	}, bundle.Override{
		Entrypoint: s.opts.Entrypoint, Command: s.opts.Command, Args: s.opts.Args,
		Env: s.cfg.Env, WorkDir: s.opts.WorkDir, User: s.cfg.User,
	})
	if err != nil {
		return fmt.Errorf("task config: %w", err)
	}
	passwd, closePasswd, err := s.imageFile("/etc/passwd")
	if err != nil {
		return err
	}
	defer closePasswd()
	group, closeGroup, err := s.imageFile("/etc/group")
	if err != nil {
		return err
	}
	defer closeGroup()
	user, err := bundle.ResolveUser(p.User, passwd, group)
	if err != nil {
		return fmt.Errorf("task config: %w", err)
	}
	s.spec.Process, s.spec.User = p, user
	s.spec.ReadOnlyRoot = s.opts.ReadonlyRootfs
	s.spec.Hostname = s.opts.Hostname
	if s.spec.Hostname == "" {
		s.spec.Hostname = defaultHostname(s.cfg)
	}
	return nil
}

// defaultHostname is the group network's, which other tasks know the
// allocation by, or the allocation's short ID.
func defaultHostname(cfg *drivers.TaskConfig) string {
	if n := cfg.NetworkIsolation; n != nil && n.HostsConfig != nil && n.HostsConfig.Hostname != "" {
		return n.HostsConfig.Hostname
	}
	const short = 8
	if len(cfg.AllocID) >= short {
		return cfg.AllocID[:short]
	}
	return "sandbox"
}

// imageFile opens a file of the image for reading; nil if there is none.
func (s *start) imageFile(name string) (io.Reader, func(), error) {
	f, err := s.image.OpenFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, func() {}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	return f, func() { _ = f.Close() }, nil
}

// decideMounts lists what of the node a task sees: Nomad's directories, its
// volumes, and three files that name things.
func (s *start) decideMounts() error {
	dir := s.cfg.TaskDir()
	mounts := []bundle.Mount{
		{Source: dir.SharedAllocDir, Destination: allocDest},
		// The logs lie below /alloc, and Nomad's log collector follows
		// links there: a task must not be able to make one
		// (CVE-2026-6959), nor to profit from one that is there.
		{Source: filepath.Join(s.t.dir, logsDir), Destination: logsDest, ReadOnly: true},
		{Source: dir.LocalDir, Destination: localDest},
		{Source: dir.SecretsDir, Destination: secretsDest},
	}
	for _, m := range s.cfg.Mounts {
		mounts = append(mounts, bundle.Mount{
			Source: m.HostPath, Destination: m.TaskPath, ReadOnly: m.Readonly, Propagation: m.PropagationMode,
		})
	}
	files, err := s.writeNameFiles()
	if err != nil {
		return err
	}
	s.spec.Mounts = append(mounts, files...)
	s.spec.Root = s.image.Root
	return s.protectRoot()
}

// nameFilesDir is where resolv.conf, hosts and hostname lie, below the task's
// directory but out of the task's sight. The task may write to them, as it may
// under Docker, so they are on the disk that Nomad accounts for, not in /run.
// Each invocation has a directory of its own there.
const nameFilesDir = ".bivouac"

func (r *record) nameFiles() string {
	return filepath.Join(r.AllocDir, r.TaskName, nameFilesDir, r.ContainerID)
}

// writeNameFiles writes resolv.conf, hosts and hostname, and returns their
// mounts.
func (s *start) writeNameFiles() ([]bundle.Mount, error) {
	resolv, err := resolvConfFor(s.cfg.DNS)
	if err != nil {
		return nil, err
	}
	name, address := s.spec.Hostname, ""
	if n := s.cfg.NetworkIsolation; n != nil && n.HostsConfig != nil {
		address = n.HostsConfig.Address
	}
	hosts, err := bundle.Hosts(name, address, nil)
	if err != nil {
		return nil, fmt.Errorf("write /etc/hosts: %w", err)
	}
	hostname, err := bundle.Hostname(name)
	if err != nil {
		return nil, fmt.Errorf("write /etc/hostname: %w", err)
	}
	dir := s.t.nameFiles()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("write task files: %w", err)
	}
	var mounts []bundle.Mount
	for _, f := range []struct {
		name    string
		content []byte
	}{{resolvConf, resolv}, {hostsFile, hosts}, {hostnameFile, hostname}} {
		path := filepath.Join(dir, f.name)
		if err := os.WriteFile(path, f.content, 0o644); err != nil {
			return nil, fmt.Errorf("write task file: %w", err)
		}
		mounts = append(mounts, bundle.Mount{Source: path, Destination: "/etc/" + f.name})
	}
	return mounts, nil
}

// resolvConfFor returns the resolver configuration the job asks for, else the
// node's own. A stub resolver on the node's loopback is not reachable from a
// sandbox, so behind systemd-resolved the real servers are used.
func resolvConfFor(dns *drivers.DNSConfig) ([]byte, error) {
	if dns != nil && len(dns.Servers)+len(dns.Searches)+len(dns.Options) > 0 {
		raw, err := bundle.ResolvConf(dns.Servers, dns.Searches, dns.Options)
		if err != nil {
			return nil, fmt.Errorf("task config: dns: %w", err)
		}
		return raw, nil
	}
	return hostResolvConf("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
}

// protectRoot gives the task a view of the root of its own if runsc would have
// to make mount points in it, which every other task of the image would see.
func (s *start) protectRoot() error {
	missing := false
	for _, m := range s.spec.Mounts {
		has, err := s.image.Has(m.Destination)
		if err != nil {
			return err
		}
		missing = missing || !has && m.Destination != logsDest // a directory of Nomad's below /alloc
	}
	if !missing {
		return nil
	}
	s.spec.Root = filepath.Join(s.t.dir, "root")
	for _, name := range []string{"root", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(s.t.dir, name), 0o755); err != nil {
			return fmt.Errorf("make private root: %w", err)
		}
	}
	return nil
}

// privateRoot is what protectRoot prepared, for the shim to mount; nil if the
// shared root serves.
func (s *start) privateRoot() *shim.Overlay {
	if s.spec.Root == s.image.Root {
		return nil
	}
	return &shim.Overlay{
		Lower: s.image.Root, Target: s.spec.Root,
		Upper: filepath.Join(s.t.dir, "upper"), Work: filepath.Join(s.t.dir, "work"),
	}
}

// binds are the directories of the allocation that the shim mounts for runsc:
// the logs, which lie where tasks may rename things, and the task's own, where
// changes to its root are kept in a file without a name, and whose path may
// hold characters that mean something to runsc.
func (s *start) binds() []shim.Bind {
	dir := s.cfg.TaskDir()
	return []shim.Bind{
		{Path: s.belowAlloc(dir.LogDir), Target: filepath.Join(s.t.dir, logsDir)},
		{Path: s.belowAlloc(dir.Dir), Target: filepath.Join(s.t.dir, scratchDir)},
	}
}

// belowAlloc makes a path of Nomad's relative to the allocation's directory.
func (s *start) belowAlloc(path string) string {
	return strings.TrimPrefix(path, s.cfg.AllocDir+"/")
}
