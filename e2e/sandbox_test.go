package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hashicorp/nomad/api"
)

func TestEnvironment(t *testing.T) {
	t.Parallel()
	a := agent(t)
	image := a.Image(t, "env", func(c *v1.Config) { c.Env = []string{"FROM_IMAGE=image", "BOTH=image"} })
	j := nomadtest.Batch(t, image, "env; echo ---; tr '\\0' '\\n' < /proc/1/environ")
	j.Task.Env = map[string]string{"FROM_JOB": "job", "BOTH": "job"}
	out := a.Output(t, j)
	for _, want := range []string{"FROM_IMAGE=image\n", "FROM_JOB=job\n", "BOTH=job\n", "NOMAD_TASK_NAME=main\n", "NOMAD_TASK_DIR=/local\n", "NOMAD_SECRETS_DIR=/secrets\n", "NOMAD_ALLOC_DIR=/alloc\n", "PATH=/"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the environment:\n%s", want, out)
		}
	}
	for _, leak := range []string{"CANARY", canary, "BVT_TOKEN", "BIVOUAC", "BOTH=image", "GOMAXPROCS"} {
		if strings.Contains(out, leak) {
			t.Errorf("%q is in the environment:\n%s", leak, out)
		}
	}
}

func TestNomadDirectories(t *testing.T) {
	t.Parallel()
	a := agent(t)
	j := nomadtest.Batch(t, busybox(t), `for d in /alloc /alloc/data /local /secrets /tmp; do echo x > $d/file && test "$(cat $d/file)" = x && echo "$d ok"; done
echo x 2>&1 > /alloc/logs/file || echo "/alloc/logs refused"
ln -s /etc/passwd /alloc/logs/link 2>&1 || echo "link refused"
rm -f /alloc/logs/main.stdout.0 2>&1 || echo "rm refused"
cat /secrets/from-template; echo "env $FROM_TEMPLATE"`)
	j.Task.Templates = []*api.Template{
		{EmbeddedTmpl: ptr("task {{ env \"NOMAD_TASK_NAME\" }}\n"), DestPath: ptr("secrets/from-template")},
		{EmbeddedTmpl: ptr("FROM_TEMPLATE=rendered\n"), DestPath: ptr("secrets/template.env"), Envvars: ptr(true)},
	}
	out := a.Output(t, j)
	for _, want := range []string{
		"/alloc ok", "/alloc/data ok", "/local ok", "/secrets ok", "/tmp ok",
		"/alloc/logs refused", "link refused", "rm refused", "task main", "env rendered",
	} {
		if !strings.Contains(out, want+"\n") {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
}

func TestUsers(t *testing.T) {
	t.Parallel()
	a := agent(t)
	image := a.Image(t, "user", func(c *v1.Config) { c.User = "user" })
	for _, tc := range []struct{ name, image, user, want string }{
		{"root by default", busybox(t), "", "0 0 0 root"},
		{"the job's", busybox(t), "user", "1000 1000 1000 2000 user"},
		{"the job's by number", busybox(t), "1234:5678", "1234 5678 5678 1234"},
		{"the image's", image, "", "1000 1000 1000 2000 user"},
		{"the job's over the image's", image, "root", "0 0 0 root"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			// What a user other than root must be able to do as well.
			j := nomadtest.Batch(t, tc.image, `touch /local/x /alloc/data/x /secrets/x /tmp/x || exit 9
echo $(id -u) $(id -g) $(id -G) $(id -un 2>/dev/null)`)
			j.Task.User = tc.user
			if out := a.Output(t, j); out != tc.want+"\n" {
				t.Errorf("uid, gid, groups and name: %q, want %q", out, tc.want)
			}
		})
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	a := agent(t)
	image := a.Image(t, "command", func(c *v1.Config) {
		c.Entrypoint, c.Cmd, c.WorkingDir = []string{"echo", "E"}, []string{"C"}, "/usr"
	})
	for _, tc := range []struct {
		name   string
		config map[string]any
		want   string
	}{
		{"the image's", nil, "E C"},
		{"args", map[string]any{"args": []string{"a", "b c"}}, "E a b c"},
		{"command", map[string]any{"command": "x", "args": []string{"a"}}, "E x a"},
		{"entrypoint", map[string]any{"entrypoint": []string{"sh", "-c"}, "args": []string{"pwd"}}, "/usr"},
		{"work_dir", map[string]any{"entrypoint": []string{"pwd"}, "work_dir": "/home/user"}, "/home/user"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			j := nomadtest.Batch(t, image, "")
			j.Task.Config = map[string]any{"image": image}
			for k, v := range tc.config {
				j.Set(k, v)
			}
			if out := a.Output(t, j); out != tc.want+"\n" {
				t.Errorf("output %q, want %q", out, tc.want)
			}
		})
	}
}

func TestRootAndHostname(t *testing.T) {
	t.Parallel()
	a := agent(t)
	j := nomadtest.Batch(t, busybox(t), `touch /x 2>&1 || echo "/ refused"
touch /local/x && echo "/local ok"
hostname; cat /etc/hostname; grep -c box /etc/hosts`)
	j.Set("readonly_rootfs", true).Set("hostname", "box")
	out := a.Output(t, j)
	if !strings.HasSuffix(out, "/ refused\n/local ok\nbox\nbox\n1\n") {
		t.Errorf("output: %q", out)
	}
}

// Tasks of one image share its files but not what they write.
func TestRootsAreApart(t *testing.T) {
	t.Parallel()
	a := agent(t)
	image := a.Image(t, "apart", func(c *v1.Config) { c.Labels = map[string]string{"test": "apart"} })
	j := nomadtest.Service(t, image, `echo mine > /etc/mine-$NOMAD_ALLOC_INDEX; rm /etc/group; echo ready; trap 'exit 0' TERM; while :; do sleep 0.2; done`)
	j.Group.Count = ptr(2)
	r := a.Run(t, j.Job)
	for _, alloc := range r.RunningAll(t, 2) {
		a.AwaitLog(t, alloc, "stdout", func(s string) bool { return s == "ready\n" })
		if got := a.Sh(t, alloc, "ls -d /etc/mine-* | wc -l"); got != "1" {
			t.Errorf("%s files of /etc/mine-*, want 1", got)
		}
	}
	if found := inImageRoots(t, "etc/mine-*"); len(found) > 0 {
		t.Errorf("written into the shared root: %q", found)
	}
	if out := a.Output(t, nomadtest.Batch(t, image, "ls /etc")); !strings.Contains(out, "group\n") || strings.Contains(out, "mine") {
		t.Errorf("a later task sees in /etc:\n%s", out)
	}
}

// inImageRoots globs in the unpacked images that all tasks share.
func inImageRoots(t *testing.T, pattern string) []string {
	t.Helper()
	roots, err := filepath.Glob(filepath.Join(agent(t).StateDir(), "images", "v1", "rootfs", "*", "root"))
	if err != nil || len(roots) == 0 {
		t.Fatalf("no image roots found: %v", err)
	}
	found, err := filepath.Glob(filepath.Join(agent(t).StateDir(), "images", "v1", "rootfs", "*", "root", pattern))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// A volume's mount point that the image lacks is made for the task alone.
func TestHostVolumes(t *testing.T) {
	t.Parallel()
	a := agent(t)
	const at = "/not/in/the/image"
	run := func(volume, script string, readOnly bool) string {
		j := nomadtest.Batch(t, busybox(t), script)
		j.Group.Volumes = map[string]*api.VolumeRequest{
			"v": {Name: "v", Type: "host", Source: volume, ReadOnly: readOnly},
		}
		j.Task.VolumeMounts = []*api.VolumeMount{{Volume: ptr("v"), Destination: ptr(at), ReadOnly: &readOnly}}
		return a.Output(t, j)
	}
	if out := run("shared", "echo from-task > "+at+"/file && echo written", false); out != "written\n" {
		t.Errorf("writing to the volume: %q", out)
	}
	raw, err := os.ReadFile(filepath.Join(shared.dirs[0], "file"))
	if err != nil || string(raw) != "from-task\n" {
		t.Errorf("on the host the file holds %q, error %v", raw, err)
	}
	if out := run("readonly", "cat "+at+"/file; echo x > "+at+"/file 2>&1 || echo refused", true); !strings.HasPrefix(out, "from-task\n") || !strings.HasSuffix(out, "refused\n") {
		t.Errorf("reading from the volume: %q", out)
	}
	// The job may narrow what the agent allows.
	if out := run("shared", "echo x > "+at+"/file 2>&1 || echo refused", true); !strings.HasSuffix(out, "refused\n") {
		t.Errorf("writing to a volume mounted read-only: %q", out)
	}
	if found := inImageRoots(t, "not"); len(found) > 0 {
		t.Errorf("the mount point is in the shared root: %q", found)
	}
}

// Nomad tells a driver nothing of network mode host, which is its default as
// well: such a task gets loopback only, and never the node's network. (Mode
// none is not here: with Nomad 1.11.3 no driver's task starts in it, "network
// already configured but not found in state".)
func TestNoNetworkIsTheNodes(t *testing.T) {
	t.Parallel()
	a := agent(t)
	for mode, want := range map[string]string{"": "lo", "host": "lo", "bridge": "eth0 lo"} {
		t.Run("mode "+mode, func(t *testing.T) {
			t.Parallel()
			j := nomadtest.Batch(t, busybox(t), `echo $(sed -n 's/^ *\([a-z0-9]*\):.*/\1/p' /proc/net/dev | sort)`)
			if mode != "" {
				j.Group.Networks = []*api.NetworkResource{{Mode: mode}}
			}
			if out := a.Output(t, j); out != want+"\n" {
				t.Errorf("interfaces: %q, want %q", out, want)
			}
		})
	}
}
