package nomadtest

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// Options shape an agent. The zero value is an agent with the driver.
type Options struct {
	// Env is added to the agent's environment.
	Env []string
	// HostVolumes become the client's host_volume blocks, by name.
	HostVolumes map[string]HostVolume
	// OwnServer runs Nomad's server in a process of its own, so that the
	// agent that is killed and started again is a client only, as on most
	// nodes. (An agent that is both refuses its own client until it leads
	// again, and the client then waits 15 to 30 s before it retries.)
	OwnServer bool
	// ImageDirs are allowed beside the agent's own directory of images.
	ImageDirs []string
}

// HostVolume is a directory that jobs may ask for.
type HostVolume struct {
	Path     string
	ReadOnly bool
}

// layout is where an agent keeps its things.
type layout struct {
	token string // bvt-NNNN, unique on the host
	dir   string // below /tmp: short, because unix sockets live in it
	run   string // the driver's run_dir
}

func newLayout() (layout, error) {
	dir, err := os.MkdirTemp("/tmp", "bvt-")
	if err != nil {
		return layout{}, err
	}
	return layoutOf(dir), nil
}

func layoutOf(dir string) layout {
	token := filepath.Base(dir)
	return layout{token: token, dir: dir, run: filepath.Join("/run", token)}
}

func (l layout) config() string  { return filepath.Join(l.dir, "agent.hcl") }
func (l layout) server() string  { return filepath.Join(l.dir, "server.hcl") }
func (l layout) log() string     { return filepath.Join(l.dir, "agent.log") }
func (l layout) data() string    { return filepath.Join(l.dir, "data") }
func (l layout) plugins() string { return filepath.Join(l.dir, "plugins") }
func (l layout) images() string  { return filepath.Join(l.dir, "img") }
func (l layout) state() string   { return filepath.Join(l.dir, "state") }
func (l layout) tmp() string     { return filepath.Join(l.dir, "tmp") }
func (l layout) owner() string   { return filepath.Join(l.dir, "owner") }
func (l layout) pluginPath() string {
	return filepath.Join(l.plugins(), "gvisor")
}

// bridge is the agent's own bridge; a device's name has 15 bytes at most.
func (l layout) bridge() string { return "bv" + tail(l.token, 10) }

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// make creates the directories and the plugin's link.
func (l layout) make(p Programs) error {
	// Tasks that are not root reach their directories through these two.
	for _, dir := range []string{l.dir, l.data()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
	}
	for _, dir := range []string{l.plugins(), l.images(), l.tmp()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return os.Symlink(p.Bivouac, l.pluginPath())
}

// ports are the agent's three.
type ports struct{ http, rpc, serf int }

// freePorts asks the kernel for ports that nobody uses now. All three are held
// until the last is known.
func freePorts() (ports, error) {
	var p ports
	for _, to := range []*int{&p.http, &p.rpc, &p.serf} {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return p, err
		}
		defer l.Close()
		addr, ok := l.Addr().(*net.TCPAddr)
		if !ok {
			return p, fmt.Errorf("listening on %v", l.Addr())
		}
		*to = addr.Port
	}
	return p, nil
}

// common is what server and client are told alike.
func (l layout) common(b *strings.Builder, data string, at ports) {
	fmt.Fprintf(b, `
name                 = %q
data_dir             = %q
plugin_dir           = %q
bind_addr            = "127.0.0.1"
log_level            = "DEBUG"
disable_update_check = true
leave_on_interrupt   = false
leave_on_terminate   = false
ports {
  http = %d
  rpc  = %d
  serf = %d
}
advertise {
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}
consul {
  auto_advertise   = false
  client_auto_join = false
  server_auto_join = false
}
limits {
  http_max_conns_per_client = 0 # no limit: a test is one client
  rpc_max_conns_per_client  = 0
}
telemetry {
  publish_allocation_metrics = true # without it, no statistics of tasks either
}
`, l.token, data, l.plugins(), at.http, at.rpc, at.serf)
}

func serverBlock(b *strings.Builder) {
	b.WriteString(`
server {
  enabled          = true
  bootstrap_expect = 1
  raft_multiplier  = 1
}
`)
}

// writeServer stores the configuration of a server on its own.
func (l layout) writeServer(at ports) error {
	var b strings.Builder
	l.common(&b, filepath.Join(l.dir, "server"), at)
	serverBlock(&b)
	return os.WriteFile(l.server(), []byte(b.String()), 0o600)
}

// write stores the agent's configuration. server is the RPC address of a
// server on its own, or "" for an agent that is its own.
func (l layout) write(p Programs, at ports, server, subnet string, o Options) error {
	var b strings.Builder
	l.common(&b, l.data(), at)
	if server == "" {
		serverBlock(&b)
	}
	// The cloud fingerprints wait for metadata services that are not there.
	// Disk thresholds would remove allocations whose logs a test still reads.
	fmt.Fprintf(&b, `
client {
  enabled               = true
  cni_path              = %q
  bridge_network_name   = %q
  bridge_network_subnet = %q
  gc_interval           = "5m"
  gc_max_allocs         = 1000
  gc_disk_usage_threshold  = 99
  gc_inode_usage_threshold = 99
  options {
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean,consul,vault"
  }
`, p.CNIDir, l.bridge(), subnet)
	if server != "" {
		fmt.Fprintf(&b, "  servers = [%q]\n", server)
	}
	for name, v := range o.HostVolumes {
		fmt.Fprintf(&b, "  host_volume %q {\n    path      = %q\n    read_only = %v\n  }\n", name, v.Path, v.ReadOnly)
	}
	dirs := append([]string{l.images()}, o.ImageDirs...)
	fmt.Fprintf(&b, `}
plugin "raw_exec" {
  config {
    enabled = true
  }
}
plugin "gvisor" {
  args = ["driver"]
  config {
    runsc_path = %q
    shim_path  = %q
    state_dir  = %q
    run_dir    = %q
    image_dirs = ["%s"]
  }
}
`, p.Runsc, p.Shim, l.state(), l.run, strings.Join(dirs, `", "`))
	return os.WriteFile(l.config(), []byte(b.String()), 0o600)
}
