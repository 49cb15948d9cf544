package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// event is one line of `go test -json` (see `go doc test2json` and, for the
// build-* actions, `go help buildjson`).
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	Elapsed     float64 // seconds; set with pass, fail and skip
	ImportPath  string  // of build-output and build-fail
	FailedBuild string  // with a package's fail: the ImportPath that did not build
}

// report collects events and prints what a reader needs to see of them.
type report struct {
	w        io.Writer
	packages map[string]*pkg
	builds   map[string]*strings.Builder // compiler output by ImportPath

	passed, failed int
	skips, fails   []string // one line each for the end
}

// pkg is a package under test.
type pkg struct {
	output  strings.Builder // of no test
	tests   map[string]*test
	counted int // tests counted so far
	failed  int
}

// test is a test or subtest that has started.
type test struct {
	started time.Time
	output  strings.Builder
	lines   []string // its own messages, for a skip's reason
	subs    bool     // it has subtests
	subFail bool     // and one of them failed
	done    bool
}

func newReport(w io.Writer) *report {
	return &report{w: w, packages: map[string]*pkg{}, builds: map[string]*strings.Builder{}}
}

func (r *report) pkg(name string) *pkg {
	p := r.packages[name]
	if p == nil {
		p = &pkg{tests: map[string]*test{}}
		r.packages[name] = p
	}
	return p
}

// add takes one event in and reports whether it printed something.
func (r *report) add(e event) bool {
	switch e.Action {
	case "build-output":
		b := r.builds[e.ImportPath]
		if b == nil {
			b = &strings.Builder{}
			r.builds[e.ImportPath] = b
		}
		b.WriteString(e.Output)
		return false
	case "build-fail":
		return false // the package's own fail event follows
	}
	p := r.pkg(e.Package)
	if e.Test == "" {
		return r.addPackage(p, e)
	}
	return r.addTest(p, e)
}

func (r *report) addPackage(p *pkg, e event) bool {
	switch e.Action {
	case "output":
		p.output.WriteString(e.Output)
		return false
	case "pass", "fail":
	case "skip": // it has no test files
		delete(r.packages, e.Package)
		return false
	default:
		return false
	}
	if e.Action == "fail" {
		r.endPackage(p, e)
	}
	word := "ok  "
	if e.Action == "fail" {
		word = "FAIL"
	}
	fmt.Fprintf(r.w, "%s  %-60s %4d tests  %6.1f s\n", word, e.Package, p.counted, e.Elapsed)
	delete(r.packages, e.Package)
	return true
}

// endPackage accounts for a failed package: tests that never ended, and a
// failure that no test explains.
func (r *report) endPackage(p *pkg, e event) {
	if b := r.builds[e.FailedBuild]; b != nil {
		r.fail(p, e.Package+" (does not build)", b.String())
		return
	}
	for _, name := range sortedKeys(p.tests) {
		if t := p.tests[name]; !t.done && !t.subs {
			r.fail(p, e.Package+" "+name+" (did not end)", t.output.String())
		}
	}
	if p.failed == 0 {
		r.fail(p, e.Package, p.output.String())
	} else if strings.Contains(p.output.String(), "DATA RACE") || strings.Contains(p.output.String(), "panic:") {
		fmt.Fprint(r.w, p.output.String())
	}
}

func (r *report) addTest(p *pkg, e event) bool {
	t := p.tests[e.Test]
	if t == nil {
		t = &test{started: time.Now()}
		p.tests[e.Test] = t
		for name := parent(e.Test); name != ""; name = parent(name) {
			if up := p.tests[name]; up != nil {
				up.subs = true
			}
		}
	}
	switch e.Action {
	case "output":
		t.output.WriteString(e.Output)
		t.note(e.Output)
		return false
	case "pass", "fail", "skip":
	default:
		return false
	}
	t.done = true
	defer func() { t.output.Reset() }()
	switch {
	case e.Action == "fail":
		for name := parent(e.Test); name != ""; name = parent(name) {
			if up := p.tests[name]; up != nil {
				up.subFail = true
			}
		}
		if t.subFail { // its output is still worth reading, its count is not
			fmt.Fprint(r.w, t.output.String())
			return true
		}
		r.fail(p, e.Package+" "+e.Test, t.output.String())
		return true
	case e.Action == "skip":
		r.skips = append(r.skips, fmt.Sprintf("%s %s: %s", e.Package, e.Test, t.reason()))
		p.counted++
	case !t.subs:
		r.passed++
		p.counted++
	}
	return false
}

// note keeps the lines a test printed itself, without go test's own.
func (t *test) note(line string) {
	s := strings.TrimSpace(line)
	if s == "" || strings.HasPrefix(s, "=== ") || strings.HasPrefix(s, "--- ") || len(t.lines) > 50 {
		return
	}
	t.lines = append(t.lines, s)
}

// reason is the last thing a skipped test said.
func (t *test) reason() string {
	if len(t.lines) == 0 {
		return "no reason given"
	}
	return t.lines[len(t.lines)-1]
}

// fail counts one failure, shows its output and keeps its name for the end.
func (r *report) fail(p *pkg, what, output string) {
	r.failed++
	p.failed++
	p.counted++
	r.fails = append(r.fails, what)
	fmt.Fprintf(r.w, "\nFAIL  %s\n%s\n", what, output)
}

// broken counts a failure of go test itself.
func (r *report) broken(what string) {
	r.failed++
	r.fails = append(r.fails, what)
	fmt.Fprintf(r.w, "\nFAIL  %s\n", what)
}

// stillRunning names the tests that have started and not ended.
func (r *report) stillRunning() {
	var running []string
	for _, name := range sortedKeys(r.packages) {
		p := r.packages[name]
		for _, tn := range sortedKeys(p.tests) {
			if t := p.tests[tn]; !t.done && !t.subs {
				running = append(running, fmt.Sprintf("%s %s (%d s)", name, tn, int(time.Since(t.started).Seconds())))
			}
		}
	}
	switch n := len(running); {
	case n == 0:
		fmt.Fprintln(r.w, "...   building tests")
	case n > 3:
		fmt.Fprintf(r.w, "...   running %s and %d more\n", strings.Join(running[:3], ", "), n-3)
	default:
		fmt.Fprintf(r.w, "...   running %s\n", strings.Join(running, ", "))
	}
}

// finish prints the skips, the names of what failed and the last line. It
// reports whether the run is good.
func (r *report) finish(noSkips bool) bool {
	if len(r.skips) > 0 {
		fmt.Fprintln(r.w, "\nSkipped:")
		for _, s := range r.skips {
			fmt.Fprintln(r.w, "  "+s)
		}
	}
	if len(r.fails) > 0 {
		fmt.Fprintln(r.w, "\nFailed:")
		for _, f := range r.fails {
			fmt.Fprintln(r.w, "  "+f)
		}
	}
	ok := r.failed == 0
	if noSkips && len(r.skips) > 0 {
		ok = false
		fmt.Fprintln(r.w, "\nThis is CI: a skipped test is a failure.")
	}
	if r.failed == 0 && r.passed == 0 {
		ok = false
		fmt.Fprintln(r.w, "\nNo test ran.")
	}
	fmt.Fprintf(r.w, "\n%d passed, %d failed, %d skipped\n", r.passed, r.failed, len(r.skips))
	return ok
}

// parent returns the name of the test that started the subtest name, or "".
func parent(name string) string {
	i := strings.LastIndexByte(name, '/')
	if i < 0 {
		return ""
	}
	return name[:i]
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
