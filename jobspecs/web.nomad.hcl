# A web server behind a port of the node, found through Nomad's own service
# catalog. Bridge mode needs the kernel's bridge module, the CNI plugins bridge,
# firewall, host-local, loopback and portmap in the agent's cni_path, and the
# program iptables.

variable "image" {
  description = "An image with busybox."
  type        = string
  default     = "docker.io/library/busybox:1.36"
}

job "web" {
  type = "service"

  group "sandbox" {
    network {
      mode = "bridge"
      port "http" { to = 8080 }
    }

    service {
      name     = "web"
      port     = "http"
      provider = "nomad"

      check {
        type     = "http"
        path     = "/"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "main" {
      driver = "gvisor"

      config {
        image   = var.image
        command = "busybox"
        args    = ["httpd", "-f", "-p", "8080", "-h", "/local/www"]
      }

      template {
        destination = "local/www/index.html"
        data        = "hello from allocation {{ env \"NOMAD_SHORT_ALLOC_ID\" }}\n"
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
