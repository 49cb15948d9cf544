# A batch task with limits: it prints those it can see and ends with an exit
# code, which Nomad shows in `nomad alloc status`.

variable "image" {
  description = "An image with a POSIX shell."
  type        = string
  default     = "docker.io/library/busybox:1.36"
}

variable "exit_code" {
  description = "What the task ends with. Anything but 0 fails the job."
  type        = number
  default     = 0
}

job "batch" {
  type = "batch"

  group "sandbox" {
    task "main" {
      driver = "gvisor"
      user   = "1000:1000"

      config {
        image           = var.image
        command         = "sh"
        args            = ["-c", "id; nproc; free -m; touch /here || echo 'the root file system is read-only'; exit ${var.exit_code}"]
        readonly_rootfs = true
        pids_limit      = 256
        cpu_hard_limit  = true
      }

      resources {
        cpu    = 200
        memory = 64
      }
    }

    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
  }
}
