package main

import (
	"bytes"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// These tests hold the source tree to its own rules: who may import whom and
// what may be linked in; style_test.go says what must be documented and how
// large things may grow. Each failure gives the reason of its rule. A rule that turns out wrong is changed
// here, in the commit that needs it, not worked around.

const module = "github.com/bivouac-run/bivouac"

// binaries are the main packages that ship.
var binaries = []string{".", "./driver/shim/bivouac-shim"}

// testOnly are packages that nothing but tests and tools use. What ships must
// not import them, and the rules for what ships do not bind them.
var testOnly = []string{"./e2e/...", "./internal/nomadtest/...", "./internal/nettest/...", "./internal/testimage/...", "./tools/..."}

var update = flag.Bool("update", false, "write deps.txt anew")

// An importRule forbids the packages in `in`, less those in `but`, to import
// what is in `ban`, less what is in `allow`. Patterns are import paths, "./"
// is this module, a last element "..." also matches everything below.
type importRule struct {
	in, but, ban, allow []string
	why                 string
}

const (
	nomad   = "github.com/hashicorp/nomad/"
	mcp     = "github.com/modelcontextprotocol/go-sdk/..."
	sockets = "the parts are separate processes that meet in sockets and files; linked together, one could not be upgraded or crash alone"
	wrapped = "one package wraps each outside program or library, so that its errors, versions and quirks are dealt with in one place"
)

var importRules = []importRule{{
	in: []string{"."}, ban: []string{"./..."},
	allow: []string{"./driver", "./device", "./netplugin", "./gateway", "./internal/cli", "./internal/version"},
	why:   "main chooses the role and calls it; logic in main cannot be tested",
}, {
	in: []string{"./driver/..."}, ban: []string{"./device/...", "./netplugin/...", "./gateway/...", "./client/..."}, why: sockets,
}, {
	in: []string{"./device/..."}, ban: []string{"./driver/...", "./netplugin/...", "./gateway/...", "./client/..."}, why: sockets,
}, {
	in: []string{"./netplugin/..."}, ban: []string{"./driver/...", "./device/...", "./gateway/...", "./client/..."}, why: sockets,
}, {
	in: []string{"./gateway/..."}, ban: []string{"./driver/...", "./device/...", "./netplugin/..."},
	allow: []string{"./netplugin/policy"}, why: sockets + "; the policy grammar is the one contract they share",
}, {
	in: []string{"./client/..."}, ban: []string{"./driver/...", "./device/...", "./netplugin/...", "./gateway/..."},
	allow: []string{"./netplugin/policy"}, why: "the SDK is imported by other people's programs and must stay small",
}, {
	in: []string{"./identity/..."}, ban: []string{"./driver/...", "./device/...", "./netplugin/...", "./gateway/...", "./client/..."},
	why: "every part may import identity, so identity imports none",
}, {
	in: []string{"./internal/..."}, but: []string{"./internal/cli/..."},
	ban: []string{"./driver/...", "./device/...", "./netplugin/...", "./gateway/...", "./client/...", "./identity/..."},
	why: "every part may import these, so they import none",
}, {
	in: []string{"./..."}, but: []string{"./driver", "./device"},
	ban: []string{nomad + "plugins/...", nomad + "drivers/...", nomad + "helper/..."},
	why: "only the two plugin roots speak Nomad's plugin protocol; what lies below them takes plain values and can be tested without it",
}, {
	in: []string{"./..."}, but: []string{"./client/..."}, ban: []string{nomad + "api/..."},
	why: "one package talks to Nomad's API, the rest go through it",
}, {
	in: []string{"./..."}, but: []string{"./driver/internal/runsc/..."}, ban: []string{"gvisor.dev/gvisor/..."}, why: wrapped,
}, {
	in: []string{"./..."}, but: []string{"./driver/internal/image/..."}, ban: []string{"github.com/google/go-containerregistry/..."}, why: wrapped,
}, {
	in: []string{"./..."}, but: []string{"./device/internal/nvml/..."}, ban: []string{"github.com/NVIDIA/..."}, why: wrapped,
}, {
	in: []string{"./..."}, but: []string{"./netplugin/internal/nft/...", "./driver/internal/network/..."}, ban: []string{"github.com/google/nftables/..."}, why: wrapped,
}, {
	in: []string{"./..."}, but: []string{"./netplugin/internal/mesh/..."}, ban: []string{"golang.zx2c4.com/wireguard/..."}, why: wrapped,
}, {
	in: []string{"./..."}, but: []string{"./identity/internal/vault/..."}, ban: []string{"github.com/hashicorp/vault/..."}, why: wrapped,
}, {
	in: []string{"./..."}, but: []string{"./gateway/..."}, ban: []string{mcp}, why: wrapped,
}, {
	in: []string{
		"./driver/internal/runsc/...", "./device/internal/nvml/...", "./netplugin/internal/nft/...",
		"./netplugin/internal/mesh/...", "./identity/internal/vault/...",
	},
	ban: []string{nomad + "...", mcp}, why: "a wrapper knows its own subject only",
}, {
	in: []string{"./netplugin/policy", "./driver/internal/bundle", "./netplugin/internal/agentapi"},
	ban: []string{
		"os", "os/exec", "os/user", "io/ioutil", "net", "net/http/...", "syscall", "golang.org/x/sys/...", "github.com/vishvananda/...",
	},
	why: "this package is pure: same input, same output, so that golden tests and fuzzing cover all of it",
}, {
	in:  []string{"./..."},
	ban: []string{"testing/...", "net/http/httptest", "github.com/stretchr/testify/...", "github.com/shoenig/test/..."},
	why: "test code in a shipped binary costs start-up time and registers flags",
}, {
	in: []string{"./..."}, ban: testOnly, why: "this package is for tests only",
}, {
	in:  []string{"./..."},
	ban: []string{"github.com/pkg/errors", "github.com/hashicorp/go-multierror", "log", "math/rand"},
	why: "use fmt.Errorf with %w, errors.Join, hclog or slog, and math/rand/v2 or crypto/rand",
}}

func TestImports(t *testing.T) {
	t.Parallel()
	for _, p := range loadTree(t) {
		if matchAny(p.path, testOnly) {
			continue
		}
		for _, f := range p.files {
			if f.test {
				continue
			}
			for _, imp := range f.imports() {
				for _, r := range importRules {
					if matchAny(p.path, r.in) && !matchAny(p.path, r.but) && matchAny(imp, r.ban) && !matchAny(imp, r.allow) {
						t.Errorf("%s imports %q: %s", f.path, imp, r.why)
					}
				}
			}
		}
	}
}

// A pure package may hold a time.Duration but must not look at the clock.
func TestPurePackagesReadNoClock(t *testing.T) {
	t.Parallel()
	clock := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}
	for _, p := range loadTree(t) {
		if !matchAny(p.path, []string{"./netplugin/policy", "./driver/internal/bundle", "./netplugin/internal/agentapi"}) {
			continue
		}
		for _, f := range p.files {
			if f.test {
				continue
			}
			ast.Inspect(f.ast, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if x, ok := sel.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clock, sel.Sel.Name) {
					t.Errorf("%s uses time.%s: the package is pure; take the time as an argument", f.pos(n), sel.Sel.Name)
				}
				return true
			})
		}
	}
}

