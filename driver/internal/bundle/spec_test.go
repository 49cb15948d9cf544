package bundle

import (
	"bytes"
	"encoding/json"
	"flag"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/shoenig/test/must"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

// smallest is the least that Spec accepts.
func smallest() Task {
	return Task{Root: "/var/lib/bivouac/rootfs", Process: Process{Args: []string{"sh"}, Cwd: "/"}}
}

// fullest sets every field, with mounts out of order.
func fullest() Task {
	return Task{
		Root: "/var/lib/bivouac/rootfs", ReadOnlyRoot: true,
		Process:  Process{Args: []string{"python", "-m", "http.server"}, Env: []string{"A1=x", "A=y", "PATH=/bin"}, Cwd: "/work", User: "app"},
		User:     User{UID: 1000, GID: 1001, Groups: []uint32{10, 1001, 44, 10}, Home: "/home/app"},
		Hostname: "agent-7", Capabilities: []string{"net_bind_service", "CAP_CHOWN", "chown"},
		Mounts: []Mount{
			{Source: "/n/logs", Destination: "/alloc/logs", ReadOnly: true},
			{Source: "/n/alloc", Destination: "/alloc"},
			{Source: "/n/work", Destination: "/work", Propagation: "host-to-task"},
			{Source: "/n/deep", Destination: "/alloc/logs/deep", Propagation: "private"},
			{Source: "/n/hosts", Destination: "/etc/hosts"},
		},
		NetNS: "/var/run/netns/7", CgroupsPath: "/nomad.slice/share.slice/7.main.scope",
		Limits: Limits{
			CPUShares: 4000, CPUQuota: 200000, CPUPeriod: 100000, CPUs: "0-3,8",
			MemoryBytes: 16 << 30, MemoryReservationBytes: 8 << 30, PidsMax: 512,
		},
		ShmBytes: 1 << 20, Annotations: map[string]string{"com.example.team": "a"},
	}
}

func TestSpecGolden(t *testing.T) {
	t.Parallel()
	schema := runtimeSchema(t)
	full, err := Spec(fullest())
	must.NoError(t, err)
	tty, err := ExecProcess(full.Process, []string{"bash", "-l"}, true)
	must.NoError(t, err)
	small, err := Spec(smallest())
	must.NoError(t, err)
	withExec := *small
	withExec.Process = tty

	for name, s := range map[string]*specs.Spec{"smallest": small, "fullest": full, "exec": &withExec} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := json.MarshalIndent(s, "", "  ")
			must.NoError(t, err)
			got = append(got, '\n')
			file := filepath.Join("testdata", name+".json")
			if *update {
				must.NoError(t, os.WriteFile(file, got, 0o644))
			}
			want, err := os.ReadFile(file)
			must.NoError(t, err)
			must.Eq(t, string(want), string(got))

			doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(want))
			must.NoError(t, err)
			must.NoError(t, schema.Validate(doc))
		})
	}
}

// TestSchemaRefuses shows that the schema can say no.
func TestSchemaRefuses(t *testing.T) {
	t.Parallel()
	schema := runtimeSchema(t)
	s, err := Spec(smallest())
	must.NoError(t, err)
	s.Linux.Namespaces[0].Type = "galaxy"
	b, err := json.Marshal(s)
	must.NoError(t, err)
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	must.NoError(t, err)
	must.Error(t, schema.Validate(doc))
}

// runtimeSchema compiles the JSON schema that comes with the runtime spec's
// module, at the version this module is built with.
func runtimeSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}",
		"github.com/opencontainers/runtime-spec").Output()
	must.NoError(t, err)
	c := jsonschema.NewCompiler()
	c.UseLoader(schemaLoader{})
	c.DefaultDraft(jsonschema.Draft4) // only the top file says which draft it is
	schema, err := c.Compile(filepath.Join(strings.TrimSpace(string(out)), "schema", "config-schema.json"))
	must.NoError(t, err)
	return schema
}

