package driver

import (
	"errors"
	"path/filepath"

	"github.com/bivouac-run/bivouac/driver/internal/network"
)

func (s *start) networkOptions() network.Options {
	return network.Options{
		ID: containerIDOf(s.cfg.AllocID, s.cfg.Name, s.cfg.ID), Task: s.cfg.Name,
		Dir: filepath.Join(s.h.cfg.RunDir, "netns"), Ports: s.ports,
	}
}

// attachNetwork gives the sandbox a network namespace behind the allocation's.
// runsc empties the namespace that it joins; the allocation's stays whole, for
// the next start, for other tasks, and for CNI's CHECK. Without a network to
// join, the sandbox has loopback only.
func (s *start) attachNetwork() error {
	if s.t.Network == nil {
		return nil
	}
	a, err := network.Attach(s.cfg.NetworkIsolation.Path, s.networkOptions())
	if err != nil {
		return &transientError{err}
	}
	s.t.Network = a
	s.spec.NetNS = a.Path
	return s.t.writeRecord()
}

// checkNetwork returns an error if the task runs without the network it was
// given, because the allocation's was made anew: it is better started again.
// Not to be able to look is no reason to end it.
func (t *task) checkNetwork() error {
	if t.Network == nil || !t.started.Sandbox.Alive() {
		return nil
	}
	if err := network.Check(t.Network); errors.Is(err, network.ErrBroken) {
		return err
	}
	return nil
}
