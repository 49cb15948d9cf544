# A task that prints where it runs, and stays for `nomad alloc exec`.
# It needs no network and gets none but loopback.

variable "image" {
  description = "An image with a POSIX shell."
  type        = string
  default     = "docker.io/library/busybox:1.36"
}

job "hello" {
  type = "service"

  group "sandbox" {
    task "main" {
      driver = "gvisor"

      config {
        image   = var.image
        command = "sh"
        args    = ["/local/hello.sh"]
      }

      template {
        destination = "local/hello.sh"
        data        = <<-EOF
          echo "user    $(id -u)"
          echo "kernel  $(uname -srv)"
          echo "memory  $(awk '/MemTotal/ { print $2, $3 }' /proc/meminfo)"
          echo "network $(awk -F : 'NR > 2 { print $1 }' /proc/net/dev)"
          echo "dmesg   $(dmesg | head -n 1)"
          trap 'echo bye; exit 0' TERM
          while :; do
            echo "up $(cut -d ' ' -f 1 /proc/uptime) s"
            sleep 10 &
            wait $!
          done
        EOF
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }

    # An example that does not start should say so, not try again.
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    update {
      min_healthy_time  = "1s"
      healthy_deadline  = "1m"
      progress_deadline = "2m"
    }
  }
}
