package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// iface is an interface of A that a sandbox gets a likeness of.
type iface struct {
	name  string
	index int
	mtu   int
	// addrs are all its addresses but IPv6 link-local ones, which mean
	// nothing behind a router.
	addrs []netip.Addr
	// routes are the destinations that A reaches through it.
	routes []netip.Prefix
}

func (f *iface) has(v4 bool) bool {
	return slices.ContainsFunc(f.addrs, func(a netip.Addr) bool { return a.Is4() == v4 })
}

// survey lists the interfaces of the namespace that have an address. The
// package's own are not among them.
func survey(nl *netlink.Handle) ([]iface, error) {
	links, err := dump(nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var found []iface
	seen := map[netip.Addr]bool{} // an address that two have is the first one's
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagUp == 0 || a.Flags&net.FlagLoopback != 0 || isOurs(a.Name) {
			continue
		}
		f := iface{name: a.Name, index: a.Index, mtu: a.MTU}
		addrs, err := dump(func() ([]netlink.Addr, error) { return nl.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, fmt.Errorf("list addresses of %q: %w", a.Name, err)
		}
		for _, addr := range addrs {
			ip, ok := netip.AddrFromSlice(addr.IP)
			if ip = ip.Unmap(); ok && usable(ip) && !seen[ip] {
				seen[ip] = true
				f.addrs = append(f.addrs, ip)
			}
		}
		if len(f.addrs) > 0 {
			found = append(found, f)
		}
	}
	if len(found) > maxInterfaces {
		return nil, fmt.Errorf("%d interfaces have addresses, more than %d", len(found), maxInterfaces)
	}
	return found, addRoutes(nl, found)
}

// usable says whether a sandbox can have an address of A's.
func usable(a netip.Addr) bool {
	return !a.IsLoopback() && !a.IsMulticast() && (a.Is4() || !a.IsLinkLocalUnicast())
}

// addRoutes gives each interface the destinations of A's main table that lead
// through it. Where several routes lead to one destination, the first choice
// of A counts: runsc takes one default route.
func addRoutes(nl *netlink.Handle, ifaces []iface) error {
	type choice struct{ priority, index int }
	best := map[netip.Prefix]choice{}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return nl.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		})
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			dst, ok := destination(&r, family)
			if !ok || r.Type != unix.RTN_UNICAST {
				continue
			}
			index := r.LinkIndex
			if len(r.MultiPath) > 0 {
				index = r.MultiPath[0].LinkIndex
			}
			if old, seen := best[dst]; !seen || r.Priority < old.priority {
				best[dst] = choice{r.Priority, index}
			}
		}
	}
	for i := range ifaces {
		f := &ifaces[i]
		for dst, c := range best {
			if c.index == f.index && f.has(dst.Addr().Is4()) {
				f.routes = append(f.routes, dst)
			}
		}
	}
	return nil
}

// destination is where a route leads, unless that is the link alone.
func destination(r *netlink.Route, family int) (netip.Prefix, bool) {
	if r.Dst == nil {
		if family == netlink.FAMILY_V4 {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0), true
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
	}
	ip, ok := netip.AddrFromSlice(r.Dst.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ip = ip.Unmap()
	if ip.IsMulticast() || ip.Is6() && ip.IsLinkLocalUnicast() {
		return netip.Prefix{}, false
	}
	ones, _ := r.Dst.Mask.Size()
	return netip.PrefixFrom(ip, ones).Masked(), true
}

// dump repeats a listing that the kernel says was disturbed by a change.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	const attempts = 5
	for i := 1; ; i++ {
		got, err := list()
		if err == nil || i == attempts || !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			return got, err
		}
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// host is the prefix of one address.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}
