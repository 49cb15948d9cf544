package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// router is A at work. All its methods run on a thread inside A.
type router struct {
	nl *netlink.Handle
}

// newRouter opens what is needed to work on the namespace that the calling
// thread is in.
func newRouter() (*router, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	return &router{nl: nl}, nil
}

func (r *router) close() { r.nl.Close() }

// connect makes the veth pairs between A and I and everything that a packet
// between the two needs but the choice of which packets: steer does that.
func (r *router) connect(o *Options, n *inner, ifaces []iface) (mark uint32, err error) {
	for i := range ifaces {
		f := &ifaces[i]
		link, err := r.addLink(o, n, i, f)
		if err != nil {
			return 0, err
		}
		if i == 0 {
			mark = markOf(link.Attrs().Index)
		}
		if err := r.addWays(o.ID, i, f, link.Attrs(), mark); err != nil {
			return 0, err
		}
		if err := n.fill(o.ID, i, f); err != nil {
			return 0, err
		}
	}
	return mark, r.addRules(o.ID, mark, ifaces)
}

// addLink makes the i-th veth pair, whose other end has in I the name that the
// interface has in A.
func (r *router) addLink(o *Options, n *inner, i int, f *iface) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = linkName(o.ID, i), f.mtu
	attrs.HardwareAddr = hardwareAddr(o.ID, i, "alloc")
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU = f.name, uint32(f.mtu)
	veth.PeerHardwareAddr = hardwareAddr(o.ID, i, "sandbox")
	veth.PeerNamespace = netlink.NsFd(n.f.Fd())
	if err := r.nl.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add interface %q: %w", attrs.Name, err)
	}
	link, err := r.nl.LinkByName(attrs.Name)
	if err != nil {
		return nil, fmt.Errorf("find interface %q: %w", attrs.Name, err)
	}
	if err := r.nl.LinkSetAlias(link, alias(o.ID, o.task())); err != nil {
		return nil, fmt.Errorf("name interface %q: %w", attrs.Name, err)
	}
	if err := tuneLink(attrs.Name); err != nil {
		return nil, err
	}
	return link, wrap("set up interface", r.nl.LinkSetUp(link))
}

// addWays gives A's end of a pair the gateway's addresses, and the sandbox's
// table the ways to the sandbox's.
func (r *router) addWays(id string, i int, f *iface, link *netlink.LinkAttrs, mark uint32) error {
	for _, gw := range []netip.Addr{gateway4, gateway6} {
		if !f.has(gw.Is4()) {
			continue
		}
		addr := &netlink.Addr{IPNet: ipNet(host(gw)), Scope: unix.RT_SCOPE_LINK}
		if gw.Is6() {
			addr.Flags = unix.IFA_F_NODAD // the sandbox's end has none
		}
		if err := r.nl.AddrAdd(&netlink.Veth{LinkAttrs: *link}, addr); err != nil {
			return fmt.Errorf("add address %s to %q: %w", gw, link.Name, err)
		}
	}
	mac := hardwareAddr(id, i, "sandbox")
	for _, a := range f.addrs {
		if err := r.nl.NeighAdd(neighbour(link.Index, a, mac)); err != nil {
			return fmt.Errorf("add neighbour %s to %q: %w", a, link.Name, err)
		}
		route := &netlink.Route{
			LinkIndex: link.Index, Dst: ipNet(host(a)), Scope: netlink.SCOPE_LINK,
			Table: int(mark), Protocol: protocol,
		}
		if err := r.nl.RouteAdd(route); err != nil {
			return fmt.Errorf("add route to %s: %w", a, err)
		}
	}
	return nil
}

// addRules makes the sandbox's mark choose its table, before the local one.
func (r *router) addRules(id string, mark uint32, ifaces []iface) error {
	for _, v4 := range []bool{true, false} {
		any := false
		family := familyOfV4(v4)
		for i := range ifaces {
			if !ifaces[i].has(v4) {
				continue
			}
			any = true
			// What comes from a sandbox for A itself must not turn round.
			rule := newRule(family, prefInterface, unix.RT_TABLE_LOCAL)
			rule.IifName = linkName(id, i)
			if err := r.nl.RuleAdd(rule); err != nil {
				return fmt.Errorf("add rule for %q: %w", rule.IifName, err)
			}
		}
		if !any {
			continue
		}
		rule := newRule(family, prefMark, int(mark))
		rule.Mark = mark
		if err := r.nl.RuleAdd(rule); err != nil {
			return fmt.Errorf("add rule for mark %#x: %w", mark, err)
		}
		if err := r.moveLocal(family, prefLocal); err != nil {
			return err
		}
	}
	return nil
}

