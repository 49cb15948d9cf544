package e2e

import (
	"archive/tar"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/bivouac-run/bivouac/internal/testimage"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hashicorp/nomad/api"
)

// mistake is a job that cannot start.
type mistake struct {
	name   string
	change func(*nomadtest.Job)
	// says is in every failure event of the task.
	says string
	// retried: Nomad tries as often as the job's restart policy says, for
	// the next attempt may succeed. Otherwise it gives up at once.
	retried bool
}

// Each mistake fails with one event per attempt that says what is wrong, and
// leaves nothing behind. Not parallel: nothing else may use the agent.
func TestMistakes(t *testing.T) {
	a := agent(t)
	table := append(configMistakes(), imageMistakes(t)...)
	runs := map[string]*nomadtest.Run{}
	for _, m := range table {
		j := nomadtest.Batch(t, busybox(t), "echo must not run")
		j.Group.RestartPolicy = nomadtest.Restarts(2)
		m.change(j)
		runs[m.name] = a.Run(t, j.Job)
	}
	for _, m := range table {
		t.Run(m.name, func(t *testing.T) {
			alloc := runs[m.name].Done(t)
			attempts := 1
			if m.retried {
				attempts = 3
			}
			failures := append(nomadtest.EventsOf(alloc, api.TaskDriverFailure), nomadtest.EventsOf(alloc, api.TaskFailedValidation)...)
			failures = append(failures, nomadtest.EventsOf(alloc, api.TaskSetupFailure)...)
			if len(failures) != attempts {
				t.Errorf("%d failure events, want %d: %s", len(failures), attempts, nomadtest.Events(alloc, "main"))
			}
			for _, e := range failures {
				if !strings.Contains(e.DisplayMessage, m.says) {
					t.Errorf("event does not say %q: %q", m.says, e.DisplayMessage)
				}
			}
			if alloc.ClientStatus != api.AllocClientStatusFailed {
				t.Errorf("allocation is %s", alloc.ClientStatus)
			}
			if n := len(nomadtest.EventsOf(alloc, api.TaskStarted)); n > 0 {
				t.Errorf("the task was started %d times", n)
			}
		})
	}
	for _, dir := range []string{filepath.Join(a.RunDir(), "tasks"), filepath.Join(a.StateDir(), "images", "v1", "tmp")} {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) > 0 {
			t.Errorf("left in %s: %v, error %v", dir, entries, err)
		}
	}
	for _, path := range []string{"/etc/bivouac-escaped", filepath.Join(a.StateDir(), "bivouac-escaped")} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("a layer wrote %s on the host", path)
		}
	}
}

func configMistakes() []mistake {
	set := func(key string, value any) func(*nomadtest.Job) {
		return func(j *nomadtest.Job) { j.Set(key, value) }
	}
	return []mistake{
		{name: "unknown key", change: set("bogus_key", true), says: "bogus_key"},
		{name: "wrong type", change: set("pids_limit", "many"), says: "number"},
		{name: "no image", change: func(j *nomadtest.Job) { delete(j.Task.Config, "image") }, says: "image"},
		{name: "negative limit", change: set("pids_limit", -1), says: "pids_limit: -1 is negative"},
		{name: "bad duration", change: set("image_pull_timeout", "soon"), says: `image_pull_timeout: "soon" is not a duration`},
		{name: "bad reference", change: set("image", "UPPER CASE"), says: "invalid image reference"},
		{name: "no such command", change: set("command", "no-such-command"), says: "the command is not in the image"},
		{name: "command not executable", change: set("command", "/etc/passwd"), says: "the command is not executable"},
		{name: "unknown user", change: func(j *nomadtest.Job) { j.Task.User = "nobody-here" }, says: "nobody-here"},
		{name: "outside image_dirs", change: set("image", "oci:/tmp/elsewhere"), says: "add its directory to plugin option image_dirs"},
	}
}

// imageMistakes need a registry, or images that are broken on purpose.
func imageMistakes(t *testing.T) []mistake {
	good := startRegistry(t)
	other := digest(t, newImage(t, "other"))
	swapped := good.push(t, "swapped:1", newImage(t, "swapped"))
	good.misbehave(func(w http.ResponseWriter, req *http.Request) bool {
		// Whoever asks for the other image's manifest gets this one's.
		req.URL.Path = strings.Replace(req.URL.Path, other, digest(t, newImage(t, "swapped")), 1)
		return false
	})
	denied, broken := startRegistry(t), startRegistry(t)
	denied.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	broken.misbehave(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusInternalServerError)
		return true
	})
	image := func(ref string) func(*nomadtest.Job) {
		return func(j *nomadtest.Job) { j.Set("image", ref) }
	}
	return []mistake{
		{name: "no such image", change: image(good.host + "/missing:1"), says: "not found"},
		{name: "no such tag", change: image(strings.TrimSuffix(swapped, ":1") + ":2"), says: "not found"},
		{name: "digest mismatch", change: image(strings.TrimSuffix(swapped, ":1") + "@" + other), says: "digest mismatch"},
		{name: "registry denies", change: image(denied.host + "/any:1"), says: "registry denied access"},
		{name: "registry fails", change: image(broken.host + "/any:1"), says: "registry unavailable", retried: true},
		{name: "registry unreachable", change: image("127.0.0.1:1/any:1"), says: "connection refused", retried: true},
		{name: "corrupt layer", change: image(corrupt(t)), says: "digest mismatch"},
		{name: "no such layout", change: image("oci:" + agent(t).ImageDir() + "/nowhere"), says: "not found"},
		{name: "layer leaves the root", change: image(escaping(t, tar.Header{Typeflag: tar.TypeReg, Name: "../../../../../../../../../etc/bivouac-escaped", Mode: 0o644})), says: "unsafe image"},
	}
}

func digest(t *testing.T, img v1.Image) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// layoutOf writes an image where the driver loads images from.
func layoutOf(t *testing.T, img v1.Image) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp(agent(t).ImageDir(), "mistake-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := testimage.Layout(dir, img); err != nil {
		t.Fatal(err)
	}
	return dir
}

// corrupt makes an image with one byte of its layer changed.
func corrupt(t *testing.T) string {
	t.Helper()
	img := newImage(t, "corrupt")
	dir := layoutOf(t, img)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	d, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "blobs", d.Algorithm, d.Hex)
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)-1] ^= 1 // of gzip's length field: what is unpacked is right
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir
}

// escaping makes an image whose layer has an entry that leaves the root.
func escaping(t *testing.T, h tar.Header) string {
	t.Helper()
	return "oci:" + layoutOf(t, imageWith(t, h, "escaped\n"))
}
