package bundle

import (
	"slices"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

func TestMergeArgs(t *testing.T) {
	t.Parallel()
	img := ImageConfig{Entrypoint: []string{"/entry", "-e"}, Cmd: []string{"serve"}}
	cases := []struct {
		name string
		img  ImageConfig
		o    Override
		want []string
	}{
		{"image as it is", img, Override{}, []string{"/entry", "-e", "serve"}},
		{"command and args replace cmd", img, Override{Command: "run", Args: []string{"a"}}, []string{"/entry", "-e", "run", "a"}},
		{"args alone replace cmd", img, Override{Args: []string{"a", "b"}}, []string{"/entry", "-e", "a", "b"}},
		{"entrypoint drops cmd", img, Override{Entrypoint: []string{"/other"}}, []string{"/other"}},
		{"entrypoint with args", img, Override{Entrypoint: []string{"/other"}, Args: []string{"a"}}, []string{"/other", "a"}},
		{"empty entrypoint with command", img, Override{Entrypoint: []string{}, Command: "sh"}, []string{"sh"}},
		{"blank entrypoint with command", img, Override{Entrypoint: []string{""}, Command: "sh"}, []string{"sh"}},
		{"no entrypoint in image", ImageConfig{Cmd: []string{"sh"}}, Override{}, []string{"sh"}},
		{"empty argument kept", ImageConfig{}, Override{Command: "echo", Args: []string{""}}, []string{"echo", ""}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p, err := Merge(c.img, c.o)
			must.NoError(t, err)
			must.Eq(t, c.want, p.Args)
		})
	}
}

func TestMergeEnvUserDir(t *testing.T) {
	t.Parallel()
	img := ImageConfig{
		Cmd: []string{"sh"}, User: "app", WorkingDir: "srv/../data/",
		Env: []string{"A=image", "B=image", "A=later", "DROPPED", "B2=x=y", "PATH=/img"},
	}
	p, err := Merge(img, Override{Env: map[string]string{"B": "job", "C": ""}})
	must.NoError(t, err)
	must.Eq(t, []string{"A=later", "B=job", "B2=x=y", "C=", "PATH=/img"}, p.Env)
	must.Eq(t, "app", p.User)
	must.Eq(t, "/data", p.Cwd)

	p, err = Merge(img, Override{User: "0:0", WorkDir: "../../etc", Env: map[string]string{"PATH": "/job"}})
	must.NoError(t, err)
	must.SliceContains(t, p.Env, "PATH=/job")
	must.Eq(t, "0:0", p.User)
	must.Eq(t, "/etc", p.Cwd)

	p, err = Merge(ImageConfig{Cmd: []string{"sh"}}, Override{})
	must.NoError(t, err)
	must.Eq(t, Process{Args: []string{"sh"}, Env: []string{"PATH=" + defaultPath}, Cwd: "/"}, p)
}

func TestMergeRefuses(t *testing.T) {
	t.Parallel()
	img := ImageConfig{Cmd: []string{"sh"}}
	cases := []struct {
		name string
		img  ImageConfig
		o    Override
		want string
	}{
		{"no command", ImageConfig{}, Override{}, `set "command"`},
		{"empty entrypoint alone", img, Override{Entrypoint: []string{}}, `set "command"`},
		{"empty program", ImageConfig{Cmd: []string{"", "x"}}, Override{}, "program's name is empty"},
		{"NUL in argument", img, Override{Args: []string{"sh", "s3cret\x00"}}, "argument 1: contains a NUL"},
		{"bad UTF-8 in argument", img, Override{Command: "\xff"}, "argument 0: is not valid UTF-8"},
		{"equals in key", img, Override{Env: map[string]string{"A=B": "s3cret"}}, `"A=B"`},
		{"empty key", img, Override{Env: map[string]string{"": "s3cret"}}, `key ""`},
		{"empty key in image", ImageConfig{Cmd: []string{"sh"}, Env: []string{"=s3cret"}}, Override{}, `key ""`},
		{"NUL in value", img, Override{Env: map[string]string{"K": "s3cret\x00"}}, `"K": value contains a NUL`},
		{"NUL in key", img, Override{Env: map[string]string{"K\x00": "s3cret"}}, "contains a NUL"},
		{"NUL in directory", img, Override{WorkDir: "/a\x00"}, "working directory"},
		{"NUL in user", img, Override{User: "a\x00"}, "user"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p, err := Merge(c.img, c.o)
			must.ErrorContains(t, err, c.want)
			must.Eq(t, Process{}, p)
			must.StrNotContains(t, err.Error(), "s3cret")
		})
	}
	_, err := Merge(ImageConfig{}, Override{})
	must.ErrorIs(t, err, ErrNoCommand)
}

// FuzzMerge checks that whatever an image holds, what Merge accepts makes a
// spec, and that no value reaches an error.
func FuzzMerge(f *testing.F) {
	f.Add("/entry", "serve", "A=b\nPATH=/x", "app:app", "srv", "", "a", "K", "v")
	f.Add("", "", "=x", "", "\x00", "/bin/sh", "", "", "\x00")
	f.Add("", "sh", "HOME=\xff", "0", "//..", "", "", "A=", "")
	f.Add("", "sh", "A1=\nA=", "0", "/", "", "", "A0", "")
	f.Fuzz(func(t *testing.T, entry, cmd, env, user, dir, command, arg, key, value string) {
		img := ImageConfig{
			Entrypoint: strings.Fields(entry), Cmd: strings.Fields(cmd), Env: strings.Split(env, "\n"),
			User: user, WorkingDir: dir,
		}
		p, err := Merge(img, Override{Command: command, Args: []string{arg}, Env: map[string]string{key: value}})
		if err != nil {
			must.Eq(t, Process{}, p)
			return
		}
		keys := make([]string, 0, len(p.Env))
		for _, kv := range p.Env {
			k, _, ok := strings.Cut(kv, "=")
			must.True(t, ok && k != "")
			keys = append(keys, k)
		}
		must.True(t, slices.IsSorted(keys))
		must.Eq(t, len(keys), len(slices.Compact(slices.Clone(keys))))
		must.SliceContains(t, keys, "PATH")
		_, err = Spec(Task{Root: "/r", Process: p})
		must.NoError(t, err)
	})
}
