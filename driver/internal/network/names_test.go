package network

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func TestLinkNames(t *testing.T) {
	t.Parallel()
	const longestName = 15 // IFNAMSIZ less the terminator
	for i := range maxInterfaces {
		name := linkName("web.0123456789abcdef", i)
		if len(name) != longestName || !isOurs(name) || !isOf(name, "web.0123456789abcdef") || isFirst(name) != (i == 0) {
			t.Errorf("the name of link %d is %q", i, name)
		}
		if isOf(name, "web.0123456789abcdee") {
			t.Errorf("%q is another container's too", name)
		}
	}
	for _, name := range []string{"", "eth0", "bvk", "bvk0", "bvk0123456789-", "bvk0123456789-00", "bvk0123456789a0", "veth01234567890"} {
		if isOurs(name) {
			t.Errorf("%q is taken for ours", name)
		}
	}
}

func TestAliases(t *testing.T) {
	t.Parallel()
	for _, task := range []string{"web", "a task of many words", ""} {
		id, got, ok := parseAlias(alias("web.1", task))
		if id != "web.1" || got != task || !ok {
			t.Errorf("%q: %q, %q, %v", task, id, got, ok)
		}
	}
	if s := alias("web.1", strings.Repeat("x", 300)); len(s) != maxAlias {
		t.Errorf("an alias of %d bytes", len(s))
	}
	if _, _, ok := parseAlias("someone else's"); ok {
		t.Error("another's alias is taken for ours")
	}
}

func TestHardwareAddressesAreLocalAndDiffer(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for i := range 4 {
		for _, side := range []string{"alloc", "sandbox"} {
			mac := hardwareAddr("web.1", i, side)
			if mac[0]&3 != 2 || seen[mac.String()] {
				t.Errorf("%v", mac)
			}
			seen[mac.String()] = true
		}
	}
}

func TestElect(t *testing.T) {
	t.Parallel()
	a, b, c := member{id: "a.1", task: "a", mark: 1}, member{id: "b.1", task: "b", mark: 2}, member{id: "c.1", task: "c", mark: 3}
	for _, tc := range []struct {
		name  string
		live  []member
		ports map[uint16]uint32
		want  uint32
	}{
		{"nobody", nil, nil, 0},
		{"the only one", []member{b}, nil, 2},
		{"the only one, with a claim", []member{b}, map[uint16]uint32{80: 2}, 2},
		{"the first by name", []member{c, b, a}, nil, 1},
		{"one without claims", []member{a, b, c}, map[uint16]uint32{80: 1}, 2},
		{"all claim", []member{c, b}, map[uint16]uint32{80: 2, 81: 3}, 2},
		{"a claim of one that is gone", []member{c, b}, map[uint16]uint32{80: 9}, 2},
	} {
		if got := elect(tc.live, tc.ports); got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.want)
		}
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	s := setting{"net/ipv4/conf/eth0/forwarding", "0"}
	if got, ok := parseSetting(s.String()); got != s || !ok {
		t.Errorf("%v, %v", got, ok)
	}
	for _, bad := range []string{"", "net/ipv4/x", "net/../../etc/passwd=x", "kernel/core_pattern=x", "/net/x=1"} {
		if _, ok := parseSetting(bad); ok {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestAnAttachmentSurvivesItsRecord(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.attach(Options{ID: "web.1", Task: "web"})
	raw, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	var read Attachment
	if err := json.Unmarshal(raw, &read); err != nil || !reflect.DeepEqual(&read, a) {
		t.Errorf("%s: %+v, %v", raw, read, err)
	}
}
