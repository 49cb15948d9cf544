package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"
	"unicode"

	"github.com/moby/sys/user"
)

const (
	// maxUserFileBytes bounds an image's passwd and group file, each. Debian's
	// are under 2 KiB.
	maxUserFileBytes = 1 << 20
	// maxGroups is NGROUPS_MAX (linux/limits.h), which gVisor keeps to as well.
	maxGroups = 65536
	// maxID is the highest user or group number accepted, containerd's and
	// moby/sys/user's bound.
	maxID = math.MaxInt32
)

// User is a user as the kernel knows it. The zero value is root.
type User struct {
	UID    uint32   // user number
	GID    uint32   // primary group number
	Groups []uint32 // supplementary groups, in the order of the group file; GID need not be among them
	Home   string   // home directory, absolute; "" = "/"
}

// ResolveUser looks up spec, "user[:group]" with names or numbers, in an
// image's /etc/passwd and /etc/group, by Docker's rules: a number need not be
// listed, a name must be, "" is user 0, and a group given outright replaces
// the user's supplementary groups.
//
// A nil reader means that the image lacks the file. Either file may be hostile:
// one over 1 MiB is an error. Numbers are at most 2147483647. A home directory
// that is not an absolute, printable path becomes "/". An unknown user matches
// user.ErrNoPasswdEntries, an unknown group user.ErrNoGroupEntries.
func ResolveUser(spec string, passwd, group io.Reader) (User, error) {
	if strings.ContainsFunc(spec, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return User{}, fmt.Errorf("user %q: contains unprintable characters", spec)
	}
	pw, err := bounded(passwd)
	if err != nil {
		return User{}, fmt.Errorf("image's /etc/passwd: %w", err)
	}
	gr, err := bounded(group)
	if err != nil {
		return User{}, fmt.Errorf("image's /etc/group: %w", err)
	}
	eu, err := user.GetExecUser(spec, nil, pw, gr)
	if err != nil {
		return User{}, userError(spec, err, pw == nil, gr == nil)
	}
	// The library checks numbers in spec but not those in the files, where
	// 4294967296 would become user 0.
	ids := append([]int{eu.Uid, eu.Gid}, eu.Sgids...)
	if i := slices.IndexFunc(ids, func(id int) bool { return id < 0 || id > maxID }); i >= 0 {
		return User{}, fmt.Errorf("user %q: the image's user files give number %d, outside 0 to %d", spec, ids[i], maxID)
	}
	if len(eu.Sgids) >= maxGroups { // the primary group joins them in the spec
		return User{}, fmt.Errorf("user %q: in %d groups, more than %d", spec, len(eu.Sgids), maxGroups-1)
	}
	u := User{UID: uint32(eu.Uid), GID: uint32(eu.Gid), Home: cleanHome(eu.Home)}
	for _, g := range eu.Sgids {
		u.Groups = append(u.Groups, uint32(g))
	}
	return u, nil
}

// userError rewords the library's errors so that they name the file and say
// what to do.
func userError(spec string, err error, noPasswd, noGroup bool) error {
	name, group, _ := strings.Cut(spec, ":")
	switch {
	case errors.Is(err, user.ErrNoPasswdEntries) && noPasswd:
		return fmt.Errorf("user %q: the image has no /etc/passwd; give a number: %w", name, err)
	case errors.Is(err, user.ErrNoPasswdEntries):
		return fmt.Errorf("user %q: not in the image's /etc/passwd: %w", name, err)
	case errors.Is(err, user.ErrNoGroupEntries) && noGroup:
		return fmt.Errorf("group %q: the image has no /etc/group; give a number: %w", group, err)
	case errors.Is(err, user.ErrNoGroupEntries):
		return fmt.Errorf("group %q: not in the image's /etc/group: %w", group, err)
	}
	return fmt.Errorf("user %q: %w", spec, err)
}

// bounded reads all of r, or fails if that is too much. It keeps nil as nil.
func bounded(r io.Reader) (io.Reader, error) {
	if r == nil {
		return nil, nil
	}
	b, err := io.ReadAll(io.LimitReader(r, maxUserFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxUserFileBytes {
		return nil, fmt.Errorf("larger than %d bytes", maxUserFileBytes)
	}
	return bytes.NewReader(b), nil
}

// cleanHome makes a home directory from a hostile file fit for HOME.
func cleanHome(home string) string {
	bad := func(r rune) bool { return r == unicode.ReplacementChar || unicode.IsControl(r) }
	if !path.IsAbs(home) || strings.ContainsFunc(home, bad) {
		return "/"
	}
	return home
}
