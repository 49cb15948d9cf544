// Package jobspecs holds example jobs. This test reads each as Nomad does and
// holds its `config` blocks to the driver's schema: an example with a key that
// does not exist, or no longer does, fails.
package jobspecs

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bivouac-run/bivouac/driver"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hcldec"
	hcljson "github.com/hashicorp/hcl/v2/json"
	"github.com/hashicorp/nomad/helper/pluginutils/hclspecutils"
)

// nomad runs the pinned Nomad's command line, which needs no agent to parse.
func nomad(t *testing.T, args ...string) []byte {
	t.Helper()
	path := os.Getenv("BIVOUAC_NOMAD")
	if _, err := os.Stat(path); err != nil {
		t.Skip("BIVOUAC_NOMAD names no Nomad: run make tools")
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("nomad %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return out
}

func examples(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.nomad.hcl")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples (%v)", err)
	}
	return files
}

// parsedJob is the part of a job that is looked at here.
type parsedJob struct {
	Job struct {
		TaskGroups []struct {
			Tasks []parsedTask
		}
	}
}

type parsedTask struct {
	Name, Driver string
	Config       json.RawMessage
}

func TestConfigsFitTheSchema(t *testing.T) {
	t.Parallel()
	decoder := taskDecoder(t)
	for _, file := range examples(t) {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			var parsed parsedJob
			if err := json.Unmarshal(nomad(t, "job", "run", "-output", file), &parsed); err != nil {
				t.Fatal(err)
			}
			seen := 0
			for _, g := range parsed.Job.TaskGroups {
				for _, task := range g.Tasks {
					if task.Driver != driver.Name {
						continue
					}
					seen++
					if diags := decode(decoder, task.Config); diags.HasErrors() {
						t.Errorf("task %q: %v", task.Name, diags)
					}
				}
			}
			if seen == 0 {
				t.Errorf("no task of it uses the driver %q", driver.Name)
			}
		})
	}
}

// The check above is worth something only if it can fail.
func TestUnknownKeyIsRefused(t *testing.T) {
	t.Parallel()
	decoder := taskDecoder(t)
	for _, config := range []string{`{"image": "x", "privileged": true}`, `{"command": "sh"}`, `{"image": "x", "args": 1}`} {
		if diags := decode(decoder, []byte(config)); !diags.HasErrors() {
			t.Errorf("config %s fits the schema", config)
		}
	}
	if diags := decode(decoder, []byte(`{"image": "x"}`)); diags.HasErrors() {
		t.Error(diags)
	}
}

func taskDecoder(t *testing.T) hcldec.Spec {
	t.Helper()
	spec, err := driver.New(hclog.NewNullLogger()).TaskConfigSchema()
	if err != nil {
		t.Fatal(err)
	}
	decoder, diags := hclspecutils.Convert(spec)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return decoder
}

func decode(decoder hcldec.Spec, config []byte) hcl.Diagnostics {
	file, diags := hcljson.Parse(config, "config.json")
	if diags.HasErrors() {
		return diags
	}
	_, diags = hcldec.Decode(file.Body, decoder, nil)
	return diags
}

func TestFormat(t *testing.T) {
	t.Parallel()
	nomad(t, append([]string{"fmt", "-check"}, examples(t)...)...)
}

func TestReadmeListsEveryJob(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range examples(t) {
		if !strings.Contains(string(readme), "]("+file+")") {
			t.Errorf("README.md has no line for %s", file)
		}
	}
}
