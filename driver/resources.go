package driver

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/bivouac-run/bivouac/driver/internal/bundle"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// limitsOf turns Nomad's resources into limits. Nomad's CPU unit is MHz, which
// it uses as cgroup v1 shares too.
func limitsOf(r *drivers.Resources, opts *TaskConfig, h *host) bundle.Limits {
	var l bundle.Limits
	l.PidsMax = opts.PidsLimit
	if l.PidsMax == 0 {
		l.PidsMax = h.cfg.PidsLimit
	}
	if r == nil || r.LinuxResources == nil {
		return l
	}
	linux := r.LinuxResources
	if linux.CPUShares > 0 {
		l.CPUShares = min(max(uint64(linux.CPUShares), 2), 262144)
	}
	l.CPUs = linux.CpusetCpus
	l.MemoryBytes = linux.MemoryLimitBytes
	if r.NomadResources != nil {
		const mib = 1 << 20
		mem := r.NomadResources.Memory
		// With memory_max the reservation is what the scheduler counted, and
		// the limit is the maximum.
		if mem.MemoryMaxMB > mem.MemoryMB {
			l.MemoryBytes = mem.MemoryMaxMB * mib
			l.MemoryReservationBytes = mem.MemoryMB * mib
		} else if mem.MemoryMB > 0 {
			l.MemoryBytes = mem.MemoryMB * mib
		}
	}
	// PercentTicks is the task's part of all the node's cores together.
	if opts.CPUHardLimit && linux.PercentTicks > 0 {
		l.CPUPeriod = opts.CPUCFSPeriod
		const leastQuota = 1000 // the kernel's, in microseconds
		l.CPUQuota = max(int64(linux.PercentTicks*float64(l.CPUPeriod)*float64(h.cores)), leastQuota)
	}
	return l
}

// portsOf returns the container ports that the labels stand for.
func portsOf(r *drivers.Resources, labels []string) ([]uint16, error) {
	if len(labels) == 0 {
		return nil, nil
	}
	byLabel := map[string]uint16{}
	if r != nil && r.Ports != nil {
		for _, p := range *r.Ports {
			port := p.To
			if port <= 0 {
				port = p.Value
			}
			byLabel[p.Label] = uint16(port)
		}
	}
	var ports []uint16
	var errs []error
	for _, label := range labels {
		port, ok := byLabel[label]
		if !ok {
			errs = append(errs, fmt.Errorf("ports: the group's network has no port %q", label))
			continue
		}
		ports = append(ports, port)
	}
	return ports, errors.Join(errs...)
}

// hostResolvConf reads the node's resolver configuration from the first path,
// or, if that names only loopback servers, from the second, if it exists.
func hostResolvConf(path, behindStub string) ([]byte, error) {
	raw, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the node's resolver configuration: %w", err)
	}
	if !onlyLoopbackServers(raw) {
		return raw, nil
	}
	if real, err := os.ReadFile(behindStub); err == nil {
		return real, nil
	}
	return raw, nil
}

func onlyLoopbackServers(resolv []byte) bool {
	found := false
	lines := bufio.NewScanner(bytes.NewReader(resolv))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		addr, err := netip.ParseAddr(fields[1])
		if err != nil || !addr.IsLoopback() {
			return false
		}
		found = true
	}
	return found
}
