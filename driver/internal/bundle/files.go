package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

const (
	// maxHostname bounds a hostname: a label's length in RFC 1123, one under
	// the 64 bytes of Linux's UTS namespace.
	maxHostname = 63
	// maxLabel and maxDomain are RFC 1035, section 2.3.4, as text.
	maxLabel  = 63
	maxDomain = 253

	fileHeader = "# written by bivouac\n"
)

// HostEntry is one line of a hosts file.
type HostEntry struct {
	Name    string // domain name; required
	Address string // IPv4 or IPv6 address without zone; required
}

// ResolvConf returns the contents of /etc/resolv.conf. Servers are addresses
// without zone, searches are domain names or "." for none, options are words
// of resolv.conf(5). Order is kept. Without servers the file names none, and
// the C library then asks 127.0.0.1.
func ResolvConf(servers, searches, options []string) ([]byte, error) {
	b := bytes.NewBufferString(fileHeader)
	var errs []error
	for _, s := range servers {
		addr, err := parseAddr(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("DNS server %w", err))
		}
		fmt.Fprintf(b, "nameserver %s\n", addr)
	}
	for _, s := range searches {
		if err := checkDomain(s); err != nil && s != "." {
			errs = append(errs, fmt.Errorf("DNS search domain %q: %w", s, err))
		}
	}
	for _, o := range options {
		if !isResolvOption(o) {
			errs = append(errs, fmt.Errorf(`DNS option %q: not of the form "name" or "name:number"`, o))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if len(searches) > 0 {
		fmt.Fprintf(b, "search %s\n", strings.Join(searches, " "))
	}
	if len(options) > 0 {
		fmt.Fprintf(b, "options %s\n", strings.Join(options, " "))
	}
	return b.Bytes(), nil
}

// isResolvOption reports whether o has the form of the options in
// resolv.conf(5): "edns0", "ndots:2".
func isResolvOption(o string) bool {
	name, number, hasNumber := strings.Cut(o, ":")
	if hasNumber {
		if _, err := strconv.ParseUint(number, 10, 16); err != nil {
			return false
		}
	}
	outside := func(r rune) bool { return r == '_' || notLabelRune(r) }
	return name != "" && !strings.ContainsFunc(name, outside)
}

// Hosts returns the contents of /etc/hosts: localhost, then hostname at
// address, then extra in the order given, repeats allowed. A hostname with dots
// also gets its first label as an alias. An empty hostname is left out; an
// empty address means 127.0.0.1, for a sandbox without a network.
func Hosts(hostname, address string, extra []HostEntry) ([]byte, error) {
	b := bytes.NewBufferString(fileHeader + `127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
fe00::0 ip6-localnet
ff00::0 ip6-mcastprefix
ff02::1 ip6-allnodes
ff02::2 ip6-allrouters
`)
	if address == "" {
		address = "127.0.0.1"
	}
	var errs []error
	addr, err := parseAddr(address)
	if err != nil {
		errs = append(errs, fmt.Errorf("address of the hostname %w", err))
	}
	if hostname != "" {
		if err := checkHostname(hostname); err != nil {
			errs = append(errs, fmt.Errorf("hostname %q: %w", hostname, err))
		}
		names := hostname
		if short, _, ok := strings.Cut(hostname, "."); ok {
			names += " " + short
		}
		fmt.Fprintf(b, "%s %s\n", addr, names)
	}
	for _, e := range extra {
		addr, err := parseAddr(e.Address)
		if err != nil {
			errs = append(errs, fmt.Errorf("extra host %q: address %w", e.Name, err))
		}
		if err := checkDomain(e.Name); err != nil {
			errs = append(errs, fmt.Errorf("extra host %q: %w", e.Name, err))
		}
		fmt.Fprintf(b, "%s %s\n", addr, e.Name)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// Hostname returns the contents of /etc/hostname.
func Hostname(name string) ([]byte, error) {
	if err := checkHostname(name); err != nil {
		return nil, fmt.Errorf("hostname %q: %w", name, err)
	}
	return []byte(name + "\n"), nil
}

// parseAddr parses an address, and refuses a zone: netip lets a zone hold any
// bytes, newlines too, and zones mean nothing in another network namespace.
func parseAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%q: not an IP address", s)
	}
	if addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q: has a zone, which means nothing in a sandbox", s)
	}
	return addr, nil
}

// checkHostname holds name to RFC 1123, section 2.1: labels of letters, digits
// and inner hyphens.
func checkHostname(name string) error {
	if len(name) > maxHostname {
		return fmt.Errorf("longer than %d bytes", maxHostname)
	}
	if strings.HasSuffix(name, ".") {
		return errors.New("ends in a dot")
	}
	if strings.Contains(name, "_") {
		return errors.New("contains an underscore, which RFC 1123 does not allow")
	}
	return checkDomain(name)
}

// checkDomain holds name to labels of letters, digits, underscores and inner
// hyphens; one trailing dot is allowed.
func checkDomain(name string) error {
	name = strings.TrimSuffix(name, ".")
	if name == "" {
		return errors.New("empty")
	}
	if len(name) > maxDomain {
		return fmt.Errorf("longer than %d bytes", maxDomain)
	}
	for label := range strings.SplitSeq(name, ".") {
		switch {
		case label == "":
			return errors.New("has an empty label")
		case len(label) > maxLabel:
			return fmt.Errorf("has a label longer than %d bytes", maxLabel)
		case label[0] == '-' || label[len(label)-1] == '-':
			return errors.New("has a label that starts or ends with a hyphen")
		case strings.ContainsFunc(label, notLabelRune):
			return errors.New("has characters other than letters, digits, hyphens and dots")
		}
	}
	return nil
}

// notLabelRune reports whether r is outside a domain label's characters.
func notLabelRune(r rune) bool {
	switch {
	case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '-', r == '_':
		return false
	}
	return true
}
