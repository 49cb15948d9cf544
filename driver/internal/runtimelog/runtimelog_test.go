package runtimelog

import (
	"strings"
	"testing"
)

func TestLastError(t *testing.T) {
	for log, want := range map[string]string{
		`{"msg":"first","level":"error"}{"msg":"careful","level":"warning"}{"msg":"the cause","level":"error"}`: "the cause",
		"{\"msg\":\"a\",\"level\":\"error\"}\n{\"msg\":\"b\",\"level\":\"err":                                   "a",
		`{"msg":"b","level":"warning"}`: "",
		"":                              "",
		"not JSON":                      "",
	} {
		if got := LastError(strings.NewReader(log)); got != want {
			t.Errorf("%q: %q, want %q", log, got, want)
		}
	}
}

func FuzzLastError(f *testing.F) {
	f.Add(`{"msg":"a","level":"error"}{"msg":`)
	f.Fuzz(func(_ *testing.T, log string) { LastError(strings.NewReader(log)) })
}
