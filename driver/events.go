package driver

import (
	"fmt"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/image"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// emit adds a line to the task's events.
func (d *Driver) emit(cfg *drivers.TaskConfig, msg string) {
	err := d.events.EmitEvent(&drivers.TaskEvent{
		TaskID: cfg.ID, TaskName: cfg.Name, AllocID: cfg.AllocID, Timestamp: time.Now(), Message: msg,
	})
	if err != nil {
		d.log.Warn("task event was not delivered", "task_id", cfg.ID, "error", err)
	}
}

// progressPeriod is how often a pull that goes on is reported: Nomad keeps ten
// events per task.
const progressPeriod = 15 * time.Second

// pullProgress turns an image store's progress into a few events: one when
// bytes begin to move, then one per period. A cached image makes none.
type pullProgress struct {
	ref  string
	emit func(string)
	last time.Time
}

func newPullProgress(ref string, emit func(string)) *pullProgress {
	return &pullProgress{ref: ref, emit: emit}
}

func (p *pullProgress) report(pr image.Progress) {
	if pr.Phase == image.PhaseResolving {
		return
	}
	now := time.Now()
	if p.last.IsZero() {
		p.last = now
		p.emit(fmt.Sprintf("Getting image %s (%d layers, %s)", p.ref, pr.Layers, megabytes(pr.TotalBytes)))
		return
	}
	if now.Sub(p.last) < progressPeriod {
		return
	}
	p.last = now
	percent := int64(0)
	if pr.TotalBytes > 0 {
		percent = min(100*pr.Bytes/pr.TotalBytes, 100)
	}
	p.emit(fmt.Sprintf("Getting image %s: layer %d of %d, %d %% of %s",
		p.ref, pr.Layer, pr.Layers, percent, megabytes(pr.TotalBytes)))
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
