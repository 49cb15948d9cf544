package bundle

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"unicode/utf8"
)

// defaultPath is the PATH of a process for which neither image nor job sets
// one: Docker's value (moby v28.5.2, oci/defaults.go).
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// ErrNoCommand is returned by Merge when neither image nor job names anything
// to run.
var ErrNoCommand = errors.New(`no command: set "command" in the task's config, or use an image with an ENTRYPOINT or CMD`)

// ImageConfig is what an OCI image config says about the process to run. All
// of it is hostile input.
type ImageConfig struct {
	Entrypoint []string // first arguments; empty = none
	Cmd        []string // arguments after Entrypoint; empty = none
	Env        []string // "KEY=value"; a later entry wins, one without "=" is dropped as Docker does
	User       string   // "user[:group]"; "" = root
	WorkingDir string   // "" = "/"; a relative one is taken from "/"
}

// Override is what a Nomad job says about the process to run. The zero value
// runs the image as it is.
type Override struct {
	// Entrypoint replaces the image's and drops the image's Cmd; nil keeps
	// both. Empty, or one empty string as `docker run --entrypoint ""` sends,
	// means no entrypoint at all.
	Entrypoint []string
	// Command, with Args after it, replaces the image's Cmd; "" = not set.
	Command string
	// Args without a Command replace the image's Cmd; empty = not set.
	Args []string
	// Env wins over the image's, key by key. Keys must be non-empty and hold
	// no "=".
	Env map[string]string
	// WorkDir is the working directory; "" = the image's. A relative one is
	// taken from "/".
	WorkDir string
	// User is "user[:group]", names or numbers; "" = the image's.
	User string
}

// Process is what to run, before its user is looked up in the image.
type Process struct {
	Args []string // program and arguments; never empty after Merge
	Env  []string // "KEY=value", sorted by key, keys unique; has PATH after Merge
	Cwd  string   // absolute and clean
	User string   // "user[:group]" for ResolveUser; "" = root
}

// Merge says what to run, given an image and a job, by Docker's rules. All
// problems come back in one joined error; ErrNoCommand is among them when
// there is nothing to run.
func Merge(img ImageConfig, o Override) (Process, error) {
	var errs []error
	args, err := mergeArgs(img, o)
	errs = append(errs, err)
	env, err := mergeEnv(img.Env, o.Env)
	errs = append(errs, err)

	cwd := o.WorkDir
	if cwd == "" {
		cwd = img.WorkingDir
	}
	if err := checkText(cwd); err != nil {
		errs = append(errs, fmt.Errorf("working directory %q: %w", cwd, err))
	}
	user := o.User
	if user == "" {
		user = img.User
	}
	if err := checkText(user); err != nil {
		errs = append(errs, fmt.Errorf("user %q: %w", user, err))
	}
	if err := errors.Join(errs...); err != nil {
		return Process{}, err
	}
	return Process{Args: args, Env: env, Cwd: path.Clean("/" + cwd), User: user}, nil
}

// mergeArgs joins entrypoint and command (moby v28.5.2, daemon/commit.go;
// Nomad v1.11.3, drivers/docker, for Command and Args).
func mergeArgs(img ImageConfig, o Override) ([]string, error) {
	entrypoint, cmd := img.Entrypoint, img.Cmd
	if o.Entrypoint != nil {
		entrypoint, cmd = o.Entrypoint, nil
	}
	if len(entrypoint) == 1 && entrypoint[0] == "" {
		entrypoint = nil
	}
	if o.Command != "" {
		cmd = slices.Concat([]string{o.Command}, o.Args)
	} else if len(o.Args) > 0 {
		cmd = o.Args
	}
	args := slices.Concat(entrypoint, cmd)
	return args, checkArgs(args)
}

// mergeEnv lays the job's environment over the image's.
func mergeEnv(image []string, job map[string]string) ([]string, error) {
	env := map[string]string{"PATH": defaultPath}
	for _, kv := range image {
		if k, v, ok := strings.Cut(kv, "="); ok {
			env[k] = v
		}
	}
	maps.Copy(env, job)

	out := make([]string, 0, len(env))
	var errs []error
	for _, k := range slices.Sorted(maps.Keys(env)) {
		if strings.Contains(k, "=") {
			errs = append(errs, fmt.Errorf(`environment key %q: contains "="`, k))
			continue
		}
		kv := k + "=" + env[k]
		errs = append(errs, checkEnv(kv))
		out = append(out, kv)
	}
	return out, errors.Join(errs...)
}

// checkArgs refuses an argument list that cannot be executed.
func checkArgs(args []string) error {
	if len(args) == 0 {
		return ErrNoCommand
	}
	var errs []error
	if args[0] == "" {
		errs = append(errs, errors.New("argument 0: the program's name is empty"))
	}
	for i, a := range args {
		if err := checkText(a); err != nil {
			errs = append(errs, fmt.Errorf("argument %d: %w", i, err))
		}
	}
	return errors.Join(errs...)
}

// checkEnv refuses a malformed "KEY=value". Its errors name only the key.
func checkEnv(kv string) error {
	k, v, ok := strings.Cut(kv, "=")
	if !ok || k == "" {
		return fmt.Errorf("environment key %q: empty, or without a value", k)
	}
	if err := checkText(k); err != nil {
		return fmt.Errorf("environment key %q: %w", k, err)
	}
	if err := checkText(v); err != nil {
		return fmt.Errorf("environment variable %q: value %w", k, err)
	}
	return nil
}

// checkText refuses what cannot pass through JSON and execve unchanged.
func checkText(s string) error {
	if strings.IndexByte(s, 0) >= 0 {
		return errors.New("contains a NUL byte")
	}
	if !utf8.ValidString(s) {
		return errors.New("is not valid UTF-8, which the runtime spec's JSON needs")
	}
	return nil
}
