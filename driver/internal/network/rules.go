package network

import (
	"errors"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Directions of a flow (linux/netfilter/nf_conntrack_tuple_common.h, IP_CT_DIR_…).
const directionOriginal, directionReply = 0, 1

// reg is the one register that the rules use.
const reg = unix.NFT_REG_1

// Offsets and lengths in headers (RFC 791, 8200, 9293, 768, 4443).
const (
	ip4Source, ip4Dest, ip4AddrLen = 12, 16, 4
	ip6Source, ip6Dest, ip6AddrLen = 8, 24, 16
	destPort, portLen              = 2, 2
	icmp6Type                      = 0
	// Multicast listeners and neighbours: 130 to 137, and 143 (RFC 3810).
	icmp6FirstLocal, icmp6LastLocal = 130, 143
)

// buildSource fills the chain for what comes from a sandbox: it must have one
// of the sandbox's addresses as its source.
func (t *table) buildSource(c *nftables.Conn) {
	add(c, t.source, "", family(unix.NFPROTO_IPV4), network(ip4Source, ip4AddrLen), lookup(t.addrs4), verdict(expr.VerdictAccept, ""))
	add(c, t.source, "", family(unix.NFPROTO_IPV6), network(ip6Source, ip6AddrLen), lookup(t.addrs6), verdict(expr.VerdictAccept, ""))
	add(c, t.source, "", verdict(expr.VerdictDrop, ""))
}

// buildInbound makes the chain that decides who gets a packet. It comes after
// destination NAT, so that a redirection in A to a sidecar stays one.
func (t *table) buildInbound(c *nftables.Conn) {
	const afterNAT = -50
	in := c.AddChain(t.base("inbound", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRef(afterNAT)))
	accept := verdict(expr.VerdictAccept, "")
	add(c, in, "", load(expr.MetaKeyIIFNAME), equal(ifName("lo")), accept)
	// A sandbox owns the flows that it begins, and no other: an answer with the
	// address and port of somebody else, which it can send since all share the
	// address, must not make the flow its own.
	add(c, in, "", loadCt(expr.CtKeyDIRECTION), equal([]byte{directionOriginal}),
		load(expr.MetaKeyIIFNAME), lookupData(t.marks), setCt(), accept)
	add(c, in, "", load(expr.MetaKeyIIFNAME), lookupData(t.marks), accept)
	add(c, in, "neighbours are A's", family(unix.NFPROTO_IPV6), protocolIs(unix.IPPROTO_ICMPV6),
		transport(icmp6Type, 1), between(icmp6FirstLocal, icmp6LastLocal), accept)
	add(c, in, "", loadCt(expr.CtKeyMARK), equal(native(markAlloc)), accept)
	add(c, in, "", loadCt(expr.CtKeyMARK), differs(native(0)), set(expr.MetaKeyMARK), accept)
	add(c, in, "A began it", loadCt(expr.CtKeyDIRECTION), equal([]byte{directionReply}), accept)
	add(c, in, "", family(unix.NFPROTO_IPV4), network(ip4Dest, ip4AddrLen), notIn(t.addrs4), accept)
	add(c, in, "", family(unix.NFPROTO_IPV6), network(ip6Dest, ip6AddrLen), notIn(t.addrs6), accept)
	// Whether wildcard or not: without a socket the rule ends here.
	add(c, in, "A has a socket", []expr.Any{&expr.Socket{Key: expr.SocketKeyWildcard, Register: reg}},
		value(native(markAlloc)), setCt(), accept)
	for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		add(c, in, "", protocolIs(proto), transport(destPort, portLen), lookupData(t.ports),
			set(expr.MetaKeyMARK), setCt(), accept)
	}
	add(c, in, "", load(expr.MetaKeyNFPROTO), lookupData(t.receiver), set(expr.MetaKeyMARK), setCt())
}

// buildOutput makes the chain that sends A's own packets to a sandbox instead
// of to A: for a claimed port, or in answer to the sandbox.
func (t *table) buildOutput(c *nftables.Conn) {
	out := c.AddChain(t.base("output", nftables.ChainTypeRoute, nftables.ChainHookOutput, nftables.ChainPriorityMangle))
	add(c, out, "", loadCt(expr.CtKeyDIRECTION), equal([]byte{directionReply}),
		loadCt(expr.CtKeyMARK), differs(native(0)), differs(native(markAlloc)), set(expr.MetaKeyMARK), verdict(expr.VerdictAccept, ""))
	toItself := [][]expr.Any{
		join(family(unix.NFPROTO_IPV4), network(ip4Dest, ip4AddrLen), lookup(t.addrs4)),
		join(family(unix.NFPROTO_IPV6), network(ip6Dest, ip6AddrLen), lookup(t.addrs6)),
	}
	for _, dest := range toItself {
		for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			add(c, out, "", dest, loadCt(expr.CtKeyDIRECTION), equal([]byte{directionOriginal}),
				protocolIs(proto), transport(destPort, portLen), lookupData(t.ports), set(expr.MetaKeyMARK), setCt())
		}
	}
}

