package network

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

const (
	// linkPrefix begins the name of every link that the package makes in A.
	linkPrefix = "bvk"
	// linkStem is what the links of one container have in common: prefix,
	// hash, dash. One character follows; IFNAMSIZ leaves 15.
	linkStem = len(linkPrefix) + 2*5 + len("-")
	// maxInterfaces is how many names one more character gives.
	maxInterfaces = 36

	aliasPrefix = "bivouac "
	maxAlias    = 255 // linux/if.h, IFALIASZ less the terminator

	// protocol marks our rules and routes (linux/rtnetlink.h: values from
	// 5 on are user space's, this one is nobody's there).
	protocol = 0xb1

	// Rule preferences. They lie below all that other programs choose, so
	// that moving the local table from 0 changes nothing for theirs.
	prefInterface = 100 // from a sandbox: the local table first
	prefMark      = 101 // to a sandbox
	prefLocal     = 102 // the local table's new place

	// markAlloc in a ct mark says that the flow is A's own. A sandbox's
	// mark, and the number of its routing table, is its slot above it.
	markAlloc = 0xb1000000
	maxSlot   = 0xffff // conntrack zones have 16 bits
)

// The router's address on every veth. The first 256 link-local addresses are
// reserved, so no host chooses one by itself (RFC 3927, section 2.1).
var (
	gateway4 = netip.MustParseAddr("169.254.0.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

func gatewayFor(a netip.Addr) netip.Addr {
	if a.Is4() {
		return gateway4
	}
	return gateway6
}

// validID is what runsc accepts, less what is not a plain file name.
var validID = regexp.MustCompile(`^[A-Za-z0-9_+-][A-Za-z0-9_+.-]{0,127}$`)

// linkName is the name in A of the i-th link of a container.
func linkName(id string, i int) string {
	sum := sha256.Sum256([]byte(id))
	return fmt.Sprintf("%s%x-%s", linkPrefix, sum[:5], strconv.FormatInt(int64(i), maxInterfaces))
}

// isOurs says whether a link's name is of linkName's making.
func isOurs(name string) bool {
	return len(name) == linkStem+1 && strings.HasPrefix(name, linkPrefix) && name[linkStem-1] == '-'
}

// isOf says whether a link belongs to a container.
func isOf(name, id string) bool {
	return isOurs(name) && name[:linkStem] == linkName(id, 0)[:linkStem]
}

// isFirst says whether a link stands for its container: there is always one.
func isFirst(name string) bool { return isOurs(name) && name[linkStem] == '0' }

// hardwareAddr is a locally administered address for one end of a veth pair.
func hardwareAddr(id string, i int, side string) net.HardwareAddr {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d/%s", id, i, side))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}

// alias is what a link says of its owner.
func alias(id, task string) string {
	s := aliasPrefix + id + " " + task
	return s[:min(len(s), maxAlias)]
}

// parseAlias is the reverse of alias.
func parseAlias(s string) (id, task string, ok bool) {
	rest, ok := strings.CutPrefix(s, aliasPrefix)
	if !ok {
		return "", "", false
	}
	return strings.Cut(rest, " ")
}

// markOf is the mark of the sandbox whose first link has this index. Indexes
// are not reused while a namespace lives, so neither are marks for long.
func markOf(linkIndex int) uint32 { return markAlloc | uint32(linkIndex%maxSlot+1) }