// schemaLoader reads the schema's files, and mends a pointer in
// defs.json of runtime-spec v1.3.0 that lacks its slash.
type schemaLoader struct{}

func (schemaLoader) Load(url string) (any, error) {
	b, err := os.ReadFile(strings.TrimPrefix(url, "file://"))
	if err != nil {
		return nil, err
	}
	b = bytes.ReplaceAll(b, []byte(`"#definitions/`), []byte(`"#/definitions/`))
	return jsonschema.UnmarshalJSON(bytes.NewReader(b))
}

// TestSpecCoversRunsc compares with the spec that runsc writes for itself.
func TestSpecCoversRunsc(t *testing.T) {
	t.Parallel()
	runsc := os.Getenv("BIVOUAC_RUNSC")
	if runsc == "" {
		if os.Getenv("BIVOUAC_CI") == "1" {
			t.Fatal("BIVOUAC_CI=1 but BIVOUAC_RUNSC names no runsc")
		}
		t.Skip("BIVOUAC_RUNSC names no runsc")
	}
	runsc, err := filepath.Abs(runsc)
	must.NoError(t, err)
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), runsc, "spec")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	must.NoError(t, err, must.Sprintf("runsc spec: %s", out))
	b, err := os.ReadFile(filepath.Join(dir, "config.json"))
	must.NoError(t, err)
	var theirs specs.Spec
	must.NoError(t, json.Unmarshal(b, &theirs))

	ours, err := Spec(smallest())
	must.NoError(t, err)
	must.Positive(t, len(theirs.Linux.Namespaces))
	for _, ns := range theirs.Linux.Namespaces {
		must.SliceContains(t, ours.Linux.Namespaces, ns)
	}
	types := make(map[string]string)
	for _, m := range ours.Mounts {
		types[m.Destination] = m.Type
	}
	must.Positive(t, len(theirs.Mounts))
	for _, m := range theirs.Mounts {
		must.Eq(t, m.Type, types[m.Destination], must.Sprintf("mount at %s", m.Destination))
	}
}

