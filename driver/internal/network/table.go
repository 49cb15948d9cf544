package network

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	tableName = "bivouac"
	ifNameLen = 16 // IFNAMSIZ: a shorter name in a rule is a prefix
)

// table is A's nftables table: constant rules, and maps that hold the state.
// Each operation takes a connection of its own: one that had an error may
// have answers left in it.
type table struct {
	*nftables.Table
	marks    *nftables.Set // link name to the sandbox's mark
	ports    *nftables.Set // claimed port to the sandbox's mark
	receiver *nftables.Set // protocol family to the mark of who gets the rest
	addrs4   *nftables.Set // A's addresses that sandboxes have too
	addrs6   *nftables.Set

	saved  *nftables.Chain // never entered: former sysctls, as comments
	source *nftables.Chain
	origin *nftables.Chain
	early  *nftables.Chain
}

func newTable() *table {
	t := &table{Table: &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName}}
	// A set's ID is for the batch that makes it. Left to itself the library
	// counts them in a variable that two goroutines would race for.
	mark := func(id uint32, name string, key nftables.SetDatatype) *nftables.Set {
		s := &nftables.Set{Table: t.Table, ID: id, Name: name, KeyType: key, DataType: nftables.TypeMark, IsMap: true}
		if key == nftables.TypeIFName {
			s.KeyByteOrder = binaryutil.NativeEndian // so that nft prints it
		}
		return s
	}
	t.marks = mark(1, "marks", nftables.TypeIFName)
	t.ports = mark(2, "ports", nftables.TypeInetService)
	t.receiver = mark(3, "receiver", nftables.TypeNFProto)
	t.addrs4 = &nftables.Set{Table: t.Table, ID: 4, Name: "addrs4", KeyType: nftables.TypeIPAddr}
	t.addrs6 = &nftables.Set{Table: t.Table, ID: 5, Name: "addrs6", KeyType: nftables.TypeIP6Addr}
	t.saved = &nftables.Chain{Table: t.Table, Name: "saved"}
	t.source = &nftables.Chain{Table: t.Table, Name: "source"}
	t.origin = &nftables.Chain{Table: t.Table, Name: "origin"}
	t.early = t.base("early", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	return t
}

func (t *table) base(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return &nftables.Chain{Table: t.Table, Name: name, Type: kind, Hooknum: hook, Priority: prio, Policy: &accept}
}

// batch runs build on a fresh connection and commits what it queued.
func batch(what string, build func(c *nftables.Conn) error) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables socket: %w", err)
	}
	if err := build(c); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return wrap(what, c.Flush())
}

