package network

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// batchElements bounds one message to the kernel, which is one buffer long.
const batchElements = 500

// contents is what the table's maps hold.
type contents struct {
	marks    map[string]uint32 // by link name
	ports    map[uint16]uint32
	receiver map[byte]uint32 // by protocol family
}

// read fetches the contents, or empty ones if there is no table.
func (t *table) read() (*contents, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables socket: %w", err)
	}
	now := &contents{map[string]uint32{}, map[uint16]uint32{}, map[byte]uint32{}}
	for _, m := range []struct {
		set  *nftables.Set
		note func(key []byte, mark uint32)
	}{
		{t.marks, func(k []byte, v uint32) { now.marks[string(bytes.TrimRight(k, "\x00"))] = v }},
		{t.ports, func(k []byte, v uint32) { now.ports[binaryutil.BigEndian.Uint16(k)] = v }},
		{t.receiver, func(k []byte, v uint32) { now.receiver[k[0]] = v }},
	} {
		elements, err := c.GetSetElements(m.set)
		if err != nil {
			return nil, fmt.Errorf("read nftables map %q: %w", m.set.Name, err)
		}
		for _, e := range elements {
			mark, err := parseMark(e.Val)
			if err != nil {
				return nil, fmt.Errorf("read nftables map %q: %w", m.set.Name, err)
			}
			m.note(e.Key, mark)
		}
	}
	return now, nil
}

// elect returns the mark of who receives what no other claims: the sandbox
// whose task has the first name among those that claim nothing, or among all
// if each claims something. It is 0 if there is none.
func elect(live []member, ports map[uint16]uint32) uint32 {
	claims := map[uint32]int{}
	for _, mark := range ports {
		claims[mark] = 1
	}
	if len(live) == 0 {
		return 0
	}
	return slices.MinFunc(live, func(a, b member) int {
		return cmp.Or(cmp.Compare(claims[a.mark], claims[b.mark]), cmp.Compare(a.task, b.task), cmp.Compare(a.id, b.id))
	}).mark
}

// families are the keys of the receiver map.
var families = []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6}

// changeReceiver queues what makes mark the receiver.
func (t *table) changeReceiver(c *nftables.Conn, now *contents, mark uint32) error {
	for _, f := range families {
		old, ok := now.receiver[f]
		if ok && old == mark {
			continue
		}
		if ok {
			if err := c.SetDeleteElements(t.receiver, element([]byte{f}, old)); err != nil {
				return err
			}
		}
		if mark == 0 {
			continue
		}
		if err := c.SetAddElements(t.receiver, element([]byte{f}, mark)); err != nil {
			return err
		}
	}
	return nil
}

func element(key []byte, mark uint32) []nftables.SetElement {
	return []nftables.SetElement{{Key: key, Val: native(mark)}}
}

func portKey(port uint16) []byte { return binaryutil.BigEndian.PutUint16(port) }

// steer lets traffic through to a sandbox that is connected, in one commit.
func (r *router) steer(o *Options, mark uint32, ifaces []iface) error {
	t := newTable()
	now, err := t.read()
	if err != nil {
		return err
	}
	all, _, err := r.members()
	if err != nil {
		return err
	}
	live := slices.DeleteFunc(all, func(m member) bool { return now.marks[m.link] != m.mark && m.id != o.ID })
	for _, m := range live {
		if m.mark == mark && m.id != o.ID {
			return fmt.Errorf("mark %#x is in use by %q", mark, m.id)
		}
	}
	for _, port := range o.Ports {
		if owner, taken := now.ports[port]; taken {
			return fmt.Errorf("port %d is claimed by %s already", port, nameOf(live, owner))
		}
	}
	for chunk := range slices.Chunk(o.Ports, batchElements) {
		err := batch("claim ports", func(c *nftables.Conn) error {
			var elements []nftables.SetElement
			for _, port := range chunk {
				now.ports[port] = mark
				elements = append(elements, element(portKey(port), mark)...)
			}
			return c.SetAddElements(t.ports, elements)
		})
		if err != nil {
			return err
		}
	}
	return batch("let the sandbox's traffic through", func(c *nftables.Conn) error {
		for i := range ifaces {
			if err := t.admit(c, linkName(o.ID, i), mark, &ifaces[i]); err != nil {
				return err
			}
		}
		return t.changeReceiver(c, now, elect(live, now.ports))
	})
}

