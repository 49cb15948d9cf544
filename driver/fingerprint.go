package driver

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/cgroup"
	"github.com/bivouac-run/bivouac/driver/internal/runsc"
	"github.com/bivouac-run/bivouac/internal/version"
	"github.com/hashicorp/nomad/plugins/drivers"
	pstructs "github.com/hashicorp/nomad/plugins/shared/structs"
)

const (
	// fingerprintPeriod is how often the programs are looked at again.
	fingerprintPeriod = 30 * time.Second
	// firstAnswer bounds the wait for the first fingerprint.
	firstAnswer = time.Second
	// probeTimeout bounds the boot check, which takes a fraction of a second;
	// the kvm platform can hang.
	probeTimeout = 20 * time.Second
)

// Fingerprint implements drivers.DriverPlugin: one answer soon, then one for
// each change.
func (d *Driver) Fingerprint(ctx context.Context) (<-chan *drivers.Fingerprint, error) {
	ch := make(chan *drivers.Fingerprint, 1)
	d.spawn(func() {
		defer close(ch)
		d.fingerprint(ctx, ch)
	})
	return ch, nil
}

// fingerprint answers until ctx or the plugin ends. The first answer waits for
// the boot check, because Nomad's client takes seconds to pass on a second
// one, but not for longer than firstAnswer.
func (d *Driver) fingerprint(ctx context.Context, ch chan<- *drivers.Fingerprint) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.ctx, cancel)()
	send := func(fp *drivers.Fingerprint) {
		select {
		case ch <- fp:
		case <-ctx.Done():
		}
	}
	var probed, health string
	note := func(v verdict) {
		if v.fp != nil {
			send(v.fp)
			probed, health = v.seen, v.fp.HealthDescription
		}
	}
	first := make(chan verdict, 1)
	go func() { first <- d.inspect(ctx, "", "") }() // ends with ctx, and is waited for below
	select {
	case v := <-first:
		note(v)
	case <-time.After(firstAnswer):
		send(&drivers.Fingerprint{
			Health: drivers.HealthStateUnhealthy, HealthDescription: "checking that a sandbox boots",
		})
		note(<-first)
	}
	tick := time.NewTicker(fingerprintPeriod)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			note(d.inspect(ctx, probed, health))
		case <-ctx.Done():
			return
		}
	}
}

// verdict is the outcome of a look at the host: what to tell Nomad, nil if
// that is nothing new, and the identity of the programs it is about.
type verdict struct {
	fp   *drivers.Fingerprint
	seen string
}

func undetected(err error) *drivers.Fingerprint {
	return &drivers.Fingerprint{Health: drivers.HealthStateUndetected, HealthDescription: err.Error()}
}

// inspect checks the host if the programs are not the ones that were probed
// before, or the last check failed.
func (d *Driver) inspect(ctx context.Context, probed, health string) verdict {
	h, err := d.relocate()
	if err != nil {
		if err.Error() == health {
			return verdict{}
		}
		return verdict{fp: undetected(err)}
	}
	seen := identity(h.runsc.Path) + identity(h.shim)
	if seen == probed && health == drivers.DriverHealthy {
		return verdict{}
	}
	fp, v := h.check(ctx)
	d.runscVersion.Store(v)
	if seen == probed && fp.HealthDescription == health {
		return verdict{}
	}
	return verdict{fp, seen}
}

// relocate looks for the programs again if one was missing, so that installing
// it heals the driver.
func (d *Driver) relocate() (*host, error) {
	h, err := d.ready()
	if h == nil || err == nil {
		return h, err
	}
	path, err := findProgram(h.cfg.RunscPath, "runsc")
	if err != nil {
		return h, err
	}
	shim, err := findProgram(h.cfg.ShimPath, "bivouac-shim")
	if err != nil {
		return h, err
	}
	found := *h
	runtime := *h.runsc
	runtime.Path = path
	found.runsc, found.shim, found.missing = &runtime, shim, nil
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.host == h {
		d.host = &found
	}
	return d.host, d.host.missing
}

// identity changes when a program is replaced.
func identity(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return path + err.Error()
	}
	return fmt.Sprint(path, info.Size(), info.ModTime().UnixNano())
}

// check asks runsc for its version, nil if it does not tell, and boots a
// sandbox.
func (h *host) check(ctx context.Context) (fp *drivers.Fingerprint, v *runsc.Version) {
	fp = &drivers.Fingerprint{
		Attributes: map[string]*pstructs.Attribute{
			"driver.gvisor":          pstructs.NewBoolAttribute(true),
			"driver.gvisor.version":  pstructs.NewStringAttribute(version.Version),
			"driver.gvisor.platform": pstructs.NewStringAttribute(h.cfg.Platform),
		},
		Health:            drivers.HealthStateUnhealthy,
		HealthDescription: drivers.DriverHealthy,
	}
	if os.Geteuid() != 0 {
		fp.HealthDescription = "the Nomad agent must run as root for this driver"
		return fp, nil
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	found, err := h.runsc.Version(ctx)
	if err != nil {
		fp.HealthDescription = err.Error()
		return fp, nil
	}
	fp.Attributes["driver.gvisor.runsc.version"] = pstructs.NewStringAttribute(found.Release)
	if found.Commit != "" {
		fp.Attributes["driver.gvisor.runsc.commit"] = pstructs.NewStringAttribute(found.Commit)
	}
	mode, err := cgroup.DetectMode(cgroup.DefaultRoot)
	if err != nil {
		fp.HealthDescription = err.Error()
		return fp, &found
	}
	fp.Attributes["driver.gvisor.cgroup"] = pstructs.NewStringAttribute(string(mode))
	if err := h.runsc.Probe(ctx, h.shim, h.cfg.RunDir); err != nil {
		fp.HealthDescription = err.Error()
		return fp, &found
	}
	fp.Health = drivers.HealthStateHealthy
	return fp, &found
}