// exists says whether the table is there and complete: a crash can leave it
// without the rule that is committed last.
func (t *table) exists() (there, complete bool, err error) {
	c, err := nftables.New()
	if err != nil {
		return false, false, fmt.Errorf("open nftables socket: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, false, fmt.Errorf("list nftables tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(x *nftables.Table) bool { return x.Name == tableName }) {
		return false, false, nil
	}
	rules, err := c.GetRules(t.Table, t.early)
	return true, len(rules) > 0, wrap("list nftables rules", err)
}

// ensure makes the table with its constant rules, if it is not there.
func (t *table) ensure() error {
	there, complete, err := t.exists()
	if err != nil || complete {
		return err
	}
	if !there {
		if err := batch("make nftables table", t.build); err != nil {
			return err
		}
	}
	if err := t.addOriginRule(); err != nil {
		return err
	}
	return batch("complete nftables table", func(c *nftables.Conn) error {
		add(c, t.early, "", verdict(expr.VerdictJump, t.origin.Name))
		return nil
	})
}

func (t *table) build(c *nftables.Conn) error {
	c.AddTable(t.Table)
	for _, s := range []*nftables.Set{t.marks, t.ports, t.receiver, t.addrs4, t.addrs6} {
		if err := c.AddSet(s, nil); err != nil {
			return err
		}
	}
	c.AddChain(t.saved)
	c.AddChain(t.source)
	t.buildSource(c)
	c.AddChain(t.origin)
	c.AddChain(t.early)
	t.buildInbound(c)
	t.buildOutput(c)
	t.buildNAT(c)
	return t.buildForward(c)
}

// add appends one rule made of several groups of expressions.
func add(c *nftables.Conn, chain *nftables.Chain, comment string, groups ...[]expr.Any) {
	r := &nftables.Rule{Table: chain.Table, Chain: chain, Exprs: slices.Concat(groups...)}
	if comment != "" {
		r.UserData = userdata.AppendString(nil, userdata.TypeComment, comment)
	}
	c.AddRule(r)
}

// addOriginRule commits the one rule that google/nftables 0.3.0 can neither
// encode nor read back: it knows no direction of a conntrack zone. The zone of
// the original direction alone keeps equal flows of two sandboxes apart, while
// answers, which come from outside without one, are found in zone 0. The rest
// of the rule is encoded there. A second copy, after a crash, does nothing.
func (t *table) addOriginRule() error {
	rule := slices.Concat(
		load(expr.MetaKeyIIFNAME), lookupData(t.marks), set(expr.MetaKeyMARK),
		[]expr.Any{&expr.Ct{Key: expr.CtKeyZONE, SourceRegister: true, Register: reg}},
		verdict(expr.VerdictJump, t.source.Name),
	)
	var exprs []netlink.Attribute
	for _, e := range rule {
		raw, err := expr.Marshal(byte(t.Family), e)
		if ct, ok := e.(*expr.Ct); ok && err == nil {
			raw, err = zoneExpr(ct)
		}
		if err != nil {
			return fmt.Errorf("encode nftables rule: %w", err)
		}
		exprs = append(exprs, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: raw})
	}
	list, err := netlink.MarshalAttributes(exprs)
	if err != nil {
		return fmt.Errorf("encode nftables rule: %w", err)
	}
	body, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(t.Name + "\x00")},
		{Type: unix.NFTA_RULE_CHAIN, Data: []byte(t.origin.Name + "\x00")},
		{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: list},
	})
	if err != nil {
		return fmt.Errorf("encode nftables rule: %w", err)
	}
	return wrap("add nftables rule", sendRule(byte(t.Family), body))
}

// zoneExpr is `ct original zone set REGISTER`. The kernel reads 16 bits of
// the register: the slot, on the little-endian machines that gVisor runs on.
func zoneExpr(ct *expr.Ct) ([]byte, error) {
	data, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_CT_KEY, Data: binaryutil.BigEndian.PutUint32(uint32(ct.Key))},
		{Type: unix.NFTA_CT_DIRECTION, Data: []byte{directionOriginal}},
		{Type: unix.NFTA_CT_SREG, Data: binaryutil.BigEndian.PutUint32(ct.Register)},
	})
	if err != nil {
		return nil, err
	}
	return netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_EXPR_NAME, Data: []byte("ct\x00")},
		{Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: data},
	})
}

// sendRule commits one encoded rule as a batch of its own.
func sendRule(family byte, body []byte) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	header := func(family byte, res uint16) []byte {
		return append([]byte{family, unix.NFNETLINK_V0}, binaryutil.BigEndian.PutUint16(res)...)
	}
	edge := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: kind, Flags: netlink.Request},
			Data:   header(0, unix.NFNL_SUBSYS_NFTABLES),
		}
	}
	if _, err := c.SendMessages([]netlink.Message{
		edge(unix.NFNL_MSG_BATCH_BEGIN),
		{
			Header: netlink.Header{
				Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWRULE,
				Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Append,
			},
			Data: append(header(family, 0), body...),
		},
		edge(unix.NFNL_MSG_BATCH_END),
	}); err != nil {
		return err
	}
	_, err = c.Receive() // the acknowledgement, or the error
	return err
}

// save notes settings in the table, before they are changed.
func (r *router) save(former []setting) error {
	t := newTable()
	return batch("note sysctls", func(c *nftables.Conn) error {
		for _, s := range former {
			add(c, t.saved, s.String(), verdict(expr.VerdictReturn, ""))
		}
		return nil
	})
}

// savedSettings are what save noted, in its order.
func (t *table) savedSettings() ([]setting, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables socket: %w", err)
	}
	rules, err := c.GetRules(t.Table, t.saved)
	if err != nil {
		return nil, fmt.Errorf("read noted sysctls: %w", err)
	}
	var found []setting
	for _, r := range rules {
		comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
		if s, ok := parseSetting(comment); ok {
			found = append(found, s)
		}
	}
	return found, nil
}

// remove deletes the table. No table is no error.
func (t *table) remove() error {
	err := batch("delete nftables table", func(c *nftables.Conn) error {
		c.DelTable(t.Table)
		return nil
	})
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