// buildNAT makes the chain that changes a source address only where the
// sandbox would take it for its own. That there is a NAT chain at all makes
// the kernel choose another source port where two flows would be the same.
func (t *table) buildNAT(c *nftables.Conn) {
	nat := c.AddChain(t.base("nat", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource))
	add(c, nat, "", load(expr.MetaKeyOIFNAME), lookupData(t.marks), family(unix.NFPROTO_IPV4),
		network(ip4Source, ip4AddrLen), lookup(t.addrs4), value(gateway4.AsSlice()), sourceNAT(unix.NFPROTO_IPV4))
	add(c, nat, "", load(expr.MetaKeyOIFNAME), lookupData(t.marks), family(unix.NFPROTO_IPV6),
		network(ip6Source, ip6AddrLen), lookup(t.addrs6), value(gateway6.AsSlice()), sourceNAT(unix.NFPROTO_IPV6))
}

// buildForward makes the chain that keeps A from routing for anyone but the
// sandboxes, unless it did so before.
func (t *table) buildForward(c *nftables.Conn) error {
	fwd := c.AddChain(t.base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter))
	accept := verdict(expr.VerdictAccept, "")
	add(c, fwd, "", load(expr.MetaKeyIIFNAME), lookupData(t.marks), accept)
	add(c, fwd, "", load(expr.MetaKeyOIFNAME), lookupData(t.marks), accept)
	for _, f := range []struct {
		proto byte
		path  string
	}{{unix.NFPROTO_IPV4, "net/ipv4/ip_forward"}, {unix.NFPROTO_IPV6, "net/ipv6/conf/all/forwarding"}} {
		now, ok, err := read(f.path)
		if err != nil {
			return err
		}
		if ok && now.value == "0" {
			add(c, fwd, "", family(f.proto), verdict(expr.VerdictDrop, ""))
		}
	}
	return nil
}

// The rest gives nft's words for what google/nftables spells out. All of it
// passes values through reg.

func join(groups ...[]expr.Any) (all []expr.Any) {
	for _, g := range groups {
		all = append(all, g...)
	}
	return all
}

func load(key expr.MetaKey) []expr.Any { return []expr.Any{&expr.Meta{Key: key, Register: reg}} }

func set(key expr.MetaKey) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, SourceRegister: true, Register: reg}}
}

func loadCt(key expr.CtKey) []expr.Any { return []expr.Any{&expr.Ct{Key: key, Register: reg}} }

func setCt() []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: reg}}
}

func value(v []byte) []expr.Any { return []expr.Any{&expr.Immediate{Register: reg, Data: v}} }

func equal(v []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: v}}
}

func differs(v []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: v}}
}

func between(first, last byte) []expr.Any {
	return []expr.Any{&expr.Range{Op: expr.CmpOpEq, Register: reg, FromData: []byte{first}, ToData: []byte{last}}}
}

func family(proto byte) []expr.Any { return join(load(expr.MetaKeyNFPROTO), equal([]byte{proto})) }

func protocolIs(proto byte) []expr.Any {
	return join(load(expr.MetaKeyL4PROTO), equal([]byte{proto}))
}

func network(offset, length uint32) []expr.Any {
	return []expr.Any{&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length, DestRegister: reg}}
}

func transport(offset, length uint32) []expr.Any {
	return []expr.Any{&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length, DestRegister: reg}}
}

func lookup(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID}}
}

func notIn(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID, Invert: true}}
}

// lookupData replaces the key in reg by what the map has for it.
func lookupData(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: s.Name, SetID: s.ID}}
}

func sourceNAT(proto uint32) []expr.Any {
	return []expr.Any{&expr.NAT{Type: expr.NATTypeSourceNAT, Family: proto, RegAddrMin: reg}}
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

func native(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

func ifName(name string) []byte {
	b := make([]byte, ifNameLen)
	copy(b, name)
	return b
}

var errNoMark = errors.New("not a mark")

func parseMark(b []byte) (uint32, error) {
	if len(b) != 4 {
		return 0, errNoMark
	}
	return binaryutil.NativeEndian.Uint32(b), nil
}
