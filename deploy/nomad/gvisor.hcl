# The gvisor driver on a Nomad client: put this beside the agent's other
# configuration (/etc/nomad.d/gvisor.hcl) and the three programs where it says.
# The agent must run as root. docs/reference/driver.md explains every option.

# Nomad starts the files in here whose name has a plugin block.
# install -D bivouac /opt/nomad/plugins/gvisor
plugin_dir = "/opt/nomad/plugins"

plugin "gvisor" {
  args = ["driver"]

  config {
    # Without these two: beside the plugin, then (runsc) on PATH.
    runsc_path = "/usr/local/bin/runsc"
    shim_path  = "/usr/local/bin/bivouac-shim"

    state_dir = "/var/lib/bivouac" # images
    run_dir   = "/run/bivouac"     # tasks; at most 40 bytes, on a tmpfs

    platform      = "systrap"
    start_timeout = "60s"
    pids_limit    = 4096

    # Jobs may name images in here by absolute path: oci:/srv/images/…
    # image_dirs = ["/srv/images"]
  }
}

# systemd ends every process of the unit at `systemctl restart nomad` unless the
# unit says KillMode=process: then sandboxes outlive the agent. Nomad's own unit
# file does.
