package bundle

import (
	"errors"
	"io"
	"path"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/moby/sys/user"
	"github.com/shoenig/test/must"
)

const (
	passwdFile = `root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:App:/home/app:/bin/sh
app:x:7:7:second of the name:/:/bin/sh
nohome:x:1002:1002:::
relhome:x:1003:1003::srv:
wrap:x:4294967296:0::/:
negative:x:-1:0::/:
# not a comment to Docker
`
	groupFile = `root:x:0:
wheel:x:10:app,root
app:x:1001:
video:x:44:other,app
huge:x:4294967296:nohome
`
)

func TestResolveUser(t *testing.T) {
	t.Parallel()
	cases := []struct {
		spec string
		want User
	}{
		{"", User{Home: "/root", Groups: []uint32{10}}},
		{"root", User{Home: "/root", Groups: []uint32{10}}},
		{"app", User{UID: 1000, GID: 1001, Groups: []uint32{10, 44}, Home: "/home/app"}},
		{"1000", User{UID: 1000, GID: 1001, Groups: []uint32{10, 44}, Home: "/home/app"}},
		{"app:video", User{UID: 1000, GID: 44, Home: "/home/app"}},
		{"app:99", User{UID: 1000, GID: 99, Home: "/home/app"}},
		{"4242", User{UID: 4242, Home: "/"}},
		{"4242:4243", User{UID: 4242, GID: 4243, Home: "/"}},
		{":video", User{GID: 44, Home: "/root"}},
		{"2147483647:2147483647", User{UID: maxID, GID: maxID, Home: "/"}},
		{"relhome", User{UID: 1003, GID: 1003, Home: "/"}},
	}
	for _, c := range cases {
		t.Run("user "+c.spec, func(t *testing.T) {
			t.Parallel()
			u, err := ResolveUser(c.spec, strings.NewReader(passwdFile), strings.NewReader(groupFile))
			must.NoError(t, err)
			must.Eq(t, c.want, u)
		})
	}
}

func TestResolveUserWithoutFiles(t *testing.T) {
	t.Parallel()
	u, err := ResolveUser("", nil, nil)
	must.NoError(t, err)
	must.Eq(t, User{Home: "/"}, u)
	u, err = ResolveUser("12:34", nil, nil)
	must.NoError(t, err)
	must.Eq(t, User{UID: 12, GID: 34, Home: "/"}, u)
	_, err = ResolveUser("app", nil, nil)
	must.ErrorContains(t, err, `user "app": the image has no /etc/passwd; give a number`)
	_, err = ResolveUser("12:video", nil, nil)
	must.ErrorContains(t, err, `group "video": the image has no /etc/group; give a number`)
}

func TestResolveUserRefuses(t *testing.T) {
	t.Parallel()
	long := "x:x:1:1::/" + strings.Repeat("a", 70<<10) + ":\n"
	cases := []struct {
		name, spec    string
		passwd, group io.Reader
		want          string
	}{
		{"unknown user", "nobody", nil, nil, `user "nobody": not in the image's /etc/passwd`},
		{"unknown group", "app:audio", nil, nil, `group "audio": not in the image's /etc/group`},
		{"two colons", "app:a:b", nil, nil, `group "a:b": not in`},
		{"user number over the bound", "2147483648", nil, nil, "0-2147483647"},
		{"negative user number", "-1", nil, nil, "0-2147483647"},
		{"number that would wrap to root", "wrap", nil, nil, "give number 4294967296"},
		{"negative number in passwd", "negative", nil, nil, "give number -1"},
		{"group number that would wrap", "nohome", nil, nil, "give number 4294967296"},
		{"newline in spec", "app\nroot", nil, nil, "unprintable"},
		{"NUL in spec", "app\x00", nil, nil, "unprintable"},
		{"huge passwd", "app", strings.NewReader(strings.Repeat("\n", maxUserFileBytes+1)), nil, "/etc/passwd: larger than"},
		{"endless group", "app", nil, endless{}, "/etc/group: larger than"},
		{"long line", "x", strings.NewReader(long), nil, "token too long"},
		{"read error", "app", iotest.ErrReader(errors.New("disk gone")), nil, "/etc/passwd: disk gone"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.passwd == nil {
				c.passwd = strings.NewReader(passwdFile)
			}
			if c.group == nil {
				c.group = strings.NewReader(groupFile)
			}
			_, err := ResolveUser(c.spec, c.passwd, c.group)
			must.ErrorContains(t, err, c.want)
		})
	}
	_, err := ResolveUser("nobody", strings.NewReader(passwdFile), nil)
	must.ErrorIs(t, err, user.ErrNoPasswdEntries)
	_, err = ResolveUser("0:none", nil, strings.NewReader(groupFile))
	must.ErrorIs(t, err, user.ErrNoGroupEntries)
}

// endless is a file that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

// FuzzResolveUser checks that whatever an image's files hold, the result is in
// bounds and makes a spec.
func FuzzResolveUser(f *testing.F) {
	f.Add("app", passwdFile, groupFile)
	f.Add("app:video", passwdFile, groupFile)
	f.Add("wrap", passwdFile, groupFile)
	f.Add("", "x:x:0:4294967296::\xff:", "g:x:-5:x")
	f.Add("a", "a", "")
	f.Add("1:", "::1:::::\n", ":::,,,")
	f.Fuzz(func(t *testing.T, spec, passwd, group string) {
		u, err := ResolveUser(spec, strings.NewReader(passwd), strings.NewReader(group))
		if err != nil {
			must.Eq(t, User{}, u)
			return
		}
		must.True(t, u.UID <= maxID && u.GID <= maxID)
		must.True(t, path.IsAbs(u.Home))
		must.LessEq(t, maxGroups, len(u.Groups))
		_, err = Spec(Task{Root: "/r", Process: Process{Args: []string{"x"}, Cwd: "/"}, User: u})
		must.NoError(t, err)
	})
}