// HashiCorp's programs are under the Business Source License, but carry
// folders under the MPL, marked by a licence file of their own. Only those may
// be imported by what ships. What those folders import in turn is HashiCorp's
// own doing and is logged.
func TestLicences(t *testing.T) {
	t.Parallel()
	importers := map[string]string{}
	for _, p := range loadTree(t) {
		for _, f := range p.files {
			if f.test || matchAny(p.path, testOnly) {
				continue
			}
			for _, imp := range f.imports() {
				if strings.HasPrefix(imp, "github.com/hashicorp/") {
					importers[imp] = f.path
				}
			}
		}
	}
	if len(importers) == 0 {
		return
	}
	const format = "{{with .Module}}{{$.ImportPath}}\t{{$.Dir}}\t{{.Dir}}{{end}}"
	direct := append([]string{"list", "-f", format}, slices.Sorted(maps.Keys(importers))...)
	for line := range strings.Lines(goCmd(t, direct...)) {
		f := strings.Split(strings.TrimSpace(line), "\t")
		if text := nearestLicence(f[1], f[2]); text == "" || strings.Contains(text, "Business Source License") {
			t.Errorf("%s imports %s, which is under the Business Source License or none: it may appear in tests and tools/ only, "+
				"or the binaries could not be used freely", importers[f[0]], f[0])
		}
	}
	var inherited []string
	linked := append([]string{"list", "-deps", "-f", format}, binaries...)
	for line := range strings.Lines(goCmd(t, linked...)) {
		f := strings.Split(strings.TrimSpace(line), "\t")
		if len(f) == 3 && strings.HasPrefix(f[0], "github.com/hashicorp/") &&
			strings.Contains(nearestLicence(f[1], f[2]), "Business Source License") {
			inherited = append(inherited, f[0])
		}
	}
	t.Logf("linked in through HashiCorp's own MPL packages, under the Business Source License: %d packages: %s",
		len(inherited), strings.Join(inherited, " "))
}

// nearestLicence returns the licence file of dir or the nearest folder above
// it, up to top.
func nearestLicence(dir, top string) string {
	for strings.HasPrefix(dir, top) {
		for _, name := range []string{"LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "COPYING"} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
				return string(b)
			}
		}
		dir = filepath.Dir(dir)
	}
	return ""
}