// admit queues the elements for one link.
func (t *table) admit(c *nftables.Conn, link string, mark uint32, f *iface) error {
	errs := []error{c.SetAddElements(t.marks, element(ifName(link), mark))}
	for _, a := range f.addrs {
		set := t.addrs4
		if a.Is6() {
			set = t.addrs6
		}
		errs = append(errs, c.SetAddElements(set, []nftables.SetElement{{Key: a.AsSlice()}}))
	}
	return errors.Join(errs...)
}

func nameOf(live []member, mark uint32) string {
	for _, m := range live {
		if m.mark == mark {
			return fmt.Sprintf("task %q (%s)", m.task, m.id)
		}
	}
	return "another sandbox"
}

// reconcile removes everything in A that belongs to no sandbox with a link
// there; if none is left, all that the package ever changed. It may be cut
// short anywhere and run again.
func (r *router) reconcile() error {
	live, names, err := r.members()
	if err != nil {
		return err
	}
	t := newTable()
	there, _, err := t.exists()
	if err != nil {
		return err
	}
	if there {
		if err := r.sweepTable(t, live, names); err != nil {
			return err
		}
	}
	if err := r.removeStaleRules(live, names); err != nil || len(names) > 0 {
		return err
	}
	return r.restore(t, there)
}

// sweepTable removes elements without a sandbox, and the flows that they let
// through: a later sandbox, or A, would otherwise never see their packets.
func (r *router) sweepTable(t *table, live []member, names map[string]bool) error {
	now, err := t.read()
	if err != nil {
		return err
	}
	isLive := func(mark uint32) bool {
		return slices.ContainsFunc(live, func(m member) bool { return m.mark == mark })
	}
	gone := map[uint32]bool{}
	var links, ports []nftables.SetElement
	for name, mark := range now.marks {
		if !names[name] {
			gone[mark] = true
			links = append(links, element(ifName(name), mark)...)
		}
	}
	for port, mark := range now.ports {
		if !isLive(mark) {
			gone[mark] = true
			delete(now.ports, port)
			ports = append(ports, element(portKey(port), mark)...)
		}
	}
	for chunk := range slices.Chunk(ports, batchElements) {
		err := batch("release ports", func(c *nftables.Conn) error { return c.SetDeleteElements(t.ports, chunk) })
		if err != nil {
			return err
		}
	}
	err = batch("remove the sandbox's elements", func(c *nftables.Conn) error {
		if len(links) > 0 {
			if err := c.SetDeleteElements(t.marks, links); err != nil {
				return err
			}
		}
		steered := slices.DeleteFunc(slices.Clone(live), func(m member) bool { return now.marks[m.link] != m.mark })
		return t.changeReceiver(c, now, elect(steered, now.ports))
	})
	errs := []error{err}
	for mark := range maps.Keys(gone) {
		errs = append(errs, forgetFlows(mark))
	}
	return errors.Join(errs...)
}

// restore makes A as it was before the first sandbox.
func (r *router) restore(t *table, there bool) error {
	for _, v4 := range []bool{true, false} {
		if err := r.moveLocal(familyOfV4(v4), 0); err != nil {
			return err
		}
	}
	if !there {
		return nil
	}
	former, err := t.savedSettings()
	if err != nil {
		return err
	}
	for _, s := range slices.Backward(former) {
		if err := s.write(); err != nil {
			return err
		}
	}
	return t.remove()
}
