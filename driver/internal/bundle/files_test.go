package bundle

import (
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

func TestResolvConf(t *testing.T) {
	t.Parallel()
	b, err := ResolvConf([]string{"10.0.0.2", "fd00::53"}, []string{"svc.example.com", "a_b.local."}, []string{"ndots:2", "edns0", "use-vc"})
	must.NoError(t, err)
	must.Eq(t, `# written by bivouac
nameserver 10.0.0.2
nameserver fd00::53
search svc.example.com a_b.local.
options ndots:2 edns0 use-vc
`, string(b))
	b, err = ResolvConf(nil, []string{"."}, nil)
	must.NoError(t, err)
	must.Eq(t, "# written by bivouac\nsearch .\n", string(b))
}

func TestResolvConfRefuses(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name                       string
		servers, searches, options []string
		want                       string
	}{
		{"name as server", []string{"dns.example.com"}, nil, nil, "not an IP address"},
		{"port", []string{"10.0.0.2:53"}, nil, nil, "not an IP address"},
		{"newline in server", []string{"10.0.0.2\nnameserver 6.6.6.6"}, nil, nil, "not an IP address"},
		{"newline in zone", []string{"fe80::1%a\nnameserver 6.6.6.6"}, nil, nil, "has a zone"},
		{"space in search", nil, []string{"a b"}, nil, "characters other than"},
		{"newline in search", nil, []string{"a\nnameserver 6.6.6.6"}, nil, "characters other than"},
		{"empty search", nil, []string{""}, nil, "empty"},
		{"two dots", nil, []string{"a..b"}, nil, "empty label"},
		{"long search", nil, []string{strings.Repeat("a.", 130)}, nil, "longer than 253"},
		{"newline in option", nil, nil, []string{"ndots:1\nnameserver 6.6.6.6"}, "DNS option"},
		{"option number", nil, nil, []string{"ndots:x"}, "DNS option"},
		{"space in option", nil, nil, []string{"ndots:1 debug"}, "DNS option"},
		{"trailing newline in option", nil, nil, []string{"debug\n"}, "DNS option"},
		{"empty option", nil, nil, []string{""}, "DNS option"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b, err := ResolvConf(c.servers, c.searches, c.options)
			must.ErrorContains(t, err, c.want)
			must.Nil(t, b)
		})
	}
}

func TestHosts(t *testing.T) {
	t.Parallel()
	const localhost = `# written by bivouac
127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
fe00::0 ip6-localnet
ff00::0 ip6-mcastprefix
ff02::1 ip6-allnodes
ff02::2 ip6-allrouters
`
	b, err := Hosts("web-1.example", "172.26.64.5", []HostEntry{{"db_1", "10.0.0.9"}, {"db_1", "fd00::9"}})
	must.NoError(t, err)
	must.Eq(t, localhost+"172.26.64.5 web-1.example web-1\n10.0.0.9 db_1\nfd00::9 db_1\n", string(b))
	b, err = Hosts("web", "", nil)
	must.NoError(t, err)
	must.Eq(t, localhost+"127.0.0.1 web\n", string(b))
	b, err = Hosts("", "10.0.0.1", nil)
	must.NoError(t, err)
	must.Eq(t, localhost, string(b))

	_, err = Hosts("a b", "x", []HostEntry{{"h\n6.6.6.6 bank", "10.0.0.1"}, {"ok", "fe80::1%\n6.6.6.6 x"}, {"gw", "host-gateway"}})
	must.ErrorContains(t, err, `hostname "a b"`)
	must.ErrorContains(t, err, `address of the hostname "x": not an IP address`)
	must.ErrorContains(t, err, `extra host "h\n6.6.6.6 bank"`)
	must.ErrorContains(t, err, `extra host "ok": address`)
	must.ErrorContains(t, err, `extra host "gw": address "host-gateway"`)
}

func TestHostname(t *testing.T) {
	t.Parallel()
	for _, ok := range []string{"a", "web-1", "WEB.example", "0", strings.Repeat("a", 63)} {
		b, err := Hostname(ok)
		must.NoError(t, err)
		must.Eq(t, ok+"\n", string(b))
	}
	for _, bad := range []string{"", ".", "a.", "-a", "a-", "a..b", "a_b", "a b", "a\n", "é", "a\x00", strings.Repeat("a", 64)} {
		_, err := Hostname(bad)
		must.Error(t, err, must.Sprintf("hostname %q", bad))
	}
}
