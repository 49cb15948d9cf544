package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
)

// Options say for which sandbox a network is made.
type Options struct {
	// ID is the container ID, new for each start. Required.
	ID string
	// Task is the task's name, the same for each start. It decides which of
	// several sandboxes receives what none claims. "" means ID.
	Task string
	// Dir is where inner namespaces are bound, one file per ID, beside the
	// package's lock files; on a tmpfs, since a reboot ends them. One for
	// all attachments of a node. Required.
	Dir string
	// Ports are the container ports that this sandbox receives, TCP and UDP.
	// With none it is a candidate for the receiver of the rest. A port that
	// another sandbox of the allocation claims is an error.
	Ports []uint16
}

func (o *Options) task() string {
	if o.Task == "" {
		return o.ID
	}
	return o.Task
}

func (o *Options) validate() error {
	var errs []error
	if !validID.MatchString(o.ID) {
		errs = append(errs, fmt.Errorf("container ID %q is not a plain name", o.ID))
	}
	if !filepath.IsAbs(o.Dir) {
		errs = append(errs, fmt.Errorf("directory %q is not an absolute path", o.Dir))
	}
	if slices.Contains(o.Ports, 0) {
		errs = append(errs, errors.New("port 0 cannot be claimed"))
	}
	return errors.Join(errs...)
}

// Attachment is a sandbox's network. The fields that Planned fills in are all
// that Detach needs.
type Attachment struct {
	// ID is the container ID.
	ID string `json:"id"`
	// AllocNetNS is the path of the allocation's namespace.
	AllocNetNS string `json:"alloc_netns"`
	// Path is where the inner namespace is bound: what runsc joins.
	Path string `json:"path"`
	// Addresses are the allocation's, which the sandbox has. None: the
	// sandbox has loopback only.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Mark is the sandbox's packet mark, conntrack mark and routing table in
	// the allocation's namespace, for an operator who looks; 0 without
	// addresses.
	Mark uint32 `json:"mark,omitempty"`
}

// Planned returns what Attach with the same arguments will make, without
// making it. A record of it, written first, is enough to Detach whatever a
// crash leaves.
func Planned(allocNetNS string, o Options) *Attachment {
	return &Attachment{ID: o.ID, AllocNetNS: allocNetNS, Path: filepath.Join(o.Dir, o.ID)}
}

// Attach makes a network namespace for a sandbox behind the allocation's. What
// an earlier attempt with the same ID left is removed first. On error nothing
// is left; if it wraps os.ErrNotExist, the allocation's namespace is gone. It
// may be called concurrently, by several processes too.
func Attach(allocNetNS string, o Options) (*Attachment, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("attach network: %w", err)
	}
	o.Ports = slices.Compact(slices.Sorted(slices.Values(o.Ports)))
	a := Planned(allocNetNS, o)
	err := inAlloc(a, func(alloc *os.File, r *router) error {
		if err := errors.Join(r.remove(a), removeInner(a.Path)); err != nil {
			return err
		}
		err := r.attach(alloc, a, &o)
		if err != nil {
			err = errors.Join(err, enter(alloc), r.remove(a), removeInner(a.Path))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("attach network of %q: %w", o.ID, err)
	}
	return a, nil
}

// inAlloc runs f on a thread in the allocation's namespace, alone among all
// that work on it.
func inAlloc(a *Attachment, f func(alloc *os.File, r *router) error) error {
	alloc, err := openNetNS(a.AllocNetNS)
	if err != nil {
		return err
	}
	defer alloc.Close()
	unlock, err := lock(filepath.Dir(a.Path), alloc)
	if err != nil {
		return err
	}
	defer unlock()
	return onThread(func() error {
		if err := enter(alloc); err != nil {
			return err
		}
		r, err := newRouter()
		if err != nil {
			return err
		}
		defer r.close()
		return f(alloc, r)
	})
}

// attach makes everything, in an order in which nothing flows before the last
// step. The calling thread changes its namespace.
func (r *router) attach(alloc *os.File, a *Attachment, o *Options) error {
	ifaces, err := survey(r.nl)
	if err != nil {
		return err
	}
	in, err := newInner(a.Path)
	if err != nil {
		return err
	}
	defer in.close()
	if err := enter(alloc); err != nil || len(ifaces) == 0 {
		return err
	}
	if err := newTable().ensure(); err != nil {
		return err
	}
	if err := r.prepare(ifaces); err != nil {
		return err
	}
	if a.Mark, err = r.connect(o, in, ifaces); err != nil {
		return err
	}
	for i := range ifaces {
		a.Addresses = append(a.Addresses, ifaces[i].addrs...)
	}
	return r.steer(o, a.Mark, ifaces)
}

// remove takes a sandbox's part out of A.
func (r *router) remove(a *Attachment) error {
	return errors.Join(r.removeLinks(a.ID), r.reconcile())
}

// Detach removes a sandbox's network; the sandbox must have ended. It may be
// called for what is not there, what was made in part, and when the
// allocation's namespace is gone. After an error it should be called again.
func Detach(a *Attachment) error {
	// By the inner namespace, too: A's path may lead to another namespace by
	// now, made anew by Nomad, while the links are in the former one.
	err := inAlloc(a, func(_ *os.File, r *router) error { return r.remove(a) })
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrNotNetNS) {
		err = nil
	}
	err = errors.Join(err, onThread(func() error { return unplug(a.Path) }), removeInner(a.Path))
	return wrap(fmt.Sprintf("detach network of %q", a.ID), err)
}

// ErrBroken is returned by Check for an attachment that is no longer in force.
var ErrBroken = errors.New("the sandbox's network is gone")

// Check says whether an attachment is still in force. It returns ErrBroken if
// the allocation's namespace was made anew or its interface taken down, which
// ends the sandbox's network for good: only a new start gives it another. Any
// other error means that it could not look.
func Check(a *Attachment) error {
	err := inAlloc(a, func(_ *os.File, r *router) error {
		inner, err := openNetNS(a.Path)
		if err != nil {
			return err
		}
		inner.Close()
		if a.Mark == 0 {
			return nil
		}
		if _, err := r.nl.LinkByName(linkName(a.ID, 0)); err != nil {
			return fmt.Errorf("find interface %q: %w", linkName(a.ID, 0), err)
		}
		now, err := newTable().read()
		if err != nil {
			return err
		}
		if now.marks[linkName(a.ID, 0)] != a.Mark {
			return fmt.Errorf("nothing leads to it: %w", ErrBroken)
		}
		return nil
	})
	if errors.As(err, new(netlink.LinkNotFoundError)) || errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrNotNetNS) {
		err = fmt.Errorf("%w: %w", err, ErrBroken)
	}
	return wrap(fmt.Sprintf("check network of %q", a.ID), err)
}
