package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Of linux/netfilter/nfnetlink_conntrack.h.
const (
	ctDelete   = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE
	ctMark     = 8                                 // CTA_MARK
	ctMarkMask = 21                                // CTA_MARK_MASK
)

// forgetFlows deletes the connection tracking entries with a mark. A kernel
// that cannot (built without it) keeps them until they expire.
func forgetFlows(mark uint32) error {
	req := nl.NewNetlinkRequest(ctDelete, unix.NLM_F_ACK)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: unix.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(ctMark, binary.BigEndian.AppendUint32(nil, mark)))
	req.AddData(nl.NewRtAttr(ctMarkMask, binary.BigEndian.AppendUint32(nil, ^uint32(0))))
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	switch {
	case err == nil, errors.Is(err, os.ErrNotExist), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return nil
	default:
		return fmt.Errorf("forget flows of mark %#x: %w", mark, err)
	}
}
