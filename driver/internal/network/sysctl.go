package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// setting is one value below /proc/sys. What is there is the namespace's of
// the thread that opens the file.
type setting struct{ path, value string }

func (s setting) String() string { return s.path + "=" + s.value }

func parseSetting(s string) (setting, bool) {
	i := strings.LastIndexByte(s, '=') // an interface's name may have one, too
	if i < 0 || !filepath.IsLocal(s[:i]) || !strings.HasPrefix(s, "net/") {
		return setting{}, false
	}
	return setting{s[:i], s[i+1:]}, true
}

// read returns the setting as it is now; ok is false if the kernel has none.
func read(path string) (s setting, ok bool, err error) {
	raw, err := os.ReadFile(filepath.Join("/proc/sys", path))
	if errors.Is(err, os.ErrNotExist) {
		return setting{}, false, nil
	}
	if err != nil {
		return setting{}, false, fmt.Errorf("read sysctl: %w", err)
	}
	return setting{path, strings.TrimSpace(string(raw))}, true, nil
}

// write sets a value that differs; a kernel without the setting is no error.
func (s setting) write() error {
	old, ok, err := read(s.path)
	if err != nil || !ok || old == s {
		return err
	}
	if err := os.WriteFile(filepath.Join("/proc/sys", s.path), []byte(s.value), 0); err != nil {
		return fmt.Errorf("write sysctl: %w", err)
	}
	return nil
}

// tuneLink prepares A's end of a pair before it comes up.
func tuneLink(name string) error {
	v4, v6 := "net/ipv4/conf/"+name+"/", "net/ipv6/conf/"+name+"/"
	for _, s := range []setting{
		{v4 + "forwarding", "1"},
		// The sandbox's source address is A's own. By the mark the
		// reverse route leads to the sandbox, so strict checking holds.
		{v4 + "src_valid_mark", "1"},
		{v4 + "accept_redirects", "0"},
		{v4 + "send_redirects", "0"},
		{v6 + "addr_gen_mode", "1"}, // none: the gateway's address is enough
		{v6 + "accept_ra", "0"},
		{v6 + "accept_redirects", "0"},
	} {
		if err := s.write(); err != nil {
			return err
		}
	}
	return nil
}

// wanted are the settings of A that routing for a sandbox takes, in the order
// to write them.
func wanted(ifaces []iface) ([]setting, error) {
	// A socket of A and a sandbox may have the same addresses and ports, told
	// apart by connection tracking; a lookup before routing would not.
	want := []setting{{"net/ipv4/ip_early_demux", "0"}}
	v6 := false
	for i := range ifaces {
		f := &ifaces[i]
		v6 = v6 || f.has(false)
		if f.has(true) {
			want = append(want, setting{"net/ipv4/conf/" + f.name + "/forwarding", "1"})
		}
	}
	if !v6 {
		return want, nil
	}
	for i := range ifaces {
		// A router ignores router advertisements, and forgets the routes it
		// has of them, unless told not to.
		ra, ok, err := read("net/ipv6/conf/" + ifaces[i].name + "/accept_ra")
		if err != nil {
			return nil, err
		}
		if ok && ra.value == "1" {
			want = append(want, setting{ra.path, "2"})
		}
	}
	return append(want, setting{"net/ipv6/conf/all/forwarding", "1"}), nil
}

// prepare writes what A needs, noting former values in the table first.
func (r *router) prepare(ifaces []iface) error {
	want, err := wanted(ifaces)
	if err != nil {
		return err
	}
	var change, former []setting
	for _, s := range want {
		now, ok, err := read(s.path)
		if err != nil {
			return err
		}
		if ok && now != s {
			change, former = append(change, s), append(former, now)
		}
	}
	if len(change) == 0 {
		return nil
	}
	if err := r.save(former); err != nil {
		return err
	}
	for _, s := range change {
		if err := s.write(); err != nil {
			return err
		}
	}
	return nil
}
