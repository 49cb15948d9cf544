package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/nomad/client/lib/cgroupslib"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// pattern is what our driver made of a task: sandboxes of runsc itself get the
// same options, runtime spec and files, with names of their own.
type pattern struct {
	t *task
	// common are runsc's path and options for every command, sandbox those
	// for create and start, create the options of create itself.
	common, sandbox, create []string
	// files are the runtime spec and those it mounts, by path.
	files map[string]string
}

// newPattern reads what the driver wrote for a task that runs.
func newPattern(t *task) (*pattern, error) {
	var shim struct {
		Run     []string        `json:"run"`
		Delete  []string        `json:"delete"`
		Overlay json.RawMessage `json:"overlay"`
	}
	if err := readState(filepath.Join(t.stateDir(), "shim.json"), &shim); err != nil {
		return nil, err
	}
	run, del := slices.Index(shim.Run, "run"), slices.Index(shim.Delete, "delete")
	if run < 0 || del < 0 || len(shim.Overlay) > 0 {
		return nil, errors.New("the shim does more than one runsc run: teach the peer to do the same")
	}
	p := &pattern{t: t, common: shim.Delete[:del], sandbox: shim.Run[:run], files: map[string]string{}}
	for _, arg := range shim.Run[run+1 : len(shim.Run)-1] { // the last one is the container ID
		if arg != "--detach" { // create always does
			p.create = append(p.create, arg)
		}
	}
	return p, p.readBundle()
}

// readBundle reads the runtime spec and the files that it mounts.
func (p *pattern) readBundle() error {
	config := filepath.Join(p.t.stateDir(), "config.json")
	raw, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	p.files[config] = string(raw)
	var spec specs.Spec
	if err := json.Unmarshal(raw, &spec); err != nil {
		return fmt.Errorf("decode runtime spec: %w", err)
	}
	for _, m := range spec.Mounts {
		info, err := os.Stat(m.Source)
		if err != nil || !info.Mode().IsRegular() {
			continue // a directory, or a type such as proc
		}
		raw, err := os.ReadFile(m.Source)
		if err != nil {
			return err
		}
		p.files[m.Source] = string(raw)
	}
	return nil
}

// readState decodes the payload of one of the driver's state files.
func readState(path string, v any) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var envelope struct {
		Data json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal(raw, &envelope); err != nil {
		return fmt.Errorf("decode %q: %w", path, err)
	}
	return json.Unmarshal(envelope.Data, v)
}

// sandbox is one that runsc runs without the driver.
type sandbox struct {
	common, sandbox, create    []string
	id, allocID, allocDir, dir string
	scope                      cgroupslib.Lifecycle
	pid                        int
	// created is how long `runsc create` took, of the last start.
	created time.Duration
}

// newSandbox makes what is there before `runsc create`, the bundle included.
func (p *pattern) newSandbox(h *host) (*sandbox, error) {
	allocID, err := newAllocID()
	if err != nil {
		return nil, err
	}
	allocDir, err := makeAllocDir(h, allocID)
	if err != nil {
		return nil, err
	}
	s := &sandbox{
		id: "raw." + allocID[:18], allocID: allocID, allocDir: allocDir,
		scope: cgroupslib.Factory(allocID, taskName, false),
	}
	s.dir = filepath.Join(h.run, "raw", "tasks", s.id)
	root := filepath.Join(h.run, "raw", "runsc")
	// What the shim binds to these two of the driver's task is an ordinary
	// directory here: the peer has no mount namespace to make.
	logs, scratch := filepath.Join(s.dir, "logs"), filepath.Join(s.dir, "scratch")
	for _, dir := range []string{s.dir, root, logs, scratch} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := s.scope.Setup(); err != nil {
		return nil, err
	}
	names := strings.NewReplacer( // the first that matches at a place wins
		p.t.stateDir(), s.dir,
		filepath.Join(p.t.p.runDir, "runsc"), root,
		p.t.cfg.AllocDir, allocDir,
		p.t.cfg.AllocID, allocID,
		p.t.config.ContainerID, s.id,
	)
	for path, content := range p.files {
		to := names.Replace(path)
		if to == path {
			continue // neither side's own: a file of the machine
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(to, []byte(names.Replace(content)), 0o644); err != nil {
			return nil, err
		}
	}
	rename := func(args []string) []string {
		var renamed []string
		for _, a := range args {
			renamed = append(renamed, names.Replace(a))
		}
		return renamed
	}
	s.common, s.sandbox, s.create = rename(p.common), rename(p.sandbox), rename(p.create)
	return s, nil
}

// command runs runsc as the driver does: nothing of our environment, /dev/null
// for the standard files.
func (s *sandbox) command(ctx context.Context, options []string, args ...string) error {
	args = slices.Concat(options[1:], args)
	cmd := exec.CommandContext(ctx, options[0], args...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Run(); err != nil {
		log, _ := os.ReadFile(filepath.Join(s.dir, "runsc.log"))
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, log)
	}
	return nil
}

// start is `runsc create` and `runsc start`.
func (s *sandbox) start(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	if err := s.command(ctx, s.sandbox, slices.Concat([]string{"create"}, s.create, []string{s.id})...); err != nil {
		return 0, err
	}
	s.created = time.Since(began)
	if err := s.command(ctx, s.sandbox, "start", s.id); err != nil {
		return 0, err
	}
	took := time.Since(began)
	raw, err := os.ReadFile(filepath.Join(s.dir, "sandbox.pid"))
	if err != nil {
		return 0, err
	}
	s.pid, err = strconv.Atoi(strings.TrimSpace(string(raw)))
	return took, err
}

// exec is `runsc exec`.
func (s *sandbox) exec(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	err := s.command(ctx, s.common, "exec", s.id, "/bin/true")
	return time.Since(began), err
}

// stop is `runsc kill`, the wait for the sandbox, `runsc delete`.
func (s *sandbox) stop(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	if err := s.command(ctx, s.common, "kill", s.id, "KILL"); err != nil {
		return 0, err
	}
	for {
		_, err := unix.Wait4(s.pid, nil, 0, nil)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return 0, fmt.Errorf("wait for sandbox: %w", err)
		}
	}
	if err := s.command(ctx, s.common, "delete", s.id); err != nil {
		return 0, err
	}
	took := time.Since(began)
	reapOrphans()
	return took, nil
}

// remove takes everything back, whatever state the sandbox is in.
func (s *sandbox) remove(ctx context.Context) error {
	killed := poll(ctx, 10*time.Second, func(context.Context) error {
		pids, err := scopePIDs(s.allocID)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		reapOrphans()
		return fmt.Errorf("processes %v do not end", pids)
	})
	_ = s.command(ctx, s.common, "delete", "--force", s.id) // mostly it is gone
	reapOrphans()
	return errors.Join(killed, s.scope.Teardown(), os.RemoveAll(s.allocDir), os.RemoveAll(s.dir))
}