// TestSpecRefuses spoils one thing at a time.
func TestSpecRefuses(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name  string
		spoil func(*Task)
		want  string
	}{
		{"no root", func(x *Task) { x.Root = "" }, `root "": empty`},
		{"relative root", func(x *Task) { x.Root = "rootfs" }, "not absolute"},
		{"node's root", func(x *Task) { x.Root = "/" }, `is "/" itself`},
		{"unclean root", func(x *Task) { x.Root = "/a/../b" }, `write "/b"`},
		{"no arguments", func(x *Task) { x.Process.Args = nil }, "no command"},
		{"NUL in argument", func(x *Task) { x.Process.Args = []string{"a\x00"} }, "NUL"},
		{"no directory", func(x *Task) { x.Process.Cwd = "" }, "working directory"},
		{"relative directory", func(x *Task) { x.Process.Cwd = "a" }, "working directory"},
		{"environment without value", func(x *Task) { x.Process.Env = []string{"A"} }, `key "A"`},
		{"environment twice", func(x *Task) { x.Process.Env = []string{"A=1", "A=2"} }, `"A": set twice`},
		{"NUL in home", func(x *Task) { x.User.Home = "/\x00" }, `"HOME": value contains a NUL`},
		{"user -1", func(x *Task) { x.User.UID = math.MaxUint32 }, "number 4294967295"},
		{"group -1", func(x *Task) { x.User.Groups = []uint32{math.MaxUint32} }, "number 4294967295"},
		{"hostname", func(x *Task) { x.Hostname = "a_b" }, `hostname "a_b"`},
		{"long hostname", func(x *Task) { x.Hostname = strings.Repeat("a", 64) }, "longer than 63"},
		{"capability", func(x *Task) { x.Capabilities = []string{"ALL"} }, `capability "ALL": unknown`},
		{"relative netns", func(x *Task) { x.NetNS = "netns/7" }, "network namespace"},
		{"node's netns", func(x *Task) { x.NetNS = "/proc/1/ns/net" }, "below /proc"},
		{"relative cgroup", func(x *Task) { x.CgroupsPath = "a:b:c" }, `cgroup "a:b:c"`},
		{"root cgroup", func(x *Task) { x.CgroupsPath = "/" }, `cgroup "/"`},
		{"shm", func(x *Task) { x.ShmBytes = -1 }, "/dev/shm"},
		{"annotation for runsc", func(x *Task) { x.Annotations = map[string]string{"dev.gvisor.flag.host-uds": "all"} }, "dev.gvisor.flag.host-uds"},
		{"annotation in capitals", func(x *Task) { x.Annotations = map[string]string{"Dev.gVisor.x": ""} }, "Dev.gVisor.x"},
		{"annotation for another sandbox", func(x *Task) { x.Annotations = map[string]string{"io.kubernetes.cri.container-type": "container"} }, "container-type"},
		{"annotation for cri-o", func(x *Task) { x.Annotations = map[string]string{"io.kubernetes.cri-o.SandboxID": "b"} }, "SandboxID"},
		{"annotation without key", func(x *Task) { x.Annotations = map[string]string{"": "b"} }, "empty key"},
		{"annotation with NUL", func(x *Task) { x.Annotations = map[string]string{"a": "\x00"} }, `annotation "a"`},
		{"shares", func(x *Task) { x.Limits.CPUShares = 1 }, "CPU shares 1"},
		{"shares over", func(x *Task) { x.Limits.CPUShares = math.MaxUint64 }, "CPU shares"},
		{"quota", func(x *Task) { x.Limits.CPUQuota = -1 }, "CPU quota in microseconds -1"},
		{"period", func(x *Task) { x.Limits.CPUPeriod = 1000001 }, "CPU period"},
		{"memory", func(x *Task) { x.Limits.MemoryBytes = -1 }, "memory limit"},
		{"reservation", func(x *Task) { x.Limits.MemoryReservationBytes = -1 }, "memory reservation"},
		{"reservation over limit", func(x *Task) { x.Limits.MemoryBytes, x.Limits.MemoryReservationBytes = 1, 2 }, "above the limit"},
		{"pids", func(x *Task) { x.Limits.PidsMax = -1 }, "limit of processes"},
		{"cpus words", func(x *Task) { x.Limits.CPUs = "all" }, "allowed CPUs"},
		{"cpus backwards", func(x *Task) { x.Limits.CPUs = "3-1" }, "allowed CPUs"},
		{"cpus trailing comma", func(x *Task) { x.Limits.CPUs = "1," }, "allowed CPUs"},
		{"cpus sign", func(x *Task) { x.Limits.CPUs = "+1" }, "allowed CPUs"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			task := smallest()
			c.spoil(&task)
			s, err := Spec(task)
			must.ErrorContains(t, err, c.want)
			must.Nil(t, s)
		})
	}
}

func TestSpecRefusesMounts(t *testing.T) {
	t.Parallel()
	for _, dest := range []string{
		"", "a", "/", "/a/", "/a/../b", "//a", "/a\x00", "/proc", "/proc/sys", "/sys", "/sys/fs/cgroup", "/dev", "/dev/shm", "/dev/null",
	} {
		task := smallest()
		task.Mounts = []Mount{{Source: "/n", Destination: dest}}
		_, err := Spec(task)
		must.ErrorContains(t, err, "destination", must.Sprintf("destination %q", dest))
	}
	for _, dest := range []string{"/process", "/device", "/system/x", "/a/proc"} {
		task := smallest()
		task.Mounts = []Mount{{Source: "/", Destination: dest}}
		_, err := Spec(task)
		must.NoError(t, err)
	}
	task := smallest()
	task.Mounts = []Mount{
		{Source: "n", Destination: "/a"}, {Source: "/n", Destination: "/b"}, {Source: "/m", Destination: "/b"},
		{Source: "/n", Destination: "/c", Propagation: "bidirectional"}, {Source: "/n", Destination: "/d", Propagation: "odd"},
	}
	_, err := Spec(task)
	must.ErrorContains(t, err, `mount "/a": source "n": not absolute`)
	must.ErrorContains(t, err, `mount "/b": destination given twice`)
	must.ErrorContains(t, err, `mount "/c": propagation "bidirectional"`)
	must.ErrorContains(t, err, `mount "/d": propagation "odd": unknown`)
}

