// Package docs holds the documentation. This test compares what it says of
// options with the schemas themselves, and follows its links.
package docs

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/bivouac-run/bivouac/driver"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hcldec"
	"github.com/hashicorp/hcl/v2/hclparse"
	"github.com/hashicorp/nomad/helper/pluginutils/hclspecutils"
	"github.com/hashicorp/nomad/plugins/shared/hclspec"
)

// option is a row of an option table.
type option struct{ kind, byDefault string }

func TestDriverOptionsAreDocumented(t *testing.T) {
	t.Parallel()
	page := read(t, "reference/driver.md")
	d := driver.New(hclog.NewNullLogger())
	plugin, err := d.ConfigSchema()
	if err != nil {
		t.Fatal(err)
	}
	task, err := d.TaskConfigSchema()
	if err != nil {
		t.Fatal(err)
	}
	compare(t, "Plugin options", documented(t, page, "Plugin options"), schema(t, plugin))
	compare(t, "Task options", documented(t, page, "Task options"), schema(t, task))
}

func compare(t *testing.T, section string, got, want map[string]option) {
	t.Helper()
	for _, key := range slices.Sorted(maps.Keys(want)) {
		g, ok := got[key]
		switch w := want[key]; {
		case !ok:
			t.Errorf("%s: %q is in the schema and not in the table", section, key)
		case g.kind != w.kind:
			t.Errorf("%s: %q is a %s, the table says %s", section, key, w.kind, g.kind)
		case w.byDefault != "" && g.byDefault != w.byDefault:
			t.Errorf("%s: the default of %q is %s, the table says %s", section, key, w.byDefault, g.byDefault)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[key]; !ok {
			t.Errorf("%s: %q is in the table and not in the schema", section, key)
		}
	}
}

var optionRow = regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| ([^|]+) \\| ([^|]+) \\|")

// documented reads the table of a section.
func documented(t *testing.T, page, section string) map[string]option {
	t.Helper()
	_, rest, ok := strings.Cut(page, "\n## "+section+"\n")
	if !ok {
		t.Fatalf("no section %q", section)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	options := map[string]option{}
	for _, m := range optionRow.FindAllStringSubmatch(rest, -1) {
		options[m[1]] = option{m[2], strings.Trim(m[3], "`")}
	}
	return options
}

// schema reads a schema. A default that the schema does not have is "".
func schema(t *testing.T, spec *hclspec.Spec) map[string]option {
	t.Helper()
	options := map[string]option{}
	for key, s := range spec.GetObject().GetAttributes() {
		var o option
		if d := s.GetDefault(); d != nil {
			o.byDefault = strings.Trim(d.GetDefault().GetLiteral().GetValue(), `"`)
			s = d.GetPrimary()
		}
		a := s.GetAttr()
		if a == nil {
			t.Fatalf("%q is no attribute: teach this test about blocks", key)
		}
		o.kind = a.GetType()
		if a.GetRequired() {
			o.byDefault = "required"
		}
		options[key] = o
	}
	return options
}

// The sample configuration of an agent has no key that the plugin refuses.
func TestSampleConfiguration(t *testing.T) {
	t.Parallel()
	spec, err := driver.New(hclog.NewNullLogger()).ConfigSchema()
	if err != nil {
		t.Fatal(err)
	}
	decoder, diags := hclspecutils.Convert(spec)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	file, diags := hclparse.NewParser().ParseHCLFile("../deploy/nomad/gvisor.hcl")
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	config, err := pluginConfig(file.Body)
	if err != nil {
		t.Fatal(err)
	}
	if _, diags := hcldec.Decode(config, decoder, nil); diags.HasErrors() {
		t.Error(diags)
	}
}

// pluginConfig finds plugin "gvisor" { config { … } }.
func pluginConfig(body hcl.Body) (hcl.Body, error) {
	content, _, diags := body.PartialContent(&hcl.BodySchema{
		Blocks: []hcl.BlockHeaderSchema{{Type: "plugin", LabelNames: []string{"name"}}},
	})
	if diags.HasErrors() {
		return nil, diags
	}
	for _, plugin := range content.Blocks {
		if plugin.Labels[0] != driver.Name {
			continue
		}
		inner, _, diags := plugin.Body.PartialContent(&hcl.BodySchema{Blocks: []hcl.BlockHeaderSchema{{Type: "config"}}})
		if diags.HasErrors() {
			return nil, diags
		}
		if len(inner.Blocks) == 1 {
			return inner.Blocks[0].Body, nil
		}
	}
	return nil, fmt.Errorf("no config block of plugin %q", driver.Name)
}

// The job in the README is one of the examples, which are tested.
func TestReadmeJobIsAnExample(t *testing.T) {
	t.Parallel()
	readme := read(t, "../README.md")
	for _, m := range regexp.MustCompile("(?s)```hcl\n(job .*?)```").FindAllStringSubmatch(readme, -1) {
		name := regexp.MustCompile(`^job "([a-z]+)"`).FindStringSubmatch(m[1])
		if name == nil {
			t.Errorf("a job without a name: %.40q", m[1])
			continue
		}
		example := read(t, "../jobspecs/"+name[1]+".nomad.hcl")
		if !strings.Contains(example, m[1]) {
			t.Errorf("the README's job %q is not what jobspecs/%s.nomad.hcl says", name[1], name[1])
		}
	}
}

var link = regexp.MustCompile(`\]\(([^)#:]+)(#[^):]*)?\)`)

func TestLinksLeadSomewhere(t *testing.T) {
	t.Parallel()
	pages := []string{"../README.md", "../CONTRIBUTING.md", "../SECURITY.md", "../CHANGELOG.md", "../jobspecs/README.md"}
	err := filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if filepath.Ext(path) == ".md" {
			pages = append(pages, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		for _, m := range link.FindAllStringSubmatch(read(t, page), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(page), m[1])); err != nil {
				t.Errorf("%s: link to %s: %v", page, m[1], err)
			}
		}
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
