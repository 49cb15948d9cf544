// Package network gives each sandbox a network namespace of its own, joined by
// a veth pair to the allocation's, so that the allocation's stays as the CNI
// plugins left it.
//
// runsc takes the addresses and routes off every interface of the namespace it
// joins. In the allocation's own namespace (A) that ends the network of the
// next task, of a restart, of sidecars, and of Nomad's CNI CHECK. So each start
// gets a fresh inner namespace (I), which runsc may empty, and A becomes its
// router:
//
//	node ── eth0 [A: 10.0.0.7/24]                 one veth pair for each
//	              │  policy routing,               interface of A that
//	              │  table inet bivouac            has an address
//	              bvk…-0 169.254.0.1 fe80::1
//	              │
//	              eth0 [I: 10.0.0.7/32, default via 169.254.0.1]
//
// I has the same addresses, the same interface names and MTU, and a route for
// each of A's. Nothing is translated as long as two parties do not use the
// same source port to the same destination. Neighbours are permanent on both
// sides, so nobody asks by ARP or ND who has an address that both have.
//
// What enters A from outside for one of its addresses goes, in this order:
//
//  1. where its connection was sent before (ct mark);
//  2. to A's kernel, if A began the flow or has a socket for it: a sidecar
//     keeps the ports it listens on;
//  3. to the sandbox that claims the destination port;
//  4. to the receiver: the first by task name of the sandboxes that claim
//     nothing, or of all if each claims something. It does not depend on the
//     order of starts, so a restart does not move it. Pings go there too.
//
// All state is in A's kernel objects: links named after the container ID, their
// aliases, the elements of the table's maps, and sysctls' former values as
// comments in the table. It goes when A goes, and Detach needs nothing but the
// ID to remove it after a crash at any point.
//
// Nothing is changed in the node's own namespace, and the package refuses to
// take it for an allocation's.
//
// Left out: egress rules (the CNI plugin's side), and a path between two
// sandboxes of one allocation, which both have its address: they meet through
// a port of the node. A sandbox reaches sidecars at 169.254.0.1 or fe80::1;
// sidecars reach a sandbox at the allocation's address, on claimed ports only,
// since the output hook cannot ask for a listening socket.
//
// Known to be wrong: addresses that A gets after a task's start are not in I
// before its restart. The ct mark and the packet mark inside A belong to this
// package. Automatic rule preferences (`ip rule add` without one) that are
// chosen in A meanwhile land before ours.
package network
