package driver

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/plugins"
)

// Serve runs the plugin until Nomad stops it. Started by hand, it explains
// itself and returns 1.
func Serve() int {
	// go-plugin's cookie (plugins/base/plugin.go of Nomad).
	if os.Getenv("NOMAD_PLUGIN_MAGIC_COOKIE") == "" {
		fmt.Fprintln(os.Stderr, `bivouac driver is started by Nomad: put the binary into plugin_dir as "gvisor" and add

  plugin "gvisor" {
    args = ["driver"]
  }

to the agent's configuration.`)
		return 1
	}
	// Log lines go to a pipe of the agent's. Without a reader, while the agent
	// is being restarted, they must fail, not kill the process.
	signal.Ignore(syscall.SIGPIPE)
	var d *Driver
	plugins.Serve(func(log hclog.Logger) any {
		d = New(log)
		return d
	})
	if err := d.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
