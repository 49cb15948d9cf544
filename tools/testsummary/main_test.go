package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The events come from the real go test, over a module that has one of every
// kind of result.
func TestReportOfRealRun(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), "go", "test", "-json", "-p", "1", "./...")
	cmd.Dir = "testdata/sample"
	out, err := cmd.Output()
	if err == nil {
		t.Fatal("the sample's go test succeeded, it must fail")
	}
	var b strings.Builder
	r := newReport(&b)
	readEvents(strings.NewReader(string(out)), r)
	if r.finish(false) {
		t.Error("finish reported a good run")
	}
	got := b.String()
	for _, want := range []string{
		"what the failing test said",                        // the whole output
		"FAIL  example.test/sample/mixed TestSubs/bad",      // the subtest
		"FAIL  example.test/sample/mixed TestParentFails",   // and a parent's own failure
		"undefined: undefinedName",                          // the compiler's words
		"FAIL  example.test/sample/broken (does not build)", //
		"the set-up failed",                                 // output of no test
		"panic: on purpose",                                 //
		"  example.test/sample/mixed TestSkip: ",            // the skip
		"needs a GPU",                                       // and its reason
		"FAIL  example.test/sample/panics TestPanics",       //
	} {
		if !strings.Contains(got, want) {
			t.Errorf("report lacks %q", want)
		}
	}
	// Passed: TestPass, two "good" subtests, TestBefore. Failed: TestFail,
	// bad, TestParentFails, broken, exits, TestPanics.
	if want := "\n4 passed, 6 failed, 1 skipped\n"; !strings.HasSuffix(got, want) {
		t.Errorf("report does not end with %q", want)
	}
	if t.Failed() {
		t.Log(got)
	}
}

func TestSkipFailsInCI(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		actions []string
		noSkips bool
		want    bool
	}{
		{"pass", []string{"pass"}, true, true},
		{"skip on a laptop", []string{"pass", "skip"}, false, true},
		{"skip in CI", []string{"pass", "skip"}, true, false},
		{"fail", []string{"pass", "fail"}, false, false},
		{"nothing ran", nil, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := newReport(&strings.Builder{})
			for i, a := range tc.actions {
				name := "Test" + string(rune('A'+i))
				r.add(event{Action: "run", Package: "p", Test: name})
				r.add(event{Action: a, Package: "p", Test: name})
			}
			if got := r.finish(tc.noSkips); got != tc.want {
				t.Errorf("finish(%v) = %v, want %v", tc.noSkips, got, tc.want)
			}
		})
	}
}

func TestSplit(t *testing.T) {
	t.Parallel()
	runs, err := split([]string{"--", "-race", "./a", "--", "./b"})
	if err != nil || len(runs) != 2 || !slices.Equal(runs[0], []string{"-race", "./a"}) || !slices.Equal(runs[1], []string{"./b"}) {
		t.Errorf("split = %q, %v", runs, err)
	}
	for _, bad := range [][]string{nil, {"./a"}} {
		if _, err := split(bad); err == nil {
			t.Errorf("split(%q) has no error", bad)
		}
	}
}
