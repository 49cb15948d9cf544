package bundle

import (
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// ExecProcess returns the process for `runsc exec --process` that runs args
// beside base, the Process of a spec from Spec: same user, environment, working
// directory, capabilities, limits and no_new_privileges. With tty it has a
// terminal, and TERM=xterm unless base sets TERM. Base is not changed, and the
// result shares no memory with it or with args.
func ExecProcess(base *specs.Process, args []string, tty bool) (*specs.Process, error) {
	if base == nil {
		return nil, errors.New("exec: the task's spec has no process")
	}
	if len(args) == 0 {
		return nil, errors.New("exec: no command")
	}
	if err := checkArgs(args); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	env := slices.Clone(base.Env)
	if tty {
		env = withDefault(env, "TERM", "xterm")
		sortEnv(env)
	}
	p := &specs.Process{
		Terminal:        tty,
		User:            base.User,
		Args:            slices.Clone(args),
		Env:             env,
		Cwd:             base.Cwd,
		Rlimits:         slices.Clone(base.Rlimits),
		NoNewPrivileges: base.NoNewPrivileges,
	}
	p.User.AdditionalGids = slices.Clone(base.User.AdditionalGids)
	if m := base.User.Umask; m != nil {
		umask := *m
		p.User.Umask = &umask
	}
	if c := base.Capabilities; c != nil {
		p.Capabilities = &specs.LinuxCapabilities{
			Bounding:    slices.Clone(c.Bounding),
			Effective:   slices.Clone(c.Effective),
			Inheritable: slices.Clone(c.Inheritable),
			Permitted:   slices.Clone(c.Permitted),
			Ambient:     slices.Clone(c.Ambient),
		}
	}
	return p, nil
}