func familyOfV4(v4 bool) int {
	if v4 {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func newRule(family, pref, table int) *netlink.Rule {
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Table = family, pref, table
	if pref != 0 {
		rule.Protocol = protocol
	}
	return rule
}

// moveLocal moves the rule for the local table between its place at boot, 0,
// and ours. It is never missing meanwhile.
func (r *router) moveLocal(family, to int) error {
	from := 0
	if to == 0 {
		from = prefLocal
	}
	rules, err := r.rules(family)
	if err != nil {
		return err
	}
	at := func(pref int) bool {
		return slices.ContainsFunc(rules, func(r netlink.Rule) bool {
			return r.Priority == pref && r.Table == unix.RT_TABLE_LOCAL && r.IifName == "" && r.Mark == 0
		})
	}
	if !at(from) {
		return nil // it is there, or someone else has moved it elsewhere
	}
	if !at(to) {
		rule := newRule(family, to, unix.RT_TABLE_LOCAL)
		if to == 0 {
			rule.Protocol = unix.RTPROT_KERNEL // as it was
		}
		if err := r.nl.RuleAdd(rule); err != nil {
			return fmt.Errorf("move the local table's rule: %w", err)
		}
	}
	if err := r.nl.RuleDel(newRule(family, from, unix.RT_TABLE_LOCAL)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("move the local table's rule: %w", err)
	}
	return nil
}

func (r *router) rules(family int) ([]netlink.Rule, error) {
	rules, err := dump(func() ([]netlink.Rule, error) { return r.nl.RuleList(family) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, nil // a kernel without IPv6
	}
	return rules, wrap("list rules", err)
}

// member is a sandbox's first link in A.
type member struct {
	id, task string
	link     string
	mark     uint32
}

// members lists the sandboxes that have a link in A, finished or not, and the
// names of all links of the package's making.
func (r *router) members() (found []member, names map[string]bool, err error) {
	links, err := dump(r.nl.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list interfaces: %w", err)
	}
	names = map[string]bool{}
	for _, l := range links {
		a := l.Attrs()
		if !isOurs(a.Name) || l.Type() != "veth" {
			continue
		}
		names[a.Name] = true
		if !isFirst(a.Name) {
			continue
		}
		m := member{link: a.Name, mark: markOf(a.Index)}
		m.id, m.task, _ = parseAlias(a.Alias)
		found = append(found, m)
	}
	return found, names, nil
}

// removeLinks deletes a container's links in A, and so those in I.
func (r *router) removeLinks(id string) error {
	links, err := dump(r.nl.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		if isOf(l.Attrs().Name, id) {
			errs = append(errs, deleteLink(r.nl, l))
		}
	}
	return errors.Join(errs...)
}

// removeStaleRules deletes the rules of sandboxes that have no link any more.
func (r *router) removeStaleRules(live []member, names map[string]bool) error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := r.rules(family)
		if err != nil {
			return err
		}
		for _, rule := range rules {
			var stale bool
			switch rule.Priority {
			case prefInterface:
				stale = isOurs(rule.IifName) && !names[rule.IifName]
			case prefMark:
				stale = rule.Mark&^maxSlot == markAlloc &&
					!slices.ContainsFunc(live, func(m member) bool { return m.mark == rule.Mark })
			}
			if !stale {
				continue
			}
			del := newRule(family, rule.Priority, rule.Table)
			del.IifName, del.Mark = rule.IifName, rule.Mark
			if err := r.nl.RuleDel(del); err != nil {
				errs = append(errs, fmt.Errorf("delete rule %v: %w", rule, err))
			}
		}
	}
	return errors.Join(errs...)
}