// deps.txt makes a new dependency visible in review: it changes in the same
// commit or the test fails.
func TestDependencyList(t *testing.T) {
	t.Parallel()
	out := goCmd(t, append([]string{"list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}}{{end}}{{end}}"}, binaries...)...)
	mods := strings.Fields(out)
	slices.Sort(mods)
	mods = slices.Compact(mods)
	got := strings.Join(mods, "\n") + "\n"
	if *update {
		if err := os.WriteFile("deps.txt", []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile("deps.txt")
	if err != nil {
		t.Fatal(err)
	}
	if got == string(want) {
		return
	}
	old := strings.Fields(string(want))
	for _, m := range mods {
		if !slices.Contains(old, m) {
			t.Errorf("the binaries now link %s; if that is meant, run make deps and commit deps.txt with the reason", m)
		}
	}
	for _, m := range old {
		if !slices.Contains(mods, m) {
			t.Errorf("the binaries no longer link %s: run make deps and commit deps.txt", m)
		}
	}
}

// No test code is linked in, except what dependencies drag along by
// themselves.
func TestBinariesHoldNoTestCode(t *testing.T) {
	t.Parallel()
	// nomad/plugins/drivers of 1.11.3, the plugin protocol itself, brings
	// these; each imports "testing" in code that is not a test.
	tolerated := []string{
		"github.com/hashicorp/go-plugin",
		"github.com/hashicorp/raft",
		nomad + "ci",
		nomad + "client/allocdir",
		nomad + "testutil",
	}
	out := goCmd(t, append([]string{"list", "-deps", "-f", "{{.ImportPath}} {{.Imports}}"}, binaries...)...)
	for line := range strings.Lines(out) {
		pkg, imports, _ := strings.Cut(line, " ")
		for _, imp := range strings.Fields(strings.Trim(imports, "[]\n")) {
			if slices.Contains([]string{"testing", "net/http/httptest"}, imp) && !slices.Contains(tolerated, pkg) {
				t.Errorf("%s imports %s and is linked into a binary: test code costs start-up time and registers flags", pkg, imp)
			}
		}
	}
}

// srcPkg is one folder of Go files.
type srcPkg struct {
	path  string // "./driver", or "." for the root
	files []*srcFile
}

// onlyTests reports whether the folder holds tests of package name and
// nothing else yet.
func (p *srcPkg) onlyTests(name string) bool {
	return p.files[0].ast.Name.Name == name && !slices.ContainsFunc(p.files, func(f *srcFile) bool { return !f.test })
}

// srcFile is one parsed Go file, whatever its build tags.
type srcFile struct {
	path string
	test bool
	ast  *ast.File
}

func (f *srcFile) pos(n ast.Node) string {
	p := fset.Position(n.Pos())
	return p.Filename + ":" + strconv.Itoa(p.Line)
}

func (f *srcFile) lines() int { return fset.File(f.ast.Pos()).LineCount() }

// imports returns the file's imports, those of this module as "./...".
func (f *srcFile) imports() []string {
	var out []string
	for _, s := range f.ast.Imports {
		p, _ := strconv.Unquote(s.Path.Value)
		if p == module {
			p = "."
		} else if rest, ok := strings.CutPrefix(p, module+"/"); ok {
			p = "./" + rest
		}
		out = append(out, p)
	}
	return out
}

var fset = token.NewFileSet()

// loadTree parses every Go file of the module, once.
func loadTree(t *testing.T) []*srcPkg {
	t.Helper()
	pkgs, err := parsed()
	if err != nil {
		t.Fatal(err)
	}
	return pkgs
}

var parsed = sync.OnceValues(func() ([]*srcPkg, error) {
	byDir := map[string]*srcPkg{}
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && file != "." {
			_, modErr := os.Stat(filepath.Join(file, "go.mod"))
			if modErr == nil || d.Name() == "testdata" || d.Name() == "build" || strings.HasPrefix(d.Name(), ".") {
				return fs.SkipDir
			}
		}
		if !strings.HasSuffix(file, ".go") {
			return nil
		}
		f, err := parser.ParseFile(fset, file, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir := path.Dir(filepath.ToSlash(file))
		if dir != "." {
			dir = "./" + dir
		}
		if byDir[dir] == nil {
			byDir[dir] = &srcPkg{path: dir}
		}
		byDir[dir].files = append(byDir[dir].files, &srcFile{path: file, test: strings.HasSuffix(file, "_test.go"), ast: f})
		return nil
	})
	var pkgs []*srcPkg
	for _, dir := range slices.Sorted(maps.Keys(byDir)) {
		pkgs = append(pkgs, byDir[dir])
	}
	return pkgs, err
})

// matchAny reports whether an import path matches one of the patterns.
func matchAny(imp string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		if prefix, ok := strings.CutSuffix(p, "/..."); ok {
			return imp == prefix || strings.HasPrefix(imp, prefix+"/")
		}
		return imp == p
	})
}

func TestMatchAny(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		imp, pattern string
		want         bool
	}{
		{"./driver", "./driver", true},
		{"./driver/internal/runsc", "./driver", false},
		{"./driver/internal/runsc", "./driver/...", true},
		{"./driver", "./driver/...", true},
		{"./drivers", "./driver/...", false},
		{".", "./...", true},
		{"./gateway", "./...", true},
		{"net", "./...", false},
		{nomad + "api", nomad + "api/...", true},
	} {
		if got := matchAny(tc.imp, []string{tc.pattern}); got != tc.want {
			t.Errorf("matchAny(%q, %q) = %v, want %v", tc.imp, tc.pattern, got, tc.want)
		}
	}
}

// goCmd runs the go command and returns its standard output.
func goCmd(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}
