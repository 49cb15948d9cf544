package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inner is the namespace that runsc joins, under construction.
type inner struct {
	f  *os.File
	nl *netlink.Handle
}

func (n *inner) close() {
	if n.nl != nil {
		n.nl.Close()
	}
	n.f.Close()
}

// newInner makes a network namespace and binds it to path. It leaves the
// calling thread in it.
func newInner(path string) (_ *inner, err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	target, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	target.Close()
	const own = "/proc/thread-self/ns/net"
	if err := unix.Mount(own, path, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("bind network namespace to %q: %w", path, err)
	}
	f, err := os.Open(own)
	if err != nil {
		return nil, fmt.Errorf("open new network namespace: %w", err)
	}
	n := &inner{f: f}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if n.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	lo, err := n.nl.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find loopback: %w", err)
	}
	return n, wrap("set up loopback", n.nl.LinkSetUp(lo))
}

// fill gives the i-th interface of I what f has in A.
func (n *inner) fill(id string, i int, f *iface) error {
	link, err := n.nl.LinkByName(f.name)
	if err != nil {
		return fmt.Errorf("find inner %q: %w", f.name, err)
	}
	// No address of the kernel's choosing: runsc would take it over.
	err = n.nl.LinkSetIP6AddrGenMode(link, addrGenModeNone)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) { // a kernel without IPv6
		return fmt.Errorf("set up inner %q: %w", f.name, err)
	}
	if err := n.nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up inner %q: %w", f.name, err)
	}
	for _, a := range f.addrs {
		addr := &netlink.Addr{IPNet: ipNet(host(a))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD // A has it too
		}
		if err := n.nl.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s to inner %q: %w", a, f.name, err)
		}
	}
	index, mac := link.Attrs().Index, hardwareAddr(id, i, "alloc")
	for _, gw := range []netip.Addr{gateway4, gateway6} {
		if !f.has(gw.Is4()) {
			continue
		}
		if err := n.nl.NeighAdd(neighbour(index, gw, mac)); err != nil {
			return fmt.Errorf("add neighbour %s to inner %q: %w", gw, f.name, err)
		}
		// Each interface has this route, so their metrics must differ.
		onLink := &netlink.Route{LinkIndex: index, Dst: ipNet(host(gw)), Scope: netlink.SCOPE_LINK, Priority: 1 + i}
		if err := n.nl.RouteAdd(onLink); err != nil {
			return fmt.Errorf("add route to %s to inner %q: %w", gw, f.name, err)
		}
	}
	for _, dst := range f.routes {
		route := &netlink.Route{LinkIndex: index, Dst: ipNet(dst), Gw: gatewayFor(dst.Addr()).AsSlice()}
		if err := n.nl.RouteAdd(route); err != nil {
			return fmt.Errorf("add route to %s to inner %q: %w", dst, f.name, err)
		}
	}
	return nil
}

// removeInner removes the bind mount at path and with it the namespace, once
// the sandbox has left it. Nothing there is no error.
func removeInner(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace %q: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}

// unplug deletes the links in I, and so their other ends in A, wherever A is
// by now. The calling thread must be one to throw away.
func unplug(path string) error {
	f, err := openNetNS(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrNotNetNS) {
		return nil // made only in part, or removed
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := enter(f); err != nil {
		return err
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open rtnetlink socket: %w", err)
	}
	defer nl.Close()
	links, err := dump(nl.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		if l.Type() == "veth" {
			errs = append(errs, deleteLink(nl, l))
		}
	}
	return errors.Join(errs...)
}

// deleteLink deletes a link, which may have gone with its other end.
func deleteLink(nl *netlink.Handle, l netlink.Link) error {
	if err := nl.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete interface %q: %w", l.Attrs().Name, err)
	}
	return nil
}

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenModeNone = 1

func neighbour(index int, a netip.Addr, mac []byte) *netlink.Neigh {
	return &netlink.Neigh{
		LinkIndex: index, Family: familyOf(a), State: netlink.NUD_PERMANENT,
		IP: a.AsSlice(), HardwareAddr: mac,
	}
}

func wrap(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
