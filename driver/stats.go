package driver

import (
	"context"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/cgroup"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// TaskStats implements drivers.DriverPlugin: one reading at once, then one per
// interval, until the task ends or ctx does. The figures are the cgroup's: the
// sandbox's own kernel is part of them.
func (d *Driver) TaskStats(ctx context.Context, taskID string, interval time.Duration) (<-chan *drivers.TaskResourceUsage, error) {
	t, err := d.lookup(taskID)
	if err != nil {
		return nil, err
	}
	h, err := d.ready()
	if h == nil {
		return nil, err
	}
	ch := make(chan *drivers.TaskResourceUsage)
	d.spawn(func() {
		defer close(ch)
		m := meter{mhzPerCore: h.mhzPerCore}
		tick := time.NewTicker(max(interval, time.Millisecond))
		defer tick.Stop()
		for {
			if t.scope == nil {
				return
			}
			usage, err := t.scope.Usage()
			if err != nil { // gone with the task, or about to be
				return
			}
			select {
			case ch <- m.read(usage, time.Now()):
			case <-t.done:
				return
			case <-ctx.Done():
				return
			case <-d.ctx.Done():
				return
			}
			select {
			case <-tick.C:
			case <-t.done:
				return
			case <-ctx.Done():
				return
			case <-d.ctx.Done():
				return
			}
		}
	})
	return ch, nil
}

// meter turns readings of CPU time into rates.
type meter struct {
	mhzPerCore float64
	last       *cgroup.Usage
	at         time.Time
}

// read returns u as Nomad's statistics; the rates cover the time since the
// reading before, and are 0 for the first.
func (m *meter) read(u *cgroup.Usage, now time.Time) *drivers.TaskResourceUsage {
	cpu := &drivers.CpuStats{
		ThrottledPeriods: u.ThrottledPeriods,
		ThrottledTime:    u.ThrottledNanos,
		Measured:         []string{"Throttled Periods", "Throttled Time", "Percent", "System Mode", "User Mode"},
	}
	if m.last != nil {
		elapsed := float64(now.Sub(m.at))
		cpu.Percent = rate(m.last.CPUNanos, u.CPUNanos, elapsed)
		cpu.UserMode = rate(m.last.UserNanos, u.UserNanos, elapsed)
		cpu.SystemMode = rate(m.last.SystemNanos, u.SystemNanos, elapsed)
		cpu.TotalTicks = cpu.Percent / 100 * m.mhzPerCore
	}
	m.last, m.at = u, now
	return &drivers.TaskResourceUsage{
		Timestamp: now.UnixNano(),
		ResourceUsage: &drivers.ResourceUsage{
			CpuStats: cpu,
			MemoryStats: &drivers.MemoryStats{
				// A sandbox's memory is shared memory to the host.
				RSS:        u.AnonBytes + u.ShmemBytes,
				Cache:      u.CacheBytes - min(u.ShmemBytes, u.CacheBytes),
				Swap:       u.SwapBytes,
				MappedFile: u.MappedFileBytes,
				Usage:      u.MemoryBytes,
				MaxUsage:   u.MemoryPeakBytes,
				Measured:   []string{"RSS", "Cache", "Swap", "Mapped File", "Usage", "Max Usage"},
			},
		},
	}
}

// rate is the part of elapsed (nanoseconds) that a counter of nanoseconds
// advanced, in percent of one core.
func rate(before, after uint64, elapsed float64) float64 {
	if after < before || elapsed <= 0 {
		return 0
	}
	return float64(after-before) / elapsed * 100
}