func TestSpecReportsEveryProblem(t *testing.T) {
	t.Parallel()
	_, err := Spec(Task{
		Hostname: "-", Capabilities: []string{"X"}, Mounts: []Mount{{}}, NetNS: "x", CgroupsPath: "x",
		Limits: Limits{CPUs: "x"}, ShmBytes: -1, Annotations: map[string]string{"dev.gvisor.x": ""},
		Process: Process{Env: []string{"X"}},
	})
	for _, want := range []string{
		"root", "no command", "working directory", "hostname", "capability", "mount", "network namespace", "cgroup",
		"allowed CPUs", "/dev/shm", "annotation", "environment",
	} {
		must.ErrorContains(t, err, want)
	}
}

func TestSpecSharesNoMemory(t *testing.T) {
	t.Parallel()
	task := fullest()
	s, err := Spec(task)
	must.NoError(t, err)
	before, err := json.Marshal(s)
	must.NoError(t, err)
	task.Process.Args[0], task.Process.Env[0], task.Annotations["x"] = "changed", "changed", "changed"
	task.User.Groups[0], task.Capabilities[0], task.Mounts[0].Source = 9, "changed", "changed"
	p, err := ExecProcess(s.Process, []string{"x"}, true)
	must.NoError(t, err)
	p.Env[0], p.Capabilities.Bounding[0], p.User.AdditionalGids[0], p.Rlimits[0].Hard = "changed", "changed", 9, 9
	after, err := json.Marshal(s)
	must.NoError(t, err)
	must.Eq(t, string(before), string(after))
}

func TestSpecCapabilities(t *testing.T) {
	t.Parallel()
	must.SliceNotContains(t, DefaultCapabilities(), "NET_RAW")
	s, err := Spec(smallest())
	must.NoError(t, err)
	must.Len(t, len(DefaultCapabilities()), s.Process.Capabilities.Bounding)
	task := smallest()
	task.Capabilities = []string{}
	s, err = Spec(task)
	must.NoError(t, err)
	must.Eq(t, &specs.LinuxCapabilities{}, s.Process.Capabilities)
}

func TestSpecKeepsHomeAndHostname(t *testing.T) {
	t.Parallel()
	task := fullest()
	task.Process.Env = []string{"HOSTNAME=other", "HOME=/else"}
	s, err := Spec(task)
	must.NoError(t, err)
	must.Eq(t, []string{"HOME=/else", "HOSTNAME=other"}, s.Process.Env)
}

func TestExecProcess(t *testing.T) {
	t.Parallel()
	s, err := Spec(fullest())
	must.NoError(t, err)
	p, err := ExecProcess(s.Process, []string{"ls"}, false)
	must.NoError(t, err)
	want := *s.Process
	want.Args = []string{"ls"}
	must.Eq(t, &want, p)

	base := *s.Process
	umask := uint32(0o27)
	base.Env, base.User.Umask = []string{"TERM=screen"}, &umask
	p, err = ExecProcess(&base, []string{"ls"}, true)
	must.NoError(t, err)
	must.True(t, p.Terminal)
	must.Eq(t, []string{"TERM=screen"}, p.Env)
	must.Eq(t, umask, *p.User.Umask)

	_, err = ExecProcess(nil, []string{"ls"}, false)
	must.ErrorContains(t, err, "no process")
	_, err = ExecProcess(s.Process, nil, false)
	must.ErrorContains(t, err, "exec: no command")
}
